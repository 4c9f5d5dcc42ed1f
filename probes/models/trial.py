"""Is the model that is scored the model that answered? Tried on a row before it is scored, and on each longer one.

The engine hands a model embeddings instead of ids, hides tokens by the attention mask, packs several continuations in
one sequence and asks for gradients. Each is tried against a plain call of the model on the ids, in nats of log-odds:
a model that does not pack is scored one sequence at a time ever after; where its own answer is not what we score, or
what is hidden still matters, it is refused by name, before the first post.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from probes.errors import ProbeInputError
from probes.models.pack import token_logprobs
from probes.records import Example

# ``probes.models.score`` calls this module, so its classes are told by name only: a scorer is its ``Scorer``, a forward
# its ``Forward``.
Scorer = Any
Forward = Any

# Nats that two ways to compute the same score may differ by: the log-odds of a label, and log p of every ``STRETCH``
# tokens of an explanation, wherever they stand. Half of ``SMALLEST_CHANGE``, below which a change counts as none, in
# half precision; in fp32 ten times the rounding of 50 tokens.
BOUND = {torch.float64: 1e-3, torch.float32: 1e-3}
HALF_BOUND = 0.05
# The same with the prefix kept and without: one computation in two orders, so nothing but rounding may be between them;
# relative to the larger of the number and 1. Gradients relative to their norm, over all post tokens.
KEPT_BOUND = {torch.float64: 1e-5, torch.float32: 1e-5}
_GRADIENT, _HALF_GRADIENT = 1e-3, 0.25
# About a label's sentence or a cited phrase, which is scored alone. A bound for the whole explanation would forbid
# rounding (which adds up over a long one), one for its mean would forgive a place that is wrong among many that are
# right: what a window too short does.
STRETCH = 10


@dataclass(frozen=True)
class Trial:
    """What a model may be spared, and how far what was tried is apart.

    Attributes:
        packs: several continuations in one sequence.
        unkept: why what stands before the post is run in every pass; empty where it is run once and kept.
        gaps: nats between two ways to one number, by name.
        bound: what they may be, in nats.
        kept_bound: the same for "prefix kept", relative to the larger of the number and 1, and never above ``bound``.
        tokens: of the longest row that every pass runs; prefix_bytes: what is kept of its prefix.
        token_bytes: memory of a pass with gradient, per token that it runs: what is saved for it, and the logits twice
            more, for their softmax and its gradient.
    """

    packs: bool
    unkept: str
    gaps: Mapping[str, float]
    bound: float
    kept_bound: float
    tokens: int
    prefix_bytes: int
    token_bytes: float

    def worse(self, other: Trial) -> Trial:
        """What holds for the rows of both."""
        gaps = {name: max(self.gaps.get(name, 0.0), gap) for name, gap in other.gaps.items()}
        return dataclasses.replace(
            self,
            packs=self.packs and other.packs,
            unkept=self.unkept or other.unkept,
            gaps={**self.gaps, **gaps},
            tokens=max(self.tokens, other.tokens),
            prefix_bytes=max(self.prefix_bytes, other.prefix_bytes),
            token_bytes=max(self.token_bytes, other.token_bytes),
        )


def told(trial: Trial, memory: Mapping[str, int]) -> str:
    """One line: how a model is scored, how sure that is, and what it takes (``Scorer.memory``)."""
    gaps = ", ".join(f"{name} {gap:.1g}" for name, gap in trial.gaps.items() if math.isfinite(gap))
    how = "all labels in one sequence" if trial.packs else "one sequence at a time"
    prefix = f"run every time ({trial.unkept})" if trial.unkept else "run once"
    sizes = ", ".join(f"{name} {memory[name] / 2**30:.2f} GiB" for name in ("weights", "prefix", "batch"))
    return (
        f"scored {how}, what stands before the post {prefix}; nats from a plain call of the model: {gaps} (allowed: "
        f"{trial.bound:g}); batches of {memory['rows']} rows of {memory['tokens']} tokens; memory: {sizes}"
    )


def try_model(scorer: Scorer, make: Callable[[bool, bool], Forward]) -> Trial:
    """Tries a model on one row.

    Args:
        make: packed or not, prefix kept or not -> the score function of the row's label and ``stretches``, as far as it
            has them.
    Raises:
        ProbeInputError: the class of the model, and which number is not what it should be.
    """
    bound = BOUND.get(scorer.probe.dtype, HALF_BOUND)
    kept_bound = KEPT_BOUND.get(scorer.probe.dtype, HALF_BOUND)
    single = make(False, False)
    said = _numbers(single, _guarded(scorer, "be called on token ids", lambda: _plain(scorer, single)))
    gaps = {"what follows exchanged": _looks_ahead(scorer, single, bound)}
    keep = torch.ones(2, len(single.post), dtype=torch.bool, device=single.post.device)
    keep[1, :-1:2] = False  # never the last: it may end the prompt, and then cannot be hidden
    with torch.no_grad():
        whole = _guarded(scorer, "be scored from embeddings", lambda: single.groups(single.post[None], None))
    gap = float((_numbers(single, whole) - said).abs().max())
    if not gap <= bound:
        raise _refusal(
            scorer, f"log-odds from embeddings and from token ids differ by {gap:.2g} nats: it looks at the ids as well"
        )
    gaps["embeddings"] = gap
    hidden, gaps["hidden tokens exchanged"] = _hidden(scorer, single, keep, bound)
    wanted = _numbers(single, torch.cat([whole, hidden]))
    packed = make(True, False)
    packs = len(packed.plans) == len(single.plans)
    if not packs:
        gaps["packed"] = _gap(packed, keep, wanted)
        packs = gaps["packed"] <= bound
    base = packed if packs else single
    slope = _gradient(scorer, base)
    kept = _try_prefix(lambda: make(packs, True), keep, wanted, slope, kept_bound)
    gaps["prefix kept"] = kept.gap
    size = (
        (kept.tokens, kept.prefix_bytes, kept.token_bytes)
        if kept.tokens
        else (base.tokens, 0, slope.bytes / base.tokens)
    )
    return Trial(packs, kept.reason, gaps, bound, kept_bound, *size)


def _gap(forward: Forward, keep: torch.Tensor, wanted: torch.Tensor) -> float:
    """Nats between the numbers of ``forward`` and what they should be; infinite where the model's own code fails."""
    try:
        with torch.no_grad():
            found = _numbers(forward, forward.groups(forward.post[None], keep))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # its own mask code, whatever that raises for a 4-D mask
        return math.inf
    return float((found - wanted).abs().nan_to_num(math.inf).max())


class _Kept(NamedTuple):
    """How scoring with the prefix kept went: why not (empty: it can be), nats from scoring without; where it can be,
    ``Trial``'s sizes."""

    reason: str
    gap: float
    tokens: int = 0
    prefix_bytes: int = 0
    token_bytes: float = 0.0


def _try_prefix(
    make: Callable[[], Forward], keep: torch.Tensor, wanted: torch.Tensor, slope: _Slope, bound: float
) -> _Kept:
    try:
        kept = make()
        if kept.prefix is None:
            return _Kept("", 0.0)
        gap = _gap(kept, keep, wanted)
        found = _slope(kept, slope.scale)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a cache of another kind, or the model's own code
        return _Kept(_reason(error), math.inf)
    if not gap <= min(bound * max(1.0, float(wanted.abs().max())), BOUND.get(kept.scorer.probe.dtype, HALF_BOUND)):
        return _Kept(f"log-odds with the prefix kept and without differ by {gap:.2g} nats", gap)
    apart = float((found.gradient - slope.gradient).norm() / slope.gradient.norm())
    if not apart <= (_GRADIENT if bound < HALF_BOUND else _HALF_GRADIENT):
        return _Kept(f"gradients with the prefix kept and without differ by {apart:.1%}", gap)
    return _Kept("", gap, kept.tokens, kept.prefix.size, found.bytes / kept.tokens)


def stretches(example: Example) -> list[str]:
    """The explanation as targets of about ``STRETCH`` tokens each; none without an explanation."""
    segment = example.segment("explanation")
    if segment is None:
        return []
    (begin, end), (first, last) = segment.char, segment.tok
    starts = (example.byte_spans[at][0] for at in range(first + STRETCH, last, STRETCH))
    cuts = sorted({begin, end, *(bisect.bisect_left(example.char_bytes, start) for start in starts)})
    ends = [cut - begin for cut in cuts if begin <= cut <= end]
    return [f"explanation[{a}:{b}]" for a, b in itertools.pairwise(ends)]


def _plain(scorer: Scorer, forward: Forward) -> torch.Tensor:
    """Log p of every group, float64 ``[1, groups]``, from ids alone: no mask, no positions, one sequence at a time."""
    groups = []
    with torch.no_grad():
        for plan in forward.plans:
            logits = scorer.call({"input_ids": plan.ids[None]}, plan.rows)
            found = token_logprobs(logits, plan.pick, plan.token)
            groups.append(found.new_zeros(1, plan.groups).index_add(1, plan.group, found))
    return torch.cat(groups, 1)


def _looks_ahead(scorer: Scorer, forward: Forward, bound: float) -> float:
    """Nats that exchanging all that follows moves log p of the first scored token: a model that fills gaps sees the
    answer that it is asked for. Of one length both, so that rounding is the same in both."""
    plan = forward.plans[0]
    first, other = plan.pick == 0, plan.ids.clone()
    other[int(plan.rows[0]) + 1 :] = plan.ids[0]

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = [scorer.call({"input_ids": ids[None]}, plan.rows[:1]) for ids in (plan.ids, other)]
        return [token_logprobs(one, plan.pick[first], plan.token[first]) for one in logits]

    here, there = _guarded(scorer, "be called on token ids", run)
    gap = float((here - there).abs().max())
    if not gap <= bound:
        said = f"what follows a token moves its log p, by {gap:.2g} nats: it is no causal language model as configured"
        raise _refusal(scorer, said)
    return gap


def _numbers(forward: Forward, groups: torch.Tensor) -> torch.Tensor:
    """float64 ``[B, numbers]``: log-odds of each candidate against all others, and log p of each stretch of the
    explanation. In the log-odds of the generated label alone, one likely candidate would hide the errors of all the
    others.
    """
    found = []
    for target, picked in forward.columns:
        chosen = groups[:, picked]
        if target == "label" and len(picked) > 1:
            others = [chosen[:, [j for j in range(len(picked)) if j != i]].logsumexp(1) for i in range(len(picked))]
            chosen = chosen - torch.stack(others, 1)
        found.append(chosen)
    return torch.cat(found, 1)


class _Slope(NamedTuple):
    """The gradient ``[1, n, D]`` with the post's embeddings scaled, and the bytes that it took."""

    scale: float
    gradient: torch.Tensor
    bytes: int


def _gradient(scorer: Scorer, forward: Forward) -> _Slope:
    """A gradient that exists and is not zero, at the post or (a saturated score has none there) well below it."""
    for scale in (1.0, 0.3):
        found = _guarded(scorer, "be differentiated", lambda scale=scale: _slope(forward, scale))
        if not bool(torch.isfinite(found.gradient).all()):
            raise _refusal(scorer, "the gradient of the log-odds is not finite")
        if bool(found.gradient.any()):
            return found
    raise _refusal(scorer, "the gradient of the log-odds is zero everywhere")


def _slope(forward: Forward, scale: float) -> _Slope:
    post, model = (scale * forward.post[None]).clone().requires_grad_(), forward.scorer.probe.model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    logits = sum(len(plan.rows) for plan in forward.plans) * model.get_input_embeddings().num_embeddings
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        score = forward(post).sum()
    return _Slope(scale, torch.autograd.grad(score, post)[0], sum(saved.values()) + 2 * 4 * logits)


def _hidden(scorer: Scorer, forward: Forward, keep: torch.Tensor, bound: float) -> tuple[torch.Tensor, float]:
    """Log p of the groups with every other token hidden, and nats that exchanging what is hidden moves them: it must
    not matter, nor what shares the batch (some models honour the mask from two rows on).

    Compared with the same model on other tokens, not with a shorter text without them: windows, convolutions and
    biases by distance count the hidden places too, and are right to."""
    other = torch.where(keep[1, :, None], forward.post, forward.post.roll(1, 0) * -1.0)
    with torch.no_grad():
        alone, changed, together = _guarded(
            scorer,
            "hide a token by the attention mask",
            lambda: (
                forward.groups(forward.post[None], keep[1:]),
                forward.groups(other[None], keep[1:]),
                forward.groups(forward.post[None], keep),
            ),
        )
    if bool(keep.all()):
        return alone, 0.0
    gap = moved = float((_numbers(forward, alone) - _numbers(forward, changed)).abs().max())
    if not gap <= bound:
        raise _refusal(
            scorer,
            f"a token hidden by the attention mask still moves the log-odds, by {gap:.2g} nats: erasure would say that "
            "the post does not matter",
        )
    gap = float((_numbers(forward, alone) - _numbers(forward, together[1:])).abs().max())
    if not gap <= max(bound, HALF_BOUND):
        raise _refusal(
            scorer, f"what shares the batch of a row with hidden tokens moves its log-odds by {gap:.2g} nats"
        )
    return alone, moved


def _guarded(scorer: Scorer, what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code, whatever it raises
        raise _refusal(scorer, f"it cannot {what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _refusal(scorer: Scorer, what: str) -> ProbeInputError:
    name = type(scorer.inner).__name__
    return ProbeInputError(
        f"{scorer.probe.name}: {name} cannot be probed here: {what}. Every map of it would be of another computation; "
        "give a model whose attention honours a mask and whose input is its token embeddings"
    )
