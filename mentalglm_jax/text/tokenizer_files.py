"""The files that tokenizers come in, read as what strangers wrote: ``tokenizer.json`` and the tiktoken text.

The library that encodes is told nothing that could make it cut, pad, vary, wait or fall over: what a file says of that
is switched off with a warning, and parts that tokenizers of GLM and its relatives, BERT and BART are not made of are
refused by name.
"""

import base64
import binascii
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import (
    Fields,
    first_line,
    inside,
    parse_json,
    read_bytes,
    read_text,
    short,
)
from mentalglm_jax.text.metaspace import EXACT

# GLM-4's special tokens in GLM-4's order (ids 151329.. in the published vocabulary).
SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
# The split of GLM-4 (the same as cl100k): contractions, words, up to three digits, punctuation, white space.
SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
QWEN_SPLIT = SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # Qwen2 and Qwen2.5: digit by digit
# Mistral's Tekken: a word ends before a capital that follows small letters.
_LETTERS = r"\p{Lm}\p{Lo}\p{M}"
TEKKEN_SPLIT = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]*[\p{{Ll}}{_LETTERS}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]+[\p{{Ll}}{_LETTERS}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Splits that were published with models, each matched in time linear in the text: GLM-4 and Llama 3 (cl100k), Qwen2,
# Mistral Nemo, GPT-2. The library matches by backtracking, so an unknown expression could take for ever on one post.
KNOWN_SPLITS = frozenset(
    {
        SPLIT,
        QWEN_SPLIT,
        TEKKEN_SPLIT,
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
MAX_TOKEN_BYTES = 256
TRIMMING = ("lstrip", "rstrip", "single_word")  # flags of an added token by which a text around it is read otherwise
# The parts a tokenizer may have, by their place in the file. Replace, Prepend and the like can multiply a text, so only
# those that write a space as ▁ are taken (``EXACT``); Precompiled and FixedLength fall over on damaged data.
_PARTS = {
    "model": {"BPE", "WordPiece", "WordLevel"},
    "normalizer": {"Sequence", "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace",
                   "Strip", "StripAccents"},
    "pre_tokenizer": {"Sequence", "BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split",
                      "Whitespace", "WhitespaceSplit"},
    "post_processor": {"Sequence", "BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    "decoder": {"Sequence", "BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Replace", "Strip", "WordPiece"},
}  # fmt: skip
_ONCE = tuple([{"id": "A", "type_id": number}] for number in (0, 1))


# Bytes without which every letter can be written: control characters (of which texts have only three, tab, line feed
# and carriage return), those that UTF-8 does not use, and the first of planes that are empty.
_IN_NO_LETTER = {*range(32), 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {9, 10, 13}


class SwitchedOffWarning(UserWarning):
    """A tokenizer file would have cut, padded or varied every text; it does not, here."""


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, with truncation, padding and dropout off.

    transformers leaves the first two in the file after one ordinary call, and then every post is cut to 8 tokens, or
    padded to 300.

    Warns:
        SwitchedOffWarning: they were on.

    Raises:
        InputError: outside its directory, not a file, not strict JSON; parts, patterns or ids that are not those of a
            byte-level (GLM, Llama 3, Qwen2, SmolLM2), SentencePiece BPE (Llama 2, Mistral), BERT or BART tokenizer; or
            whatever else the library cannot read.
    """
    inside(path.parent, path.name)
    hint = "download or build it again"
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a tokenizer ({error.strerror}); {hint}") from None
    raw = parse_json(text, f"{path}: cannot be read as a tokenizer", hint)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: cannot be read as a tokenizer (no JSON object); {hint}")
    for place in _PARTS:
        _check_part(path, place, raw.get(place))
    _check_vocabulary(path, raw)
    off = [name for name in ("truncation", "padding") if raw.get(name) is not None]
    raw |= dict.fromkeys(off)
    if raw["model"].get("dropout"):
        off.append("dropout")
        raw["model"] = raw["model"] | {"dropout": None}
    if off:
        warnings.warn(f"{path}: {' and '.join(off)} switched off; texts are encoded whole", SwitchedOffWarning,
                      stacklevel=3)  # fmt: skip
        text = json.dumps(raw, ensure_ascii=False)
    try:
        backend = Tokenizer.from_str(text)
        added = raw.get("added_tokens") or ()
        lost = [one for one in added if backend.token_to_id(one["content"]) != one["id"]]
        backend.decode(backend.encode("a 我\n\U0001f642", add_special_tokens=False).ids)
    except BaseException as error:  # bare Exception, and what pyo3 makes of a panic, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: cannot be read as a tokenizer ({first_line(error)}); {hint}") from None
    if lost:
        raise InputError(f"{path}: added token {short(lost[0]['content'])} cannot have the id {lost[0]['id']}; {hint}")
    return backend


def _check_part(path: Path, place: str, part: Any) -> None:
    """One part of the file, and the parts of a sequence."""
    if part is None and place != "model":
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None and place == "model" and isinstance(part, dict):
        kind = "BPE" if "merges" in part else "WordLevel"  # files of early versions do not say
    if not isinstance(kind, str) or kind not in _PARTS[place]:
        raise InputError(
            f"{path}: {place} {short(kind)} is not a part of a byte-level, BERT or BART tokenizer; known: "
            f"{', '.join(sorted(_PARTS[place]))}"
        )
    assert isinstance(part, dict)
    if kind == "Sequence":
        key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(
            place, "processors"
        )
        parts = part.get(key)
        if not isinstance(parts, list) or len(parts) > 20:
            raise InputError(f"{path}: {place}.{key} must be a list of at most 20 parts")
        for one in parts:
            _check_part(path, place, one)
    bounded = kind in ("Prepend", "Replace") or (kind == "Strip" and place == "decoder")
    if bounded and part not in EXACT.get(place, ()):
        raise InputError(f"{path}: {place} {kind} does something else than to write spaces as ▁ and back, and could "
                         "change any text; use the tokenizer of the original release")  # fmt: skip
    if kind == "TemplateProcessing":  # we never use it, but other programs write texts by it when it was exported
        single = part.get("single")
        pieces = single if isinstance(single, list) and len(single) <= 20 else []
        if [one["Sequence"] for one in pieces if isinstance(one, dict) and "Sequence" in one] not in _ONCE:
            raise InputError(f"{path}: {place}.single does not hold the text once: other programs would leave it out "
                             "or write it twice; use the tokenizer of the original release")  # fmt: skip
    if kind == "Split":
        expression = part.get("pattern")
        expression = expression.get("Regex") if isinstance(expression, dict) else None
        if not isinstance(expression, str) or expression not in KNOWN_SPLITS:
            raise InputError(
                f"{path}: {place} splits by {short(part.get('pattern'))}, which is none of the published patterns; an "
                "unknown one may never end on some post. Use the tokenizer of the original release"
            )


def _check_vocabulary(path: Path, raw: Mapping[str, Any]) -> None:
    """Ids count from 0 without a gap: what is beyond the embedding would be read as another token without a word."""
    model = Fields(raw["model"], f"{path}: model")
    vocabulary = model.mapping("vocab")
    model.number("dropout", 0.0, 1.0, None)
    for key, most in (("continuing_subword_prefix", 8), ("end_of_word_suffix", 8), ("unk_token", 200)):
        model.text(key, None, most)
    # With the first the library panics; the second transformers passes over where it rebuilds a tokenizer.
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if raw["model"].get("type", "BPE") == "BPE" and raw["model"].get(key):
            raise InputError(f"{path}: model.{key} is not supported for BPE")
    model.integer("max_input_chars_per_word", 0, 10_000, None)
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"] for token in added
    ):
        raise InputError(f"{path}: added_tokens must be a list of tokens with their content")
    ids = [*vocabulary.values(), *(token.get("id") for token in added if token["content"] not in vocabulary)]
    if not all(type(one) is int for one in ids) or sorted(ids) != list(range(len(ids))):
        raise InputError(f"{path}: the ids of vocab and added_tokens must be 0 to {len(ids) - 1}, each once")


def check_lossless(backend: Tokenizer, where: str) -> re.Pattern[str] | None:
    """Whether every text becomes tokens byte by byte, as the tokenizers of GLM and its relatives do it, and comes back
    as it was.

    A file may hold parts that are sound and take letters, spaces or case away; a post would then be another one
    without a word. A split that keeps "<|", the role and "|>" apart is also what keeps a post from opening a turn.
    Qwen2's NFC is let pass: it writes the same letters in one of two ways that Unicode calls the same. So are missing
    bytes of which no letter is made (SmolLM2's vocabulary has 235 of the 256).

    Returns:
        the characters that have no token all the same, as a regular expression: control characters, and code points
        that Unicode has not assigned. None: there are none.

    Raises:
        InputError: a part that changes the text, or a letter without a token.
    """

    def parts(one: Any, key: str) -> list[dict[str, Any]]:
        found = json.loads(one.__getstate__()) if one is not None else {}
        return found.get(key, [found]) if found else []

    hint = "take the tokenizer of the original release"
    splits = parts(backend.pre_tokenizer, "pretokenizers")
    normalizers = [part.get("type") for part in parts(backend.normalizer, "normalizers")]
    if any(kind != "NFC" for kind in normalizers) or not _keeps_all(splits):
        shown = ", ".join(str(part.get("type")) for part in splits) or "none"
        raise InputError(f"{where}: does not split a text as GLM's tokenizer does, by the known expression and then in "
                         f"bytes (normalizer {'present' if normalizers else 'none'}, pre_tokenizer {shown}), so a post "
                         f"could lose letters; {hint}")  # fmt: skip
    if [part.get("type") for part in parts(backend.decoder, "decoders")] != ["ByteLevel"]:
        raise InputError(
            f"{where}: its decoder is not ByteLevel, so that answers would come out in byte letters; {hint}"
        )
    missing = {byte for byte, letter in enumerate(_byte_letters()) if backend.token_to_id(letter) is None}
    if lost := len(missing - _IN_NO_LETTER):
        raise InputError(
            f"{where}: {lost} of the 256 bytes have no token, so that letters of a post would vanish; {hint}"
        )
    controls = "".join(rf"\x{byte:02x}" for byte in sorted(missing) if byte < 32)
    planes = "\U00040000-\U0007ffff" * (0xF1 in missing) + "\U00080000-\U000bffff" * (0xF2 in missing)
    return re.compile(f"[{controls}{planes}]") if controls or planes else None


def check_added(backend: Tokenizer, where: str) -> None:
    """Raises: InputError: an added token takes spaces away, or is none where a word stands beside it."""
    for token in backend.get_added_tokens_decoder().values():
        if found := [flag for flag in TRIMMING if getattr(token, flag)]:
            what = "is read as letters beside a word" if found == ["single_word"] else "takes the spaces beside it away"
            raise InputError(f"{where}: added token {short(token.content)} {what}; take the tokenizer of the original "
                             "release")  # fmt: skip


def _keeps_all(splits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these steps cut a text without changing it, the last of them in bytes: GLM, Llama 3 and Qwen2 split by
    an expression of their own, SmolLM2 cuts digits apart, and it and GPT-2 leave the rest to ByteLevel's expression."""
    *first, last = splits or [{}]
    kinds = [part.get("type") for part in first]
    plain = last.get("type") == "ByteLevel" and last.get("add_prefix_space") is False
    by_expression = kinds == ["Split"] and first[0].get("behavior") == "Isolated" and first[0].get("invert") is False
    return plain and (by_expression if last.get("use_regex") is False else kinds in ([], ["Digits"]))


def byte_level(model: models.BPE) -> Tokenizer:
    """GLM's way from text to the bytes that ``model`` joins, and back."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def from_tiktoken(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """A tiktoken text (``base64(token) rank`` a line) as byte-level BPE, with the special tokens ``config`` places.

    tiktoken joins the two neighbours whose joint is the token of lowest rank. As merge rules that is: every way to cut
    a token into two tokens, in the order of the tokens' ranks.

    Raises:
        InputError: a line is malformed, ranks have gaps or repeat, bytes are missing, or special tokens stand elsewhere
            than after the ranks.
    """
    ranks = _ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        if len(cuts) > 1:
            cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(spelled[a], spelled[b]) for a, b in cuts]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    backend = byte_level(models.BPE(vocab, merges, ignore_merges=True))
    added = _placed_specials(path, config, len(ranks))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return backend


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    data = read_bytes(path)
    if data[:1] == b"\n" and data[2:3] == b"\n" and b"\x15" in data[:300]:  # a list of pieces, each with its score
        raise InputError(
            f"{path}: is a SentencePiece model, which is not read by itself; make a tokenizer.json of it with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), DIR being this directory"
        )
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        encoded, _, rank = line.strip().partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not token or not re.fullmatch(rb"[0-9]{1,9}", rank):
            raise InputError(f"{path}: line {number} is not 'base64 rank'; download it again")
        if len(token) > MAX_TOKEN_BYTES:  # the ways to cut one grow with its square
            raise InputError(f"{path}: line {number} holds a token of {len(token)} bytes; GLM-4's longest has 128")
        if token in ranks or int(rank) != len(ranks):
            raise InputError(f"{path}: line {number} repeats a token or leaves out a rank; download it again")
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"{path}: {len(missing)} of the 256 bytes have no token; download it again")
    return ranks


def _placed_specials(path: Path, config: Mapping[str, Any], first: int) -> Sequence[str]:
    """The special tokens in the order of their ids, which must follow the ranks without a gap."""
    stated = config.get("added_tokens_decoder")
    if not stated:
        return SPECIALS
    try:
        placed = sorted((int(index), token["content"]) for index, token in stated.items())
        good = all(isinstance(token, str) and token for _, token in placed)
    except (AttributeError, KeyError, TypeError, ValueError):
        placed, good = [], False
    if not good or [index for index, _ in placed] != list(range(first, first + len(placed))):
        raise InputError(
            f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder must place tokens at {first}, "
            f"{first + 1}, ... after those of {path.name}"
        )
    return [token for _, token in placed]


def token_bytes(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for."""
    return bytes(_LETTER_BYTES[letter] for letter in token)


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself if printable, else one from 256 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_LETTER_BYTES = {letter: byte for byte, letter in enumerate(_byte_letters())}
