"""Is the model that is scored the model that answered? Tried on a row before it is scored, and on each longer one.

The engine hands a model embeddings instead of ids, hides tokens by the attention mask, packs several continuations in
one sequence and asks for gradients. Each is tried against a plain call of the model on the ids, in nats of log-odds:
a model that does not pack is scored one sequence at a time ever after; where its own answer is not what we score, or
what is hidden still matters, it is refused by name, before the first post.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Any

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
# About a label's sentence or a cited phrase, which is scored alone. A bound for the whole explanation would forbid
# rounding (which adds up over a long one), one for its mean would forgive a place that is wrong among many that are
# right: what a window too short does.
STRETCH = 10


def try_model(scorer: Scorer, make: Callable[[bool], Forward]) -> bool:
    """Tries a model on one row.

    Args:
        make: packed or not -> the score function of the row's label and ``stretches``, as far as it has them.
    Returns:
        whether it may be scored packed.
    Raises:
        ProbeInputError: the class of the model, and which number is not what it should be.
    """
    bound = BOUND.get(scorer.probe.dtype, HALF_BOUND)
    single = make(False)
    told = _numbers(single, _plain(scorer, single))
    keep = torch.ones(2, len(single.post), dtype=torch.bool, device=single.post.device)
    keep[1, :-1:2] = False  # never the last: it may end the prompt, and then cannot be hidden
    with torch.no_grad():
        whole = _guarded(scorer, "be scored from embeddings", lambda: single.groups(single.post[None], None))
    gap = float((_numbers(single, whole) - told).abs().max())
    if not gap <= bound:
        raise _refusal(
            scorer, f"log-odds from embeddings and from token ids differ by {gap:.2g} nats: it looks at the ids as well"
        )
    _gradient(scorer, single)
    hidden = _hidden(scorer, single, keep, bound)
    packed = make(True)
    if len(packed.plans) == len(single.plans):
        return True
    try:
        with torch.no_grad():
            found = _numbers(packed, packed.groups(packed.post[None], keep))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # its own mask code, whatever that raises for a 4-D mask
        return False
    wanted = _numbers(single, torch.cat([whole, hidden]))
    return bool(((found - wanted).abs() <= bound).all())


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
    """Log p of every group, float32 ``[1, groups]``, from ids alone: no mask, no positions, one sequence at a time."""
    groups = []
    with torch.no_grad():
        for plan in forward.plans:
            logits = scorer.call({"input_ids": plan.ids[None]}, plan.rows)
            found = token_logprobs(logits, plan.pick, plan.token)
            groups.append(found.new_zeros(1, plan.groups).index_add(1, plan.group, found))
    return torch.cat(groups, 1)


def _numbers(forward: Forward, groups: torch.Tensor) -> torch.Tensor:
    """float32 ``[B, numbers]``: log-odds of each candidate against all others, and log p of each stretch of the
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


def _gradient(scorer: Scorer, forward: Forward) -> None:
    """A gradient that exists and is not zero, at the post or (a saturated score has none there) well below it."""
    found = False
    for scale in (1.0, 0.3):
        post = (scale * forward.post[None]).clone().requires_grad_()
        gradient = _guarded(
            scorer, "be differentiated", lambda post=post: torch.autograd.grad(forward(post).sum(), post)[0]
        )
        if not bool(torch.isfinite(gradient).all()):
            raise _refusal(scorer, "the gradient of the log-odds is not finite")
        found = found or bool(gradient.any())
    if not found:
        raise _refusal(scorer, "the gradient of the log-odds is zero everywhere")


def _hidden(scorer: Scorer, forward: Forward, keep: torch.Tensor, bound: float) -> torch.Tensor:
    """Log p of the groups with every other token hidden. What a hidden token is must not matter, nor what shares the
    batch (some models honour the mask from two rows on)."""
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
        return alone
    gap = float((_numbers(forward, alone) - _numbers(forward, changed)).abs().max())
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
    return alone


def _guarded(scorer: Scorer, what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code, whatever it raises
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
        raise _refusal(scorer, f"it cannot {what} ({reason})") from error


def _refusal(scorer: Scorer, what: str) -> ProbeInputError:
    name = type(scorer.inner).__name__
    return ProbeInputError(
        f"{scorer.probe.name}: {name} cannot be probed here: {what}. Every map of it would be of another computation; "
        "give a model whose attention honours a mask and whose input is its token embeddings"
    )
