"""What transformers 4 makes of a directory, in a process of its own.

    python ask_transformers_4.py FOLDER DIR IDS.json OUT.json

FOLDER holds that transformers. Written are its version, logits of IDS, ids of a chat and of a text, a greedy answer,
and what its tokenizer and its loader say.
"""

import json
import sys

TEXT = "I cannot sleep. 睡不着"
CHAT = [{"role": "user", "content": "How are you?"}]


def main(folder: str, directory: str, ids_file: str, out: str) -> None:
    """One directory."""
    import torch

    sys.path.insert(0, folder)
    import transformers

    transformers.logging.set_verbosity_error()
    with open(ids_file, encoding="utf-8") as file:
        ids = json.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model, keys = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    asked = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        said = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=8)
    found = {
        "version": transformers.__version__, "logits": logits.tolist(), "prompt": prompt,
        "answer": said[0, len(prompt) :].tolist(), "plain": tokenizer.encode(TEXT, add_special_tokens=False),
        "stops": model.generation_config.eos_token_id,
        "keys": sorted(key for values in keys.values() for key in values),
    }  # fmt: skip
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:5])
