"""Is the model that is scored the model that answered? Tried on a row before it is scored, and on each longer one.

The engine hands a model embeddings instead of ids, hides tokens by the attention mask, packs several continuations in
one sequence and asks for gradients. Each is tried against a plain call of the model on the ids, in nats of log-odds.
What a model cannot do is in its ``Abilities``, and done otherwise ever after:

* One that does not pack is scored one sequence at a time.
* One that looks at the ids beside their embeddings is called on ids, and has no maps from gradients.
* One where a hidden token still matters has erased tokens cut out of its sequence.

Where its own answer is not what we score even so, it is refused by name, before the first post.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from probes.errors import ProbeInputError
from probes.models.abilities import Abilities
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
    """What a model can do, and how far what was tried is apart.

    Attributes:
        can: what it can do.
        gaps: nats between two ways to one number, by name.
        bound: what they may be, in nats.
        kept_bound: the same for "prefix kept", relative to the larger of the number and 1, and never above ``bound``.
        tokens: of the longest row that every pass runs; prefix_bytes: what is kept of its prefix.
        token_bytes: memory of a pass with gradient, per token that it runs: what is saved for it, and the logits twice
            more, for their softmax and its gradient.
    """

    can: Abilities
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
            can=self.can.both(other.can),
            gaps={**self.gaps, **gaps},
            tokens=max(self.tokens, other.tokens),
            prefix_bytes=max(self.prefix_bytes, other.prefix_bytes),
            token_bytes=max(self.token_bytes, other.token_bytes),
        )


def told(trial: Trial, memory: Mapping[str, int]) -> str:
    """One line: how a model is scored, how sure that is, and what it takes (``Scorer.memory``)."""
    gaps = ", ".join(f"{name} {gap:.1g}" for name, gap in trial.gaps.items() if math.isfinite(gap))
    can = trial.can
    how = "all labels in one sequence" if can.packs else "one sequence at a time"
    prefix = f"run every time ({can.unkept})" if can.unkept else "run once"
    limits = "".join(f"; {limit}" for limit in can.limits.values())
    sizes = ", ".join(f"{name} {memory[name] / 2**30:.2f} GiB" for name in ("weights", "prefix", "batch"))
    return (
        f"scored {how}, what stands before the post {prefix}{limits}; nats from a plain call of the model: {gaps} "
        f"(allowed: {trial.bound:g}); batches of {memory['rows']} rows of {memory['tokens']} tokens; memory: {sizes}"
    )


def try_model(scorer: Scorer, make: Callable[[Abilities], Forward]) -> Trial:
    """Tries a model on one row.

    Args:
        make: what it can do -> the score function of the row's label and ``stretches``, as far as it has them.
    Raises:
        ProbeInputError: the class of the model, and which number is not what it should be.
    """
    bound = BOUND.get(scorer.probe.dtype, HALF_BOUND)
    kept_bound = KEPT_BOUND.get(scorer.probe.dtype, HALF_BOUND)
    can = Abilities(packs=False, unkept="not tried yet")
    single = make(can)
    said = _numbers(single, _guarded(scorer, "be called on token ids", lambda: _plain(scorer, single)))
    gaps = {"what follows exchanged": _looks_ahead(scorer, single, bound)}
    single, whole = _called(scorer, make, can, said, bound, gaps)
    keep = torch.ones(2, len(single.ids), dtype=torch.bool, device=single.ids.device)
    keep[1, :-1:2] = False  # never the last: it may end the prompt, and then cannot be hidden
    hidden, why = _hidden(single, keep, bound, gaps)
    if why:
        single = make(dataclasses.replace(single.can, unmasked=why))
        hidden = _cut(scorer, single, keep, bound, gaps)
    wanted = _numbers(single, torch.cat([whole, hidden]))
    base = single if single.can.unmasked or single.can.counts else _packed(make, single, keep, wanted, bound, gaps)
    slope, why = _gradient(scorer, base)
    can = dataclasses.replace(base.can, ungraded=why)
    kept = _try_prefix(lambda: make(dataclasses.replace(can, unkept="")), keep, wanted, slope, kept_bound)
    gaps["prefix kept"] = kept.gap
    size = (
        (kept.tokens, kept.prefix_bytes, kept.token_bytes)
        if kept.tokens
        else (base.tokens, 0, slope.bytes / base.tokens)
    )
    return Trial(dataclasses.replace(can, unkept=kept.reason), gaps, bound, kept_bound, *size)


def try_joined(scorer: Scorer, make: Callable[[Abilities], Forward], own: Abilities, can: Abilities) -> float:
    """Tries one row by what two trials found together, as ``try_model`` tries it by what one found.

    Args:
        make: as for ``try_model``. own: what this row's own trial found. can: what holds for the rows of both.
    Returns:
        nats from a plain call of the model on ids: the row as it is, and every other token of the post erased; where
        that is not cut out, from what was tried of ``own``.
    Raises:
        ProbeInputError: they are more than the bound.
    """
    single = make(Abilities(packs=False, unkept="not tried yet"))
    keep = torch.ones(2, len(single.ids), dtype=torch.bool, device=single.ids.device)
    keep[1, :-1:2] = False
    left = torch.ones(len(single.example.ids), dtype=torch.bool, device=keep.device)
    left[slice(*single.example.post_tok)] = keep[1]
    what = f"be scored {', '.join(can.way)}"

    def run() -> float:
        whole, before = _plain(scorer, single), make(dataclasses.replace(own, packs=False, unkept="not tried yet"))
        erased = _plain(scorer, single, left) if can.unmasked else before.groups(before.ids[None], keep[1:])
        joined = make(can)
        apart = _numbers(joined, _groups(joined, keep)) - _numbers(single, torch.cat([whole, erased]))
        return float(apart.abs().nan_to_num(math.inf).max())

    gap = _guarded(scorer, what, run)
    if not gap <= BOUND.get(scorer.probe.dtype, HALF_BOUND):
        said = f"rows of different length need different ways, and with both ({', '.join(can.way)})"
        raise _refusal(scorer, f"{said} it differs from a plain call by {gap:.2g} nats")
    return gap


def _called(
    scorer: Scorer,
    make: Callable[[Abilities], Forward],
    can: Abilities,
    said: torch.Tensor,
    bound: float,
    gaps: dict[str, float],
) -> tuple[Forward, torch.Tensor]:
    """The score function by the first way of calling the model that says what a plain call does, and log p of its
    groups. A model that counts its positions itself gives other answers with ours; one that looks at the ids as well,
    with embeddings."""
    first = ""
    for on_ids, counts in itertools.product((False, True), (False, True)):
        found = make(dataclasses.replace(can, on_ids=first if on_ids else "", counts=counts))
        name = "token ids by the engine" if on_ids else "embeddings"
        whole, why = _tried(f"be scored from {name}", lambda f=found: _whole(f))
        gap = math.inf if whole is None else float((_numbers(found, whole) - said).abs().nan_to_num(math.inf).max())
        if whole is not None and gap <= bound:
            gaps["ids" if on_ids else "embeddings"] = gap
            return found, whole
        why = (
            why or f"log-odds from embeddings and from token ids differ by {gap:.2g} nats: it looks at the ids as well"
        )
        first = first or why
    raise _refusal(scorer, first)


def _whole(forward: Forward) -> torch.Tensor:
    """Log p of the groups of the row as it is; and a model that is given embeddings has to take those that are no
    token's: gradients ask for them."""
    with torch.no_grad():
        if not forward.can.on_ids:
            forward.groups(-forward.post[None], None)
        return forward.groups(forward.ids[None], None)


def _packed(
    make: Callable[[Abilities], Forward],
    single: Forward,
    keep: torch.Tensor,
    wanted: torch.Tensor,
    bound: float,
    gaps: dict[str, float],
) -> Forward:
    """The packed score function where it gives what the other does; else the other."""
    packed = make(dataclasses.replace(single.can, packs=True))
    if len(packed.plans) < len(single.plans):
        gaps["packed"] = _gap(packed, keep, wanted)
        return packed if gaps["packed"] <= bound else single
    return packed


def _gap(forward: Forward, keep: torch.Tensor, wanted: torch.Tensor) -> float:
    """Nats between the numbers of ``forward`` and what they should be; infinite where the model's own code fails."""
    found, _ = _tried("", lambda: _numbers(forward, _groups(forward, keep)))
    return math.inf if found is None else float((found - wanted).abs().nan_to_num(math.inf).max())


def _groups(forward: Forward, keep: torch.Tensor) -> torch.Tensor:
    """Log p of the groups; what is cut by itself, as a longer row beside it would leave its positions as they were."""
    parts = keep.split(1) if forward.can.unmasked else (keep,)
    return torch.cat([forward.groups(forward.ids[None], part) for part in parts])


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
        found = _saved(kept) if slope.gradient is None else _slope(kept, slope.scale)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a cache of another kind, or the model's own code
        return _Kept(_reason(error), math.inf)
    if not gap <= min(bound * max(1.0, float(wanted.abs().max())), BOUND.get(kept.scorer.probe.dtype, HALF_BOUND)):
        return _Kept(f"log-odds with the prefix kept and without differ by {gap:.2g} nats", gap)
    if found.gradient is None or slope.gradient is None:
        return _Kept("", gap, kept.tokens, kept.prefix.size, found.bytes / kept.tokens)
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


def _plain(scorer: Scorer, forward: Forward, left: torch.Tensor | None = None) -> torch.Tensor:
    """Log p of every group, float64 ``[1, groups]``, from ids alone: no mask, no positions, one sequence at a time.

    Args:
        left: bool ``[tokens]`` of the row: the others are not there. None: all are.
    """
    groups = []
    with torch.no_grad():
        for plan in forward.plans:
            ids, rows = plan.ids, plan.rows
            if left is not None:  # what follows the post is never erased
                here = torch.cat([left, left.new_ones(len(ids))])[: len(ids)]
                ids, rows = ids[here], rows - int((~here).sum())
            logits = scorer.call({"input_ids": ids[None]}, rows)
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
    """The gradient ``[1, n, D]`` with the post's embeddings scaled, or None; and the bytes that it takes."""

    scale: float
    gradient: torch.Tensor | None
    bytes: int


def _gradient(scorer: Scorer, forward: Forward) -> tuple[_Slope, str]:
    """A gradient that is not zero, at the post or (a saturated score has none there) well below it; else why not."""
    if forward.can.on_ids:
        return _saved(forward), forward.can.on_ids
    for scale in (1.0, 0.3):
        found, why = _tried("be differentiated", lambda scale=scale: _slope(forward, scale), grad=True)
        if found is None or found.gradient is None:
            return _saved(forward), why
        if not bool(torch.isfinite(found.gradient).all()):
            raise _refusal(scorer, "the gradient of the log-odds is not finite")
        if bool(found.gradient.any()):
            return found, ""
    raise _refusal(scorer, "the gradient of the log-odds is zero everywhere")


def _slope(forward: Forward, scale: float) -> _Slope:
    post = (scale * forward.post[None]).clone().requires_grad_()
    score, size = _counted(forward, lambda: forward(post).sum())
    return _Slope(scale, torch.autograd.grad(score, post)[0], size)


def _saved(forward: Forward) -> _Slope:
    """No gradient, and what a pass takes at most: what it would save for one."""
    embedding = forward.scorer.probe.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _module, _given, out: out.requires_grad_())
    try:
        for grad in (True, False):
            found, _ = _tried("", lambda: _counted(forward, lambda: forward.groups(forward.ids[None], None)), grad)
            if found is not None:
                return _Slope(1.0, None, found[1])
    finally:
        hook.remove()
    raise _refusal(forward.scorer, "it cannot be called twice")


def _counted(forward: Forward, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What a pass gives, and the bytes that it saves, with the logits twice more."""
    model = forward.scorer.probe.model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    logits = sum(len(plan.rows) for plan in forward.plans) * model.get_input_embeddings().weight.shape[0]
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = run()
    return found, sum(saved.values()) + 2 * 4 * logits


def _hidden(forward: Forward, keep: torch.Tensor, bound: float, gaps: dict[str, float]) -> tuple[torch.Tensor, str]:
    """Log p of the groups with every other token hidden, and why tokens cannot be hidden: exchanging what is hidden
    must not matter, nor what shares the batch (some models honour the mask from two rows on).

    Compared with the same model on other tokens, not with a shorter text without them: windows, convolutions and
    biases by distance count the hidden places too, and are right to."""
    own = forward.ids if forward.can.on_ids else forward.post
    other = torch.where(keep[1].view(-1, *[1] * (own.ndim - 1)), own, _others(forward))

    def run() -> tuple[torch.Tensor, ...]:
        groups = forward.groups
        return groups(own[None], keep[1:]), groups(other[None], keep[1:]), groups(own[None], keep)

    found, why = _tried("hide a token by the attention mask", run)
    if found is None:
        return torch.empty(0), why
    alone, changed, together = found
    if bool(keep.all()):
        gaps["hidden tokens exchanged"] = 0.0
        return alone, ""
    gap = float((_numbers(forward, alone) - _numbers(forward, changed)).abs().max())
    if not gap <= bound:
        return alone, f"a token hidden by the attention mask still moves the log-odds, by {gap:.2g} nats"
    if not (company := _company(forward, alone, together)) <= max(bound, HALF_BOUND):
        said = f"what shares the batch of a row with hidden tokens moves its log-odds by {company:.2g} nats"
        if company > 10 * HALF_BOUND:
            return alone, said
        raise _refusal(forward.scorer, said)  # rounding: without the tokens it would round, too
    gaps["hidden tokens exchanged"] = gap
    return alone, ""


def _others(forward: Forward) -> torch.Tensor:
    """What no token of the post is: other embeddings; for a model that is called on ids, each the next of the row's."""
    if not forward.can.on_ids:
        return forward.post.roll(1, 0) * -1.0
    names = sorted({*forward.example.ids} - {forward.scorer.probe.pad_id})
    after = dict(zip(names, [*names[1:], names[0]], strict=True))
    return torch.tensor([after.get(one, names[0]) for one in forward.ids.tolist()], device=forward.ids.device)


def _company(forward: Forward, alone: torch.Tensor, together: torch.Tensor) -> float:
    return float((_numbers(forward, alone) - _numbers(forward, together[1:])).abs().max())


def _cut(scorer: Scorer, forward: Forward, keep: torch.Tensor, bound: float, gaps: dict[str, float]) -> torch.Tensor:
    """Log p of the groups with every other token cut out: what a plain call of the model on the ids that are left says,
    whatever shares the batch."""
    left = torch.ones(len(forward.example.ids), dtype=torch.bool, device=keep.device)
    left[slice(*forward.example.post_tok)] = keep[1]
    said = _guarded(scorer, "be called on token ids", lambda: _plain(scorer, forward, left))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return forward.groups(forward.ids[None], keep[1:]), forward.groups(forward.ids[None], keep)

    with torch.no_grad():
        alone, together = _guarded(scorer, "be scored with tokens cut out", run)
    gaps["cut"] = float((_numbers(forward, alone) - _numbers(forward, said)).abs().nan_to_num(math.inf).max())
    if not gaps["cut"] <= bound:
        raise _refusal(
            scorer,
            f"{forward.can.unmasked}; and with tokens cut out it differs from a plain call by {gaps['cut']:.2g} nats",
        )
    gap = _company(forward, alone, together)
    if not gap <= max(bound, HALF_BOUND):
        raise _refusal(
            scorer, f"what shares the batch of a row with tokens cut out moves its log-odds by {gap:.2g} nats"
        )
    return alone


T = TypeVar("T")
# What fails on a machine and not by the model: errors of memory on a CPU and of CUDA's libraries have no class.
_THE_MACHINES = re.compile(r"can't allocate memory|CUDA|cu(?:BLAS|DNN|SPARSE)|HIP|out of memory", re.IGNORECASE)


def _tried(what: str, run: Callable[[], T], grad: bool = False) -> tuple[T | None, str]:
    """What ``run`` gives; or None, and what the model cannot do, with its own code's words, whatever that raises."""
    try:
        with torch.set_grad_enabled(grad):
            return run(), ""
    except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if _THE_MACHINES.search(str(error)):
            raise
        return None, f"it cannot {what} ({_reason(error)})"


def _guarded(scorer: Scorer, what: str, run: Callable[[], T], grad: bool = False) -> T:
    found, why = _tried(what, run, grad)
    if found is None:
        raise _refusal(scorer, why)
    return found


def _reason(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _refusal(scorer: Scorer, what: str) -> ProbeInputError:
    name = type(scorer.inner).__name__
    return ProbeInputError(
        f"{scorer.probe.name}: {name} cannot be probed here: {what}. Every map of it would be of another computation; "
        "give another causal language model"
    )
