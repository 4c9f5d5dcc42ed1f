"""The tokenizer that a GGUF file carries, as the ``tokenizer.json`` it came from.

Byte-level BPE (``gpt2``) is exact: the file has tokens, merges and the name of the split. A SentencePiece vocabulary
(``llama``) is refused: its rules stand in llama.cpp's code, not in the file, and letters would be lost in ours.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json, write_text
from mentalglm_jax.foreign import Fields, first_line, short
from mentalglm_jax.text.tokenizer_files import QWEN_SPLIT, SPLIT, check_lossless

_KEY = "tokenizer.ggml."
_MOST = 1_000_000  # tokens
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5  # kinds of tokens; 1 is an ordinary one
# Name of the split: its expression (None: ByteLevel's own, GPT-2's), NFC first, digits apart, words without merges.
_SPLITS: dict[str, tuple[str | None, bool, bool, bool]] = {
    "qwen2": (QWEN_SPLIT, True, False, False),
    "llama-bpe": (SPLIT, False, False, True),
    "llama3": (SPLIT, False, False, True),
    "glm4": (SPLIT, False, False, False),
    "chatglm-bpe": (SPLIT, False, False, False),
    "smollm": (None, False, True, False),
    "gpt-2": (None, False, False, False),
}
_BEGUN = ("llama-bpe", "llama3")  # to llama.cpp texts begin with the first token where the file is silent
# Tokens at which llama.cpp ends an answer whatever the keys say (its ``llama_vocab::impl::load``).
_ENDING = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
                     "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<|fim_pad|>",
                     "<|fim_repo|>", "<|file_sep|>"})  # fmt: skip
# Words of a template stand between spaces; "$A" in it is the text, and what follows a colon its kind.
_NOT_ITSELF = re.compile(r"^\$|[\s:]")


class Vocabulary:
    """The tokenizer of a GGUF file's metadata.

    Attributes:
        special_ids: bos_token_id, eos_token_id, pad_token_id, as far as the file has them.
        chat_template: the model's, if any.

    Raises:
        InputError: another kind of tokenizer, lists that do not belong together, or a text that would not come back.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str):
        stated = {key.removeprefix(_KEY): value for key, value in metadata.items() if key.startswith(_KEY)}
        read = Fields(stated, f"{where}: {_KEY}*")
        kind = read.text("model", most=100)
        if kind != "gpt2":
            raise InputError(
                f"{where}: a tokenizer of the kind {short(kind)}; only byte-level BPE (gpt2) can be read exactly. Take "
                "the Hugging Face files of this model"
            )
        split = read.text("pre", "absent", 100)
        if split not in _SPLITS:
            raise InputError(f"{where}: its tokenizer splits by {short(split)}; known: {', '.join(_SPLITS)}")
        tokens, merges = read.texts("tokens", most=_MOST), read.texts("merges", most=2 * _MOST)
        kinds = stated.get("token_type")
        kinds = np.ones(len(tokens), np.int32) if kinds is None else kinds
        if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != len(tokens):
            raise InputError(f"{where}: {_KEY}token_type must give each of the {len(tokens)} tokens its kind")
        while tokens and kinds[len(tokens) - 1] == _UNUSED:  # rows that fill the embedding up
            tokens.pop()
        if not tokens or len(set(tokens)) != len(tokens) or "" in tokens:
            raise InputError(f"{where}: {_KEY}tokens must be texts, each once")
        self._tokens, self._where = tokens, where
        self._context = next((v for k, v in metadata.items() if k.endswith(".context_length") and type(v) is int), None)
        self.backend = self._built(split, merges)
        added = [
            AddedToken(text, special=kind != _USER, normalized=False)
            for text, kind in zip(tokens, kinds.tolist(), strict=False)
            if kind in (_UNKNOWN, _CONTROL, _USER)
        ]
        self.backend.add_tokens(added)
        self.special_ids = self._special_ids(read)
        if read.flag("add_eos_token", False) or read.flag("add_sep_token", False):
            raise InputError(f"{where}: ends every text with a token ({_KEY}add_eos_token or add_sep_token), which "
                             "prompts of this package never do")  # fmt: skip
        if read.flag("add_bos_token", split in _BEGUN) and "bos_token_id" in self.special_ids:
            bos = self.special_ids["bos_token_id"]
            if _NOT_ITSELF.search(tokens[bos]):  # "$A" would write every text twice
                raise InputError(f"{where}: begins a text with the token {short(tokens[bos])}, which the template of "
                                 "tokenizer.json would take for something else")  # fmt: skip
            self.backend.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B",
                special_tokens=[(tokens[bos], bos)],
            )  # fmt: skip
        stops = [read.integer(f"{key}_token_id", 0, len(tokens) - 1, None) for key in ("eos", "eot", "eom")]
        stops += [place for place, token in enumerate(tokens) if token in _ENDING]
        self._ends = dict.fromkeys(one for one in stops if one is not None)
        self.chat_template = Fields(metadata, where).text("tokenizer.chat_template", None)
        check_lossless(self.backend, where)

    def __len__(self) -> int:
        return len(self._tokens)

    def _built(self, split: str, merges: list[str]) -> Tokenizer:
        expression, nfc, digits, whole = _SPLITS[split]
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if wrong := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
            raise InputError(f"{self._where}: {_KEY}merges holds {short(wrong)}, which is not two tokens")
        try:
            places = {token: place for place, token in enumerate(self._tokens)}
            backend = Tokenizer(models.BPE(places, pairs, ignore_merges=whole))  # type: ignore[arg-type]
        except BaseException as error:  # bare Exception, and what pyo3 makes of a panic, which is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{self._where}: its tokenizer cannot be built ({first_line(error)})") from None
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        if expression is not None:
            first = [pre_tokenizers.Split(Regex(expression), behavior="isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
        backend.normalizer = normalizers.NFC() if nfc else None
        backend.decoder = decoders.ByteLevel()
        return backend

    def _special_ids(self, read: Fields) -> dict[str, int]:
        keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        places = {name: read.integer(key, 0, len(self._tokens) - 1, None) for name, key in keys.items()}
        return {name: place for name, place in places.items() if place is not None}

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=False) + "\n")
        named = {key.removesuffix("_id"): self._tokens[place] for key, place in self.special_ids.items()}
        write_json(directory / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **({"model_max_length": self._context} if self._context else {}),
        })  # fmt: skip
        if self.chat_template is not None:
            write_text(directory / "chat_template.jinja", self.chat_template)
        generation = dict(self.special_ids)
        if self._ends:
            generation["eos_token_id"] = [*self._ends]  # type: ignore[assignment]
        write_json(directory / "generation_config.json", generation)
