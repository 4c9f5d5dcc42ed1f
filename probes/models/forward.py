"""The scores of one row's targets as a function of its perturbed post.

What the model can do is in ``Abilities``, and is obeyed here: it is given embeddings or token ids, positions or none,
and erased tokens are hidden from attention or cut out of the sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from probes.errors import ProbeInputError
from probes.models.abilities import Abilities
from probes.models.pack import Plan, attention_mask, token_logprobs
from probes.models.prefix import MIN_TOKENS
from probes.records import Example, Span

# ``probes.models.score`` makes these, so its class is told by name only.
Scorer = Any
ERASERS = ("attention", "neutral", "resample")


class Forward:
    """Scores of one example's targets as a function of its (perturbed) post. Made by ``Scorer.forward``.

    Attributes:
        scorer: the engine it runs on.
        can: what its model can do.
        targets: names, the columns of every result.
        ids: int64 ``[n]``, the tokens of the post. post, neutral: float32 ``[n, D]``, the embeddings of these, and of
            as many pad tokens.
        plans: the sequences of one row. columns: for each target its groups of log p.
        prefix: the model's cache after the tokens before the post, or None where every pass runs them.
        tokens: length of one packed row, without the prefix.
        rows_run: sequences evaluated so far.
    """

    def __init__(self, scorer: Scorer, example: Example, targets: Sequence[str], can: Abilities) -> None:
        self.scorer, self.can = scorer, can
        self.example = example
        self.targets = tuple(targets)
        self.rows_run = 0
        self.label_retokenised = False
        probe = scorer.probe
        first, last = example.post_tok
        self.plans, self.columns = self._lay_out(can.packs)
        keeps = not can.unkept and first >= MIN_TOKENS
        self.prefix = scorer.prefix(example.ids[:first], can) if keeps else None
        self._begin = 0 if self.prefix is None else first
        self.tokens = sum(len(plan.ids) - self._begin for plan in self.plans)
        self.ids = self.plans[0].ids[first:last]
        self._pad = torch.tensor(probe.pad_id, device=probe.device)
        embedding = probe.model.get_input_embeddings()
        with torch.no_grad():
            before = self._given(self.plans[0].ids[self._begin : first])
            self._around = [(before, self._given(plan.ids[last:])) for plan in self.plans]
            self.post = embedding(self.ids).float()
            self.neutral = embedding(self._pad).float().expand_as(self.post)

    def _given(self, post: torch.Tensor) -> torch.Tensor:
        """Ids or float32 embeddings as the model is given them."""
        probe = self.scorer.probe
        if post.is_floating_point():
            return post.to(probe.dtype)
        return post if self.can.on_ids else probe.model.get_input_embeddings()(post)

    def _lay_out(self, packed: bool) -> tuple[list[Plan], list[tuple[str, list[int]]]]:
        """Plans, and for each target how its score comes from the concatenated groups."""
        example, device = self.example, self.scorer.probe.device
        spans: list[Span] = []
        branches: list[tuple[int, Sequence[int]]] = []
        columns: list[tuple[str, list[int]]] = []
        for target in self.targets:
            if target == "label":
                continue
            columns.append((target, [len(spans)]))
            spans.append(target_tokens(example, target))
        if "label" in self.targets:
            start, label, others, self.label_retokenised = self.scorer.label_ids(example)
            branches = [(start, ids) for ids in (label, *others)]
            columns.append(("label", list(range(len(spans), len(spans) + len(branches)))))
        columns.sort(key=lambda column: self.targets.index(column[0]))
        ends = [end for _, end in spans] + ([branches[0][0] + len(branches[0][1])] if branches else [])
        trunk = example.ids[: min(max(ends), len(example.ids))]
        if packed or not branches:
            return [Plan.build(trunk, spans, branches, device)], columns
        alone = [
            Plan.build([*example.ids[:start], *ids], [(start, start + len(ids))], [], device) for start, ids in branches
        ]
        return ([Plan.build(trunk, spans, [], device)] if spans else []) + alone, columns

    def __call__(self, post: torch.Tensor) -> torch.Tensor:
        """Scores for post embeddings.

        Args:
            post: float32 ``[B, n, D]``, one embedding per token of ``example.post_tok``.
        Returns:
            float64 ``[B, targets]`` in nats, differentiable in ``post``.
        Raises:
            ProbeInputError: the model is called on token ids only.
        """
        if self.can.on_ids:
            raise self.scorer.refused("embeddings that are no token's", self.can.on_ids)
        rows = self.scorer.batch_rows(self.tokens)
        if len(post) <= rows or not post.requires_grad:
            return self._run(post, None)
        # More than fits at once: each part is run again when its gradient is asked for.
        return torch.cat([checkpoint(self._run, part, None, use_reentrant=False) for part in post.split(rows)])

    def filler(self, texts: Sequence[str], draws: int, seed: int = 0) -> torch.Tensor:
        """float32 ``[draws, n, D]``: the embeddings of ``filler_ids``."""
        with torch.no_grad():
            return self.scorer.probe.model.get_input_embeddings()(self.filler_ids(texts, draws, seed)).float()

    def filler_ids(self, texts: Sequence[str], draws: int, seed: int = 0) -> torch.Tensor:
        """Tokens of what may stand in a post of this length instead: clauses of other posts, cut to its tokens.

        Args:
            texts: clauses to draw from, in one fixed order; each draw is another random sequence of them.
        Returns:
            int64 ``[draws, n]``.
        Raises:
            ProbeInputError: no text, or texts without a single token.
        """
        encode, rng, size = self.scorer.probe.token_bytes.encode, random.Random(seed), len(self.ids)
        tokens = [ids for ids in (encode(text) for text in texts) if ids]
        if not tokens:
            raise ProbeInputError(
                f"{self.example.id}: resampling needs fillers: clauses of other posts to put in place of the erased"
            )
        rows = []
        for _ in range(draws):
            row: list[int] = []
            while len(row) < size:
                row += rng.choice(tokens)
            rows.append(row[:size])
        return torch.tensor(rows, device=self.ids.device)

    def eraser(self, name: str) -> str:
        """What that eraser does with this model: where attention cannot hide a token, "attention" is "cut"."""
        return "cut" if name == "attention" and self.can.unmasked else name

    def kept(self, keep: torch.Tensor, eraser: str = "attention", filler: torch.Tensor | None = None) -> torch.Tensor:
        """Scores with some post tokens erased, in chunks under the token budget.

        Args:
            keep: bool ``[B, n]``.
            eraser: "attention" (no position may attend to an erased token; positions stay. Where the model cannot hide
                tokens they are cut out of the sequence, and what follows closes up), "neutral" (the token becomes the
                pad token) or "resample" (it becomes a token of ``filler``; the median over its rows: other posts hold
                cues of their own, and what those few do is not what the erased token did).
            filler: int64 ``[draws, n]`` (``filler_ids``), for "resample" only.
        Returns:
            float64 ``[B, targets]`` in nats, no gradient.
        Raises:
            ProbeInputError: unknown eraser, no filler to resample from; or attention erasure of the prompt's last
                token, which cannot be hidden from its own prediction.
        """
        if eraser not in ERASERS:
            raise ProbeInputError(f"eraser {eraser!r}: not one of {', '.join(ERASERS)}")
        if (eraser == "resample") != (filler is not None):
            raise ProbeInputError(f"eraser {eraser!r}: filler rows are for resampling, and resampling needs them")
        keep = keep.to(self.ids.device)
        last = self.example.post_tok[1]
        if eraser == "attention" and last >= self.example.prompt_len and not bool(keep[:, -1].all()):
            raise ProbeInputError(
                f"{self.example.id}: the post ends the prompt, so hiding its last token cannot erase it; "
                "use the neutral eraser, or put text after the post"
            )

        def part(rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                if eraser == "attention":
                    return self._run(self.ids[None], rows)
                if filler is None:
                    return self._run(torch.where(rows, self.ids, self._pad), None)
                whole = rows.all(1)  # nothing to draw for: run once
                scores = torch.empty(len(rows), len(self.targets), dtype=torch.float64, device=rows.device)
                if whole.any():
                    scores[whole] = self._run(self.ids[None], None)
                if not whole.all():
                    draws = [self._run(torch.where(rows[~whole], self.ids, drawn), None) for drawn in filler]
                    scores[~whole] = torch.stack(draws).quantile(0.5, 0)
                return scores

        return self.scorer.chunked(part, keep, self.tokens)

    def _run(self, post: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        scores = self.groups(post, keep)
        columns = []
        for target, picked in self.columns:
            column = scores[:, picked[0]]
            if target == "label" and len(picked) > 1:
                column = column - scores[:, picked[1:]].logsumexp(-1)
            columns.append(column)
        return torch.stack(columns, 1)

    def groups(self, post: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Log p, before they are combined: every explanation span, then the label sentence, then its rivals.

        Args:
            post: int64 ``[B or 1, n]`` token ids, or float32 ``[B or 1, n, D]`` embeddings.
            keep: bool ``[B, n]``, False where erased: hidden by the attention mask, or cut out where the model cannot
                hide tokens; or None.
        Returns:
            float64 ``[B, groups]`` in nats.
        """
        scorer, begin = self.scorer, self._begin
        batch = len(post) if keep is None else len(keep)
        self.rows_run += batch * len(self.plans)
        groups, given = [], self._given(post)
        for plan, (before, after) in zip(self.plans, self._around, strict=True):
            parts = (before[None], given, after[None])
            tokens = torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], 1)
            positions, mask, rows, pick = plan.positions[begin:], None, plan.rows - begin, plan.pick
            if keep is None or not self.can.unmasked:
                mask = attention_mask(plan, keep, self.example.post_tok, scorer.probe.dtype, begin)
            else:
                tokens, places = self._cut(tokens, keep, before.shape[0])
                rows, place = places[:, rows].unique(return_inverse=True)
                positions, pick = positions[: tokens.shape[1]], place[:, pick]
            logits = scorer.logits(tokens, positions, mask, rows, self.prefix, self.can)
            found = token_logprobs(logits, pick, plan.token)
            groups.append(found.new_zeros(batch, plan.groups).index_add(1, plan.group, found))
        return torch.cat(groups, 1)

    @staticmethod
    def _cut(tokens: torch.Tensor, keep: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences ``tokens [B, S, ...]`` without what is erased of the post (``keep [B, n]``, from ``first`` on).

        Returns:
            what is left of each, closed up; shorter ones end in erased tokens, which nothing before them sees.
            And int64 ``[B, S]``: where each token is then, or the last one before it that is left.
        """
        left = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        left[:, first : first + keep.shape[1]] = keep
        order = (~left).long().argsort(dim=1, stable=True)[:, : int(left.sum(1).max())]
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        return tokens[row, order], left.long().cumsum(1) - 1


def target_tokens(example: Example, target: str) -> Span:
    """Token range of "explanation", or of ``explanation[a:b]`` (characters of the explanation).

    Raises:
        ProbeInputError: unknown target, or the row has no such part.
    """
    segment = example.segment("explanation")
    if target.partition("[")[0] != "explanation":
        raise ProbeInputError(f"target {target!r}: not label, explanation or explanation[a:b]")
    if segment is None:
        raise ProbeInputError(f"{example.id}: the row has no explanation to attribute")
    if target == "explanation":
        return segment.tok
    try:
        low, high = (int(part) for part in target.removeprefix("explanation[").removesuffix("]").split(":"))
    except ValueError as error:
        raise ProbeInputError(f"target {target!r}: not label, explanation or explanation[a:b]") from error
    length = segment.char[1] - segment.char[0]
    if not 0 <= low < high <= length:
        raise ProbeInputError(f"{example.id}: target {target!r} is not inside the explanation of {length} characters")
    return example.tokens_of((segment.char[0] + low, segment.char[0] + high), within=segment.tok)
