"""Cheap checks of explanations: what they quote, how they compare with a reference, whether they fit the label."""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from mentalglm_jax.data.explain.quotes import MOST_CELLS, aligned, quotes_of_post, reduce
from mentalglm_jax.data.records import Record
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.baselines import tfidf_logreg
from mentalglm_jax.evaluate.metrics import indicator
from mentalglm_jax.text import tasks
from mentalglm_jax.text.labels import UNSPACED, base_language

# A quote counts as found in the post when this share of it can be aligned.
GROUNDED = 0.7
# Reference explanations that the consistency classifier learns from, per language and question, at most.
MOST_EXPLANATIONS = 1000
MOST_UNITS = 2000  # of an explanation, in what it shares with a reference
MOST_QUOTES = 1000  # of an explanation: each is looked for in all of the post
_EDGE = " \t\n,.;:!?，。；：！？、…"


def quotes(explanation: str, own_words: Collection[str] = ()) -> list[str]:
    """What stands between quotation marks and claims to be the post's (``data.quotes``: apostrophes are no marks, and
    ``own_words`` are the explainer's), without white space and punctuation at its ends; the first ``MOST_QUOTES``."""
    found = (quote for text in quotes_of_post(explanation, own_words) if (quote := text.strip(_EDGE)))
    return list(itertools.islice(found, MOST_QUOTES))


def grounding(quote: str, post: str) -> float:
    """How much of ``quote`` stands in ``post``, from 0 to 1: the best local alignment of their letters.

    Smith & Waterman (1981) with match 2, mismatch and gap -1, over twice the quote's length: 1 is found word for word
    (punctuation, white space, width and case apart), one character left out or put in costs little. Empty is 0, and so
    is what is longer than any quote (``aligned``) and not there word for word.
    """
    return _grounding(reduce(quote), reduce(post))


def _grounding(quote: str, post: str) -> float:
    return float(bool(quote)) if not quote or quote in post else aligned(quote, post)


def _grounded(found: Sequence[str], post: str) -> list[bool]:
    """Of each quote whether it stands in the post; the quotes of an explanation are aligned as long as one may take."""
    text, left, hits = reduce(post), MOST_CELLS, []
    for quote in map(reduce, found):
        left -= 0 if quote in text else len(quote) * len(text)
        hits.append((_grounding(quote, text) if left >= 0 else float(quote in text)) >= GROUNDED)
    return hits


def explanation_scores(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """How explanations treat the post; None where there is nothing to count.

    Returns:
        n: answers that have an explanation, rate: their share of all answers.
        with_quote_rate: explanations that quote anything but label names, which are no quotes of the post below either.
        quotes_verbatim_rate: quotes that occur word for word in the post.
        verbatim_rate: quoting explanations all of whose quotes do.
        quotes_grounded_rate: quotes that occur in the post but for small changes (``grounding`` of at least 0.7); the
            others are made up.
        median_characters: length of the explanations, and reference_median_characters of the reference ones.
        cue_n: answers to posts whose cues are known; the rates below are over these, no explanation being a miss.
        cue_recall: distinct cue texts that the explanation contains.
        cue_citation_accuracy: answers that contain every cue text and no decoy text.
        decoy_rate: answers, of those to posts with decoys, that contain a decoy text.
    """
    from mentalglm_jax.data.explain.checks import Candidate  # with it comes scikit-learn

    explained = [a for a in answers if a.explanation is not None]
    quoted = [(a.record.post, quotes(str(a.explanation), Candidate(a.record, "").label_words)) for a in explained]
    verbatim = [[quote in post for quote in found] for post, found in quoted if found]
    grounded = [hit for post, found in quoted for hit in _grounded(found, post)]
    references = [a.record.explanation for a in answers if a.record.explanation is not None]
    recalls, right, decoyed = [], [], []
    for answer in answers:
        if answer.record.cues:
            text = answer.explanation or ""
            cues, decoys = (
                {answer.record.post[start:end] for start, end in spans or ()}
                for spans in (answer.record.cues, answer.record.decoys)
            )
            cited, misled = [cue in text for cue in cues], [decoy in text for decoy in decoys - cues]
            recalls += cited
            right.append(all(cited) and not any(misled))
            decoyed += [any(misled)] if misled else []
    return {
        "n": len(explained),
        "rate": len(explained) / len(answers),
        "with_quote_rate": _mean([bool(found) for _, found in quoted]),
        "quotes_verbatim_rate": _mean([hit for hits in verbatim for hit in hits]),
        "verbatim_rate": _mean([all(hits) for hits in verbatim]),
        "quotes_grounded_rate": _mean(grounded),
        "median_characters": _median([str(a.explanation) for a in explained]),
        "reference_median_characters": _median(references),
        "cue_n": len(right),
        "cue_recall": _mean(recalls),
        "cue_citation_accuracy": _mean(right),
        "decoy_rate": _mean(decoyed),
    }


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _median(texts: Sequence[str]) -> float | None:
    return float(np.median([len(text) for text in texts])) if texts else None


def characters(text: str) -> list[str]:
    """Every character that is not white space, as the authors' scorer counts Chinese."""
    return [c for c in text if not c.isspace()]


def chinese_words(text: str) -> list[str]:
    """Words by jieba's dictionary and model, white space dropped."""
    import rjieba

    return [word for word in rjieba.cut(text) if not word.isspace()]


def english_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, as ROUGE's own tokenizer without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits of any script, in lower case."""
    return re.findall(r"\w+", text.lower())


def units(language: str) -> dict[str, Callable[[str], list[str]]]:
    """What texts of a language are counted by; where words are not set apart by spaces and there is no dictionary,
    characters alone."""
    base = base_language(language)
    if base == "zh":
        return {"character": characters, "word": chinese_words}
    if base in UNSPACED:
        return {"character": characters}
    return {"word": english_words if base == "en" else words}


def _beginning(split: Callable[[str], list[str]], text: str) -> list[str]:
    return split(text[: 40 * MOST_UNITS])[:MOST_UNITS]  # no words are that long


def _in_order(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, by bits of one number (Hyyrö 2004): a table of both lengths takes
    seconds a pair."""
    places: dict[str, int] = {}
    for at, unit in enumerate(one):
        places[unit] = places.get(unit, 0) | 1 << at
    every = (1 << len(one)) - 1
    left = every
    for unit in other:
        both = left & places.get(unit, 0)
        left = (left + both | left - both) & every
    return len(one) - left.bit_count()


def _rouge_l(reference: Sequence[str], said: Sequence[str]) -> float:
    """The F measure of ROUGE-L: 2PR / (P + R)."""
    return 2 * _in_order(reference, said) / (len(reference) + len(said)) if reference or said else 0.0


class _Units:
    """What rouge-score calls a tokenizer."""

    def __init__(self, split: Callable[[str], list[str]]):
        self.tokenize = split


def overlap(pairs: Sequence[tuple[str, str]], language: str) -> dict[str, dict[str, float]]:
    """ROUGE and BLEU of (reference, explanation) pairs, by word and, for Chinese, by character; of a text longer than
    ``MOST_UNITS`` its beginning.

    An absent explanation is the empty text and scores 0. ROUGE-1, -2 and -L (Lin 2004) are means of the F measure over
    pairs; BLEU-4 (Papineni et al. 2002) is sacrebleu's corpus score with its default smoothing, divided by 100, over
    units separated by spaces. All are from 0 to 1.

    Returns:
        Unit ("word", "character") to rouge1, rouge2, rougeL, bleu. Empty without pairs.
    """
    if not pairs:
        return {}
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    found = {}
    for unit, whole in units(language).items():
        split = functools.partial(_beginning, whole)
        scorer = RougeScorer(["rouge1", "rouge2"], tokenizer=_Units(split))
        scores = [scorer.score(reference, said) for reference, said in pairs]
        found[unit] = {name: float(np.mean([s[name].fmeasure for s in scores])) for name in scores[0]}
        found[unit]["rougeL"] = float(np.mean([_rouge_l(split(reference), split(said)) for reference, said in pairs]))
        references, said = ([" ".join(split(text)) for text in part] for part in zip(*pairs, strict=True))
        found[unit]["bleu"] = BLEU(tokenize="none").corpus_score(said, [references]).score / 100
    return found


def reference_overlap(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """``overlap`` per language over all answers whose record has a reference explanation, with their number ``n``."""
    found: dict[str, dict[str, Any]] = {}
    for language in sorted({answer.record.language for answer in answers}):
        pairs = [
            (a.record.explanation, a.explanation or "") for a in answers
            if a.record.language == language and a.record.explanation is not None
        ]  # fmt: skip
        if pairs:
            found[language] = {"n": len(pairs), **overlap(pairs, language)}
    return found


def consistency(answers: Sequence[Answer], train: Sequence[Record]) -> dict[str, float | int] | None:
    """Do explanations, read alone, lead to the label they are given for?

    A classifier (``tfidf_logreg`` on at most 1000 training explanations per language and question, evenly spread) reads
    the label off an explanation, as the MentalBERT classifiers do for IMHI's consistency check. Both readings use all
    answers that have a label and an explanation.

    Returns:
        n; agreement (the classifier's labels are exactly the answer's); reference_agreement (the same classifier on the
        reference explanations and gold labels of the same records: what to expect of good explanations; absent
        without references). None when nothing can be learned or nothing is to be judged.
    """
    judged = [a for a in answers if a.labels is not None and a.explanation is not None]
    known = [r for r in train if r.explanation is not None]
    agreed, expected = [], []
    for group in sorted({(a.record.task, a.record.language, a.record.question) for a in judged}):
        of_group = [r for r in known if (r.task, r.language, r.question) == group]
        if len(of_group) < 2:
            continue
        step = max(1, -(-len(of_group) // MOST_EXPLANATIONS))
        of_group, task = of_group[::step], tasks.get_task(group[0])
        mine = [a for a in judged if (a.record.task, a.record.language, a.record.question) == group]
        with_reference = [a for a in mine if a.record.explanation is not None]
        unseen = [str(a.explanation) for a in mine] + [str(a.record.explanation) for a in with_reference]
        guess = tfidf_logreg(task.arity, group[1], [str(r.explanation) for r in of_group],
                             indicator(task, [r.gold for r in of_group]), unseen, tune=False)  # fmt: skip
        agreed += (guess[: len(mine)] == indicator(task, [a.labels for a in mine])).all(axis=1).tolist()
        gold = indicator(task, [a.record.gold for a in with_reference])
        expected += (guess[len(mine) :] == gold).all(axis=1).tolist()
    if not agreed:
        return None
    found: dict[str, float | int] = {"n": len(agreed), "agreement": float(np.mean(agreed))}
    return found | ({"reference_agreement": float(np.mean(expected))} if expected else {})
