"""What ``test_fuzz.py`` reads: models, adapters and tokenizers that somebody else made."""

import base64
import contextlib
import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.checkpoints.gguf_files import GgufFile
from mentalglm_jax.checkpoints.gguf_models import ARCHITECTURES, _model
from mentalglm_jax.checkpoints.hf_files import Checkpoint, TensorFiles
from mentalglm_jax.checkpoints.model_card import licence_of
from mentalglm_jax.checkpoints.weights import check_tensors, detect_layout, generation_config, read_config
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import first_line, read_json
from mentalglm_jax.model.glm import abstract_model
from mentalglm_jax.text import chat_template
from mentalglm_jax.text.gguf_vocabulary import Vocabulary
from mentalglm_jax.text.tokenizer import BUILTIN, CHAT_TEMPLATE, GlmTokenizer
from mentalglm_jax.text.tokenizer_files import from_tiktoken, read_tokenizer
from tests.hostile.foreign_files import CONFIG, write_adapter, write_checkpoint
from tests.hostile.fuzzing import (
    Mutator,
    Reader,
    Readers,
    either,
    from_file,
    in_bytes,
    in_header,
    in_values,
)
from tests.hostile.gguf_bytes import entry, small_model
from tests.mentalglm_jax.chat_families import LLAMA, LLAMA_DATED, PLAIN, QWEN, SMOLLM

READERS = Readers()
LANGUAGES = {"glm": CHAT_TEMPLATE, "qwen": QWEN, "smollm": SMOLLM, "yi": PLAIN, "llama": LLAMA, "dated": LLAMA_DATED}
TOKENS = {"glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
          "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
          "qwen": ("<|im_start|>", "<|im_end|>")}  # fmt: skip

# --- checkpoints ---


@READERS.reads("config.json")
def _config(place: Path) -> Reader:
    checkpoint = Checkpoint(write_checkpoint(place))

    def read() -> None:
        checkpoint.config = read_json(place / "config.json")
        config = read_config(checkpoint)
        check_tensors(checkpoint, config, detect_layout(checkpoint.tensors))

    sound = CONFIG.to_dict()
    return Reader(in_values(sound, sound | {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
                  from_file(place / "config.json", read))  # fmt: skip


@READERS.reads("generation_config.json")
def _generation_config(place: Path) -> Reader:
    file = place / "generation_config.json"
    sound = {"eos_token_id": [1, 2], "pad_token_id": 0, "do_sample": True, "temperature": 0.8}
    return Reader(in_values(sound, sound | {"eos_token_id": 1}),
                  from_file(file, lambda: generation_config(CONFIG, read_json(file))))  # fmt: skip


@READERS.reads("model.safetensors")
def _safetensors(place: Path) -> Reader:
    parts = {"a.weight": np.ones((2, 3), np.float32), "b": np.ones(4, ml_dtypes.bfloat16), "c": np.zeros((1, 1, 2))}
    file = place / "model.safetensors"
    save_file(parts, file, {"format": "pt", "rope_theta": "1.0"})
    data = file.read_bytes()
    return Reader(either(in_header(data), in_header(data), in_bytes(data)),
                  from_file(file, lambda: TensorFiles([file])))  # fmt: skip


@READERS.reads("model.safetensors.index.json")
def _index(place: Path) -> Reader:
    write_checkpoint(place, 300_000)
    file = place / "model.safetensors.index.json"
    return Reader(in_values(json.loads(file.read_text())), from_file(file, lambda: Checkpoint(place)))


class Checked(Exception):
    """An adapter passed every check; the arrays that would now be made are not."""


def checked(*_: object) -> None:
    """In place of ``add_lora``."""
    raise Checked


def _adapter(place: Path, name: str) -> Callable[[bytes], object]:
    write_adapter(place)
    model = abstract_model(CONFIG)

    def read() -> None:
        with contextlib.suppress(Checked):
            load_adapter(model, place)

    return from_file(place / name, read)


@READERS.reads("adapter_config.json")
def _adapter_config(place: Path) -> Reader:
    read = _adapter(place, "adapter_config.json")
    sound = json.loads((place / "adapter_config.json").read_text())
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 3}, "exclude_modules": "lm_head"}
    return Reader(in_values(sound, sound | patterns, sound | {"target_modules": ".*[qv]_proj"}), read)


@READERS.reads("adapter_model.safetensors")
def _adapter_model(place: Path) -> Reader:
    read = _adapter(place, "adapter_model.safetensors")
    return Reader(in_header((place / "adapter_model.safetensors").read_bytes()), read)


@READERS.reads("a GGUF file")
def _gguf(place: Path) -> Reader:
    def read() -> None:
        file = GgufFile(place / "m.gguf")
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:  # as ``convert_gguf`` begins
            raise InputError("another architecture")
        _model(file, name, Vocabulary(file.metadata, "m.gguf"))

    data = small_model()
    head = data[: data.rindex(b"output_norm.weight") + 80]
    return Reader(either(in_bytes(data), in_bytes(head + bytes(1 << 14)), _doubled(data)),
                  from_file(place / "m.gguf", read))  # fmt: skip


def _doubled(data: bytes) -> Mutator:
    """With an entry more, of any kind."""

    def damaged(draw: Any) -> bytes:
        kind, name = draw.randrange(14), draw.choice(["llama.x", "general.alignment", "tokenizer.ggml.merges", "", "a"])
        more = entry(name, kind, draw.randbytes(draw.choice([0, 1, 4, 8, 30])))
        count = int.from_bytes(data[16:24], "little") + 1
        return data[:16] + count.to_bytes(8, "little") + more + data[24:]

    return Mutator(data, damaged)


@READERS.reads("a model card")
def _card(place: Path) -> Reader:
    sound = b"---\nlicense: other\nlicense_name: glm-4\nlicense_link: LICENSE\ntags: [a, b]\n---\n# A model\n"
    return Reader(in_bytes(sound, b"\xef\xbb\xbf\n" + sound),
                  from_file(place / "README.md", lambda: (licence_of(place, "org/name"), _count(place))))  # fmt: skip


def _count(place: Path) -> None:
    """A card that cannot be read says nothing of a licence: that is its refusal."""
    if licence_of(place, None) is None:
        raise InputError("no licence")


# --- tokenizers ---


def _smaller(raw: dict[str, Any], merges: int = 40) -> dict[str, Any]:
    """The builtin tokenizer with fewer words, for speed."""
    value = copy.deepcopy(raw)
    value["model"]["merges"] = value["model"]["merges"][:merges]
    words = sorted(value["model"]["vocab"].items(), key=lambda pair: pair[1])[: 256 + merges]
    value["model"]["vocab"] = {word: number for number, (word, _) in enumerate(words)}
    for number, token in enumerate(value["added_tokens"]):
        token["id"] = len(words) + number
    return value


@READERS.reads("tokenizer.json")
def _tokenizer(place: Path) -> Reader:
    file = place / "tokenizer.json"
    sound = _smaller(json.loads((BUILTIN / "tokenizer.json").read_text()), 8)
    bert = {
        "version": "1.0", "truncation": None, "padding": {"strategy": "BatchLongest"}, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##",
                                                                   "cleanup": True},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "##b": 4}},
    }  # fmt: skip

    def read() -> None:
        backend = read_tokenizer(file)
        backend.encode("ab <|user|> 我 " * 20)
        GlmTokenizer(backend, where=str(file)).encode("a <|user|> 我 " * 20)

    def read_bert() -> None:
        read_tokenizer(file).encode("ab <|user|> 我 " * 20)

    glm, other = in_values(sound), in_values(bert)
    turns = itertools.cycle([True, False])
    reader = {True: from_file(file, read), False: from_file(file, read_bert)}
    chosen = [True]

    def damaged(draw: Any) -> bytes:
        chosen[:] = [next(turns)]
        return (glm if chosen[0] else other).damaged(draw)

    return Reader(Mutator(glm.sound, damaged), lambda data: reader[chosen[0]](data))


@READERS.reads("tokenizer_config.json")
def _tokenizer_config(place: Path) -> Reader:
    shutil.copytree(BUILTIN, place, dirs_exist_ok=True)
    (place / "chat_template.jinja").unlink()
    (place / "tokenizer.json").write_text(json.dumps(_smaller(json.loads((place / "tokenizer.json").read_text()))))
    sound = json.loads((BUILTIN / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "x"}]
    return Reader(in_values(sound, sound | {"chat_template": named}, sound | {"chat_template": CHAT_TEMPLATE}),
                  from_file(place / "tokenizer_config.json", lambda: GlmTokenizer.load(place)))  # fmt: skip


@READERS.reads("tokenizer.model")
def _tiktoken(place: Path) -> Reader:
    tokens = [bytes([number]) for number in range(256)] + [b"ab", b"abc", b"  ", "我".encode()]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    file = place / "tokenizer.model"
    return Reader(in_bytes(b"\n".join(lines)), from_file(file, lambda: from_tiktoken(file, {})))


@READERS.reads("chat_template.jinja")
def _chat_template(place: Path) -> Reader:
    texts = list(LANGUAGES.values())

    def read(data: bytes) -> None:
        template, refusal = data.decode("utf-8", "replace"), None
        for tokens in TOKENS.values():  # it is one family's
            try:
                _, odd = chat_template.recognise(template, {"bos_token": tokens[0]}, tokens.__contains__, "t.jinja")
            except InputError as error:
                refusal = error
            else:
                if odd is None:
                    return
                refusal = InputError(odd)
        assert refusal is not None
        raise refusal

    return Reader(in_bytes(*(text.encode() for text in texts)), read)


def rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """In place of a process of its own; ``test_tokenizers.py`` has its bounds."""
    conversations = json.loads(json.dumps(chat_template.PROBES))
    try:
        return tuple(chat_template._render({"template": template, "tokens": dict(tokens),
                                            "conversations": conversations}))  # fmt: skip
    except Exception as error:
        raise InputError(f"its chat template cannot be rendered ({first_line(error)})") from None
