"""What the explanation does to the label, and the label to the explanation, measured on the model itself.

* ``weight_of_evidence`` (PEX; Zhao & Daume 2025): log p(e | x, y) - log p(e | x, not y), in nats: is this explanation
  what the model would say for this label rather than for another? Two or three more passes. It has no null and no
  p-value: a model wrote the explanation after this label, so it is above 0 on average whatever it says.
* ``mediation_share``: of all the post does to the label, how much goes through the explanation. 0 where the
  label comes first; there the explanation is an afterthought whatever it says.
* ``counterfactuals`` (CCT; Siegel et al. 2024): clauses are put into the post, and both the label's shift (total
  variation distance) and whether the new explanation mentions the clause are recorded. A model that explains itself
  mentions what moves it; ``probes.results.summary`` correlates the two over the data set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.models.greedy import continued, stops_of
from probes.models.probed import Probed
from probes.models.token_bytes import decode_bytes
from probes.records import Check, Example, Span
from probes.saliency.settings import SMALLEST_CHANGE


def _check(name: str, value: float, n: int) -> Check:
    if not math.isfinite(value):
        return Check(name, "model", None, None, None, None, None, None, 0, "abstain", ())
    return Check(name, "model", value, None, None, None, None, None, n, "ok", ())


def weight_of_evidence(probe: Probed, example: Example) -> Check:
    """Weight of evidence of the explanation for its label, in nats; abstains without a rival label or explanation.

    Rivals are weighted by p(rival | x) among rivals. Where the explanation comes first, Bayes' rule turns it round:
    log odds of the label with the explanation's words minus without them (hidden from attention).
    """
    label, said = example.segment("label"), example.segment("explanation")
    if label is None or said is None:
        return _check("weight_of_evidence", math.nan, 0)
    probe.scorer.check(example)
    start, own, others, _ = probe.scorer.label_ids(example)
    if not others:
        return _check("weight_of_evidence", math.nan, 0)
    head = list(example.ids[:start])
    if said.tok[0] < start:
        shown, hidden = (_log_odds(probe, head, [own, *others], spans) for spans in ((), (said.tok,)))
        return _check("weight_of_evidence", shown - hidden, 2)
    tail = list(example.ids[label.tok[1] : said.tok[1]])
    gap = said.tok[0] - label.tok[1]
    sequences = [[*head, *ids, *tail] for ids in (own, *others)]
    found = probe.scorer.logprobs(sequences, [start + len(ids) + gap for ids in (own, *others)])
    prior = probe.scorer.logprobs([[*head, *ids] for ids in others], [start] * len(others)).log_softmax(0)
    return _check("weight_of_evidence", float(found[0] - (found[1:] + prior).logsumexp(0)), len(others))


def _log_odds(probe: Probed, head: list[int], labels: Sequence[list[int]], hidden: Sequence[Span]) -> float:
    """Log-odds of the first label against the others after ``head``, with token ranges hidden from attention."""
    sequences = [[*head, *ids] for ids in labels]
    found = probe.scorer.logprobs(sequences, [len(head)] * len(labels), [hidden] * len(labels))
    return float(found[0] - found[1:].logsumexp(0)) if len(labels) > 1 else float(found[0])


def mediation_share(probe: Probed, example: Example, donors: Sequence[Example], most: int = 4) -> Check:
    """1 - (label shift when only the post is exchanged) / (when post and explanation are), mean over donors.

    The post is exchanged for one the model labels otherwise, whole and real, so nothing is erased and nothing is out of
    distribution; the explanation stays as it was, or becomes the donor's own.

    1: the label hears of the post through the explanation only. 0: it would be the same without the explanation, as it
    must be where the label comes first.

    Args:
        donors: other rows of the same task; the first ``most`` with another label are used.
    Returns:
        abstains without label or explanation, without a donor, or where donors move the label by less than 0.1 nats.
    """
    label, said = example.segment("label"), example.segment("explanation")
    others_rows = [d for d in donors if d.label != example.label and d.candidates == example.candidates]
    usable = [d for d in others_rows if d.segment("label") is not None and d.segment("explanation") is not None][:most]
    if label is None or said is None or not usable:
        return _check("mediation_share", math.nan, 0)
    probe.scorer.check(example)
    start, own, others, _ = probe.scorer.label_ids(example)
    labels, said_before = [own, *others], list(example.ids[example.prompt_len : start])
    whole = _log_odds(probe, list(example.ids[:start]), labels, ())
    direct, total = 0.0, 0.0
    for donor in usable:
        donor_start = probe.scorer.label_ids(donor)[0]
        direct += whole - _log_odds(probe, [*donor.ids[: donor.prompt_len], *said_before], labels, ())
        total += whole - _log_odds(probe, list(donor.ids[:donor_start]), labels, ())
    if abs(total) < SMALLEST_CHANGE * len(usable):
        return _check("mediation_share", math.nan, 0)
    return _check("mediation_share", 1.0 - direct / total, len(usable))


def counterfactuals(
    probe: Probed, example: Example, fillers: Sequence[str], count: int = 8, seed: int = 0, extra_tokens: int = 24
) -> tuple[tuple[float, float], ...]:
    """Inserts ``count`` clauses, one at a time, at a random clause boundary each.

    Args:
        fillers: clauses of other posts. extra_tokens: how much longer than the original answer the new one may get.
    Returns:
        (total variation distance of the label distribution, 1.0 if the new answer mentions the clause else 0.0) per
        insertion; empty when the prompt cannot be rebuilt from its text, or there is nothing to insert or no rival.
    """
    label = example.segment("label")
    prompt, _ = decode_bytes(b"".join(probe.token_bytes(index) for index in example.ids[: example.prompt_len]))
    encode = probe.token_bytes.encode
    if label is None or not fillers or encode(prompt) != list(example.ids[: example.prompt_len]):
        return ()
    probe.scorer.check(example)
    start, own, others, _ = probe.scorer.label_ids(example)
    if not others or start > example.prompt_len + 4:
        return ()  # the answer begins with the explanation: its label cannot be scored without generating first
    rng, (a, b) = random.Random(seed), example.post_char
    lead = list(example.ids[example.prompt_len : start])
    ends = [end for _, end in pieces(example.post, cut=example.cut)][:-1] or [len(example.post)]
    posts: list[tuple[str, Span]] = []
    for filler in rng.sample(list(fillers), min(count, len(fillers))):
        at = rng.choice(ends)
        posts.append((example.post[:at] + filler + example.post[at:], (at, at + len(filler))))
    prompts = [encode(prompt[:a] + post + prompt[b:]) for post, _ in posts]
    before = _distribution(probe, [*example.ids[: example.prompt_len], *lead], [own, *others])
    after = [_distribution(probe, [*ids, *lead], [own, *others]) for ids in prompts]
    shifts = [0.5 * float(np.abs(p - before).sum()) for p in after]
    answers = _generate(probe, prompts, len(example.ids) - example.prompt_len + extra_tokens)
    said = []
    for (post, (low, high)), answer in zip(posts, answers, strict=True):
        places = (span for citation in align(answer, post) for span in citation.post_char)
        said.append(float(any(2 * (min(y, high) - max(x, low)) >= y - x for x, y in places)))
    return tuple(zip(shifts, said, strict=True))


def _distribution(probe: Probed, head: list[int], labels: Sequence[list[int]]) -> np.ndarray:
    """float64 ``[labels]``: probability of each label sentence among them."""
    found = probe.scorer.logprobs([[*head, *ids] for ids in labels], [len(head)] * len(labels))
    return found.double().softmax(0).cpu().numpy()


def _generate(probe: Probed, prompts: Sequence[list[int]], most: int) -> list[str]:
    """Greedy answers, left-padded with a mask, in batches under the token budget; one at a time where the model ignores
    the mask."""
    answers: list[str] = []
    rows = 1 if probe.scorer.can.unmasked else probe.scorer.batch_rows(max(map(len, prompts)) + most)
    for at in range(0, len(prompts), rows):
        chunk = prompts[at : at + rows]
        size = max(map(len, chunk))
        ids = torch.full((len(chunk), size), probe.pad_id, device=probe.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(chunk):
            ids[row, size - len(prompt) :] = torch.tensor(prompt, device=probe.device)
            mask[row, size - len(prompt) :] = 1
        stops = stops_of(probe.model, probe.tokenizer)
        out = continued(probe.model, ids, mask, most, stops, probe.pad_id)
        for row in out[:, size:].tolist():
            stop = next((i for i, index in enumerate(row) if index in probe.token_bytes.added), len(row))
            answers.append(decode_bytes(b"".join(probe.token_bytes(index) for index in row[:stop]))[0])
    return answers
