"""The page as a parser sees it: one file, nothing from outside, nothing unescaped, nothing left after redaction."""

import base64
import dataclasses
import hashlib
import re
import string
from html.parser import HTMLParser

import numpy as np
import pytest

from probes.citations.align import align
from probes.errors import ProbeInputError
from probes.records import Check
from probes.report import overview
from probes.report.overview import HEADLINES, MAIN, MORE, disagreement, funnel, number, panel
from probes.report.page import render, write_report
from probes.report.view import LAYERS, clause_bars, erasure, groups, levels, method_agreement, percent, signed, visible
from probes.results.posts import PostResult
from probes.results.store import Run
from probes.results.summary import summarise
from tests.probes.worlds import attribution, clause_map, post_result

VOID = {"meta", "input", "br"}
NECESSITY = Check("necessity", "erase", 3.0, 0.5, 0.1, 1.0, 0.05, None, 20, "ok", ())
SUFFICIENCY = Check("sufficiency", "erase", -0.2, -3.0, -4.0, -2.0, 0.05, None, 20, "ok", ())
MANIFEST = {
    "created": "2026-01-02T03:04:05+00:00",
    "model": "/home/xyzzy/secret/base-model + /home/xyzzy/adapter-zh",
    "model_fp": "f" * 16,
    "budget": "standard",
    "redact": False,
    "settings": {"tolerance": 0.05},
    "versions": {"torch": "2.0"},
    "skipped": [],
}


class Page(HTMLParser):
    """Elements with attributes and text, and whether every tag was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"doubled attribute on {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("style", "script"):
            self.raw[self.stack[-1]] = self.raw.get(self.stack[-1], "") + data
        else:
            self.text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    @property
    def words(self) -> str:
        return "".join(self.text)


def page_of(*results: PostResult, redact: bool = False, max_cards: int = 200) -> tuple[str, Page]:
    run = Run(MANIFEST, summarise(results, n_boot=50, draws=99), tuple(results))
    html = render(run, redact, max_cards)
    return html, Page(html)


def hostile(post: str, explanation: str, **changes: object) -> PostResult:
    units = ((0, len(post) // 2), (len(post) // 2, len(post))) if len(post) > 1 else ((0, len(post)),)
    maps = []
    for method in ("ig", "erase"):
        for target in ("label", "explanation"):
            chars = clause_map(np.array([2.0, -1.0][: len(units)]), units)
            maps.append(attribution(method, target, chars, units if method == "erase" else None, example_id="x"))
    base = post_result(0)
    result = dataclasses.replace(
        base,
        id="x",
        post=post,
        explanation=explanation,
        length=len(post),
        explanation_length=len(explanation),
        units=units,
        cues=None,
        citations=tuple(align(explanation, post)),
        attributions=tuple(maps),
    )
    return dataclasses.replace(result, **changes)


@pytest.fixture(scope="module")
def many():
    results = [
        post_result(s, cite=(s % 4,), invent=s % 5 == 0, language=("zh", "en")[s % 2], label=("high", "low")[s % 2])
        for s in range(9)
    ]
    return page_of(*results)


def test_one_file_and_nothing_from_outside(many):
    html, page = many
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "video", "audio")
        assert "src" not in attributes and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(page.all("style")) == len(page.all("script")) == 1


def test_policy_names_exactly_the_inline_code(many):
    _, page = many
    (meta,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = dict(part.split(" ", 1) for part in meta["content"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    first = [tag for tag, _ in page.elements if tag in ("meta", "style", "script")]
    assert first.index("style") > 1  # the policy stands before what it governs


ATTACKS = [
    '<script>alert(1)</script>"><img src=x onerror=alert(1)>',
    "</style></script><svg/onload=alert(1)>{{ 7 * 7 }}{% raw %}",
    "' onmouseover='alert(1)' x='&lt;b&gt;&amp;&#x3c;",
    "<!-- --><![CDATA[ ]]>\x00\x0b\x1b]8;;x\x07",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_everywhere_stays_text(attack):
    post = f"我想{attack}结束这一切"
    explanation = f"帖子说“{attack}”和“{attack[::-1]}”{attack}"
    result = hostile(post, explanation, id=attack, label=attack, task=attack, label_text=attack)
    result = dataclasses.replace(
        result, attributions=tuple(dataclasses.replace(a, example_id=attack) for a in result.attributions)
    )
    manifest = MANIFEST | {"model": attack, "versions": {attack: attack}, "settings": {attack: attack}}
    html = render(Run(manifest, summarise([result], n_boot=0, draws=9), (result,)))
    page = Page(html)
    assert len(page.all("script")) == len(page.all("style")) == 1 and not page.all("img")
    assert all(not n.startswith("on") for _, a in page.elements for n in a)
    assert "alert(1)" not in page.raw["script"] and "49" not in page.words.replace(attack, "")[:2000]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html)
    visible_attack = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda m: f"U+{ord(m[0]):04X}", attack)
    assert page.words.count(visible_attack) >= 3


def test_the_post_is_all_there_in_order(many):
    _, page = many
    for s in range(9):
        assert post_result(s, language=("zh", "en")[s % 2]).post in page.words


def test_direction_marks_and_zero_width_characters_are_shown_not_obeyed():
    post = "a\u202eb\u200bc\u2066d\ufeffe\u00adf"
    html, page = page_of(hostile(post, "“\u202e”"))
    for mark in ("\u202e", "\u200b", "\u2066", "\ufeff", "\u00ad"):
        assert mark not in html
        assert f"U+{ord(mark):04X}" in page.words
    assert all(a.get("dir") == "auto" for a in page.all("div") if "text" in (a.get("class") or "").split())
    assert visible("👩\u200d🔬\r\nx\rz") == [("text", "👩\u200d🔬\nx\nz")]
    assert visible("\ud800") == [("mark", "U+D800")]


def test_characters_drawn_as_one_are_not_parted():
    post = "e\u0301👩\u200d🔬👍🏽🇨🇳x" * 2
    result = hostile(post, "")
    values = np.arange(len(post), dtype=float)
    maps = tuple(dataclasses.replace(a, char_values=values) for a in result.attributions)
    for group in groups(dataclasses.replace(result, attributions=maps)):
        for run in group["runs"]:
            first = run["pieces"][0][1][0]
            assert first not in "\u0301\u200d🏽" and not first.startswith("🔬")


def test_a_post_of_ten_thousand_characters():
    rng = np.random.default_rng(0)
    post = "".join(rng.choice(list("我很累不想说话今天天气还行abc，。"), 10_000))
    result = hostile(post, f"“{post[200:230]}”")
    noisy = tuple(dataclasses.replace(a, char_values=rng.normal(size=10_000)) for a in result.attributions)
    html, page = page_of(dataclasses.replace(result, attributions=noisy))
    assert post in page.words
    assert len(html) < 2_500_000


def test_redaction_leaves_no_words():
    secret = "绝密的一句话在这里"
    post = f"今天下雨了。{secret}！后来天晴了。"
    result = hostile(post, f"帖子提到“{secret}”，又说“另一句编造的话”。")
    html, page = page_of(result, redact=True)
    pieces = {post[i : i + 3] for i in range(len(post) - 2)} | {"编造", "提到", "帖子"}
    assert not [piece for piece in pieces if piece in html]
    assert "Redacted" in page.words and "from 6–15" in page.words and "not in the post" in page.words
    assert page.words.count("▮") == len(post)
    plain, _ = page_of(result)
    assert secret in plain
    flagged = Run(MANIFEST | {"redact": True}, summarise([result], n_boot=0, draws=9), (result,))
    assert secret not in render(flagged)  # a redacted run cannot be unredacted by forgetting the flag


def test_home_directories_are_not_passed_on(many):
    html, page = many
    assert "xyzzy" not in html and "base-model + adapter-zh" in page.words


def test_what_the_page_says(many):
    _, page = many
    assert page.words.count("not a diagnosis") == 1 and "crisis" in page.words
    cards = [a for a in page.all("article") if "post-card" in (a["class"] or "")]
    assert len(cards) == 9
    assert len(page.all("table", **{"class": "sortable"})) == 1
    verdicts = [w for w in ("supported", "contradicted", "inconclusive") if w in page.words]
    assert len(verdicts) == 3
    assert "faithful" not in page.words.replace("Agreement is not faithfulness", "")
    assert (
        "expected if citations were placed at random" in page.words
        and "places this citation could have had" in page.words
    )


def test_the_first_screen_says_what_was_asked_found_how_sure_and_what_not(many):
    html, _ = many
    first = html.split("<main>")[0]
    for heading in ("What was asked", "What was found", "How sure", "What it is not"):
        assert f"<dt>{heading}</dt>" in first
    assert "9 posts" in first and "By their length alone they would hold" in first and "Holm" in first
    few = render(Run(MANIFEST, summarise([post_result(0)], n_boot=0, draws=9), (post_result(0),)))
    assert "Only 1 post can be compared" in few and HEADLINES["inconclusive"] in few


def test_no_post_drops_out_silently():
    results = [post_result(0), post_result(1, cite=()), post_result(2, converged=False), post_result(3, cite=(4,))]
    results.append(post_result(4, noise=2.0, true=(), cite=(0,)))
    evidence = [r.evidence() for r in results]
    steps = funnel(
        MANIFEST | {"skipped": [{"id": "a", "reason": "the post is empty"}]},
        summarise(results, evidence, n_boot=0, draws=9),
        evidence,
    )
    assert [step["count"] for step in steps[:3]] == [5, 4, 3]
    assert [step["lost"] for step in steps[:3]] == [
        "1 the post is empty",
        "1 cite nothing that is in the post",
        "1 without a map of each family that passes its gate",
    ]
    assert steps[3]["count"] == sum(e.report.verdict != "inconclusive" for e in evidence) >= 2


def test_strips_put_mean_interval_null_and_posts_where_the_numbers_are():
    results = [post_result(s, cite=((1,), (4,))[s % 3 == 0]) for s in range(8)]
    results = [dataclasses.replace(r, measured=(NECESSITY, SUFFICIENCY)) for r in results]
    evidence = [r.evidence() for r in results]
    summary, posts = summarise(results, evidence, n_boot=200, draws=99), [(r.id, "post-1") for r in results]
    main, effects, cosines = (panel(which, summary, evidence, posts) for which in (MAIN, MORE[0], MORE[2]))
    assert main is not None and effects is not None and cosines is not None
    assert [strip["screening"] for strip in main["strips"]] == [False, False, True]
    for strip, method in zip(main["strips"], ("ig", "erase", "gradnorm"), strict=True):
        assert strip["mean"] == 100 * summary["mass_ratio"][method]
        assert strip["ci"] == [100 * end for end in summary["mass_ratio_ci"][method]]
        assert strip["null"] == 100 * summary["mass_ratio_null"][method]
        assert np.mean([dot["x"] for dot in strip["dots"]]) == pytest.approx(strip["mean"])
    hidden, left = effects["strips"]
    assert (hidden["value"], hidden["null_value"], left["value"]) == ("−3.0", "−0.5", "−0.2")  # change, not loss
    assert hidden["mean"] < hidden["null"] < effects["zero"] and left["mean"] < effects["zero"]
    assert cosines["strips"][0]["null_value"] == number(summary["cosine_mismatched"]["ig"])
    assert panel(MORE[0], summarise([]), [], []) is None


def test_a_phrase_carries_the_map_it_was_written_from():
    result = post_result(3, cite=(1, 4), noise=0.0)
    runs = [run for group in groups(result) for run in group["runs"]]
    by_phrase: dict[str, int] = {}
    for run in runs:
        for part in run["phrases"].split():
            name, level = part.split(":")
            by_phrase[name] = max(by_phrase.get(name, 0), int(level))
    first, second = (c.id for c in result.citations)
    assert by_phrase == {first: 5, second: 5}
    lit = "".join(run["pieces"][0][1] for run in runs if f"{first}:5" in run["phrases"])
    a, b = result.units[1]
    assert result.post is not None and lit == result.post[a:b]
    _, page = page_of(result)
    assert any(f"{second}:5" in (span.get("data-phrase") or "") for span in page.all("span"))


def test_layer_names_are_no_other_attribute(many):
    html, _ = many
    card = html.split("<article")[1]
    used = set(re.findall(r" data-(\w+)=", card))
    assert not {code for code in string.ascii_lowercase if code in used} - set(LAYERS.values())


def test_erasure_is_shown_with_its_null():
    result = dataclasses.replace(post_result(3, noise=0.0), measured=(NECESSITY, SUFFICIENCY))
    strip, bare = erasure(result, result.evidence()), erasure(post_result(3), post_result(3).evidence())
    assert strip is not None and bare is not None
    hidden, left = strip["rows"]
    assert (hidden["value"], hidden["band"]) == (-3.0, [-1.0, -0.1]) and (left["value"], left["band"]) == (
        -0.2,
        [-4, -2],
    )
    assert hidden["x"] < hidden["low"] < hidden["high"] < strip["zero"] and left["high"] < left["x"] < strip["zero"]
    _, page = page_of(result)
    assert "The middle 90%" in page.words or "the middle 90%" in page.words
    assert bare["rows"] == []


def test_disagreement_of_the_methods_is_shown():
    result = post_result(3, noise=0.0)
    chars = clause_map(np.array([0, 0, 0, 4.0, 0, 0]), result.units)
    other = tuple(dataclasses.replace(a, char_values=chars) if a.method == "ig" else a for a in result.attributions)
    same, apart = (method_agreement(r.evidence()) for r in (result, dataclasses.replace(result, attributions=other)))
    assert [found["methods"] for found in same[:1]] == [("ig", "erase")] and len(same) == 3
    assert same[0]["r"] == pytest.approx(1.0)
    assert apart[-1]["methods"] == ("erase", "gradnorm") and apart[0]["r"] < 0 < apart[-1]["r"]
    rows = disagreement([result.evidence(), dataclasses.replace(result, attributions=other).evidence()])
    by_pair = {row["pair"]: (row["r"], row["n"]) for row in rows}
    assert by_pair["integrated gradients and erasure"] == (np.mean([same[0]["r"], apart[0]["r"]]), 2)


def test_every_test_and_what_the_interventions_say_is_shown():
    evidence = Check("weight_of_evidence", "model", 1.5, None, None, None, None, None, 3, "ok", ())
    through = Check("mediation_share", "model", 0.25, None, None, None, None, None, 4, "ok", ())
    shut = Check("faithfulness_corr", "ig", 0.1, None, None, None, None, None, 64, "failed_gate", ())
    rng = np.random.default_rng(0)
    results = [
        dataclasses.replace(
            post_result(s),
            measured=(evidence, through, *([shut] if s < 2 else [])),
            counterfactuals=tuple((float(x), float(x > 0.5)) for x in rng.random(6)),
        )
        for s in range(6)
    ]
    step = {"down_to": "head", "correlation": {"ig": 0.125}, "correlation_null": {"ig": 0.5}, "cue_auroc": {"ig": None}}
    first = {
        "down_to": "nothing",
        "correlation": {"ig": 1.0},
        "correlation_null": {"ig": 0.5},
        "cue_auroc": {"ig": None},
    }
    kind = {"correlation": 0.5, "correlation_null": 0.375, "cue_auroc_before": 1.0, "cue_auroc_after": 0.5, "n": 6}
    kind |= {"correlation_ci": [0.25, 0.625], "cue_auroc_ci": None}
    summary = summarise(results, n_boot=50, draws=99)
    summary["randomisation"] = {"n": 6, "kinds": {"weights": {"ig": kind}}, "cascade": [first, step]}
    page = Page(render(Run(MANIFEST, summary, tuple(results))))
    for test in summary["tests"]:
        assert test["hypothesis"][1:] in page.words
    rows = {row["what"]: row for row in overview.tests(summary)}
    assert "weight of evidence, model" not in rows  # it has no null: above 0 by design
    shown = {title: (value, note) for title, value, note in overview.behaviour(summary)}
    assert shown["Effect of the post that goes through the explanation"][0] == "25%"
    assert shown["Maps untrue to erased subsets"] == ("2", "of 2; they may not speak")
    assert shown["What moves the label is mentioned"][1].endswith("36 clauses put into 6 posts")
    for words in ("all weights, another draw per post", "1.00 → 0.50", "0.50 (0.25 to 0.62), null 0.38", "head", "0.12",
                  "25%", "Adebayo"):  # fmt: skip
        assert words in page.words


def test_authors_are_counted_or_said_to_be_unknown(many):
    assert "Authors are not known" in many[1].words
    known = [dataclasses.replace(post_result(s), user=str(s % 3)) for s in range(6)]
    assert "resample the 3 authors" in page_of(*known)[1].words


def test_keyboard_and_names(many):
    _, page = many
    cited = [a for a in page.all("span") if "cite" in (a.get("class") or "").split()]
    assert cited and all(a.get("tabindex") == "0" for a in cited)
    radios = page.all("input", type="radio")
    groups_of = {a["name"] for a in radios}
    assert all(sum(r["name"] == name and "checked" in r for r in radios) == 1 for name in groups_of)
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for a in page.all("svg"))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for a in page.all("a")}
    assert targets <= set(ids)
    assert page.all("html", lang="en") and page.all("div", lang="zh")


def test_cited_phrases_point_at_existing_sources(many):
    html, _ = many
    for card in re.findall(r"<article.*?</article>", html, re.S):
        source, answer = card.split("Model's answer")
        asked = set(" ".join(re.findall(r'data-cites="([^"]+)"', answer)).split())
        given = set(" ".join(re.findall(r'data-cites="([^"]+)"', source)).split())
        assert asked == given


def test_most_suspicious_first_and_the_cut_is_said():
    results = [post_result(0, cite=(1,)), post_result(1, cite=(4,)), post_result(2, cite=(1,), invent=True)]
    html, page = page_of(*results, max_cards=2)
    order = re.findall(r'<h3 id="post-\d+-title"><bdi>(p\d)</bdi>', html)
    assert order == ["p1", "p2"]
    assert "The first 2 of 3 are shown in full below." in page.words
    assert html.index(">p0<") > 0  # the table still lists it


@pytest.mark.parametrize(
    "results",
    [
        [],
        [post_result(3, cite=())],
        [dataclasses.replace(post_result(4), explanation=None, explanation_length=0, citations=())],
        [post_result(5, methods=("erase",)), post_result(6, methods=("gradnorm",))],
        [post_result(7, converged=False)],
        [dataclasses.replace(post_result(8), attributions=())],
        [hostile("a", "“a”")],
    ],
    ids=["none", "uncited", "unexplained", "one-method", "unconverged", "no-maps", "one-character"],
)
def test_odd_runs_still_make_a_page(results):
    for redact in (False, True):
        _, page = page_of(*results, redact=redact)
        assert "nan" not in page.words.lower().split() and "None" not in page.words


def test_levels_and_bars_say_what_the_numbers_say():
    assert levels(np.array([5.0, -5, 1, 0.4, 0, -2.1])).tolist() == [5, -5, 1, 0, 0, -3]
    assert levels(np.zeros(3)).tolist() == [0, 0, 0] and levels(np.array([np.nan])).tolist() == [0]
    result = post_result(3, noise=0.0)
    chart = clause_bars(result, result.evidence().cited)[1]
    assert chart["method"] == "erase" and [row["cited"] for row in chart["rows"]] == [False, True, *[False] * 4]
    assert chart["rows"][1]["left"]["width"] == 100.0 and chart["rows"][0]["left"]["width"] == 0.0
    assert chart["rows"][1]["left"]["value"] == pytest.approx(4.0)
    assert (percent(0.904), percent(0.041), percent(None), percent(0.0)) == ("90%", "4.1%", "–", "0%")
    assert (signed(-4.23), signed(0.01), signed(2.0), signed(None)) == ("−4.2", "0.0", "+2.0", "–")


def test_same_run_same_page(tmp_path):
    results = tuple(post_result(s) for s in range(3))
    run = Run(MANIFEST, summarise(results, n_boot=50, draws=99), results)
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert first == write_report(run, tmp_path / "b.html").read_bytes()
    with pytest.raises(ProbeInputError, match="no manifest"):
        write_report(tmp_path, tmp_path / "c.html")


# Machado, Oliveira & Fernandes (2009), severity 1.0, in linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb: np.ndarray, blindness: str) -> np.ndarray:
    """CIELAB (D65) of an sRGB colour in 0..255, as somebody with that colour blindness sees it."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_for_and_against_are_told_apart_without_seeing_all_colours(many, blindness):
    style = many[1].raw["style"]
    pairs = re.findall(
        r"--blue: (#\w+).*?--blue-rgb: ([\d, ]+);.*?--orange: (#\w+).*?--orange-rgb: ([\d, ]+);", style, re.S
    )
    assert len(pairs) == 2  # light and dark
    for words in pairs:
        colours = [
            np.array([int(w[i : i + 2], 16) for i in (1, 3, 5)] if w[0] == "#" else w.split(","), dtype=float)
            for w in words
        ]
        for a, b in ((colours[0], colours[2]), (colours[1], colours[3])):
            assert np.linalg.norm(lab(a, blindness) - lab(b, blindness)) > 40  # 2.3 is just noticeable
    assert "wavy" in style and '"◆"' in style  # and shape says it again
