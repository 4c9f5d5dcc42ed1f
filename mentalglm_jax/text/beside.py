"""The files beside a ``tokenizer.json``, as transformers reads them: chat template, named tokens, and what changes ids.

transformers adds to the tokens of ``tokenizer.json`` whatever these files name, and for some values of
``tokenizer_class`` it takes the vocabulary alone and splits texts by rules of that class. A post would then be other
ids there than here, without a word. So what these files say must be what ``tokenizer.json`` says, or it is refused.
"""

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import inside, read_json, read_text, short, there
from mentalglm_jax.text.tokenizer_files import QWEN_SPLIT, TEKKEN_SPLIT, TRIMMING

MAX_TEMPLATE_BYTES = 1 << 20
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_OLDEST = "the list"  # what added_tokens.json is: tokens and ids, without flags
_LISTS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
# Model types whose tokenizer transformers takes as the file says, whatever the class; and the one for which it never
# does.
_AS_STATED, _QWEN = ("glm", "glm4", "glm4v", "mistral"), "qwen2"
# Classes of transformers 5 that split by rules of their own, without those for which the rules are compared here.
_OWN_RULES = frozenset(
    f"{name}Tokenizer"
    for name in ("Bart", "Blenderbot", "Clip", "CLIP", "CodeGen", "CodeLlama", "Cohere", "Deberta", "Esmc", "Gemma",
                 "GPTNeoX", "Herbert", "LayoutLMv3", "LED", "Longformer", "Luke", "MarkupLM", "MVP", "Nllb", "Nougat",
                 "OpenAIGPT", "Qwen3_5", "Reformer", "Roberta", "SeamlessM4T", "Siglip2", "Tipsv2", "Whisper")
)  # fmt: skip


# Those among ours that transformers builds anew from the vocabulary, adding the tokens that the other files list.
_REBUILT = ("Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer")


class TokenizerClassWarning(UserWarning):
    """transformers reads the spaces of this tokenizer otherwise than the file says, and than it did before."""


def template_of(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a directory; ``config`` is its tokenizer_config.json.

    Raises:
        InputError: two of them are the default one.
    """
    if there(other := directory / "additional_chat_templates" / "default.jinja"):
        raise InputError(f"{other}: is a second default template, which transformers takes; delete one of them")
    path = directory / "chat_template.jinja"
    if there(path):
        return read_text(inside(directory, path.name), MAX_TEMPLATE_BYTES)
    stated = config.get("chat_template")
    if isinstance(stated, list):  # several by name, as transformers once wrote them; of one name it takes the last
        stated = {str(one.get("name")): one.get("template") for one in stated if isinstance(one, dict)}
    if isinstance(stated, dict):
        stated = stated.get("default")
    return stated if isinstance(stated, str) and stated.strip() else None


def named_tokens(config: Mapping[str, Any], backend: Tokenizer) -> dict[str, str]:
    """Special tokens by their role, those that are in the vocabulary."""
    found = {name: _content(config.get(name)) for name in _ROLES}
    return {name: token for name, token in found.items() if token and backend.token_to_id(token) is not None}


def check_beside(directory: Path, config: Mapping[str, Any], backend: Tokenizer) -> None:
    """Refuses a directory whose other files say another tokenizer than its ``tokenizer.json``.

    Args:
        config: its tokenizer_config.json, or nothing.
        backend: its tokenizer.json, unchanged.

    Raises:
        InputError: they name a token that the file does not have as a token of its own, or with spaces taken off beside
            it; they ask for another file, or for role tokens as letters; or the class splits texts by other rules.

    Warns:
        TokenizerClassWarning: of Llama 2's class transformers 5 puts spaces before texts otherwise.
    """
    where = directory / "tokenizer_config.json"
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    told = _told(directory, config)
    for path, said in told:
        for key, stated in _claims(said):
            token = _content(stated)
            if not token:
                continue
            if token not in added:
                raise InputError(f"{path}: {key} names the token {short(token)}, which is none of the added_tokens of "
                                 "tokenizer.json: transformers would add it and read posts as other tokens; take both "
                                 "files of the original release")  # fmt: skip
            flags = stated if isinstance(stated, dict) and key == "added_tokens_decoder" else {}
            if more := [flag for flag in TRIMMING if flags.get(flag) and not getattr(added[token], flag)]:
                raise InputError(f"{path}: {key} has {more[0]} for {short(token)}, which tokenizer.json has not; take "
                                 "both files of the original release")  # fmt: skip
        if said.get("split_special_tokens"):
            raise InputError(f"{path}: split_special_tokens has transformers write the marks of a turn in letters; "
                             "delete that key")  # fmt: skip
    names = config.get("fast_tokenizer_files") or []
    if others := [name for name in (names if isinstance(names, list) else [names]) if name != "tokenizer.json"]:
        raise InputError(f"{where}: fast_tokenizer_files names {short(others[0])}, which some programs would read in "
                         "place of tokenizer.json; delete that key")  # fmt: skip
    _check_class(directory, {key: value for _, said in told for key, value in said.items()}, backend)


def check_special(directory: Path, config: Mapping[str, Any], special: Collection[str]) -> None:
    """Refuses a directory whose other files make more tokens special than are ``special`` here: transformers leaves
    those out of an answer's text.

    Raises:
        InputError: naming the file, the key and the token.
    """
    for path, said in _told(directory, config):
        for key, stated in _claims(said):
            flagged = key not in ("added_tokens_decoder", _OLDEST) or _flagged(stated)
            if (token := _content(stated)) and flagged and token not in special:
                raise InputError(f"{path}: {key} makes {short(token)} a special token, so transformers leaves it out "
                                 "of answers; tokenizer.json does not; take both files of the original release"
                                 )  # fmt: skip


def _told(directory: Path, config: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """The files that name tokens, and what they say. transformers reads the older ones only where the newer one lists
    no tokens."""
    told: list[tuple[Path, Mapping[str, Any]]] = [(directory / "tokenizer_config.json", config)]
    if "added_tokens_decoder" not in config:
        older, oldest = directory / "special_tokens_map.json", directory / "added_tokens.json"
        told += [(older, read_json(older))] if there(older) else []
        told += [(oldest, {_OLDEST: [*read_json(oldest)]})] if there(oldest) else []
    return told


def _flagged(stated: Any) -> bool:
    return isinstance(stated, dict) and bool(stated.get("special"))


def _claims(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every token that a file names, as text or as an object, with its key."""
    for key, value in said.items():
        if key in (*_LISTS, _OLDEST, "added_tokens_decoder"):
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            yield from ((key, one) for one in values)
        elif key.endswith("_token") and isinstance(value, str | dict):
            yield key, value


def _content(stated: Any) -> str | None:
    token = stated.get("content") if isinstance(stated, dict) else stated
    return token if isinstance(token, str) else None


def _check_class(directory: Path, said: Mapping[str, Any], backend: Tokenizer) -> None:
    """Raises: InputError: transformers' class for this tokenizer splits a text by other rules than the file's."""
    where = directory / "tokenizer_config.json"
    model = read_json(directory / "config.json") if there(directory / "config.json") else {}
    kind, stated = model.get("model_type"), said.get("tokenizer_class") or model.get("tokenizer_class")
    raw = json.loads(backend.to_str())
    steps, normal = _steps(raw.get("pre_tokenizer"), "pretokenizers"), _steps(raw.get("normalizer"), "normalizers")
    split = steps[0].get("pattern", {}).get("Regex") if steps and steps[0].get("type") == "Split" else None
    if said.get("fix_mistral_regex") and kind == "mistral" and steps and split != TEKKEN_SPLIT:
        raise InputError(f"{where}: fix_mistral_regex has transformers split by another expression than tokenizer.json "
                         "has; delete that key, or take the tokenizer.json of the original release")  # fmt: skip
    if kind in _AS_STATED or not isinstance(stated, str | None):
        return
    name = "Qwen2Tokenizer" if kind == _QWEN else (stated or "").removesuffix("Fast")
    if name in _REBUILT:
        _check_ids(directory, said, backend, name)
    last = steps[-1] if steps else {}
    by_bytes = last.get("type") == "ByteLevel" and not raw["model"].get("ignore_merges")
    if name == "Qwen2Tokenizer":
        same = by_bytes and split == QWEN_SPLIT and len(steps) == 2 and [one.get("type") for one in normal] == ["NFC"]
    elif name == "GPT2Tokenizer":
        same = by_bytes and bool(last.get("use_regex")) and not normal
        same = same and (len(steps) == 1 or not _joins_digits(raw["model"].get("vocab") or {}))
    else:
        same = name not in _OWN_RULES
        if name == "LlamaTokenizer" and raw["model"].get("byte_fallback"):
            _warn_of_spaces(where, said, last)
    if not same or (name in ("Qwen2Tokenizer", "GPT2Tokenizer") and said.get("add_prefix_space")):
        because = f"model_type {kind}" if kind == _QWEN else f"tokenizer_class {short(stated)}"
        raise InputError(f"{where}: for {because} transformers splits texts by rules of {name}, which are not those of "
                         "tokenizer.json; take both files of the original release")  # fmt: skip


def _check_ids(directory: Path, said: Mapping[str, Any], backend: Tokenizer, name: str) -> None:
    """Raises: InputError: a list of added tokens has not all of tokenizer.json's, or has them under other ids."""
    tokens = backend.get_added_tokens_decoder()
    own = {number: token.content for number, token in tokens.items()}
    where, stated = directory / "tokenizer_config.json", said.get("added_tokens_decoder")
    listed = None
    if isinstance(stated, dict):
        listed = {int(key) if key.isdecimal() else key: _content(one) for key, one in stated.items()}
        special = {_content(one) for key, one in _claims(said) if key != "added_tokens_decoder" or _flagged(one)}
        stated_plain = {*listed.values()} - special
        if plain := [token.content for token in tokens.values() if token.special and token.content in stated_plain]:
            raise InputError(f"{where}: added_tokens_decoder says {short(plain[0])} is no special token, so {name} of "
                             "transformers writes it into answers; tokenizer.json says it is one; take both files of "
                             "the original release")  # fmt: skip
    elif "added_tokens_decoder" not in said and there(oldest := directory / "added_tokens.json"):
        where, listed = oldest, {number: token for token, number in read_json(oldest).items()}
        own = {number: token for number, token in own.items() if token in listed.values()}
    if listed is not None and listed != own:
        odd = next((number for number in sorted(own) if listed.get(number) != own[number]), None)
        what = (
            "more tokens than" if odd is None else f"{short(listed.get(odd))} as token {odd}, not {short(own[odd])} of"
        )
        raise InputError(f"{where}: lists {what} tokenizer.json; {name} of transformers takes its tokens from this "
                         "list, so posts would be other ids there; take both files of the original release"
                         )  # fmt: skip


def _warn_of_spaces(where: Path, said: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """``last`` is the pre_tokenizer of the file: Metaspace, or none where a normalizer puts the spaces."""
    theirs = "never" if said.get("add_prefix_space") is False else "always" if said.get("legacy") else "first"
    ours = last.get("prepend_scheme") if last.get("type") == "Metaspace" else "by a normalizer"
    if theirs != ours and not {theirs, ours} <= {"first", "never"}:  # a conversation begins with a special token
        warnings.warn(
            f"{where}: for tokenizer_class {short(said.get('tokenizer_class'))} transformers 5 puts a space before "
            f"texts by its own rule ({theirs}), not as tokenizer.json says, which is used here; with "
            "PreTrainedTokenizerFast there it reads the file, too", TokenizerClassWarning, stacklevel=4,
        )  # fmt: skip


def _joins_digits(vocabulary: Mapping[str, Any]) -> bool:
    """Whether a token holds a digit and more: only then it matters that digits are cut apart first."""
    return any(len(token) > 1 and any(digit in token for digit in "0123456789") for token in vocabulary)


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part[key] if part.get("type") == "Sequence" else [part]
