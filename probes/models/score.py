"""Teacher-forced scores of a label and an explanation, many perturbed posts at a time.

One row of work is one packed sequence (``probes.models.pack``), so one pass gives log p of every candidate label and of
the explanation. What stands before the post is run once and kept (``probes.models.prefix``). On the first example (and
each longer one) every shortcut is tried against a plain call of the model (``probes.models.trial``): where they differ
it is scored without it ever after, or refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from probes.errors import ProbeError, ProbeInputError
from probes.models.abilities import Abilities
from probes.models.forward import Forward
from probes.models.loaded import LoadedModel
from probes.models.pack import log_norm
from probes.models.prefix import NoPrefix, Prefix, read_prefix
from probes.models.trial import Trial, stretches, try_joined, try_model
from probes.records import Example, Span

# Tokens of one batch. On a CPU larger batches leave the cache and get slower; on a GPU 8192 tokens of a 9B model with a
# 150k vocabulary stay under 5 GB of saved activations and logits per 1000 tokens.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
_SLACK = 1.25  # of what a pass is counted to take: buffers of the kernels, blocks that the allocator cannot give back


class Scorer:
    """The batched engine: token budget, out-of-memory back-off, trial of the model. One per ``Probe``.

    Attributes:
        token_budget: tokens of one batch.
        tried: what the trial found (``probes.models.trial.Trial``), None before the first row.
        can: what the model can do, as far as it was tried.
    """

    def __init__(self, probe: LoadedModel) -> None:
        self.probe = probe
        self.inner = _inner(probe.model)
        self.token_budget = TOKEN_BUDGET.get(probe.device.type, TOKEN_BUDGET["cuda"])
        self.tried: Trial | None = None
        self.can = Abilities()
        self._checked, self._checked_prefix, self._settled = 0, 0, False
        self._held: dict[str, Example] = {}  # the rows that were tried: that of most tokens, that of the longest prefix
        self._shared: dict[tuple[tuple[int, ...], bool, bool], Prefix] | None = None
        parameters = inspect.signature(self.inner.forward).parameters
        self._takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        self._takes = frozenset(parameters)

    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        rows: torch.Tensor,
        prefix: Prefix | None,
        can: Abilities,
    ) -> torch.Tensor:
        """Logits ``[B, R, V]`` at ``rows`` for embeddings ``[B, S, D]`` or ids ``[B, S]``, positions ``[S]`` and a 2-D
        or 4-D mask; where there is a prefix, of the tokens after it."""
        inputs = self._inputs(tokens, positions, can) | {"attention_mask": mask}
        if prefix is not None:
            inputs |= {"past_key_values": prefix.cache(len(tokens)), "use_cache": True}
        return self.call(inputs, rows)

    def _inputs(self, tokens: torch.Tensor, positions: torch.Tensor, can: Abilities) -> dict[str, Any]:
        inputs: dict[str, Any] = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        takes = (
            self._takes_all or "position_ids" in self._takes
        )  # Bloom and the state-space models count for themselves
        if takes and not can.counts:
            inputs["position_ids"] = positions.expand(len(tokens), -1)
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

    def refused(self, what: str, why: str) -> ProbeInputError:
        """The line for what this model cannot be asked for."""
        return ProbeInputError(f"{self.probe.name}: {type(self.inner).__name__} cannot be asked for {what}: {why}")

    def prefix(self, ids: Sequence[int], can: Abilities) -> Prefix:
        """The model's cache after ``ids``.

        Raises:
            NoPrefix: it has none that can be kept.
        """
        if not self._takes_all and not {"past_key_values", "use_cache"} <= self._takes:
            raise NoPrefix("it takes no past_key_values")
        key = (tuple(ids), bool(can.on_ids), can.counts)
        if self._shared is not None and key in self._shared:
            return self._shared[key]
        device = self.probe.device
        with torch.no_grad():
            tokens = torch.tensor([key[0]], device=device)
            given = tokens if can.on_ids else self.probe.model.get_input_embeddings()(tokens)
            inputs = self._inputs(given, torch.arange(len(key[0]), device=device), can)
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
        return Forward(self, example, targets, self.can)

    def check(self, example: Example) -> None:
        """Tries the model on a row unless a longer one was tried before (``probes.models.trial``). A data set's longest
        row first: then no later one can find a window, a mask or a memory too short.

        Raises:
            ProbeInputError: the model cannot be probed, by name and reason.
        """
        size, first = len(example.ids), example.post_tok[0]
        if (size <= self._checked and first <= self._checked_prefix) or not _tried_targets(example):
            return
        try:
            found = try_model(self, self._maker(example))
            tried = found if self.tried is None else self.tried.worse(found)
            self._require_same(example, tried)
            tried = self._try_joined(example, found, tried)
        except RuntimeError as error:
            self.back_off(error, self.token_budget)  # one row at a time: there is no smaller batch
            raise
        self.tried = tried
        self.can = self.tried.can
        if size > self._checked:
            self._checked, self._held["tokens"] = size, example
        if first > self._checked_prefix:
            self._checked_prefix, self._held["prefix"] = first, example

    def _maker(self, example: Example) -> Callable[[Abilities], Forward]:
        return lambda can: Forward(self, example, _tried_targets(example), can)

    def _try_joined(self, example: Example, found: Trial, tried: Trial) -> Trial:
        """Rows that need different ways are all scored by both at once: that is tried on each row that was tried."""
        rows = [(example, found.can)]
        rows += [(row, self.can) for row in self._held.values() if row is not example]
        gaps = [try_joined(self, self._maker(row), own, tried.can) for row, own in rows if own.way != tried.can.way]
        return dataclasses.replace(tried, gaps={**tried.gaps, "joined": max(gaps)}) if gaps else tried

    def _require_same(self, example: Example, tried: Trial) -> None:
        if self._settled and tried.can.limits.keys() != self.can.limits.keys():
            what = "; ".join(said for name, said in tried.can.limits.items() if name not in self.can.limits)
            raise ProbeInputError(f"{example.id}: this longer row can only be probed otherwise than those before it "
                                  f"({what}); probe the long rows in a run of their own")  # fmt: skip

    def settle(self, examples: Sequence[Example]) -> None:
        """Tries the model on the rows of one run: on the longest, and on that with the longest prefix. From now on rows
        are probed as those, or refused: the maps of a run are of one kind. Another run may settle otherwise."""
        self._settled = False
        self.check(max(examples, key=lambda e: len(e.ids)))
        self.check(max(examples, key=lambda e: e.post_tok[0]))
        self._settled = True

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
            hidden: for each sequence token ranges before its start that no position may attend to; positions stay.
                Where the model cannot hide tokens they are cut out, and what follows closes up.
        Returns:
            float64 ``[len(sequences)]`` in nats, no gradient; independent of what shares the batch.
        """
        if any(start < 1 or start > len(sequence) for sequence, start in zip(sequences, starts, strict=True)):
            raise ProbeError("logprobs: each start must lie in 1..len(sequence)")
        if hidden is not None and self.can.unmasked:
            gone = [{at for a, b in spans for at in range(a, b)} for spans in hidden]
            sequences = [
                [t for at, t in enumerate(ids) if at not in out] for ids, out in zip(sequences, gone, strict=True)
            ]
            starts, hidden = [at - len(out) for at, out in zip(starts, gone, strict=True)], None
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
                given = ids if self.can.on_ids else self.probe.model.get_input_embeddings()(ids)
                seen = None if self.can.unmasked else mask
                logits = self.logits(given, torch.arange(size, device=device), seen, rows, None, self.can)
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


def _tried_targets(example: Example) -> list[str]:
    return ["label"] * (example.segment("label") is not None) + stretches(example)


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _inner(model: Any) -> Any:
    """The transformers model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
