"""GLM's tokenizer and chat format, without remote code: text to token ids, with a mask of what is trained.

Reads both published forms: ``tokenizer.json`` (the -hf, 0414 and Z1 releases, or a small one made by ``train_bpe``) and
the tiktoken text ``tokenizer.model`` of the original releases. A role token written inside a post stays text: content
can never open a turn of its own.
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
from mentalglm_jax.foreign import inside, read_json, read_text
from mentalglm_jax.text.tokenizer_files import SPECIALS, byte_level, check_lossless, from_tiktoken, read_tokenizer

BUILTIN = Path(__file__).parents[1] / "assets" / "tokenizer"
MAX_CONFIG_BYTES = 4 << 20  # tokenizer_config.json repeats the special tokens
MAX_TEMPLATE_BYTES = 1 << 20
ROLES = ("system", "user", "assistant", "observation")
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


@dataclass(frozen=True)
class ChatFormat:
    """Where the chat templates of the releases differ for the same messages."""

    opening: str = ""  # what follows <|assistant|> when the model is to answer
    after_metadata: str = ""  # between a message's metadata and the line break
    empty_turns: bool = True  # whether a message without content is rendered
    strip: bool = False  # user text is stripped, and an answer loses its <think>...</think> once it is history
    tools_in_message: bool = False  # tools stand in a message, not beside the messages; the other place is ignored
    tools_opening: str = "# 可用工具"
    before_tool: str = "\n"


_ANSWERS = "开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
CHAT_FORMATS = {
    "chat": ChatFormat(  # glm-4-9b-chat, -chat-1m
        empty_turns=False, tools_in_message=True,
        tools_opening="你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型" + _ANSWERS,
    ),
    "0414": ChatFormat(after_metadata=" ", before_tool="\n\n"),  # GLM-4-0414
    "z1": ChatFormat(  # GLM-Z1-0414
        opening="\n<think>", strip=True,
        tools_opening="你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型" + _ANSWERS,
    ),
}  # fmt: skip


class ToolsIgnoredWarning(UserWarning):
    """The chat template of this release does not look for tools where they were given."""


@dataclass(frozen=True)
class Encoded:
    """``mask[i]`` is True where ``ids[i]`` is something the model is trained to produce."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


class GlmTokenizer:
    """See ``load`` and ``train_bpe``. Wraps a ``tokenizers.Tokenizer`` that holds GLM's special tokens.

    Raises:
        InputError: a special token the chat format needs is not in the vocabulary.
    """

    def __init__(self, backend: Tokenizer, chat_template: str = CHAT_TEMPLATE, where: str = "tokenizer") -> None:
        for token in ("<|endoftext|>", "[gMASK]", "<sop>", *(f"<|{role}|>" for role in ROLES)):
            if backend.token_to_id(token) is None:
                raise InputError(f"{where}: special token {token} is not in the vocabulary; is this a GLM-4 tokenizer?")
        check_lossless(backend, where)
        present = [token for token in SPECIALS if backend.token_to_id(token) is not None]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in present])
        backend.encode_special_tokens = True  # special strings inside a text are text
        self._backend = backend
        self._chat_template = chat_template
        self.pad_id = self.id_of("<|endoftext|>")
        self.user_id = self.id_of("<|user|>")
        self.assistant_id = self.id_of("<|assistant|>")
        self.prefix_ids = (self.id_of("[gMASK]"), self.id_of("<sop>"))
        # Which of the three ends a turn depends on who fine-tuned the model, so all of them stop generation.
        self.eos_ids = (self.pad_id, self.user_id, self.id_of("<|observation|>"))
        self.special_ids = frozenset(map(self.id_of, present))
        if caught := self.special_ids & set(self.encode(" ".join(present) + "".join(present))):
            raise InputError(
                f"{where}: reads {backend.id_to_token(min(caught))} inside a text as a special token, so that a post "
                "could open a turn of its own; take the tokenizer of the original release"
            )

    @classmethod
    def load(cls, directory: str | Path) -> "GlmTokenizer":
        """Reads ``tokenizer.json``, or ``tokenizer.model`` where that is missing, and the chat template to be saved
        along again (``chat_template.jinja``, else that of ``tokenizer_config.json``, else glm-4-9b-chat's).

        Warns:
            SwitchedOffWarning: the file cuts, pads or varies what it encodes, see ``read_tokenizer``.

        Raises:
            InputError: a file is missing, damaged or outside the directory, or is not GLM's.
        """
        directory = Path(directory)
        path, old = directory / "tokenizer.json", directory / "tokenizer.model"
        has_config = (directory / "tokenizer_config.json").exists()
        config = read_json(directory / "tokenizer_config.json", MAX_CONFIG_BYTES) if has_config else {}
        if path.exists() or path.is_symlink():
            backend = read_tokenizer(path)
        elif old.exists():
            path, backend = old, from_tiktoken(inside(directory, old.name), config)
        else:
            raise InputError(f"{path}: no such file, nor {old.name}; a directory with one of the two is needed")
        template = directory / "chat_template.jinja"
        if template.exists():
            text = read_text(inside(directory, template.name), MAX_TEMPLATE_BYTES)
        else:
            text = config.get("chat_template")
        return cls(backend, text if isinstance(text, str) else CHAT_TEMPLATE, str(path))

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
        """Token ids of plain text; no prefix is added and special strings in ``text`` are not special."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; ids without a token (padding rows of the embedding) give nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def turn_ids(self, role: str, content: str, metadata: str = "") -> list[int]:
        """``<|role|>`` and metadata + "\\n" + content, encoded as one string the way the chat template's text is."""
        if role not in ROLES:
            raise InputError(f"unknown role {role!r} in a chat; known: {', '.join(ROLES)}")
        return [self.id_of(f"<|{role}|>"), *self.encode(f"{metadata}\n{content}")]

    def prompt_ids(self, user: str, system: str | None = None) -> list[int]:
        """Ids up to and including ``<|assistant|>``; the model goes on with a line break and its answer."""
        head = [{"role": "system", "content": system}] if system else []
        return self.conversation_ids([*head, {"role": "user", "content": user}], "0414")

    def conversation_ids(
        self, messages: Sequence[Mapping[str, Any]], release: str = "chat", answer: bool = True,
        tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:  # fmt: skip
        """Ids of a conversation as the chat template of a release renders it, its contents encoded apart from roles.

        Args:
            messages: "role", "content" and, for a tool call, "metadata" (the tool's name) of each turn; for "chat" also
                "tools", functions as below.
            release: "chat" (glm-4-9b-chat), "0414" or "z1"; see ``CHAT_FORMATS``.
            answer: end with ``<|assistant|>`` (and Z1's opening ``<think>``) for the model to go on.
            tools: functions the model may call, ``{"type": "function", "function": {"name": ...}}``; for 0414 and z1.

        Warns:
            ToolsIgnoredWarning: the release's template ignores tools at the place where they are; so does the result.

        Raises:
            InputError: an unknown release or role, or a tool that is no function.
        """
        if release not in CHAT_FORMATS:
            raise InputError(f"chat format {release!r} is not one of {', '.join(CHAT_FORMATS)}")
        form, ids = CHAT_FORMATS[release], [*self.prefix_ids]
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
                ids += self.turn_ids(role, content, metadata + form.after_metadata if metadata else "")
        return [*ids, self.assistant_id, *self.encode(form.opening)] if answer else ids

    def span_in_prompt(self, user: str, part: str) -> tuple[int, int]:
        """The tokens ``[a, b)`` of ``prompt_ids(user)`` wholly inside the last occurrence of ``part`` in ``user``.

        (0, 0) if there is none.
        """
        start = user.rfind(part) + 1  # the line break that opens the turn
        encoding = self._backend.encode("\n" + user, add_special_tokens=False)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if start <= a < b <= start + len(part)]
        first = len(self.prefix_ids) + 1
        return (first + inside[0], first + inside[-1] + 1) if start and inside else (0, 0)

    def chat(self, messages: Sequence[Mapping[str, str]], train: Literal["last", "all"] = "last") -> Encoded:
        """Encodes a conversation for training; each message has "role" and "content".

        Trained are, of the last or of all assistant turns, the line break, the answer and the token that ends it: the
        role token of the message that follows, or ``<|user|>`` appended at the end. This is GLM-4's own ``combine:
        False`` masking. (transformers' chat template, given the same messages, stops before that last token.)

        Raises:
            InputError: no messages, an unknown role, an empty turn, or a conversation that does not end with the
            assistant.
        """
        if train not in ("last", "all"):
            raise InputError(f"train: {train!r} is neither 'last' nor 'all'")
        _check_chat(messages)
        ids, mask = [*self.prefix_ids], [False, False]
        answered = False  # the turn before was a trained one: its stop token is the next role token
        for number, message in enumerate(messages):
            turn = self.turn_ids(message["role"], message["content"])
            trained = message["role"] == "assistant" and (train == "all" or number == len(messages) - 1)
            ids += turn
            mask += [answered, *([trained] * (len(turn) - 1))]
            answered = trained
        return Encoded((*ids, self.user_id), (*mask, True))

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; transformers loads them without remote
        code.
        """
        directory = Path(directory)
        write_text(directory / "tokenizer.json", self._backend.to_str(pretty=False) + "\n")
        write_json(
            directory / "tokenizer_config.json",
            _hf_config([t for t in SPECIALS if self._backend.token_to_id(t) is not None]),
        )
        write_text(directory / "chat_template.jinja", self._chat_template)


def _tools_text(form: ChatFormat, tools: Any) -> str:
    """What a system turn says of tools."""
    text = form.tools_opening
    for tool in tools if isinstance(tools, Sequence) and not isinstance(tools, str) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"chat: a tool must be a function with a name, found {str(tool)[:80]!r}")
        text += f"{form.before_tool}## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}\n"
        text += "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return text


def _check_chat(messages: Sequence[Mapping[str, str]]) -> None:
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"chat message {number}: role {role!r} is none of {', '.join(ROLES)}")
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


def _hf_config(specials: list[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": specials,
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
