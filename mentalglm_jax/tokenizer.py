"""GLM's tokenizer and chat format, without remote code: text to token ids, with a mask of what is trained.

Works on a ``tokenizer.json`` (byte-level BPE): that of a GLM-4 checkpoint in Hugging Face layout, or a small one made
by ``train_bpe``. A role token written inside a post stays text: content can never open a turn of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json, write_text

BUILTIN = Path(__file__).parent / "assets" / "tokenizer"
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
ROLES = ("system", "user", "assistant", "observation")
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
        backend.encode_special_tokens = True  # special strings inside a text are text
        self._backend = backend
        self._chat_template = chat_template
        self.pad_id = self.id_of("<|endoftext|>")
        self.user_id = self.id_of("<|user|>")
        self.assistant_id = self.id_of("<|assistant|>")
        self.prefix_ids = (self.id_of("[gMASK]"), self.id_of("<sop>"))
        # Which of the three ends a turn depends on who fine-tuned the model, so all of them stop generation.
        self.eos_ids = (self.pad_id, self.user_id, self.id_of("<|observation|>"))
        self.special_ids = frozenset(i for t in SPECIALS if (i := backend.token_to_id(t)) is not None)

    @classmethod
    def load(cls, directory: str | Path) -> "GlmTokenizer":
        """Reads ``tokenizer.json`` (and ``chat_template.jinja`` where there is one, to be saved along again).

        Raises:
            InputError: the file is missing or damaged, or is not GLM's.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            hint = "a directory with tokenizer.json is needed"
            if (path.parent / "tokenizer.model").is_file():
                hint = "only the old tokenizer.model is there: take tokenizer.json from the checkpoint's -hf repository"
            raise InputError(f"{path}: no such file; {hint}")
        try:
            backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception on malformed JSON
            raise InputError(f"{path}: cannot be read as a tokenizer ({error}); download or build it again") from None
        template = path.with_name("chat_template.jinja")
        text = template.read_text(encoding="utf-8") if template.is_file() else CHAT_TEMPLATE
        return cls(backend, text, str(path))

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

    def turn_ids(self, role: str, content: str) -> list[int]:
        """``<|role|>`` and "\\n" + content, encoded as one string the way the chat template's text is."""
        if role not in ROLES:
            raise InputError(f"unknown role {role!r} in a chat; known: {', '.join(ROLES)}")
        return [self.id_of(f"<|{role}|>"), *self.encode("\n" + content)]

    def prompt_ids(self, user: str, system: str | None = None) -> list[int]:
        """Ids up to and including ``<|assistant|>``; the model goes on with a line break and its answer."""
        head = self.turn_ids("system", system) if system else []
        return [*self.prefix_ids, *head, *self.turn_ids("user", user), self.assistant_id]

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


def _check_chat(messages: Sequence[Mapping[str, str]]) -> None:
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"chat message {number}: role {role!r} is none of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content:
            raise InputError(f"chat message {number} ({role}): is empty; give text or remove the turn")
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
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        max_token_length=max_token_length,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return GlmTokenizer(backend)
