"""Is the saliency map itself true of the model? Gates a map has to pass in the ``full`` budget before it may speak.

Each map is judged by an eraser of another kind than made it, so that no method validates itself: gradient maps and
resampling by attention erasure, maps made by attention erasure by the pad token. All in nats of the label's log-odds.

* ``faithfulness_corr`` (Bhatt et al. 2020): Pearson r, over random subsets of clauses, of the saliency erased with the
  score lost, both without what the number of erased clauses explains (any positive map adds up to more where more is
  erased), and the score without what the number of erased tokens explains: a weak model answers any shorter post
  otherwise, and a map that knows lengths only would pass (V10). The map keeps its part of length, which counts
  against it. The gate: below 0.3, or not above 95 % of its null, a map may not speak.
* ``infidelity`` (Yeh et al. 2019), scaled: mean squared error of the best multiple of the saliency erased as a
  prediction of the score lost, as a share of the mean square of the loss; 0 is perfect, 1 no better than silence.
* ``comprehensiveness``, ``aopc_sufficiency`` (DeYoung et al. 2020): the score lost when the top clauses are erased, and
  changed when only they stay, mean over 1, 5, 10, 20 and 50 % of the clauses.
* ``soft_comprehensiveness``, ``soft_sufficiency`` (Zhao & Aletras 2023): each embedding dimension of a token is zeroed
  (or kept) with a probability that goes with its saliency. As published, scaled to a largest of 1, a map is judged by
  how much it erases: a flat one erases all and wins. Here every map erases (or keeps) ``SOFT_SHARE`` of the post in
  expectation, and only where is its own.
* ``max_sensitivity``: largest relative change of the map when punctuation is replaced by other punctuation.

The null of the first three is the same map rotated over the clauses of the post, as everywhere here. Its values in
random order would be no null for a text: where neighbouring clauses are alike, in the map and in what they do, that
rejects true nulls (``probes validate``, V10).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from probes.checks.agreement import cosine, pearson
from probes.checks.crosscheck import post_units, unit_sums
from probes.errors import RowRefused
from probes.models.forward import Forward
from probes.models.probed import Probed
from probes.models.token_bytes import decode_bytes
from probes.nulls import band
from probes.records import Attribution, Check, Example
from probes.saliency.attribute import attribute
from probes.saliency.erase import MaskTable, subset_masks
from probes.saliency.settings import METHODS, Settings

MIN_FAITHFULNESS = 0.3
MIN_RANK = 0.95
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
SOFT_SHARE = 0.2
_SUBSETS, _ROTATIONS, _SOFT_DRAWS = 64, 20, 4
_SWAPS: dict[int, str] = str.maketrans({"，": "、", "。": "；", "！": "。", ",": ";", ".": "!", "!": "."})


def judge(probe: Probed, example: Example, attributions: Sequence[Attribution], settings: Settings) -> list[Check]:
    """All gates for every label map of one post.

    Returns:
        one check per gate and method; a map that fails ``faithfulness_corr`` has it with status "failed_gate". With
        fewer than 3 clauses every gate abstains and shuts nobody out.
    """
    forward = probe.scorer.forward(example, ("label",))
    tables = {
        eraser: MaskTable.of(forward, dataclasses.replace(settings, eraser=eraser, units="clause"))
        for eraser in ("attention", "neutral")
    }
    checks: list[Check] = []
    for found in attributions:
        if found.target != "label":
            continue
        kind, changes = METHODS[found.method]
        own = {**dataclasses.asdict(settings), **changes}["eraser"] if kind in ("erase", "shap", "kernelshap") else ""
        table = tables["neutral" if own == "attention" else "attention"]
        values = unit_sums(found.char_values, table.spans)
        if len(values) < 3 or not np.isfinite(values).all():
            continue
        checks += _faithfulness(found.method, values, table, settings.seed)
        checks += _aopc(found.method, values, table)
        checks += _soft(found.method, example, forward, found.char_values, settings.seed)
    return checks


def _faithfulness(method: str, values: np.ndarray, table: MaskTable, seed: int) -> list[Check]:
    masks = subset_masks(table.count, _SUBSETS, seed)
    lost = _lost(table, masks)
    gone = 1 - masks.numpy()
    erased = gone @ values
    size = np.stack([np.ones(len(gone)), gone.sum(1)], 1)
    tokens = gone @ np.bincount(table.owner.numpy(), minlength=table.count)
    beyond = _without(np.column_stack([size, tokens]), lost)
    if np.ptp(beyond) <= 1e-9 * np.ptp(lost):  # length says it all
        beyond = np.zeros(len(lost))

    def partial(some: np.ndarray) -> float:
        sums = gone @ some
        rest = _without(size, sums)
        return pearson(rest, beyond) if np.ptp(rest) > 1e-9 * np.ptp(sums) else math.nan  # a constant orders nothing

    value = partial(values)
    draws = np.array([partial(moved) for moved in rotations(values, len(values))])
    draws = draws[np.isfinite(draws)]
    passed = math.isfinite(value) and value >= MIN_FAITHFULNESS and (draws < value).mean() >= MIN_RANK
    fitted = float(erased @ lost / max(float(erased @ erased), 1e-300)) * erased
    power = float(lost @ lost)
    miss = float(((fitted - lost) ** 2).sum() / power) if power > 0 else math.nan
    return [
        _made("faithfulness_corr", method, value, draws, "ok" if passed else "failed_gate"),
        _made("infidelity", method, miss, np.empty(0)),
    ]


def _without(what: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values [n]`` less their least-squares fit by the columns of ``what [n, m]``."""
    return values - what @ np.linalg.lstsq(what, values, rcond=None)[0]


def _lost(table: MaskTable, masks: torch.Tensor) -> np.ndarray:
    """float64 ``[rows]``: score of the whole post minus score of what each mask keeps."""
    scores = table(torch.cat([torch.ones(1, table.count, dtype=torch.float64), masks]))[:, 0].numpy()
    return scores[0] - scores[1:]


def rotations(values: np.ndarray, most: int) -> list[np.ndarray]:
    """``values`` rotated, the identity left out: all of them, or ``most``, evenly spaced."""
    count = min(most, len(values) - 1)
    return [np.roll(values, round(len(values) * (i + 1) / (count + 1))) for i in range(count)]


def _aopc(method: str, values: np.ndarray, table: MaskTable) -> list[Check]:
    orders = [np.argsort(-found, kind="stable") for found in (values, *rotations(values, _ROTATIONS))]
    sizes = [max(1, math.ceil(share * len(values))) for share in BINS]
    masks = np.ones((len(orders), len(sizes), len(values)))
    for i, order in enumerate(orders):
        for j, size in enumerate(sizes):
            masks[i, j, order[:size]] = 0.0
    flat = torch.as_tensor(masks.reshape(-1, len(values)))
    without, only = (_lost(table, rows).reshape(len(orders), len(sizes)).mean(1) for rows in (flat, 1 - flat))
    return [
        _made("comprehensiveness", method, float(without[0]), without[1:]),
        _made("aopc_sufficiency", method, float(only[0]), only[1:]),
    ]


def at_equal_share(values: np.ndarray, share: float) -> np.ndarray:
    """Probabilities ``[n]`` with mean ``share``, proportional to the positive values up to 1; what these cannot take is
    spread evenly over the rest."""
    size = np.maximum(values, 0.0)
    wanted, order = share * len(size), np.argsort(-size, kind="stable")
    left = np.append(np.cumsum(size[order][::-1])[::-1], 0.0)  # sum of the values from each place on
    for full in range(len(size)):
        if left[full] <= 0:  # all positive ones are certain, or there is none
            found = np.full(len(size), max(0.0, wanted - full) / (len(size) - full))
            found[order[:full]] = 1.0
            return found
        scale = (wanted - full) / left[full]
        if scale * size[order[full]] <= 1:
            found = scale * size
            found[order[:full]] = 1.0
            return found
    return np.ones(len(size))


def on_tokens(example: Example, char_values: np.ndarray) -> np.ndarray:
    """``[post tokens]``: the value of a map on the post's characters where each token begins."""
    first, last = example.post_tok
    starts = np.array([span[0] for span in example.byte_spans[first:last]])
    chars = np.searchsorted(np.array(example.char_bytes), starts, side="right") - 1 - example.post_char[0]
    return char_values[np.clip(chars, 0, len(char_values) - 1)]


def _soft(method: str, example: Example, forward: Forward, char_values: np.ndarray, seed: int) -> list[Check]:
    """Soft normalised erasure, not divided by the whole effect: in nats, so that posts without an effect do no harm.
    Abstains where the model is called on token ids: half a token has none."""
    names = ("soft_comprehensiveness", "soft_sufficiency")
    if forward.can.on_ids:
        return [_made(name, method, math.nan, np.empty(0)) for name in names]
    shares = at_equal_share(on_tokens(example, char_values), SOFT_SHARE)
    weight = torch.as_tensor(shares, dtype=torch.float32, device=forward.post.device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(_SOFT_DRAWS, *forward.post.shape, generator=generator).to(forward.post)
    rows = torch.cat(
        [forward.post[None], forward.post * (noise >= weight[:, None]), forward.post * (noise < weight[:, None])]
    )

    def part(chosen: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return forward(chosen)[:, 0].double().cpu()

    scores = forward.scorer.chunked(part, rows, forward.tokens).numpy()
    without, only = scores[0] - scores[1 : _SOFT_DRAWS + 1].mean(), scores[0] - scores[_SOFT_DRAWS + 1 :].mean()
    return [_made(name, method, float(value), np.empty(0)) for name, value in zip(names, (without, only), strict=True)]


def max_sensitivity(
    probe: Probed,
    example: Example,
    attributions: Sequence[Attribution],
    settings: Settings,
    fillers: Sequence[str] = (),
) -> list[Check]:
    """Largest change, over two replacements of the punctuation, of each label map on clauses: 1 - cosine, in [0, 2].

    Abstains (no check) where the post has no punctuation to replace or the new post cannot be laid out.
    """
    names = [a.method for a in attributions if a.target == "label"]
    before = {a.method: a for a in attributions if a.target == "label"}
    worst: dict[str, float] = {}
    for swaps in (_SWAPS, dict(list(_SWAPS.items())[::2])):
        post = example.post.translate(swaps)
        edited = _with_post(probe, example, post) if post != example.post else None
        if edited is None:
            continue
        units = post_units(list(before.values()), example.post, example.cut)
        for found in attribute(probe, edited, names, ("label",), settings, fillers):
            near = cosine(unit_sums(before[found.method].char_values, units), unit_sums(found.char_values, units))
            if math.isfinite(near):
                worst[found.method] = max(worst.get(found.method, 0.0), 1 - near)
    return [_made("max_sensitivity", name, value, np.empty(0)) for name, value in worst.items()]


def _with_post(probe: Probed, example: Example, post: str) -> Example | None:
    """The row with another post of the same length, or None where text and tokens do not go back and forth."""
    prompt, _ = decode_bytes(b"".join(probe.token_bytes(index) for index in example.ids[: example.prompt_len]))
    encode, (a, b) = probe.token_bytes.encode, example.post_char
    if encode(prompt) != list(example.ids[: example.prompt_len]):
        return None
    said = example.segment("explanation")
    row = {
        "id": example.id,
        "post": post,
        "prompt_ids": encode(prompt[:a] + post + prompt[b:]),
        "output_ids": list(example.ids[example.prompt_len :]),
        "label_text": example.label_text,
        "parsed_label": example.label,
        "parsed_explanation": example.explanation if said is not None else None,
        "candidates": example.candidates,
    }
    try:
        edited = probe.encode(row)
    except RowRefused:  # say too long, where other punctuation is more tokens
        return None
    return dataclasses.replace(edited, cut=example.cut)


def _made(name: str, method: str, value: float, draws: np.ndarray, status: str = "ok") -> Check:
    if not math.isfinite(value):
        return Check(name, method, None, None, None, None, None, None, 0, status if status != "ok" else "abstain", ())
    if not len(draws):
        return Check(name, method, value, None, None, None, None, None, 1, status, ())
    low, high = band(draws)
    p = (1 + int((draws >= value).sum())) / (1 + len(draws))
    return Check(
        name, method, value, float(draws.mean()), low, high, p, None, len(draws), status, (), tuple(draws.tolist())
    )
