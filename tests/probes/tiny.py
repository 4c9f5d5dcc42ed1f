"""Builders of tiny tokenizers, tiny random GLMs, and rows as `mentalglm generate` writes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

# GLM-4's added tokens, in its order.
SPECIALS = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
SPECIALS += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SPECIALS += ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QUESTION = {"zh": "这个帖子的自杀风险是高还是低？", "en": "Is the suicide risk of this post high or low?"}
LABELS = {
    "zh": {"high": "该用户的自杀风险为高。", "low": "该用户的自杀风险为低。"},
    "en": {"high": "The suicide risk of this user is high.", "low": "The suicide risk of this user is low."},
}
TEMPLATE = {"zh": '考虑以下这个帖子："{}" 问题：{}', "en": 'Consider this post: "{}" Question: {}'}
REASONS = {"zh": " 推理：", "en": " Reasoning: "}
POSTS = (
    ("zh", "昨晚又没睡好，外面下着雨。😭感觉活着没有意义！有时候会想：“是不是睡一觉就好了”", "感觉活着没有意义"),
    ("zh", "今天和朋友吃了饭，心情还可以。", "心情还可以"),
    (
        "en",
        "I fed the dog, it rained. I can't see a way out any more... Work starts at 9.30.",
        "I can't see a way out",
    ),
    ("en", "We had dinner. It was fine", "It was fine"),
)


def boilerplate(language: str) -> str:
    """All that surrounds a post in a prompt and an answer."""
    return f"{TEMPLATE[language]}{QUESTION[language]}{''.join(LABELS[language].values())}{REASONS[language]}"


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GLM's split and special tokens; few merges, so Chinese characters stay cut in pieces."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> GlmForCausalLM:
    """Two layers, width 64, GLM-4's geometry in small: 2 KV heads, half of each head rotated, biases on q, k, v."""
    special = tokenizer.convert_tokens_to_ids
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,  # GLM-4 too has embedding rows without a token
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": special("<|endoftext|>"),
        "eos_token_id": [special(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")],
    }
    torch.manual_seed(seed)
    model = GlmForCausalLM(GlmConfig(**(settings | changes)))
    with torch.no_grad():  # zero at initialisation, which would hide an error in them
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def make_row(
    tokenizer: PreTrainedTokenizerFast,
    index: int,
    language: str,
    post: str,
    cue: str,
    label: str = "high",
    **changes: Any,
) -> dict[str, Any]:
    """A row of generations.jsonl whose explanation quotes ``cue``."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    explanation = f"帖子提到“{cue}”。" if language == "zh" else f'The post says "{cue}".'
    sentence = LABELS[language][label]
    output = f"{sentence}{REASONS[language]}{explanation}"
    prompt = f"[gMASK]<sop><|user|>\n{TEMPLATE[language].format(post, QUESTION[language])}<|assistant|>"
    start = post.find(cue)
    return {
        "id": f"row-{index}",
        "task": "suicide_risk",
        "language": language,
        "post": post,
        "question": QUESTION[language],
        "label": label,
        "explanation": explanation,
        "source": "test",
        "split": "test",
        "cues": [[start, start + len(cue)]],
        "decoys": None,
        "prompt_ids": encode(prompt),
        "output_ids": encode("\n" + output + "<|user|>"),
        "output_text": output,
        "parsed_label": label,
        "parsed_explanation": explanation,
        "parse_status": "ok",
        "candidates": LABELS[language],
        "label_text": sentence,
    } | changes


def save_adapter(model_dir: Path, path: Path) -> None:
    """A LoRA adapter of rank 4 on four kinds of layer, B not zero."""
    names = ["q_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is going away
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    model.save_pretrained(path)
