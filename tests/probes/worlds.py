"""Hand-made posts with known saliency, for tests that need no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probes.checks.crosscheck import units_hit
from probes.citations.align import align
from probes.records import Attribution
from probes.results.posts import PostResult, cited_target

WORDS_ZH = (
    "最近一直睡不好也没有胃口白天坐在窗边看云朋友约我去公园散步我说改天吧晚上又翻来覆去想很多事情楼下的猫叫了一夜"
)
LINE_EN = "lately the kettle hums while rain taps windows and buses pass my street in slow grey rows before morning"
WORDS_EN = LINE_EN.split()


def clause_texts(rng: np.random.Generator, k: int, language: str) -> list[str]:
    """k clauses with their punctuation; each is unlike the others."""
    made = []
    for _ in range(k):
        if language == "zh":
            start, size = int(rng.integers(len(WORDS_ZH))), int(rng.integers(6, 14))
            made.append(
                "".join(rng.permutation(list((WORDS_ZH * 2)[start : start + size]))) + "，。！"[rng.integers(3)]
            )
        else:
            made.append(
                " ".join(rng.choice(WORDS_EN, int(rng.integers(4, 8)), replace=False)) + (", ", ". ")[rng.integers(2)]
            )
    return made


def attribution(
    method: str, target: str, char_values: np.ndarray, units: Sequence[tuple[int, int]] | None = None, **changes: object
) -> Attribution:
    """A map; on clauses when ``units`` are given (values are then summed per clause), else on characters."""
    spans = tuple(units) if units else tuple((i, i + 1) for i in range(len(char_values)))
    values = np.array([char_values[a:b].sum() for a, b in spans])
    total = float(char_values.sum())
    fields: dict = {
        "example_id": "p0",
        "baseline": "pad",
        "f_input": total,
        "f_baseline": 0.0,
        "delta": 0.001 if method == "ig" else None,
        "rel_delta": 0.01 if method == "ig" else None,
        "converged": True if method == "ig" else None,
        "n_fwd": 16,
        "n_bwd": 16,
        "seconds": 0.1,
        "dtype": "float32",
        "seed": 0,
        "model_fp": "0" * 16,
        "params": {},
    }
    return Attribution(
        method=method,
        target=target,
        unit="clause" if units else "char",
        values=values,
        unit_spans=spans,
        char_values=char_values,
        **(fields | changes),
    )


def clause_map(
    weights: np.ndarray, units: Sequence[tuple[int, int]], rng: np.random.Generator | None = None
) -> np.ndarray:
    """Character values that sum to ``weights`` per clause: flat, or with one peak each when ``rng`` is given."""
    values = np.zeros(units[-1][1])
    for weight, (a, b) in zip(weights, units, strict=True):
        shape = np.ones(b - a)
        if rng is not None:
            shape = np.exp(-0.5 * ((np.arange(b - a) - rng.integers(0, max(1, b - a - 2))) / 2.0) ** 2)
        values[a:b] = weight * shape / shape.sum()
    return values


def post_result(
    seed: int = 0,
    *,
    true: Sequence[int] = (1,),
    cite: Sequence[int] = (1,),
    k: int = 6,
    language: str = "zh",
    noise: float = 0.05,
    methods: Sequence[str] = ("ig", "erase", "gradnorm"),
    invent: bool = False,
    label: str = "high",
    name: str | None = None,
    **changes: object,
) -> PostResult:
    """A post of k clauses whose label depends on clauses ``true`` and whose explanation quotes clauses ``cite``.

    ``noise``: size of independent noise per clause and method, the true clauses sharing weight 1. ``true=()`` leaves
    noise only. ``invent`` adds a quote that is not in the post.
    """
    rng = np.random.default_rng(seed)
    texts = clause_texts(rng, k, language)
    ends = np.cumsum([len(t) for t in texts])
    units = tuple((int(e - len(t)), int(e)) for e, t in zip(ends, texts, strict=True))
    post, name = "".join(texts), name or f"p{seed}"
    quoted = [texts[i].rstrip("，。！,. ") for i in cite] + (
        ["从来没有写过的句子" if language == "zh" else "words never written"] * invent
    )
    explanation = (
        "帖子提到" + "和".join(f"“{q}”" for q in quoted)
        if language == "zh"
        else "It says " + " and ".join(f'"{q}"' for q in quoted)
    )
    weights = np.zeros(k)
    weights[list(true)] = 4.0 / max(1, len(true))
    maps = []
    for method in methods:
        for target, base in (("label", weights), ("explanation", None)):
            if base is None:
                base = np.zeros(k)
                base[list(cite)] = 9.0
            noisy = base + 4 * noise * rng.normal(size=k)
            chars = clause_map(
                np.abs(noisy) if method == "gradnorm" else noisy, units, None if method == "erase" else rng
            )
            maps.append(
                attribution(method, target, chars, units if method == "erase" else None, example_id=name, **changes)
            )
    citations = tuple(align(explanation, post))
    for citation in citations if "erase" in methods else ():  # each phrase is written from where it is taken
        base = units_hit(citation.post_char, units) * 5.0
        chars = clause_map(base + noise * rng.normal(size=k), units)
        maps.append(attribution("erase", cited_target(citation), chars, units, example_id=name))
    maps.sort(key=lambda a: methods.index(a.method))
    return PostResult(
        id=name,
        task="suicide_risk",
        label=label,
        label_text="该用户的自杀风险为高。" if language == "zh" else "The suicide risk of this user is high.",
        length=len(post),
        units=units,
        post=post,
        explanation=explanation,
        explanation_length=len(explanation),
        cues=tuple(units[i] for i in true) or None,
        decoys=None,
        citations=citations,
        attributions=tuple(maps),
    )
