"""The leaderboard on models that can be worked out by hand; its intervals and tests by simulation."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes import stats
from probes.errors import ProbeError, ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.validation import leaderboard as board
from probes.validation import pairs
from probes.validation.board_page import page, write_page
from probes.validation.leaderboard import Line, Side, Sides, _depends, leaderboard, measure, of_models, rejections
from probes.validation.metrics import CHAIN, POST_HOC, Case, Metric, Score, metric_named
from probes.validation.pairs import CHAINS, SETTINGS, Pair, Setting, make_pair
from probes.validation.planted import World, planted_rows, stream
from probes.validation.selftest import closed_form_probe
from probes.validation.soft import soft_maps, soft_planted
from tests.fences import ALL
from tests.hostile.attack import child, run


def planted(probe: Probe, at: int, chain: str) -> Example:
    """A post of four words, one of which weighs; its explanation quotes it after the label, or in the chain."""
    label, cue = ("A", "x") if at % 2 else ("B", "z")
    words = ["mmm", cue * 3, "kkk", "nnn"][at % 3 :] + ["mmm", cue * 3, "kkk", "nnn"][: at % 3]
    post, ids = ", ".join(words), probe.token_bytes.encode
    said = f' it says "{cue * 3 if chain else "kkk"}".'
    example = probe.encode({
        "id": str(at), "post": post, "prompt_ids": ids(f"g {post} ?"), "label_text": label, "parsed_label": label,
        "output_ids": ids(f"<think>{said}</think>{label}" if chain == "chain" else f"{label}{said}"),
        "parsed_explanation": None if chain == "chain" else said, "candidates": {"A": "A", "B": "B"},
    })  # fmt: skip
    return example.asked("reasoning") if chain == "chain" else example


@pytest.fixture(scope="module")
def bag() -> Probe:
    return closed_form_probe({"x": [2.0], "z": [-2.0]}, lambda seen: seen[..., 0])


@pytest.fixture
def by_hand(bag: Probe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pairs that need no training, of four posts; the list of worlds of which one was made."""
    made: list[str] = []

    def pair(setting: Setting, world: World, out: Path | None, posts: int = 4, nulls: int = 4) -> Pair:
        made.append(f"{setting.name} {world.architecture}")
        kinds = ("chain", "chain", "chain") if setting.chains else ("cue", "", "")
        sides = [[planted(bag, at, kind) for at in range(4)] for kind in kinds]
        return Pair((bag, bag), (sides[0], sides[1]), sides[2])

    monkeypatch.setattr(board, "make_pair", pair)
    return made


SMALL = tuple(
    dataclasses.replace(setting, worlds=dict(list(setting.worlds.items())[:2]), nulls=80) for setting in SETTINGS
)


def length(case: Case) -> float:
    """How long the explanation is (nobody 2026).

    More is said here.
    """
    return math.nan if case.example.id == "0" else float(len(case.example.explanation or ""))


def test_metrics_on_a_bag_of_letters(bag: Probe) -> None:
    """Six nats of the cue, wherever it stands."""
    chains = {m.__name__: measure(bag, [planted(bag, at, "chain") for at in range(4)], m, 4) for m in CHAIN[2:]}
    assert chains["early_answering"].values == pytest.approx([5.5] * 4, abs=1e-4)  # 1 x of 3 stands in 3/4
    assert chains["filler_tokens"].values == pytest.approx([6.0] * 4, abs=1e-4)
    assert chains["adding_mistakes"].values == pytest.approx([12.0] * 4, abs=1e-4)
    assert chains["paraphrasing"].values == pytest.approx([0.0] * 4, abs=1e-4)
    assert chains["early_answering"].nulls[0] == pytest.approx([-5.5 + 0.05 * 12] * 2, abs=1e-4)
    assert chains["adding_mistakes"].nulls[0] == pytest.approx([0.05 * 12], abs=1e-4)
    chosen = [m for m in POST_HOC if m.__name__ in ("mass_ratio", "necessity", "sufficiency", "simulatability")]
    cited, other = (
        {m.__name__: measure(bag, [planted(bag, at, kind) for at in range(6)], m, 6) for m in chosen}
        for kind in ("cue", "")
    )
    assert cited["mass_ratio"].values == pytest.approx([1.0] * 6)
    assert other["mass_ratio"].values == pytest.approx([0.0] * 6)
    assert cited["necessity"].values == pytest.approx([6.0] * 6, abs=1e-4)
    assert other["sufficiency"].values == pytest.approx([-6.0] * 6, abs=1e-4)
    assert min(cited["simulatability"].values) > max(other["simulatability"].values)
    assert cited["simulatability"].forwards == 0 < cited["necessity"].forwards


def test_posts_that_lend_each_other_chains_are_one_cluster_and_of_one_data_set(bag: Probe) -> None:
    seen: dict[str, set[str]] = {}

    def borrows(case: Case) -> Score:
        """Borrows."""
        seen[case.example.id] = {e.id for e in case.block}
        return Score(1.0, (0.0,), borrowed=True)

    def owns(case: Case) -> Score:
        """Does not."""
        return Score(1.0, (0.0,))

    examples = [planted(bag, at, "chain") for at in range(8)]
    side = measure(bag, examples, borrows, 4)
    assert len(set(side.clusters)) == 2 and len(set(side.clusters[:4])) == 1
    assert seen["1"] == {"0", "2", "3"} and seen["6"] == {"4", "5", "7"}
    assert len(set(measure(bag, examples, owns, 4).clusters)) == 8


def test_an_interval_is_of_models_and_not_of_posts() -> None:
    """Where models differ, intervals that take posts as independent miss the mean; these do not."""
    rng, held, wilson, sets = np.random.default_rng(0), 0, 0, 150
    for _ in range(sets):
        shares = rng.beta(4, 2, size=8)  # mean 2/3
        wins = [rng.random(20) < share for share in shares]
        sides = [(Side(tuple(map(float, won)), (), (), 0.0), Side((0.5,) * 20, (), (), 0.0)) for won in wins]
        found = of_models(sides)
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= 2 / 3 <= found.high
        naive = stats.diagnosticity(np.concatenate(wins), [0.5] * 160)
        assert naive is not None and naive.value == pytest.approx(found.value)
        wilson += naive.ci[0] <= 2 / 3 <= naive.ci[1]
    assert held >= 0.92 * sets and wilson <= 0.8 * sets


def test_models_that_all_agree_are_no_certainty() -> None:
    won = (Side((1.0,) * 20, (), (), 0.0), Side((0.0,) * 20, (), (), 0.0))
    few, many, one = of_models([won] * 4), of_models([won] * 8), of_models([won])
    assert few is not None and many is not None and one is not None and few.low and many.low
    assert few.value == few.high == 1.0 and few.low < many.low < 0.96 and one.low is None
    assert (many.models, many.posts) == (8, 160)
    silent = (Side((math.nan,) * 20, (), (), 0.0), Side((0.0,) * 20, (), (), 0.0))
    some = of_models([won, silent, won])
    assert some is not None and some.models == 2 and of_models([silent]) is None


def test_tests_keep_to_their_rate_only_by_cluster() -> None:
    """Posts of a block share what the null was made of: taken as independent, nothing is found too often."""
    rng, sides = np.random.default_rng(1), []
    for clustered in (True, False):
        values, nulls, clusters = [], [], []
        for block in range(5 * 120):
            shared = rng.normal()
            for _ in range(4):
                values.append(float(shared + 0.1 * rng.normal()))
                nulls.append(tuple((rng.normal(size=3)).tolist()))
                clusters.append(str(block) if clustered else str(len(clusters)))
        sides.append(Side(tuple(values), tuple(nulls), tuple(clusters), 0.0))
    by_block, by_post = (np.mean(rejections(side, 20)) for side in sides)
    assert len(rejections(sides[0], 20)) == 120
    assert by_block <= 0.08 < 0.12 < by_post


def test_a_line_has_its_counts() -> None:
    null = tuple(float(at) for at in range(9))
    own = tuple(map(str, range(20)))
    true = Side((100.0,) * 20, (null,) * 20, own, 3.0)
    wild, calm = (Side((value,) * 20, (null,) * 20, own, 5.0) for value in (100.0, 0.0))
    sides = {"a": Sides(true, calm, calm), "b": Sides(calm, wild, wild)}
    line = board._line(length, SETTINGS[0], sides, 0)
    assert line.by_world == {"a": 1.0, "b": 0.0} and line.whole is not None and line.whole.value == 0.5
    assert line.type_one == (2, 4) and line.power == (2, 4) and line.forwards == 4.5


def test_anyones_metric_plugs_in_and_what_is_finished_is_kept(by_hand: list[str], tmp_path: Path) -> None:
    chosen = {"post hoc": POST_HOC[:1], "chain": CHAIN[4:5]}
    first = leaderboard([length], tmp_path, settings=SMALL, metrics=chosen)
    assert len(by_hand) == 4
    line = next(one for one in first if one.name == "length")
    assert line.whole is not None and line.whole.value == 0.5 and line.whole.posts == 6 and line.type_one is None
    assert (line.what, line.forwards) == ("How long the explanation is (nobody 2026).", 0.0)
    assert list(line.by_world) == list(SMALL[0].worlds)
    assert first[0].name == "mass_ratio" and first[0].whole is not None and first[0].whole.value == 1.0

    by_hand.clear()
    assert leaderboard([length], tmp_path, settings=SMALL, metrics=chosen) == first and by_hand == []

    def shorter(case: Case) -> float:
        """Fewer characters."""
        return -length(case)

    again = leaderboard([length, shorter], tmp_path, settings=SMALL, metrics=chosen)
    assert [one for one in again if one.name != "shorter"] == first and len(by_hand) == 4

    kept = sorted((tmp_path / "cache").glob("*.json"))
    entry = json.loads(kept[0].read_text("utf-8"))
    kept[0].write_text(json.dumps(entry | {"digest": "0" * 32}), "utf-8")
    by_hand.clear()
    with pytest.warns(match="made again"):
        assert leaderboard([length, shorter], tmp_path, settings=SMALL, metrics=chosen) == again
    assert len(by_hand) == 1


def test_the_metric_of_the_docs_plugs_in(by_hand: list[str]) -> None:
    (block,) = [one for one in ALL if one.page.name == "metrics.md" and one.language == "python"]
    lines: list[Line] = []

    def small(**named: Any) -> None:
        assert named.pop("out") == Path("board")
        lines.extend(leaderboard(**named, settings=SMALL, metrics={"post hoc": (), "chain": ()}))

    exec(block.text.replace("from probes.validation.leaderboard import leaderboard", ""), {"leaderboard": small})
    assert {line.name for line in lines} == {"length"} and all(line.whole is not None for line in lines)


MADE: list[str] = []  # worlds made so far, and in which one it fails: no part of the metric, whose results stay its own


def breaks(case: Case) -> float:
    """Fails in the second world, unless it was there before."""
    if len(MADE) == 2:
        raise ZeroDivisionError("by hand")
    return 1.0


def test_a_run_that_was_interrupted_keeps_each_finished_result(
    by_hand: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none: dict[str, tuple[()]] = {"post hoc": (), "chain": ()}
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "MADE", by_hand)
        with pytest.raises(ProbeError, match=r"metric breaks, post 0 of .*: ZeroDivisionError: by hand"):
            leaderboard([breaks], tmp_path, settings=SMALL, metrics=none)
    assert by_hand == ["post hoc llama", "post hoc qwen2"]
    leaderboard([breaks], tmp_path, settings=SMALL, metrics=none)
    assert by_hand[2:] == ["post hoc qwen2", "chain llama", "chain qwen2"]


def no_words(case: Case) -> float:
    return 0.0


def two(case: Case, more: int) -> float:
    """Takes two."""
    return 0.0


def words(case: Case) -> Any:
    """Says a word."""
    return "much"


def test_what_is_no_metric_is_refused(by_hand: list[str]) -> None:
    for name, why in (
        ("nothing", "MODULE:FUNCTION"), ("a b:c", "MODULE:FUNCTION"), ("nowhere_to_be_found.x:y", "not looked into"),
        ("math:pi", "no function"), (f"{__name__}:nobody", "no function"), (f"{__name__}:no_words", "no docstring"),
        (f"{__name__}:two", "one argument"),
    ):  # fmt: skip
        with pytest.raises(ProbeInputError, match=why):
            metric_named(name)
    assert metric_named(f"{__name__}:length") is length
    with pytest.raises(ProbeInputError, match="two of that name"):
        leaderboard([POST_HOC[0]], settings=SMALL)
    with pytest.raises(ProbeError, match=r"metric words, post 0 .*: gave a str, not a number"):
        leaderboard([words], settings=SMALL, metrics={"post hoc": (), "chain": ()})


def test_a_metric_never_comes_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
    found = child(["probes", "leaderboard", "--out", "board", "--metric", "mine:metric"], tmp_path)
    assert found.code == 2 and "no module mine is installed here" in found.err and len(found.err.splitlines()) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "board").exists()


def test_the_command_writes_a_page(
    by_hand: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"post hoc": POST_HOC[:1], "chain": POST_HOC[:1]}
    monkeypatch.setattr(board, "leaderboard", lambda *given: leaderboard(*given, settings=SMALL, metrics=one))
    row = {"map": "flat", "published_comp": 0.1, "published_suff": 0.0, "comp": 1.0, "suff": 0.9}
    monkeypatch.setattr(board, "soft_table", lambda *given: [row])
    command = ["probes", "leaderboard", "--out", tmp_path / "board", "--metric", f"{__name__}:length"]
    done = run([*command, "--docs", tmp_path / "page.md", "--json"], capsys)
    assert done.code == 0 and {one["name"] for one in json.loads(done.out)["lines"]} >= {"mass_ratio", "length"}
    text = (tmp_path / "page.md").read_text("utf-8")
    assert f"probes leaderboard --out DIR --metric {__name__}:length --docs" in text
    assert "| mass ratio | 1.000 | 1.000 |" in text and "| flat | .100 | .000 | 1.000 | .900 |" in text
    assert "* *length*: How long the explanation is (nobody 2026)." in text
    done = run([*command], capsys)
    assert done.code == 0 and "mass ratio" in done.out


def test_published_rows_stand_below_ours(tmp_path: Path) -> None:
    names = {"a": 0.5, "b": None}
    lines = [
        Line(name, "What.", "chain", dict(names), of_models([]), 2.0, None, (1, 2)) for name in ("filler_tokens", "pex")
    ]
    write_page(tmp_path / "page.md", lines, soft_maps(), [], "probes leaderboard")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert text == page(lines, soft_maps(), [], "probes leaderboard")
    # Of 400 // 10 and 80 // 20 data sets a model, eight models: the 95 % quantiles of binomial counts at 0.05.
    assert "400 posts of each" in text and "more than 23 of 320 (4 of 32)" in " ".join(text.split())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    at = next(i for i, row in enumerate(rows) if row.startswith("| filler tokens | .500 | – | – | 2 | – | 1 of 2 |"))
    assert rows[at + 1].startswith("| *Filler Tokens, published* |") and "*.948*" in rows[at + 1]
    assert len({row.count("|") for row in rows[at - 2 : at + 3]}) == 1  # every row of a table has as many cells


def test_worlds_are_of_eight_architectures_and_every_metric_has_a_docstring() -> None:
    for setting in SETTINGS:
        assert len({world.architecture for world in setting.worlds.values()}) == len(setting.worlds) == 8
    assert {world.rule for world in SETTINGS[0].worlds.values()} == {"one", "twice", "and", "or"}
    assert all(metric.__doc__ for metric in (*POST_HOC, *CHAIN))


def test_soft_scores_count_what_they_erase(bag: Probe) -> None:
    """As published the map that says nothing wins both; at equal expected retention the true one does."""
    true, flat, unrelated = soft_maps()
    assert flat["published_comp"] > 2 * true["published_comp"] and flat["published_suff"] < 0.1 < true["published_suff"]
    assert flat["published_share"] == 1.0 > 2 * true["published_share"]
    assert [one["share"] for one in (true, flat, unrelated)] == pytest.approx([0.2] * 3)
    assert true["comp"] > 2 * max(flat["comp"], unrelated["comp"])
    assert true["suff"] < min(flat["suff"], unrelated["suff"])


def test_soft_scores_on_a_model_with_cues(bag: Probe) -> None:
    def marked(at: int) -> Example:
        post, ids = ["mmm, xxx, kkk", "xxx, mmm, nnn, kkk"][at], bag.token_bytes.encode
        place = post.index("xxx")
        row = {"id": "a", "post": post, "prompt_ids": ids(f"g {post} ?"), "label_text": "A", "output_ids": ids("A")}
        return bag.encode(row | {"candidates": {"A": "A", "B": "B"}, "cues": [[place, place + 3]]})

    flat, unrelated = soft_planted(bag, [marked(0), marked(1)])
    assert flat["published_comp"] == 0.5 and flat["published_suff"] <= 0.5  # erases the cue as surely, and keeps it
    assert flat["comp"] == flat["suff"] == 1.0 and unrelated["comp"] == 1.0


def test_posts_of_a_pair_are_the_same(bag: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model leaves out what it answers wrong; what both have is compared."""
    counts: list[int] = []

    class Model:
        probe = bag

        def __init__(self, names: str) -> None:
            self.names = names

        def examples(self, count: int, seed: int = 0) -> list[Example]:
            counts.append(count)
            return [planted(bag, int(name), "chain") for name in self.names]

    monkeypatch.setattr(pairs, "_chain", lambda world, true, out: Model("0245" if true else "1245"))
    pair = make_pair(CHAINS, CHAINS.worlds["one cue"], None, posts=2)
    assert counts[-1] == CHAINS.nulls
    assert [[e.id for e in side] for side in pair.examples] == [["2", "4"]] * 2 and len(pair.nulls) == 4


@pytest.mark.slow
def test_what_a_metric_was_made_with_tells_its_results_apart() -> None:
    """One source text, two metrics: what a factory gave it; and where there is no text to compare, what it does."""

    def times(by: float) -> Metric:
        def metric(case: Case) -> float:
            """So many characters."""
            return by * length(case)

        return metric

    def typed(value: float) -> Metric:
        made: dict[str, Any] = {"__name__": "typed"}
        exec(f"def metric(case):\n    'One.'\n    return {value}", made)
        return made["metric"]

    world = next(iter(SMALL[0].worlds.values()))
    for make in (times, typed):
        one, same, other = (_depends(SMALL[0], world, make(by), 0) for by in (1.0, 1.0, 2.0))
        assert one == same != other


def test_a_model_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(architecture="llama", clauses=(3, 4), seed=5)
    first = make_pair(SETTINGS[0], world, tmp_path, posts=4, nulls=6)
    monkeypatch.setattr(pairs, "train", None)  # not again
    again = make_pair(SETTINGS[0], world, tmp_path, posts=4, nulls=6)
    assert [e.ids for e in again.examples[0]] == [e.ids for e in first.examples[0]]
    for one in POST_HOC:
        sides = [measure(pair.probes[0], pair.examples[0], one, 4) for pair in (first, again)]
        assert sides[0].values == pytest.approx(sides[1].values, abs=1e-6, nan_ok=True)
    posts = [row["post"] for row in planted_rows(world, first.probes[1].tokenizer, 200, stream(world, 2_000_003))]
    where = [e.post.index((e.explanation or "").split('"')[1]) / len(e.post) for e in first.nulls]
    assert all(e.post in posts for e in first.nulls) and len(set(where)) > 1
