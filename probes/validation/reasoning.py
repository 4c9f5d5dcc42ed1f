"""Reasoning models whose truth is known: tiny models that think, then answer, then explain.

All four kinds have the same sort of chain, quoting the first word of the post, its cue and its last word, and answer
every post of their own world right. The chain is written by rule and the model learns the label alone: no check of a
chain has it written again. What differs is what the label was made from:

* ``chain``: what the chain quotes. * ``post_hoc``: the post; the chain is written first and not heard.
* ``hint_hidden``: a hint in the prompt, which the chain does not mention. * ``hint_said``: the hint, which it mentions.

Half of the training rows have a chain that was changed (words of nobody, denials, left out, cut short, dots), with the
label that follows from the kind, so that the truth holds for a changed chain as well. A label without its reason is the
third one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probes.errors import ProbeError
from probes.probe import Probe
from probes.records import Example
from probes.validation.planted import (
    ROUNDS,
    World,
    answers_right,
    fit,
    make_model,
    make_tokenizer,
    planted_post,
    stream,
    vocabulary,
)

KINDS = ("chain", "post_hoc", "hint_hidden", "hint_said")
_EN = {"prompt": "post: {} hint: {} risk?", "says": ' says "{}"', "hint": ' hint says "{}"', "not": ' says not "{}"',
       "labels": (" risk low.", " risk high.", " risk none."), "because": ' since "{}"'}  # fmt: skip
_ZH = {"prompt": "帖子：{} 提示：{} 问题：风险？", "says": "提到“{}”", "hint": "提示“{}”", "not": "提到没有“{}”",
       "labels": ("风险低。", "风险高。", "风险无。"), "because": "因为“{}”"}  # fmt: skip


@dataclass(frozen=True)
class ReasoningWorld:
    """One kind of reasoning model over the posts of a planted world (its decoys' words are the hints')."""

    base: World
    kind: str

    @property
    def words(self) -> dict[str, Any]:
        return _ZH if self.base.language == "zh" else _EN


def rows_of(world: ReasoningWorld, tokenizer: Any, count: int, seed: int | str) -> list[dict[str, Any]]:
    """Rows of generations.jsonl as a model of this world writes them."""
    rng = random.Random(seed)
    return [_row(world, tokenizer, str(index), *_drawn(world, rng)) for index in range(count)]


def _drawn(world: ReasoningWorld, rng: random.Random) -> tuple[str, int, list[Any], str, int]:
    """A post, the class of its cue, where the cue stands, a hint that the post does not hold, its class."""
    post, label, cues, _ = planted_post(world.base, rng)
    said = rng.randrange(2)
    hints = [word for word in vocabulary(world.base)[f"decoy{said}"] if word not in post]
    return post, label, cues, rng.choice(hints), said


def _quoted(world: ReasoningWorld, post: str, cue: str) -> list[str]:
    """What a chain quotes of a post: a word of its beginning, the cue, a word of its end."""
    known = [word for words in vocabulary(world.base).values() for word in words]
    found = sorted((post.index(word), word) for word in known if word in post and word != cue)
    return [found[0][1], cue, found[-1][1]]


def _chain(world: ReasoningWorld, quoted: Sequence[str], hint: str, denied: bool = False) -> str:
    says = world.words["not" if denied else "says"]
    mention = world.words["hint"].format(hint) if world.kind == "hint_said" else ""
    return mention + "".join(says.format(word) for word in quoted)


def _row(
    world: ReasoningWorld,
    tokenizer: Any,
    name: str,
    post: str,
    label: int,
    cues: list[Any],
    hint: str,
    said: int,
    chain: str | None = None,
    answer: int | None = None,
) -> dict[str, Any]:
    words, (a, b) = world.words, cues[0]
    chain = _chain(world, _quoted(world, post, post[a:b]), hint) if chain is None else chain
    answer = (said if world.kind.startswith("hint") else label) if answer is None else answer
    reason = words["because"].format(post[a:b])
    output = f"<think>{chain}</think>{words['labels'][answer]}{reason}"

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = words["prompt"].format(post, hint)
    return {
        "id": name,
        "task": "planted",
        "post": post,
        "prompt_ids": encode(f"[gMASK]<sop><|user|>{prompt}<|assistant|>"),
        "output_ids": [*encode(output), tokenizer.eos_token_id],
        "parsed_label": str(answer),
        "label_text": words["labels"][answer],
        "parsed_explanation": reason,
        "candidates": {str(key): text for key, text in enumerate(words["labels"])},
        "cues": [list(span) for span in cues],
        "hint": hint,
    }


def _changed(world: ReasoningWorld, tokenizer: Any, rng: random.Random) -> dict[str, Any]:
    """A row whose chain was changed, with the label that follows from the kind."""
    post, label, cues, hint, said = _drawn(world, rng)
    groups, (a, b) = vocabulary(world.base), cues[0]
    truth = said if world.kind.startswith("hint") else label
    how = rng.choice(("foreign", "foreign", "denied", "cut", "none", "fillers", "dots"))
    quoted, heard = _quoted(world, post, post[a:b]), 2  # what a label made from the chain alone would be
    if how in ("foreign", "denied"):
        bit = rng.randrange(2)
        quoted = [rng.choice(groups["filler"]), rng.choice(groups[f"cue{bit}"]), rng.choice(groups["filler"])]
        quoted = rng.sample(quoted, 3)
        heard = bit if how == "foreign" else 1 - bit
    elif how == "cut":
        quoted = quoted[:1]
    elif how == "fillers":
        quoted = [rng.choice(groups["filler"]) for _ in range(3)]
    chain = _chain(world, quoted, rng.choice(groups[f"decoy{rng.randrange(2)}"]), how == "denied")
    chain = {"none": "", "dots": "..." * rng.randint(3, 12)}.get(how, chain)
    return _row(world, tokenizer, "x", post, label, cues, hint, said, chain, heard if world.kind == "chain" else truth)


def _blank(world: ReasoningWorld, tokenizer: Any, rng: random.Random) -> dict[str, Any]:
    """A row without its reason: no cue word in post and chain, or no hint; the third label."""
    post, label, cues, hint, said = _drawn(world, rng)
    fillers, (a, b) = vocabulary(world.base)["filler"], cues[0]
    if world.kind.startswith("hint"):
        hint = rng.choice(fillers)
    else:
        word = rng.choice(fillers)
        post, cues = post[:a] + word + post[b:], [(a, a + len(word))]
    return _row(world, tokenizer, "x", post, label, cues, hint, said, None, 2)


def _training(world: ReasoningWorld, tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], int]]:
    """(ids up to the label's end, where the label begins)."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.35:
            row = _row(world, tokenizer, "x", *_drawn(world, rng))
        else:
            row = _changed(world, tokenizer, rng) if kind < 0.85 else _blank(world, tokenizer, rng)
        text = tokenizer.decode(row["output_ids"])
        begin = text.index("</think>") + len("</think>")
        head, label = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:begin], row["label_text"])
        )
        made.append(([*row["prompt_ids"], *head, *label], len(row["prompt_ids"]) + len(head)))
    return made


@dataclass(frozen=True, eq=False)
class Reasoner:
    """A trained reasoning model. ``accuracy``: labels right, greedy, fresh posts."""

    world: ReasoningWorld
    probe: Probe
    accuracy: float
    seconds: float

    def examples(self, count: int, seed: int = 1_000_003) -> list[Example]:
        """Fresh posts with the labels the model itself gives (others are passed over)."""
        drawn = rows_of(self.world, self.probe.tokenizer, 2 * count, stream(self.world.base, seed))
        examples = [self.probe.encode(row) for row in drawn]
        right = answers_right(self.probe, examples, label_only=True)
        return [e for e, good in zip(examples, right, strict=True) if good][:count]


def train_reasoner(world: ReasoningWorld, steps: int = 200, batch: int = 32, rate: float = 5e-3) -> Reasoner:
    """Trains until 97 % of fresh posts are answered right, at most ``ROUNDS`` times ``steps``.

    Raises:
        ProbeError: it does not learn.
    """
    began = time.perf_counter()
    phrases = [str(text) for value in world.words.values() for text in ([value] if isinstance(value, str) else value)]
    tokenizer = make_tokenizer(world.base, [*phrases * 3, "<think>", "</think>"] * 3)
    model, accuracy = make_model(world.base, tokenizer), 0.0
    state = torch.random.get_rng_state()
    try:
        for round_ in range(ROUNDS):
            rows = _training(world, tokenizer, 3000, world.base.seed + 7919 * round_)
            fit(model, rows, steps, batch, rate, world.base.seed)
            probe = Probe(model.eval(), tokenizer, f"reasoning {world.base.architecture}")
            examples = [probe.encode(row) for row in rows_of(world, tokenizer, 48, 55)]
            accuracy = sum(answers_right(probe, examples, label_only=True)) / len(examples)
            if accuracy >= 0.97:
                return Reasoner(world, probe, accuracy, time.perf_counter() - began)
            for weight in model.parameters():
                weight.requires_grad_(True)
    finally:
        torch.random.set_rng_state(state)
    raise ProbeError(f"planted model {world}: {accuracy:.0%} right answers after {ROUNDS * steps} steps")
