"""Teacher-forced scores of a label and an explanation, many perturbed posts at a time.

One row of work is one packed sequence (``probes.models.pack``), so one pass gives log p of every candidate label and of
the explanation. What stands before the post is run once and kept (``probes.models.prefix``). On the first example (and
each longer one) every shortcut is tried against a plain call of the model (``probes.models.trial``): where they differ
it is scored without it ever after, or refused.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from probes.errors import ProbeError, ProbeInputError
from probes.models.loaded import LoadedModel
from probes.models.pack import Plan, attention_mask, log_norm, token_logprobs
from probes.models.prefix import MIN_TOKENS, NoPrefix, Prefix, read_prefix
from probes.models.trial import Trial, stretches, try_model
from probes.records import Example, Span

# Tokens of one batch. On a CPU larger batches leave the cache and get slower; on a GPU 8192 tokens of a 9B model with a
# 150k vocabulary stay under 5 GB of saved activations and logits per 1000 tokens.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
_SLACK = 1.25  # of what a pass is counted to take: buffers of the kernels, blocks that the allocator cannot give back
ERASERS = ("attention", "neutral", "resample")


class Forward:
    """Scores of one example's targets as a function of its (perturbed) post. Made by ``Scorer.forward``.

    Attributes:
        scorer: the engine it runs on.
        targets: names, the columns of every result.
        plans: the sequences of one row. columns: for each target its groups of log p.
        prefix: the model's cache after the tokens before the post, or None where every pass runs them.
        tokens: length of one packed row, without the prefix.
        rows_run: sequences evaluated so far.
    """

    def __init__(self, scorer: Scorer, example: Example, targets: Sequence[str], packed: bool, keep: bool) -> None:
        self.scorer = scorer
        self.example = example
        self.targets = tuple(targets)
        self.rows_run = 0
        self.label_retokenised = False
        probe = scorer.probe
        first, last = example.post_tok
        self.plans, self.columns = self._lay_out(packed)
        self.prefix = scorer.prefix(example.ids[:first]) if keep and first >= MIN_TOKENS else None
        self._begin = 0 if self.prefix is None else first
        self.tokens = sum(len(plan.ids) - self._begin for plan in self.plans)
        embedding = probe.model.get_input_embeddings()
        with torch.no_grad():
            before = embedding(self.plans[0].ids[self._begin : first])
            self._around = [(before, embedding(plan.ids[last:])) for plan in self.plans]
            self.post = embedding(self.plans[0].ids[first:last]).float()
            neutral = torch.tensor(probe.pad_id, device=probe.device)
            self.neutral = embedding(neutral).float().expand_as(self.post)

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
        """
        rows = self.scorer.batch_rows(self.tokens)
        if len(post) <= rows or not post.requires_grad:
            return self._run(post, None)
        # More than fits at once: each part is run again when its gradient is asked for.
        return torch.cat([checkpoint(self._run, part, None, use_reentrant=False) for part in post.split(rows)])

    def filler(self, texts: Sequence[str], draws: int, seed: int = 0) -> torch.Tensor:
        """Embeddings of what may stand in a post of this length instead: clauses of other posts, cut to its tokens.

        Args:
            texts: clauses to draw from, in one fixed order; each draw is another random sequence of them.
        Returns:
            float32 ``[draws, n, D]``.
        Raises:
            ProbeInputError: no text, or texts without a single token.
        """
        encode, rng, size = self.scorer.probe.token_bytes.encode, random.Random(seed), len(self.post)
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
        with torch.no_grad():
            return self.scorer.probe.model.get_input_embeddings()(torch.tensor(rows, device=self.post.device)).float()

    def kept(self, keep: torch.Tensor, eraser: str = "attention", filler: torch.Tensor | None = None) -> torch.Tensor:
        """Scores with some post tokens erased, in chunks under the token budget.

        Args:
            keep: bool ``[B, n]``.
            eraser: "attention" (no position may attend to an erased token; positions stay), "neutral" (the token
                becomes the pad token) or "resample" (it becomes a token of ``filler``; the median over its rows: other
                posts hold cues of their own, and what those few do is not what the erased token did).
            filler: float32 ``[draws, n, D]`` (``filler``), for "resample" only.
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
        keep = keep.to(self.post.device)
        last = self.example.post_tok[1]
        if eraser == "attention" and last >= self.example.prompt_len and not bool(keep[:, -1].all()):
            raise ProbeInputError(
                f"{self.example.id}: the post ends the prompt, so hiding its last token cannot erase it; "
                "use the neutral eraser, or put text after the post"
            )

        def part(rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                if eraser == "attention":
                    return self._run(self.post[None], rows)
                if filler is None:
                    return self._run(torch.where(rows[..., None], self.post, self.neutral), None)
                whole = rows.all(1)  # nothing to draw for: run once
                scores = torch.empty(len(rows), len(self.targets), dtype=torch.float64, device=rows.device)
                if whole.any():
                    scores[whole] = self._run(self.post[None], None)
                if not whole.all():
                    cut = rows[~whole]
                    draws = [self._run(torch.where(cut[..., None], self.post, drawn), None) for drawn in filler]
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
            post: float32 ``[B or 1, n, D]``.
            keep: bool ``[B, n]``, False where hidden by the attention mask, or None.
        Returns:
            float64 ``[B, groups]`` in nats.
        """
        probe = self.scorer.probe
        batch = len(post) if keep is None else len(keep)
        self.rows_run += batch * len(self.plans)
        groups = []
        for plan, (before, after) in zip(self.plans, self._around, strict=True):
            parts = (before, post.to(probe.dtype), after)
            embeds = torch.cat([part.expand(batch, -1, -1) for part in parts], 1)
            begin = self._begin
            mask = attention_mask(plan, keep, self.example.post_tok, probe.dtype, begin)
            logits = self.scorer.logits(embeds, plan.positions[begin:], mask, plan.rows - begin, self.prefix)
            found = token_logprobs(logits, plan.pick, plan.token)
            groups.append(found.new_zeros(batch, plan.groups).index_add(1, plan.group, found))
        return torch.cat(groups, 1)


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


class Scorer:
    """The batched engine: token budget, out-of-memory back-off, trial of the model. One per ``Probe``.

    Attributes:
        token_budget: tokens of one batch.
        tried: what the trial found (``probes.models.trial.Trial``), None before the first row.
    """

    def __init__(self, probe: LoadedModel) -> None:
        self.probe = probe
        self.inner = _inner(probe.model)
        self.token_budget = TOKEN_BUDGET.get(probe.device.type, TOKEN_BUDGET["cuda"])
        self.tried: Trial | None = None
        self._packs, self._keeps = True, True
        self._checked, self._checked_prefix = 0, 0
        self._shared: dict[tuple[int, ...], Prefix] | None = None
        parameters = inspect.signature(self.inner.forward).parameters
        self._takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        self._takes = frozenset(parameters)

    def logits(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        rows: torch.Tensor,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        """Logits ``[B, R, V]`` at ``rows`` for embeddings ``[B, S, D]``, positions ``[S]`` and a 2-D or 4-D mask; where
        there is a prefix, of the tokens after it."""
        inputs = self._inputs(embeds, positions) | {"attention_mask": mask}
        if prefix is not None:
            inputs |= {"past_key_values": prefix.cache(len(embeds)), "use_cache": True}
        return self.call(inputs, rows)

    def _inputs(self, embeds: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"inputs_embeds": embeds}
        if self._takes_all or "position_ids" in self._takes:  # Bloom and the state-space models count for themselves
            inputs["position_ids"] = positions.expand(len(embeds), -1)
        return inputs

    def call(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, R, V]`` at ``rows`` of the model on ``inputs``."""
        if self._takes_all or "use_cache" in self._takes:
            inputs = {"use_cache": False} | inputs
        if "logits_to_keep" in self._takes:
            return self.probe.model(**inputs, logits_to_keep=rows).logits
        return self.probe.model(**inputs).logits[:, rows]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """While the block lasts the model stays as it is: what one row's prefix left in its cache serves the next row
        with that prefix. Outside, a prefix is run anew for every ``Forward``: somebody may draw new weights."""
        before = self._shared
        self._shared = {} if before is None else before
        try:
            yield
        finally:
            self._shared = before

    def changed(self) -> None:
        """The model has other weights from now on: what an earlier prefix left serves no row any more."""
        if self._shared is not None:
            self._shared.clear()

    def prefix(self, ids: Sequence[int]) -> Prefix:
        """The model's cache after ``ids``.

        Raises:
            NoPrefix: it has none that can be kept.
        """
        if not self._takes_all and not {"past_key_values", "use_cache"} <= self._takes:
            raise NoPrefix("it takes no past_key_values")
        key = tuple(ids)
        if self._shared is not None and key in self._shared:
            return self._shared[key]
        device = self.probe.device
        with torch.no_grad():
            embeds = self.probe.model.get_input_embeddings()(torch.tensor([key], device=device))
            inputs = self._inputs(embeds, torch.arange(len(key), device=device))
            if "logits_to_keep" in self._takes:
                inputs["logits_to_keep"] = 1
            found = read_prefix(self.probe.model, inputs)
        if self._shared is not None:
            self._shared.clear()
            self._shared[key] = found
        return found

    def forward(self, example: Example, targets: Sequence[str]) -> Forward:
        """The score function of one example.

        Args:
            targets: out of "label" (log-odds of the generated label sentence against the log-sum over the other
                candidates; plain log p if there are none), "explanation" (sum of log p of its tokens given all before
                them) and ``explanation[a:b]``.
        Raises:
            ProbeInputError: the row has no such part.
        """
        self.check(example)
        return Forward(self, example, targets, self._packs, self._keeps)

    def check(self, example: Example) -> None:
        """Tries the model on a row unless a longer one was tried before (``probes.models.trial``). A data set's longest
        row first: then no later one can find a window, a mask or a memory too short.

        Raises:
            ProbeInputError: the model cannot be probed, by name and reason.
        """
        targets = ["label"] * (example.segment("label") is not None) + stretches(example)
        size, first = len(example.ids), example.post_tok[0]
        if (size <= self._checked and first <= self._checked_prefix) or not targets:
            return
        try:
            tried = try_model(self, lambda packed, keep: Forward(self, example, targets, packed, keep))
        except RuntimeError as error:
            self.back_off(error, self.token_budget)  # one row at a time: there is no smaller batch
            raise
        self.tried = tried if self.tried is None else self.tried.worse(tried)
        self._packs, self._keeps = self.tried.packs, not self.tried.unkept
        self._checked, self._checked_prefix = max(self._checked, size), max(self._checked_prefix, first)

    def fit(self, max_memory: int) -> None:
        """Makes batches small enough. After ``check``, which measures what a token takes.

        Args:
            max_memory: bytes for weights, kept prefix and batches together.
        Raises:
            ProbeInputError: not even one row of the longest that was tried fits.
        """
        assert self.tried is not None
        room = max_memory - self._weights - self.tried.prefix_bytes
        self.token_budget = min(self.token_budget, int(room // (_SLACK * self.tried.token_bytes)))
        if self.token_budget < self.tried.tokens:
            least = self._weights + self.tried.prefix_bytes + _SLACK * self.tried.token_bytes * self.tried.tokens
            raise ProbeInputError(
                f"max memory {_gib(max_memory)}: weights and one row of {self.tried.tokens} tokens take "
                f"{_gib(least)}; give at least that, or a model and rows that are smaller"
            )

    @property
    def memory(self) -> dict[str, int]:
        """What scoring takes, in bytes: ``weights``, ``prefix``, ``batch``; and ``tokens`` of the longest row that
        every pass runs, ``rows`` of such in a batch. After ``check``."""
        assert self.tried is not None
        rows = self.batch_rows(self.tried.tokens)
        batch = int(_SLACK * self.tried.token_bytes * self.tried.tokens * rows)
        found = {"weights": self._weights, "prefix": self.tried.prefix_bytes, "batch": batch}
        return {**found, "tokens": self.tried.tokens, "rows": rows}

    @property
    def _weights(self) -> int:
        held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
                for one in (*self.probe.model.parameters(), *self.probe.model.buffers())}  # fmt: skip
        return sum(held.values())

    def label_ids(self, example: Example) -> tuple[int, list[int], list[list[int]], bool]:
        """Token ids the label target compares.

        Returns:
            where they start; ids of the generated label sentence; ids of every other candidate; and whether the
            generated sentence had to be tokenised anew to be comparable (its tokens reach past its own end).
        Raises:
            ProbeInputError: the row has no label sentence.
        """
        segment = example.segment("label")
        if segment is None:
            raise ProbeInputError(f"{example.id}: the row has no label sentence to attribute")
        start, end = segment.tok
        encode = self.probe.token_bytes.encode
        # What the first label token holds besides the label (a space, say) opens every candidate too.
        lead_bytes = range(example.byte_spans[start][0], example.char_bytes[segment.char[0]])
        lead = "".join(example.text[i] for i, at in enumerate(example.char_bytes[:-1]) if at in lead_bytes)
        generated = list(example.ids[start:end])
        label = encode(lead + example.label_text)
        others = [encode(lead + text) for text in example.rivals]
        whole = example.byte_spans[end - 1][1] == example.char_bytes[segment.char[1]]
        return (start, generated, others, False) if whole else (start, label, others, label != generated)

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], hidden: Sequence[Sequence[Span]] | None = None
    ) -> torch.Tensor:
        """Sum of log p of ``sequence[start:]`` given what precedes, for ragged sequences, right-padded and masked.

        Args:
            sequences: token ids; starts: first scored token of each, at least 1.
            hidden: for each sequence token ranges that no position may attend to; positions stay.
        Returns:
            float64 ``[len(sequences)]`` in nats, no gradient; independent of what shares the batch.
        """
        if any(start < 1 or start > len(sequence) for sequence, start in zip(sequences, starts, strict=True)):
            raise ProbeError("logprobs: each start must lie in 1..len(sequence)")
        device = self.probe.device
        # Alike lengths share a batch, so little of it is padding.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))

        def part(indices: torch.Tensor) -> torch.Tensor:
            chosen = [order[int(i)] for i in indices]
            size = max(len(sequences[i]) for i in chosen)
            ids = torch.full((len(chosen), size), self.probe.pad_id, device=device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i], device=device)
                mask[row, : len(sequences[i])] = 1
                for a, b in hidden[i] if hidden is not None else ():
                    mask[row, a:b] = 0
            first = min(starts[i] for i in chosen) - 1
            rows = torch.arange(first, size - 1, device=device)
            with torch.no_grad():
                embeds = self.probe.model.get_input_embeddings()(ids)
                logits = self.logits(embeds, torch.arange(size, device=device), mask, rows)
                picked = logits.gather(2, ids[:, first + 1 :, None])[..., 0].double() - log_norm(logits)
            at = torch.arange(first + 1, size, device=device)
            ends = torch.tensor([[starts[i], len(sequences[i])] for i in chosen], device=device)
            scored = (at >= ends[:, :1]) & (at < ends[:, 1:])
            return torch.where(scored, picked, 0.0).sum(1)

        longest = max((len(sequence) for sequence in sequences), default=1)
        result = torch.empty(len(sequences), device=device, dtype=torch.float64)
        result[torch.tensor(order, device=device)] = self.chunked(part, torch.arange(len(sequences)), longest)
        return result

    def chunked(
        self, part: Callable[[torch.Tensor], torch.Tensor], items: torch.Tensor, tokens: int, per_item: int = 1
    ) -> torch.Tensor:
        """``torch.cat`` of ``part`` over slices of ``items`` that fit the token budget, halved when memory runs out.

        Args:
            tokens: of one row. per_item: rows that ``part`` makes of an item; where fewer fit, it has to see to that.
        """
        done: list[torch.Tensor] = []
        at = 0
        while at < len(items):
            rows = max(1, self.batch_rows(tokens) // per_item)
            try:
                done.append(part(items[at : at + rows]))
                at += rows
            except RuntimeError as error:
                self.back_off(error, tokens)
        return torch.cat(done)

    def batch_rows(self, tokens: int) -> int:
        """Rows of ``tokens`` tokens that make one batch."""
        return max(1, self.token_budget // max(tokens, 1))

    def back_off(self, error: RuntimeError, tokens: int) -> None:
        """Halves the token budget if ``error`` is an out-of-memory error and a smaller batch exists; else raises it.

        Raises:
            ProbeError: a single row does not fit.
        """
        out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise error
        if self.batch_rows(tokens) == 1:
            raise ProbeError(
                f"out of memory with a single sequence of {tokens} tokens on {self.probe.device}"
            ) from error
        self.token_budget = tokens * (self.batch_rows(tokens) // 2)
        if self.probe.device.type == "cuda":
            torch.cuda.empty_cache()


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _inner(model: Any) -> Any:
    """The transformers model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
