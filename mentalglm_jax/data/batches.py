"""From records to packed training batches, with Grain.

Each example is one conversation as token ids plus its training targets: which positions predict an answer token, and
which token. Examples are packed best-fit into rows that have two capacities, tokens and targets, so that the loss can
gather the targets into a fixed-size block before the vocabulary projection and nothing is ever cut.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from mentalglm_jax.data.conversations import Conversation
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tasks import Order
from mentalglm_jax.text.tokenizer import Encoded, GlmTokenizer

_log = logging.getLogger(__name__)
# Rows open at a time while packing: more pack tighter (99 % of log-normal lengths at 64) and cost time.
_OPEN_ROWS = 64


class Example(TypedDict):
    """One conversation. ``target_index[i]`` is the position whose logits predict ``target_ids[i]``; ``post`` is
    the span of tokens that hold nothing but the post; ``id`` is the record's, to name it by.

    A pair of answers is one example of two segments, each with the prompt: ``split`` is where the second, rejected one
    begins, ``reference`` the log-probability of each target when the stage began. All examples are pairs or none is.
    """

    tokens: Int[np.ndarray, " n"]
    target_index: Int[np.ndarray, " m"]
    target_ids: Int[np.ndarray, " m"]
    post: NotRequired[tuple[int, int]]
    id: NotRequired[str]
    split: NotRequired[int]
    reference: NotRequired[Float[np.ndarray, " m"]]


class Batch(TypedDict):
    """Packed rows. ``segment_ids`` 0 is padding; ``target_weights`` is 1 for a target, 0 for an unused slot;
    ``is_post`` marks the tokens of posts. Of pairs of answers, chosen ones are the odd segments, and the last three
    are there: the segment of every target (0 for an unused slot), 1 for a pair and 0 for an unused place of P, and
    ``Example.reference``."""

    tokens: Int[np.ndarray, "B S"]
    positions: Int[np.ndarray, "B S"]
    segment_ids: Int[np.ndarray, "B S"]
    target_index: Int[np.ndarray, "B M"]
    target_ids: Int[np.ndarray, "B M"]
    target_weights: Float[np.ndarray, "B M"]
    is_post: Bool[np.ndarray, "B S"]
    target_segments: NotRequired[Int[np.ndarray, "B M"]]
    pair_weights: NotRequired[Float[np.ndarray, "B P"]]
    reference: NotRequired[Float[np.ndarray, "B M"]]


def example(encoded: Encoded) -> Example:
    """The training example of an encoded conversation: token ``t`` is predicted at position ``t - 1``.

    The first token has no position before it and is never a target, whatever its mask says.
    """
    ids = np.asarray(encoded.ids, np.int32)
    index = np.flatnonzero(np.asarray(encoded.mask)[1:]).astype(np.int32)
    return Example(tokens=ids, target_index=index, target_ids=ids[index + 1])


def encode_records(
    records: Iterable[Record], tokenizer: GlmTokenizer, sequence_length: int, order: Order = "label_first"
) -> tuple[list[Example], list[str]]:
    """Examples of ``records`` and the ids of those left out because they exceed ``sequence_length`` tokens.

    An over-long example is left out whole: cutting it would train an answer without its end.

    Raises:
        InputError: nothing is left, or a text that the tokenizer cannot write.
    """
    kept, too_long = [], []
    for record in records:
        try:
            encoded = tokenizer.chat(record.chat(order))
        except InputError as error:
            raise InputError(f"record {record.id!r}: {error}") from None
        if len(encoded.ids) > sequence_length:
            too_long.append(record.id)
        else:
            post = tokenizer.span_in_prompt(record.prompt, record.post, record.system)
            kept.append({**example(encoded), "post": post, "id": record.id})
    if not kept:
        raise InputError(
            f"none of {len(too_long)} records fits into sequence_length = {sequence_length} tokens; raise it"
            if too_long
            else "no training records: check the recipe's data, languages and tasks"
        )
    return kept, too_long


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: GlmTokenizer, sequence_length: int,
    train_on: Literal["last", "all"],
) -> tuple[list[Example], list[str]]:  # fmt: skip
    """Examples of conversations, their ``last`` or ``all`` assistant turns being targets, and the ids of those left out
    because they exceed ``sequence_length`` tokens.

    Raises:
        InputError: naming the conversation: turns that the chat format does not have in this order.
    """
    kept, too_long = [], []
    for one in conversations:
        try:
            encoded = tokenizer.chat(one.messages, train_on)
        except InputError as error:
            raise InputError(f"conversation {one.id!r}: {error}") from None
        if len(encoded.ids) > sequence_length:
            too_long.append(one.id)
        else:
            kept.append({**example(encoded), "id": one.id})
    return kept, too_long


def encode_chats(chats: Iterable[tuple[str, str]], tokenizer: GlmTokenizer, sequence_length: int) -> list[Example]:
    """Examples for pre-training from (user, assistant) turns; as in fine-tuning, only the answer is a target.

    Over-long ones are left out whole; a warning says how many.

    Raises:
        InputError: nothing is left.
    """
    return _fitting(
        (
            tokenizer.chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
            for user, assistant in chats
        ),
        sequence_length,
    )


def encode_posts(posts: Iterable[str], tokenizer: GlmTokenizer, sequence_length: int) -> list[Example]:
    """Examples for pre-training from plain posts, each a user turn: every token but the first is a target.

    Over-long ones are left out whole; a warning says how many.

    Raises:
        InputError: nothing is left.
    """
    rows = (tuple(tokenizer.prompt_ids(post)) for post in posts)
    return _fitting((Encoded(ids, (True,) * len(ids)) for ids in rows), sequence_length)


def _fitting(texts: Iterable[Encoded], sequence_length: int) -> list[Example]:
    rows = list(texts)
    kept = [row for row in rows if len(row.ids) <= sequence_length]
    if not kept:
        raise InputError(
            f"none of {len(rows)} pre-training texts fits into sequence_length = {sequence_length} tokens; raise it"
            if rows
            else "no pre-training texts: check the recipe's data"
        )
    if len(kept) < len(rows):
        _log.warning("%d of %d pre-training texts are longer than sequence_length = %d tokens and were left out whole",
                     len(rows) - len(kept), len(rows), sequence_length)  # fmt: skip
    return [example(row) for row in kept]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of every token, target, post span and split, in order: what tells two data sets of the same size apart."""
    digest = hashlib.sha256()
    for item in examples:
        parts = [item["tokens"], item["target_index"], item["target_ids"], item.get("post", ())]
        for values in [*parts, [item["split"]]] if "split" in item else parts:
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(np.asarray(values, np.int32).tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What packing did to a data set, known before training starts; ``efficiency`` is the share that is not padding.
    ``median``, ``p95`` and ``longest`` are lengths of examples in tokens."""

    examples: int
    tokens: int
    targets: int
    median: int
    p95: int
    longest: int
    rows: int
    efficiency: float

    def __str__(self) -> str:
        return (
            f"{self.examples:,} examples of {self.median} tokens (median; 95 % up to {self.p95}, longest "
            f"{self.longest}), {self.targets / self.tokens:.0%} of them answer; {self.rows:,} rows, "
            f"packed {self.efficiency:.0%} full"
        )


class PackedBatches:
    """Shuffled, endlessly repeated batches of packed rows with a checkpointable iterator.

    Rows are packed once. So an epoch is exactly ``steps_per_epoch()`` batches and holds every example once, and a
    resumed iterator finds its place from one number. Every epoch has the rows in another order; its last batch is
    filled up with empty rows.

    Args:
        examples: what to pack.
        rows: rows per batch (B).
        sequence_length: tokens per row (S).
        targets_per_row: targets per row (M); None chooses 1.25 x the data's own share, at least the largest example.
        seed: of packing, shuffling and masking, from 0 to 2**32 - 1.
        mask_posts: each row's post tokens are replaced by ``neutral_id`` at a rate drawn from U(0, mask_posts), anew
            every epoch, so that a model probed by erasure has seen erased posts (Madsen et al. 2024, arXiv 2310.06271).
        local_rows: the rows of every batch that this process feeds, in order; batches hold no others. None is all.

    Raises:
        InputError: no examples, an example longer than a row, or one with more targets than a row has room for.
    """

    def __init__(
        self, examples: Sequence[Example], *, rows: int, sequence_length: int, targets_per_row: int | None, seed: int,
        mask_posts: float = 0.0, neutral_id: int = 0, local_rows: Sequence[int] | None = None,
    ):  # fmt: skip
        tokens = sum(len(e["tokens"]) for e in examples)
        targets = sum(len(e["target_ids"]) for e in examples)
        if not targets:
            raise InputError(f"nothing to train on: {len(examples)} examples without any answer token")
        sizes = np.array([len(e["tokens"]) for e in examples])
        longest = int(sizes.max())
        most = max(len(e["target_ids"]) for e in examples)
        if longest > sequence_length:
            raise InputError(f"sequence_length = {sequence_length}, but an example has {longest} tokens; raise it")
        if targets_per_row is None:
            share = int(np.ceil(1.25 * sequence_length * targets / tokens / 32)) * 32
            targets_per_row = min(max(share, most), sequence_length)
        if most > targets_per_row:
            raise InputError(f"targets_per_row = {targets_per_row}, but an example has {most} answer tokens; raise it")
        self.targets_per_row = targets_per_row
        self._mask_posts, self._neutral_id = mask_posts, neutral_id
        self._rows, self._sequence_length, self._seed, self._examples = rows, sequence_length, seed, examples
        self._local_rows = list(range(rows)) if local_rows is None else list(local_rows)
        self._packed = self._pack()
        self.pairs_per_row = max(map(len, self._packed)) if "split" in examples[0] else 0
        self.lengths = Lengths(
            examples=len(examples), tokens=tokens, targets=targets, median=int(np.median(sizes)),
            p95=int(np.percentile(sizes, 95)), longest=longest, rows=len(self._packed),
            efficiency=tokens / (len(self._packed) * sequence_length),
        )  # fmt: skip

    def _pack(self) -> list[list[int]]:
        """The numbers of the examples in each row."""

        def lengths(number: int) -> dict[str, np.ndarray | int]:
            item = self._examples[number]
            return {"tokens": item["tokens"], "targets": item["target_ids"], "number": number}

        shuffled = grain.MapDataset.source(range(len(self._examples))).seed(self._seed).shuffle().map(lengths)
        packed = grain.experimental.BestFitPackIterDataset(
            shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
            length_struct={"tokens": self._sequence_length, "targets": self.targets_per_row},
            num_packing_bins=_OPEN_ROWS, shuffle_bins=False, meta_features=("number",),
        )  # fmt: skip
        return [list(row["number"]) for row in packed]

    def steps_per_epoch(self) -> int:
        """Batches that hold every example once."""
        return -(-self.lengths.rows // self._rows)

    def __iter__(self) -> grain.DatasetIterator:
        """A Grain iterator over ``Batch`` with ``get_state`` and ``set_state``."""
        batches = self._shuffled().batch(self._rows, batch_fn=self._batch).repeat()
        if self._mask_posts > 0:
            batches = batches.random_map(self._masked)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def _shuffled(self) -> grain.MapDataset:
        return grain.MapDataset.source(self._packed).seed(self._seed).shuffle()

    def rows_of(self, batch: int) -> list[list[int]]:
        """The numbers of the examples in each row of the ``batch``-th batch (from 0) of the iterator."""
        rows: Any = self._shuffled().batch(self._rows, batch_fn=list).repeat()[batch]
        return [list(map(int, row)) for row in rows]

    def examples_of(self, batch: int) -> list[int]:
        """The numbers of the examples in the ``batch``-th batch (from 0) of the iterator, in all its rows."""
        return [number for row in self.rows_of(batch) for number in row]

    def _masked(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """``batch`` with post tokens replaced by the neutral token, in each row at a rate from U(0, mask_posts)."""
        # Drawn for all rows on every process, so that a row is masked alike wherever it is.
        rate = rng.uniform(0, self._mask_posts, (self._rows, 1))
        drawn = (rng.random((self._rows, self._sequence_length)) < rate)[self._local_rows]
        hit = batch["is_post"] & drawn
        return {**batch, "tokens": np.where(hit, np.int32(self._neutral_id), batch["tokens"])}

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        local = len(self._local_rows)
        places, slots = (local, self._sequence_length), (local, self.targets_per_row)
        tokens, positions, segment_ids = (np.zeros(places, np.int32) for _ in range(3))
        target_index, target_ids = (np.zeros(slots, np.int32) for _ in range(2))
        weights, is_post = np.zeros(slots, np.float32), np.zeros(places, bool)
        reference, pair_weights = np.zeros(slots, np.float32), np.zeros((local, self.pairs_per_row), np.float32)
        for line, number_of_row in enumerate(self._local_rows):
            row = rows[number_of_row] if number_of_row < len(rows) else ()  # an epoch's last batch may be short
            start = used = segment = 0  # tokens, targets and segments in this row so far
            pair_weights[line, : len(row)] = 1
            for number in row:
                item = self._examples[number]
                end, full = start + len(item["tokens"]), used + len(item["target_ids"])
                tokens[line, start:end] = item["tokens"]
                begin = start
                for stop in (start + item["split"], end) if "split" in item else (end,):
                    segment += 1
                    positions[line, begin:stop] = np.arange(stop - begin)
                    segment_ids[line, begin:stop] = segment
                    begin = stop
                target_index[line, used:full] = item["target_index"] + start
                target_ids[line, used:full] = item["target_ids"]
                weights[line, used:full] = 1
                reference[line, used:full] = item.get("reference", 0)
                a, b = item.get("post", (0, 0))
                is_post[line, start + a : start + b] = True
                start, used = end, full
        batch = Batch(tokens=tokens, positions=positions, segment_ids=segment_ids, target_index=target_index,
                      target_ids=target_ids, target_weights=weights, is_post=is_post)  # fmt: skip
        if not self.pairs_per_row:
            return batch
        segments = np.where(weights > 0, np.take_along_axis(segment_ids, target_index, axis=1), 0)
        return {**batch, "target_segments": segments, "pair_weights": pair_weights, "reference": reference}
