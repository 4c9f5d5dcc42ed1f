"""How each family of models writes a conversation: one table, and what of a row a checkpoint's own template decides.

A row says which tokens frame a turn. A conversation is rendered as segments, special tokens and plain texts; texts are
encoded with special tokens off, so that nothing a post says can open or end a turn. A row is chosen by rendering a few
conversations with the checkpoint's own ``chat_template`` (``chat_template.py``): never by a name.

    glm      GLM-4 (base, -chat, 0414, Z1): a turn has no end token, the next role token ends it
    chatml   Qwen2, Qwen2.5, SmolLM2, Yi, and what else writes <|im_start|>
    llama3   Llama 3, 3.1, 3.2, 3.3
    mistral  Mistral from 7B v0.3 on, Nemo, Ministral: [INST] and [/INST] are special tokens
    inst     Llama 2, Mistral 7B up to v0.2: [INST] and [/INST] are plain letters

What is plain letters a post could write as well. So in ``inst`` a text that holds one of these marks is refused: there
is no rendering of it that is the template's and opens no turn.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mentalglm_jax.errors import InputError

_ROLES = ("system", "user", "assistant")


class Segment(NamedTuple):
    """A piece of a rendered conversation: one special token, or text to be encoded on its own."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Turn:
    """One rendered message. The model writes ``said`` of an assistant's turn (with what ends it, the first of
    ``after``); of other turns, ``said`` is the text that holds the content, from ``at`` on. ``said`` is one text
    without a special token in it: with the content, what stands beside it in plain letters."""

    before: tuple[Segment, ...]
    said: str
    after: tuple[Segment, ...]
    at: int


@dataclass(frozen=True)
class ChatFormat:
    """A row of the table.

    Attributes:
        turn: one message, with ``{role}`` and ``{content}``.
        answer: what stands before an answer: the beginning of an assistant's turn. The rest up to the content is what
            the model writes itself (GLM's line break).
        stops: what may end an answer; the first is what training teaches.
        start: before all turns.
        roles: who may speak.
        assistant: the assistant's message, where it is written otherwise than ``turn``.
        strip: whose content loses the white space around it.
        default_system: what the system says where no system message is given; None: there is no such turn.
        system_head: what stands before a given system message in its turn.
        system_anywhere: a system may speak later, too.
        joined: where the system has no turn of its own, the content of a user's with ``{system}`` and ``{content}``.
        joins: which user's turn that is, the "first" or the "last".
        letters: marks of turns that are no special tokens, so that no text may hold them.
    """

    name: str
    turn: str
    answer: str
    stops: tuple[str, ...]
    start: str = ""
    roles: tuple[str, ...] = _ROLES
    assistant: str | None = None
    strip: tuple[str, ...] = ()
    default_system: str | None = None
    system_head: str = ""
    system_anywhere: bool = False
    joined: str | None = None
    joins: Literal["first", "last"] = "first"
    letters: tuple[str, ...] = ()

    def frame(self, role: str) -> str:
        """One message of ``role``, with ``{content}``."""
        return self.turn.replace("{role}", role) if role != "assistant" or self.assistant is None else self.assistant

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every special token of the format, each once."""
        frames = [self.start, *map(self.frame, self.roles)]
        found = [segment.text for frame in frames for segment in self.segments(frame) if segment.special]
        return tuple(dict.fromkeys([*self.stops, *found]))

    @property
    def lead(self) -> str:
        """The text that the model writes before the content of its answer."""
        return self.frame("assistant").partition("{content}")[0].removeprefix(self.answer)

    @property
    def trail(self) -> str:
        """The text that the model writes after the content, before what ends its turn (Llama 2's space)."""
        after = self.segments(self.frame("assistant").partition("{content}")[2])
        return after[0].text if after and not after[0].special else ""

    @property
    def ends_itself(self) -> bool:
        """Whether a turn has a token that ends it; otherwise that of the next turn does."""
        return any(segment.special for segment in self.segments(self.frame("assistant").partition("{content}")[2]))

    @property
    def answers_after_special(self) -> bool:
        """Whether the token before an answer is a special one."""
        before = self.segments(self.answer) or self.segments(self.frame("user"))
        return before[-1].special

    def segments(self, frame: str) -> list[Segment]:
        """A frame (never a content) cut at its special tokens."""
        parts, found = [part for part in _SPECIAL.split(frame) if part], list[Segment]()
        for part in parts:
            special = _SPECIAL.fullmatch(part) is not None and part not in self.letters
            if found and not special and not found[-1].special:
                found[-1] = Segment(found[-1].text + part)
            else:
                found.append(Segment(part, special))
        return found

    def laid_out(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Role and content of each turn as it is rendered, with the system turn that the format adds or completes, or
        in the user's turn where it has none.

        Raises:
            InputError: a system message that is not the first, where templates differ in what they make of it; turns
                that do not alternate, where templates refuse them; or a text with a mark that a turn begins or ends
                with.
        """
        turns = [(one["role"], one["content"]) for one in messages]
        for _, content in turns:
            if mark := next((one for one in self.letters if one in content), None):
                raise InputError(
                    f"chat: a text holds {mark}, with which this model's own format ({self.name}) marks a turn, in "
                    "plain letters: the text would open or end one; take it out, or write it otherwise"
                )
        if not self.system_anywhere and any(role == "system" for role, _ in turns[1:]):
            raise InputError(f"chat: a system message must be the first message in the {self.name} format")
        if self.joined is not None:
            turns = self._with_system(self.joined, turns)
        turns = [(role, content.strip() if role in self.strip else content) for role, content in turns]
        if self.joined is not None:
            return turns
        if turns and turns[0][0] == "system":
            turns[0] = ("system", self.system_head + turns[0][1])
        elif self.default_system is not None:
            turns.insert(0, ("system", self.default_system))
        return turns

    def _with_system(self, joined: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The system's message in the user's."""
        said = turns[0][1] if turns and turns[0][0] == "system" else None
        turns = turns if said is None else turns[1:]
        if any(role != ("user", "assistant")[place % 2] for place, (role, _) in enumerate(turns)) or not turns:
            raise InputError(f"chat: in the {self.name} format user and assistant take turns, and the user begins")
        if said is not None:
            users = [place for place, (role, _) in enumerate(turns) if role == "user"]
            place = users[0 if self.joins == "first" else -1]
            before, _, after = joined.partition("{content}")
            turns[place] = ("user", before.replace("{system}", said) + turns[place][1] + after)
        return turns

    def render(self, role: str, content: str, opening: str | None = None) -> Turn:
        """One turn of ``laid_out``; ``opening`` takes the place of the text between the role and the content.

        Raises:
            InputError: an unknown role.
        """
        if role not in self.roles:
            raise InputError(f"unknown role {role!r} in a chat; known: {', '.join(self.roles)}")
        head, _, tail = self.frame(role).partition("{content}")
        after = self.segments(tail)
        if role == "assistant":
            before, own = self.segments(self.answer), self.lead
        else:
            before = self.segments(head)
            own = before.pop().text if before and not before[-1].special else ""
        own = own if opening is None else opening
        beside = after.pop(0).text if after and not after[0].special else ""
        return Turn(tuple(before), own + content + beside, tuple(after), len(own))

    def spelled(self, messages: Sequence[Mapping[str, Any]], answer: bool) -> str:
        """The conversation as one text, as a chat template renders it."""
        turns = [self.render(*turn) for turn in self.laid_out(messages)]
        pieces = [(*turn.before, Segment(turn.said), *turn.after) for turn in turns]
        text = self.start + "".join(piece.text for parts in pieces for piece in parts)
        return text + self.answer if answer else text

    def start_segments(self) -> list[Segment]:
        """What stands before all turns."""
        return self.segments(self.start)

    def answer_segments(self) -> list[Segment]:
        """What stands before an answer."""
        return self.segments(self.answer)


FORMATS = (
    ChatFormat(
        "glm", turn="<|{role}|>\n{content}", answer="<|assistant|>", start="[gMASK]<sop>",
        # Which of the three ends a turn depends on who fine-tuned the model, so all of them stop generation.
        stops=("<|user|>", "<|endoftext|>", "<|observation|>"), roles=(*_ROLES, "observation"),
        system_anywhere=True,
    ),
    ChatFormat(
        "chatml", turn="<|im_start|>{role}\n{content}<|im_end|>\n", answer="<|im_start|>assistant\n",
        stops=("<|im_end|>",),
    ),
    ChatFormat(
        "llama3", turn="<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n", stops=("<|eot_id|>",), start="<|begin_of_text|>",
        strip=_ROLES,
    ),
    ChatFormat(
        "mistral", turn="[INST] {content}[/INST]", assistant=" {content}</s>", answer="", stops=("</s>",), start="<s>",
        joined="{system}\n\n{content}", joins="last",
    ),
    ChatFormat(
        "inst", turn="[INST] {content} [/INST]", assistant=" {content}</s>", answer="", stops=("</s>",), start="<s>",
        joined="{system}\n\n{content}", letters=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
)  # fmt: skip
GLM = FORMATS[0]
_SPECIAL = re.compile(r"(<\|[a-z_]+\|>|\[gMASK\]|<sop>|</?s>|\[/?INST\])")

# What a template is asked to render: white space around contents, line breaks, two scripts.
_SYSTEM = {"role": "system", "content": " Sys \n\nteme: 系统。 \n"}
_ASKED = {"role": "user", "content": "\n Eins\n\n 'zwei' 我想。 3 \n"}
_SAID = {"role": "assistant", "content": " Ja {{ x }}.\n\n* eins\n"}
_AGAIN = {"role": "user", "content": "Und?"}
PROBES: tuple[tuple[tuple[Mapping[str, str], ...], bool], ...] = (
    ((_ASKED,), True),
    ((_SYSTEM, _ASKED), True),
    ((_ASKED, _SAID), False),
    ((_SYSTEM, _ASKED, _SAID, _AGAIN), True),
    ((_ASKED, _SAID, _AGAIN, _SAID), False),
)


def fitted(row: ChatFormat, rendered: Sequence[str], bos: str | None) -> ChatFormat | None:
    """``row`` with what the template decides, if it then renders ``PROBES`` letter for letter as the template did; else
    None. That is a beginning, the system's default and head; of Mistral's family, where spaces stand, what is stripped
    and which turn the system joins.

    Args:
        rendered: what the template made of each of ``PROBES``.
        bos: the token that texts of this tokenizer begin with.
    """
    for one in _variants(row, bos):
        found = one if row.joined is not None else _with_system_turn(one, rendered)
        if found is not None and list(rendered) == [found.spelled(messages, answer) for messages, answer in PROBES]:
            return found
    return None


def _variants(row: ChatFormat, bos: str | None) -> Iterator[ChatFormat]:
    """What checkpoints of one row differ in, all of it."""
    if row.joined is None:
        for start in [row.start, bos] if bos and not row.start else [row.start]:
            yield dataclasses.replace(row, start=start)
        return
    blocks = ["{system}\n\n{content}", "<<SYS>>\n{system}\n<</SYS>>\n\n{content}"]
    close = " [/INST]" if row.letters else "[/INST]"
    heads = (("<s>", ""), ("", "<s>"))  # once, or before every user's turn
    places: tuple[Literal["first", "last"], ...] = ("first", "last")
    for (start, again), opening, lead, end, strip, joined, joins in itertools.product(
        heads, ("[INST] ", "[INST]", " [INST] "), (" ", ""), ("</s>", " </s>"), ((), _ROLES, ("assistant",)),
        blocks if row.letters else blocks[:1], places,
    ):  # fmt: skip
        yield dataclasses.replace(
            row, start=start, turn=again + opening + "{content}" + close, assistant=lead + "{content}" + end,
            strip=strip, joined=joined, joins=joins
        )  # fmt: skip


def _with_system_turn(row: ChatFormat, rendered: Sequence[str]) -> ChatFormat | None:
    """``row`` with the system's default and head, as the first two of ``PROBES`` show them."""
    head, _, tail = row.frame("system").partition("{content}")
    asked = dataclasses.replace(row, start="").spelled((_ASKED,), True)
    system = _SYSTEM["content"].strip() if "system" in row.strip else _SYSTEM["content"]
    given = [text.removeprefix(row.start).removesuffix(asked) for text in rendered[:2]]
    inside = [text.removeprefix(head).removesuffix(tail) for text in given]
    if any(f"{head}{said}{tail}" != text for said, text in zip(inside, given, strict=True) if text):
        return None
    default = inside[0] if given[0] else None
    found = dataclasses.replace(row, default_system=default, system_head=inside[1].removesuffix(system))
    added = (found.default_system or "") + found.system_head
    return None if any(token in added for token in found.tokens) else found


@dataclass(frozen=True)
class GlmRelease:
    """Where the chat templates of GLM-4's releases differ for the same messages: empty turns, metadata, tools."""

    opening: str = ""  # what follows <|assistant|> when the model is to answer
    after_metadata: str = ""  # between a message's metadata and the line break
    empty_turns: bool = True  # whether a message without content is rendered
    strip: bool = False  # user text is stripped, and an answer loses its <think>...</think> once it is history
    tools_in_message: bool = False  # tools stand in a message, not beside the messages; the other place is ignored
    tools_opening: str = "# 可用工具"
    before_tool: str = "\n"


_ANSWERS = "开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
GLM_RELEASES = {
    "chat": GlmRelease(  # glm-4-9b-chat, -chat-1m
        empty_turns=False, tools_in_message=True,
        tools_opening="你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型" + _ANSWERS,
    ),
    "0414": GlmRelease(after_metadata=" ", before_tool="\n\n"),  # GLM-4-0414
    "z1": GlmRelease(  # GLM-Z1-0414
        opening="\n<think>", strip=True,
        tools_opening="你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型" + _ANSWERS,
    ),
}  # fmt: skip
