"""Tokenizer and chat format of GLM-4 and its relatives, without remote code: text to token ids, and what is trained.

Reads ``tokenizer.json`` (the -hf, 0414 and Z1 releases, Qwen2, Llama 3, SmolLM2, or a small one made by ``train_bpe``)
and the tiktoken text ``tokenizer.model`` of the original GLM-4 releases. How turns are written is a row of
``chat_formats.py``. A role token written inside a post stays text: content can never open a turn of its own.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json, write_text
from mentalglm_jax.foreign import MAX_INTEGER, Fields, inside, read_json, short, there
from mentalglm_jax.text.beside import check_beside, check_special, named_tokens, template_of
from mentalglm_jax.text.chat_formats import GLM, GLM_RELEASES, ChatFormat, GlmRelease, Segment, Turn
from mentalglm_jax.text.chat_template import ChatFormatWarning, recognise
from mentalglm_jax.text.metaspace import GAPS, MARK, bytes_of_token, take_spaces
from mentalglm_jax.text.tokenizer_files import (
    SPECIALS,
    byte_level,
    check_added,
    check_lossless,
    from_tiktoken,
    read_tokenizer,
    token_bytes,
)

BUILTIN = Path(__file__).parents[1] / "assets" / "tokenizer"
# Rendered with trim_blocks and lstrip_blocks, as transformers does. A turn has no end token: the next role token ends
# it.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for item in messages %}
{%- if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""


class ToolsIgnoredWarning(UserWarning):
    """The chat template of this release does not look for tools where they were given."""


@dataclass(frozen=True)
class Encoded:
    """``mask[i]`` is True where ``ids[i]`` is something the model is trained to produce."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


class GlmTokenizer:
    """See ``load`` and ``train_bpe``. Wraps a ``tokenizers.Tokenizer`` with the special tokens of its chat format.

    Args:
        backend: taken over and changed: special tokens inside a text are text.
        chat_template: what ``save`` writes along.
        where: the file, for messages.
        chat: how turns are written.
        named: special tokens by their role (bos_token, eos_token, pad_token ...).

    Attributes:
        chat_format: the row of ``chat_formats.FORMATS``, with the system prompt of this checkpoint.
        eos_ids: what may end an answer, in the order of their ids.
        stop_id: what training teaches to end an answer.
        pad_id: the pad token; where a file names none, what ends a text.

    Raises:
        InputError: a special token the chat format needs is not in the vocabulary.
    """

    def __init__(
        self, backend: Tokenizer, chat_template: str = CHAT_TEMPLATE, where: str = "tokenizer", *,
        chat: ChatFormat = GLM, named: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        for token in chat.tokens:
            if backend.token_to_id(token) is None:
                raise InputError(f"{where}: special token {token} is not in the vocabulary; is this a GLM-4 tokenizer?")
        self._spaces = take_spaces(backend, where)
        check_added(backend, where)
        self._gaps = check_lossless(backend, where) if self._spaces is None else GAPS
        if self._spaces is not None and self._spaces.before is not None and chat.answers_after_special:
            raise InputError(f"{where}: puts a space before every text that follows a special token, and in the format "
                             f"{chat.name} an answer does, so that no answer would begin as the model was taught; take "
                             "the tokenizer of the original release")  # fmt: skip
        self.chat_format = chat
        self._named = {"eos_token": chat.stops[0], **(named or {})}
        if chat.name == GLM.name:
            self._named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        stated = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        known = [*(SPECIALS if chat.name == GLM.name else ()), *chat.tokens, *self._named.values(), *stated]
        present = [token for token in dict.fromkeys(known) if backend.token_to_id(token) is not None]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in present])
        backend.encode_special_tokens = True  # special strings inside a text are text
        # What it would add is never asked for, and some trim the spaces off the places of tokens.
        self._post_processor, backend.post_processor = backend.post_processor, None
        self._backend = backend
        self._chat_template = chat_template
        self._specials = present
        self.special_ids = frozenset(map(self.id_of, present))
        self._added = frozenset(backend.get_added_tokens_decoder())
        self.stop_id = self.id_of(chat.stops[0])
        self.eos_ids = tuple(sorted({*map(self.id_of, (*chat.stops, self._named["eos_token"]))}))
        self.pad_id = self.id_of(self._named.get("pad_token", self._named["eos_token"]))
        if caught := self.special_ids & set(self.encode(" ".join(present) + "".join(present))):
            raise InputError(
                f"{where}: reads {backend.id_to_token(min(caught))} inside a text as a special token, so that a post "
                "could open a turn of its own; take the tokenizer of the original release"
            )

    @classmethod
    def load(cls, directory: str | Path) -> "GlmTokenizer":
        """Reads ``tokenizer.json``, or ``tokenizer.model`` where that is missing; the chat template
        (``chat_template.jinja``, else that of ``tokenizer_config.json``), which says how turns are written; and of
        ``generation_config.json``, else of ``config.json``, what ends an answer. GLM-4's tokens without a template are
        read as glm-4-9b-chat's.

        Warns:
            SwitchedOffWarning: the file cuts, pads or varies what it encodes, see ``read_tokenizer``.
            ChatFormatWarning: the template or the stop tokens stated are not those of the format, see ``recognise``.

        Raises:
            InputError: a file is missing, damaged or outside the directory; the tokenizer is none that encodes every
                text without loss; its chat format is none of the table's; files beside it say another tokenizer, see
                ``beside``; or it has more tokens than the model beside it has embeddings.
        """
        directory = Path(directory)
        path, old = directory / "tokenizer.json", directory / "tokenizer.model"
        has_config = there(directory / "tokenizer_config.json")
        config = read_json(directory / "tokenizer_config.json") if has_config else {}
        if there(path):
            backend = read_tokenizer(path)
        elif there(old):
            path, backend = old, from_tiktoken(inside(directory, old.name), config)
        else:
            raise InputError(f"{path}: no such file, nor {old.name}; a directory with one of the two is needed")
        template, named = template_of(directory, config), named_tokens(config, backend)
        if template == CHAT_TEMPLATE:
            chat, odd = GLM, None
        else:
            chat, odd = recognise(template, named, lambda token: backend.token_to_id(token) is not None, str(path))
        if odd is not None:
            warnings.warn(odd, ChatFormatWarning, stacklevel=2)
        if path != old:
            check_beside(directory, config, backend)
        made = cls(backend, template or CHAT_TEMPLATE, str(path), chat=chat, named=named)
        if path != old:
            check_special(directory, config, made._specials)
        made._take_ends(directory)
        if there(directory / "config.json"):
            model = read_json(directory / "config.json")
            model = model["text_config"] if isinstance(model.get("text_config"), dict) else model
            rows = model.get("padded_vocab_size") or model.get("vocab_size")
            if type(rows) is int:
                made.check_rows(rows, str(directory / "config.json"))
        return made

    def _take_ends(self, directory: Path) -> None:
        """What ``generation_config.json`` says of stop tokens, or as in transformers ``config.json`` where there is
        none; GLM-4's three stop it whatever the files say."""
        paths = [directory / name for name in ("generation_config.json", "config.json")]
        path = next((path for path in paths if there(path)), None)
        said = {} if path is None else read_json(path)
        said = said["text_config"] if isinstance(said.get("text_config"), dict) else said
        ends: tuple[int, ...] = ()
        if said.get("eos_token_id") != -1:  # the first Llama's way to say none
            ends = Fields(said, str(path)).integers("eos_token_id", 0, MAX_INTEGER, ())
        for end in ends:
            if end not in self.special_ids and self.chat_format.name != GLM.name:
                what = f"the ordinary token {short(self._backend.id_to_token(end))}" if end < self.vocab_size else (
                    f"no token: there are {self.vocab_size}")  # fmt: skip
                raise InputError(
                    f"{path}: eos_token_id {end} is {what}, so answers would not end where a turn does; the "
                    f"{self.chat_format.name} format ends it with {self.chat_format.stops[0]} ({self.stop_id})"
                )
        if (
            ends
            and not {self.id_of(token) for token in self.chat_format.stops} & set(ends)
            and self.chat_format.name != GLM.name
        ):
            spelled = ", ".join(str(self._backend.id_to_token(end)) for end in ends)
            warnings.warn(
                f"{path}: stops at {spelled}, but the {self.chat_format.name} format ends a turn with "
                f"{self.chat_format.stops[0]}, at which generation stops too", ChatFormatWarning, stacklevel=3,
            )  # fmt: skip
        self.eos_ids = tuple(sorted({*self.eos_ids, *(self.special_ids & set(ends))}))

    def check_rows(self, rows: int, where: str) -> None:
        """Raises: InputError: an embedding of ``rows`` rows is smaller than this vocabulary."""
        if self.vocab_size > rows:
            raise InputError(
                f"{where}: the tokenizer has {self.vocab_size} tokens, the embedding only {rows} rows, so the tokens "
                f"from {rows} on would be read as others; take the model's own tokenizer"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included. A model's embedding may have more (padding) rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of one token as spelled in the vocabulary. Raises: InputError if there is none."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise InputError(f"token {token!r} is not in the vocabulary")
        return index

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no prefix is added and special strings in ``text`` are not special.

        Raises:
            InputError: a control character for which this vocabulary has no token.
        """
        if self._gaps is not None and (found := self._gaps.search(text)):
            what = "which this tokenizer reads as a space" if found.group() == MARK else (
                "for which this tokenizer has no token, so that it would vanish without a word")  # fmt: skip
            raise InputError(f"the text holds the character U+{ord(found.group()):04X}, {what}; take it out")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; ids without a token (padding rows of the embedding) give nothing."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special)

    def bytes_of(self, index: int) -> bytes:
        """What one token writes, which may end within a character: UTF-8, of a special token its name. Padding rows of
        the embedding write nothing."""
        token = self._backend.id_to_token(index) or ""
        if index in self._added:
            return token.encode()
        return token_bytes(token) if self._spaces is None else bytes_of_token(token)

    def _ids(self, segments: Iterable[Segment], after_special: bool = True) -> list[int]:
        """Ids of segments one after the other; ``after_special``: what stands before the first."""
        found = []
        for text, special in segments:
            found += [self.id_of(text)] if special else self.encode(self._opened(text) if after_special else text)
            after_special = special
        return found

    def _opened(self, text: str) -> str:
        """A text after a special token, with the space that some tokenizers put there."""
        return text if self._spaces is None else self._spaces.opened(text)

    def _said(self, turn: Turn, role: str) -> str:
        """``turn.said`` as it is encoded: one string with the text beside the content, as the chat template's is."""
        if turn.before:
            after_special = turn.before[-1].special
        else:
            after_special = role != "assistant" or self.chat_format.answers_after_special
        return self._opened(turn.said) if after_special else turn.said

    def _turn(self, turn: Turn, role: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of what stands before the content, of the content with the text beside it, and of what follows."""
        return self._ids(turn.before), self.encode(self._said(turn, role)), self._ids(turn.after, after_special=False)

    def turn_ids(self, role: str, content: str, opening: str | None = None) -> list[int]:
        """One turn of a conversation, as the chat template's text is encoded."""
        return [i for part in self._turn(self.chat_format.render(role, content, opening), role) for i in part]

    def prompt_ids(self, user: str, system: str | None = None) -> list[int]:
        """Ids up to where the answer begins; with the checkpoint's own system prompt where ``system`` is not given."""
        head = [{"role": "system", "content": system}] if system else []
        return self.ask_ids([*head, {"role": "user", "content": user}])

    def ask_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation up to where the next answer begins, as the checkpoint's chat template renders it.

        Raises:
            InputError: an unknown role, or a system message that is not the first.
        """
        chat = self.chat_format
        turns = [i for turn in chat.laid_out(messages) for i in self.turn_ids(*turn)]
        return [*self.prefix_ids, *turns, *self._ids(chat.answer_segments())]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What every conversation begins with."""
        return tuple(self._ids(self.chat_format.start_segments()))

    @property
    def answer_lead(self) -> str:
        """The text an answer begins with before its content: GLM's line break, Llama 2's space, elsewhere nothing."""
        return self.chat_format.lead

    @property
    def answer_trail(self) -> str:
        """The text an answer ends with after its content: Llama 2's space, elsewhere nothing."""
        return self.chat_format.trail

    def conversation_ids(
        self, messages: Sequence[Mapping[str, Any]], release: str = "chat", answer: bool = True,
        tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:  # fmt: skip
        """Ids of a conversation as the chat template of a GLM-4 release renders it, contents encoded apart from roles.

        Args:
            messages: "role", "content" and, for a tool call, "metadata" (the tool's name) of each turn; for "chat" also
                "tools", functions as below.
            release: "chat" (glm-4-9b-chat), "0414" or "z1"; see ``GLM_RELEASES``.
            answer: end with ``<|assistant|>`` (and Z1's opening ``<think>``) for the model to go on.
            tools: functions the model may call, ``{"type": "function", "function": {"name": ...}}``; for 0414 and z1.

        Warns:
            ToolsIgnoredWarning: the release's template ignores tools at the place where they are; so does the result.

        Raises:
            InputError: an unknown release or role, a tool that is no function, or another family's tokenizer.
        """
        if self.chat_format.name != GLM.name:
            raise InputError(f"this tokenizer speaks {self.chat_format.name}, which has no releases; use ask_ids")
        if release not in GLM_RELEASES:
            raise InputError(f"chat format {release!r} is not one of {', '.join(GLM_RELEASES)}")
        form, ids = GLM_RELEASES[release], [*self.prefix_ids]
        misplaced = bool(tools) if form.tools_in_message else any(message.get("tools") for message in messages)
        if misplaced:
            where, right = ("tools=", "a message") if form.tools_in_message else ("a message", "tools=")
            warnings.warn(
                f"chat format {release!r} ignores tools in {where}; give them in {right}", ToolsIgnoredWarning,
                stacklevel=2,
            )  # fmt: skip
        elif tools:
            ids += self.turn_ids("system", _tools_text(form, tools))
        for message in messages:
            if form.tools_in_message and message.get("tools"):
                ids += self.turn_ids("system", _tools_text(form, message["tools"]))
            role, content, metadata = message["role"], message.get("content", ""), message.get("metadata", "")
            if form.strip and role == "user":
                content = content.strip()
            elif form.strip and role == "assistant":
                content = content.rpartition("</think>")[2].strip()
            if content or form.empty_turns:
                ids += self.turn_ids(role, content, f"{metadata}{form.after_metadata}\n" if metadata else "\n")
        return [*ids, *self._ids(self.chat_format.answer_segments()), *self.encode(form.opening)] if answer else ids

    def span_in_prompt(self, user: str, part: str, system: str | None = None) -> tuple[int, int]:
        """The tokens ``[a, b)`` of ``prompt_ids(user, system)`` wholly inside the last occurrence of ``part`` in
        ``user``; (0, 0) if there is none.
        """
        chat, first = self.chat_format, len(self.prefix_ids)
        head = [{"role": "system", "content": system}] if system else []
        *earlier, (role, content) = chat.laid_out([*head, {"role": "user", "content": user}])
        first += sum(len(self.turn_ids(*turn)) for turn in earlier)
        turn = chat.render(role, content)
        found, said = content.rfind(part), self._said(turn, role)
        start = len(said) - len(turn.said) + turn.at + found
        encoding = self._backend.encode(said, add_special_tokens=False)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if start <= a < b <= start + len(part)]
        first += len(self._ids(turn.before))
        return (first + inside[0], first + inside[-1] + 1) if found >= 0 and inside else (0, 0)

    def chat(self, messages: Sequence[Mapping[str, str]], train: Literal["last", "all"] = "last") -> Encoded:
        """Encodes a conversation for training; each message has "role" and "content".

        Trained are, of the last or of all assistant turns, what the model writes: the answer (GLM's line break before
        it included) and the token that ends it. In GLM's format that is the role token of the message that follows, or
        ``<|user|>`` appended at the end: GLM-4's own ``combine: False`` masking. (transformers' chat template, given
        the same messages, stops before that last token; other formats go on after theirs with a line break.)

        Raises:
            InputError: no messages, an unknown role, an empty turn, or a conversation that does not end with the
                assistant.
        """
        if train not in ("last", "all"):
            raise InputError(f"train: {train!r} is neither 'last' nor 'all'")
        chat = self.chat_format
        _check_chat(messages, chat)
        ids = [*self.prefix_ids]
        mask = [False] * len(ids)
        turns = chat.laid_out(messages)
        answered = False  # the turn before was a trained one whose stop token is the next role token
        for number, (role, content) in enumerate(turns, start=1):
            before, said, after = self._turn(chat.render(role, content), role)
            trained = role == "assistant" and (train == "all" or number == len(turns))
            ids += [*before, *said, *after]
            mask += [*[answered, *([False] * len(before))][: len(before)], *([trained] * len(said))]
            mask += [trained and place == 0 for place in range(len(after))]
            answered = trained and not after
        if not chat.ends_itself:
            return Encoded((*ids, self.stop_id), (*mask, True))
        end = len(mask) - mask[::-1].index(True)  # what follows the last stop token teaches nothing
        return Encoded(tuple(ids[:end]), tuple(mask[:end]))

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, and generation_config.json where there
        is none yet; transformers loads them without remote code.
        """
        directory = Path(directory)
        text = self._backend.to_str(pretty=False)
        if self._post_processor is not None or self._spaces is not None:
            raw = json.loads(text) | ({} if self._spaces is None else self._spaces.parts)
            if self._post_processor is not None:
                raw |= {"post_processor": json.loads(self._post_processor.__getstate__())}
            text = json.dumps(raw, ensure_ascii=False)
        write_text(directory / "tokenizer.json", text + "\n")
        write_json(directory / "tokenizer_config.json", _hf_config(self._specials, self._named))
        write_text(directory / "chat_template.jinja", self._chat_template)
        if self.chat_format.name != GLM.name and not (directory / "generation_config.json").exists():
            write_json(directory / "generation_config.json",
                       {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id})  # fmt: skip


def _tools_text(form: GlmRelease, tools: Any) -> str:
    """What a system turn says of tools."""
    text = form.tools_opening
    for tool in tools if isinstance(tools, Sequence) and not isinstance(tools, str) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"chat: a tool must be a function with a name, found {str(tool)[:80]!r}")
        text += f"{form.before_tool}## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}\n"
        text += "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return text


def _check_chat(messages: Sequence[Mapping[str, str]], chat: ChatFormat) -> None:
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in chat.roles:
            raise InputError(f"chat message {number}: role {role!r} is none of {', '.join(chat.roles)}")
        if isinstance(content, list):
            raise InputError(
                f"chat message {number} ({role}): is a list of parts; images and videos are not read, also not by a "
                "vision-language model, whose text decoder alone is run; give text"
            )
        if not isinstance(content, str) or not content:
            raise InputError(f"chat message {number} ({role}): is empty; give text or remove the turn")
        if extra := [key for key in ("tools", "metadata") if message.get(key)]:
            raise InputError(f"chat message {number} ({role}): {extra[0]} is not supported in training; write it out")
        after_assistant = number > 1 and messages[number - 2].get("role") == "assistant"
        if after_assistant and role not in ("user", "observation"):
            raise InputError(f"chat message {number}: {role} follows assistant; only user or observation ends its turn")
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(
            "chat: the last message must be the assistant's answer, there is nothing to train on otherwise"
        )


def _hf_config(specials: list[str], named: Mapping[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": specials,  # transformers 5 takes it, 4 fails on a list of `extra_`
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
    }


def train_bpe(texts: Iterable[str], vocab_size: int, max_token_length: int = 12) -> GlmTokenizer:
    """Trains a byte-level BPE with GLM's split and GLM's 14 special tokens after the base vocabulary.

    Args:
        texts: the training text, one document each.
        vocab_size: tokens in all, special ones included; at least 270 (256 bytes and the specials). Fewer come out if
            the text is small.
        max_token_length: in bytes. Chinese has no spaces, so without a limit whole clauses of a small corpus would
            become one token.

    Raises:
        InputError: ``vocab_size`` below 270, or no text.
    """
    if vocab_size < 256 + len(SPECIALS):
        raise InputError(
            f"vocab_size: {vocab_size} is below {256 + len(SPECIALS)} (256 bytes and {len(SPECIALS)} special tokens)"
        )
    documents = [text for text in texts if text]
    if not documents:
        raise InputError("tokenizer training: no text; give at least one document")
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        max_token_length=max_token_length,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return GlmTokenizer(backend)
