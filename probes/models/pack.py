"""Several continuations of one prompt in one sequence.

The trunk is prompt, label sentence and explanation as generated; behind it stands what is left of every other candidate
label sentence after the words it shares with the generated one. A 4-D attention mask lets each candidate see the prompt
and the shared words but nothing else, and its positions go on from there, so that to the model it is alone. The prompt,
most of the work, is run once instead of once per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probes.records import Span

# Rows of logits turned to exponentials at a time.
_LOGIT_ROWS = 4096


@dataclass(frozen=True)
class Plan:
    """One packed sequence and what to read from it: S packed tokens, T scored tokens, groups whose log p add up.

    Attributes:
        ids, positions: int64 ``[S]``.
        allow: bool ``[S, S]`` who sees whom, or None for plain causal attention.
        rows: int64 ``[R]`` positions whose logits are needed.
        pick, token, group: int64 ``[T]``: row of ``rows`` that predicts it, the token, the group its log p adds to.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    allow: torch.Tensor | None
    rows: torch.Tensor
    pick: torch.Tensor
    token: torch.Tensor
    group: torch.Tensor
    groups: int

    @classmethod
    def build(
        cls,
        trunk: Sequence[int],
        spans: Sequence[Span],
        branches: Sequence[tuple[int, Sequence[int]]],
        device: torch.device,
    ) -> Plan:
        """Lays out ``trunk`` with branches.

        Args:
            trunk: the main sequence.
            spans: token ranges of the trunk to score, one group each; none starts at 0.
            branches: ``(start, ids)``: alternative continuations of ``trunk[:start]``, one group each, after the spans.
        """
        ids, positions = list(trunk), list(range(len(trunk)))
        wanted: list[tuple[int, int, int]] = []  # predictor position, token, group
        for group, (a, b) in enumerate(spans):
            wanted += [(at - 1, trunk[at], group) for at in range(a, b)]
        tails: list[tuple[int, int, int]] = []  # first packed position, one past the last, trunk tokens it may see
        for group, (start, branch) in enumerate(branches, start=len(spans)):
            shared = 0
            while shared < len(branch) and start + shared < len(trunk) and branch[shared] == trunk[start + shared]:
                shared += 1
            fork, begin = start + shared, len(ids)
            for offset, token in enumerate(branch):
                at = start + offset - 1 if offset <= shared else begin + offset - shared - 1
                wanted.append((at, token, group))
            ids += branch[shared:]
            positions += range(fork, fork + len(branch) - shared)
            if len(ids) > begin:
                tails.append((begin, len(ids), fork))
        allow = None
        if tails:
            allow = torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
            for begin, end, fork in tails:
                allow[begin:end, fork:begin] = False
                allow[end:, begin:end] = False
        rows = sorted({at for at, _, _ in wanted})
        index = {at: row for row, at in enumerate(rows)}

        def long(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            long(ids),
            long(positions),
            allow,
            long(rows),
            long([index[at] for at, _, _ in wanted]),
            long([token for _, token, _ in wanted]),
            long([group for _, _, group in wanted]),
            len(spans) + len(branches),
        )


def token_logprobs(logits: torch.Tensor, pick: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """float64 log p of ``token [T]`` under row ``pick`` (``[T]``, ``[B, T]``) of ``logits [B, R, V]`` -> ``[B, T]``."""
    batch = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[batch, pick, token].double() - log_norm(logits)[batch, pick]


def log_norm(logits: torch.Tensor) -> torch.Tensor:
    """float64 log-sum-exp over the vocabulary of ``logits [B, R, V]`` -> ``[B, R]``.

    A map is made of small differences of log p. The exponentials need no more than float32, but their log is added to
    the largest logit, and log p of many tokens to each other, in float64: a logit of 30 in float32 is right to 2e-6.
    """
    return _LogNorm.apply(logits)


class _LogNorm(torch.autograd.Function):
    """A few rows at a time, and nothing of the vocabulary's size kept for the gradient but the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        top, rest = logits.amax(-1).to(_wide(logits)), []
        for chunk, most in zip(_rows(logits), top.flatten().split(_LOGIT_ROWS), strict=True):
            rest.append((chunk.to(most.dtype) - most[:, None]).exp_().sum(-1).log_())
        found = torch.cat(rest).view(top.shape)
        ctx.save_for_backward(logits, top, found)
        return top.double() + found.double()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        logits, top, rest = ctx.saved_tensors
        parts = zip(_rows(logits), *(one.flatten().split(_LOGIT_ROWS) for one in (top, rest, grads[0])), strict=True)
        slopes = []
        for chunk, most, norm, grad in parts:
            share = (chunk.to(most.dtype) - most[:, None]).sub_(norm[:, None]).exp_()
            slopes.append(share.mul_(grad.to(share.dtype)[:, None]).to(logits.dtype))
        return torch.cat(slopes).view(logits.shape)


def _rows(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return logits.reshape(-1, logits.shape[-1]).split(_LOGIT_ROWS)


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def attention_mask(
    plan: Plan, keep: torch.Tensor | None, post: Span, dtype: torch.dtype, begin: int = 0
) -> torch.Tensor | None:
    """Who sees whom, with erased tokens unseen by all but themselves.

    Args:
        keep: bool ``[B, n]`` over the tokens ``post`` of the sequence, False where erased; None to erase nothing.
        begin: first token that asks; those before it are in the model's cache.
    Returns:
        additive ``[B or 1, 1, S - begin, S]`` in ``dtype``; where no branch needs that, 0/1 int64 ``[B, S]``, which any
        model honours; None where plain causal attention will do.
    """
    if keep is None and plan.allow is None:
        return None
    size = len(plan.ids)
    if plan.allow is None:
        assert keep is not None
        flat = torch.ones(len(keep), size, dtype=torch.long, device=keep.device)
        flat[:, slice(*post)] = keep.long()
        return flat
    allow = plan.allow[None, None, begin:]
    if keep is not None:
        seen = torch.ones(len(keep), size, dtype=torch.bool, device=keep.device)
        seen[:, slice(*post)] = keep
        own = torch.eye(size, dtype=torch.bool, device=keep.device)[begin:]
        allow = allow & (seen[:, None, None, :] | own)
    zero = torch.zeros((), dtype=dtype, device=allow.device)
    return torch.where(allow, zero, zero + torch.finfo(dtype).min)
