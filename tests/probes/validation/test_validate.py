"""Gates, behaviour, randomisation, error rates, planted worlds: what `probes validate` is made of, in seconds."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probes import stats
from probes.checks import randomise as randomise_module
from probes.checks.behaviour import counterfactuals, mediation_share, weight_of_evidence
from probes.checks.crosscheck import examine
from probes.checks.gates import at_equal_share, judge, max_sensitivity
from probes.checks.randomise import cascade, compare, kinds, randomised, study
from probes.errors import ProbeInputError
from probes.nulls import atom_null, atoms, p_greater, shift_null
from probes.probe import Probe
from probes.records import Example
from probes.report.overview import randomisation
from probes.results import summary as summary_module
from probes.results.summary import summarise
from probes.saliency.attribute import Settings, attribute
from probes.validation import corrupt, error_rates
from probes.validation.gate_rates import gate_rates, length_rates
from probes.validation.planted import World, make_model, make_tokenizer, planted_rows, train, vocabulary
from probes.validation.probing import probe_posts
from probes.validation.rows import false_alarms
from probes.validation.selftest import closed_form_probe
from probes.validation.validate import PAIRS, cue_aurocs, page, row, validate
from tests.probes.worlds import post_result

LETTERS = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def linear() -> tuple[Probe, Example]:
    """Eight clauses of two letters whose weights add up."""
    rng = np.random.default_rng(0)
    probe = closed_form_probe({c: [float(rng.normal())] for c in LETTERS}, lambda seen: seen[..., 0])
    post = "".join(f"{LETTERS[i : i + 2]}，" for i in range(0, 16, 2))
    ids = probe.token_bytes.encode
    given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
    return probe, probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})


def test_gates_pass_the_truth_and_stop_a_map_that_is_not(linear: tuple[Probe, Example]) -> None:
    probe, example = linear
    maps = attribute(probe, example, ("ig", "erase"), ("label",))
    found = {(c.name, c.method): c for c in judge(probe, example, maps, Settings())}
    for method in ("ig", "erase"):
        assert found["faithfulness_corr", method].value == pytest.approx(1.0, abs=1e-6)
        assert found["infidelity", method].value == pytest.approx(0.0, abs=1e-6)
        assert found["faithfulness_corr", method].status == "ok"
        best = found["comprehensiveness", method]
        assert best.value is not None and best.value >= max(best.draws)
        keep = found["aopc_sufficiency", method]
        assert keep.value is not None and keep.value <= min(keep.draws)
    wrong = [dataclasses.replace(m, char_values=-m.char_values, values=-m.values) for m in maps]
    stopped = judge(probe, example, wrong, Settings())
    assert {c.method for c in stopped if c.status == "failed_gate"} == {"ig", "erase"}
    units = [(3 * i, min(3 * i + 3, len(example.post))) for i in range(8)]
    report = examine(wrong, [], example_id="r", length=len(example.post), units=units, measured=stopped).report
    assert "integrated gradients: failed the gate faithfulness corr" in report.notes


def test_a_map_that_knows_lengths_only_does_not_pass() -> None:
    """Where any missing token costs the label: with the number of clauses alone held equal, nearly every one did."""
    found = {one["id"]: one["value"] for one in length_rates(16, 5)}
    assert found["V10.gate.length"] <= 0.2 and found["V10.gate.true"] >= 0.9


def test_soft_erasure_is_the_share_of_each_dimension(linear: tuple[Probe, Example]) -> None:
    """In a linear model the expected loss of a soft erasure is the sum of weight times effect."""
    probe, example = linear
    ((found),) = attribute(probe, example, ("ig",), ("label",))
    soft = next(c for c in judge(probe, example, [found], Settings()) if c.name == "soft_comprehensiveness")
    positive = np.maximum(found.char_values, 0)
    assert soft.value is not None
    assert 0 < soft.value <= positive.sum() + 1e-6


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_soft_erasure_takes_as_much_of_every_map(share: float) -> None:
    rng = np.random.default_rng(0)
    maps = [np.ones(9), np.eye(9)[2], -np.ones(9), np.zeros(9), rng.gamma(0.3, size=9), rng.normal(size=40)]
    for values in maps:
        found = at_equal_share(values, share)
        assert found.mean() == pytest.approx(share) and found.min() >= 0 and found.max() <= 1
        assert all(
            found[i] >= found[j] for i in range(len(values)) for j in range(len(values)) if values[i] > values[j]
        )


def test_a_flat_map_does_not_win_by_erasing_everything() -> None:
    """Scaled to a largest of 1, as published, soft comprehensiveness is best for the map that says nothing."""
    probe = closed_form_probe({"x": [2.0]} | {c: [0.2] for c in LETTERS}, lambda seen: seen[..., 0])
    post, ids = "ab，cd，ex，fg，hi，jk，lm", probe.token_bytes.encode
    given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A")}
    example = probe.encode(given | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
    ((true,),) = (attribute(probe, example, ("ig",), ("label",)),)
    flat = dataclasses.replace(true, char_values=np.ones(len(post)), values=np.ones(len(post)))
    found = {}
    for name, one in (("true", true), ("flat", flat)):
        found[name] = {c.name: c.value for c in judge(probe, example, [one], Settings())}
    assert found["true"]["soft_comprehensiveness"] > found["flat"]["soft_comprehensiveness"]
    assert found["true"]["soft_sufficiency"] < found["flat"]["soft_sufficiency"]  # what is lost without the rest


def test_max_sensitivity_is_zero_where_punctuation_does_nothing(linear: tuple[Probe, Example]) -> None:
    probe, example = linear
    maps = attribute(probe, example, ("ig", "erase"), ("label",))
    values = {c.method: c.value for c in max_sensitivity(probe, example, maps, Settings())}
    assert values == pytest.approx({"ig": 0.0, "erase": 0.0}, abs=1e-6)


def test_weight_of_evidence_is_bayes(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[3])
    label, said = example.segment("label"), example.segment("explanation")
    assert label is not None and said is not None
    start, own, others, _ = tiny_probe.scorer.label_ids(example)
    tail = list(example.ids[label.tok[1] : said.tok[1]])

    def of(ids: list[int]) -> float:
        whole = torch.tensor([[*example.ids[:start], *ids, *tail]])
        logits = tiny_probe.model(input_ids=whole).logits[0].log_softmax(-1)
        begin = start + len(ids) + said.tok[0] - label.tok[1]
        return float(sum(logits[at - 1, whole[0, at]] for at in range(begin, whole.shape[1])))

    found = weight_of_evidence(tiny_probe, example)
    assert found.value == pytest.approx(of(own) - of(others[0]), rel=1e-4)  # one rival: its weight is 1


def test_mediation_is_zero_where_the_label_comes_first(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    examples = [tiny_probe.encode(r) for r in tiny_rows]
    other = dataclasses.replace(examples[1], label="low")
    assert mediation_share(tiny_probe, examples[0], [other]).value == pytest.approx(0.0, abs=1e-6)
    assert mediation_share(tiny_probe, examples[0], [examples[1]]).status == "abstain"  # the same label
    bare = tiny_probe.encode(tiny_rows[0] | {"parsed_explanation": None})
    assert weight_of_evidence(tiny_probe, bare).status == "abstain"


def test_counterfactuals_are_seeded_and_shift_distributions(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example, fillers = tiny_probe.encode(tiny_rows[0]), ("外面下着雪，", "we had tea, ", "猫在睡觉。")
    found = counterfactuals(tiny_probe, example, fillers, count=3, extra_tokens=-20)
    assert len(found) == 3 and all(0 <= shift <= 1 and said in (0.0, 1.0) for shift, said in found)
    assert counterfactuals(tiny_probe, example, fillers, count=3, extra_tokens=-20) == found
    assert counterfactuals(tiny_probe, example, ()) == ()


def test_counterfactual_test_of_a_data_set() -> None:
    rng = np.random.default_rng(0)
    results = []
    for s in range(8):
        shift = rng.random(6)
        honest = tuple((float(x), float(x > 0.5)) for x in shift)
        results.append(dataclasses.replace(post_result(s), counterfactuals=honest))
    found = summarise(results, n_boot=100, draws=199)["counterfactual"]
    assert found["r"] > 0.8 and found["p"] == 1 / 200 and found["ci"][0] > 0.6 and found["n"] == 8
    mute = [dataclasses.replace(r, counterfactuals=tuple((x, 0.0) for x, _ in r.counterfactuals)) for r in results]
    assert summarise(mute, n_boot=100, draws=199)["counterfactual"] is None


def test_randomisation_is_undone(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[3])
    before = attribute(tiny_probe, example, ("gradnorm",), ("label",))[0].values
    for kind in ("weights", "top_half"):
        with randomised(tiny_probe, kind):
            inside = attribute(tiny_probe, example, ("gradnorm",), ("label",))[0].values
        assert np.abs(inside - before).max() > 0.1 * np.abs(before).max()
    np.testing.assert_allclose(attribute(tiny_probe, example, ("gradnorm",), ("label",))[0].values, before)
    assert kinds(tiny_probe) == ("weights", "top_half")
    with pytest.raises(ProbeInputError, match="adapter_off"), randomised(tiny_probe, "adapter_off"):
        pass


def test_cascade_goes_down_to_the_embeddings_and_is_undone(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    examples = [tiny_probe.encode(row) for row in tiny_rows[:2]]
    before = {name: weight.clone() for name, weight in tiny_probe.model.named_parameters()}
    steps = cascade(tiny_probe, examples, ("gradnorm",))
    layers = [f"layer {i}" for i in reversed(range(tiny_probe.model.config.num_hidden_layers))]
    assert [step["down_to"] for step in steps] == ["nothing", "head", *layers, "embeddings"]
    assert steps[0]["correlation"]["gradnorm"] == pytest.approx(1.0)
    assert len({step["correlation"]["gradnorm"] for step in steps}) == len(steps)  # every step changes the model
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_probe.model.named_parameters())
    assert steps == cascade(tiny_probe, examples, ("gradnorm",))


def test_an_interrupted_study_goes_on_where_it_was(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    """Each step is made once, and what is drawn after what was kept is the same."""
    examples = [tiny_probe.encode(row) for row in tiny_rows[:2]]
    kept: list[str] = []

    def run(most: int) -> dict[str, Any]:
        """The study, with room for one more step than are kept."""
        at = itertools.count()

        def keep(make: Callable[[], Any]) -> Any:
            number = next(at)
            if number == most:
                raise KeyboardInterrupt
            if number == len(kept):
                kept.append(json.dumps(make()))
            return json.loads(kept[number])

        return study(tiny_probe, examples, ("gradnorm",), keep=keep)

    whole = study(tiny_probe, examples, ("gradnorm",))
    count = len(whole["kinds"]) + len(whole["cascade"])
    for most in range(1, count):
        with pytest.raises(KeyboardInterrupt):
            run(most)
        assert len(kept) == most
    assert run(count) == json.loads(json.dumps(whole)) and len(kept) == count


def test_what_other_weights_left_in_a_cache_serves_nobody(
    tiny_model_dir: Path, adapter_dir: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    """A run keeps the pass over what stands before the post; weights that are drawn meanwhile must not meet it."""
    probe = Probe.from_pretrained(tiny_model_dir, adapter=adapter_dir, merge=False)
    examples = [probe.encode(row) for row in tiny_rows[:2]]
    wanted = study(probe, examples, ("erase",))
    before = attribute(probe, examples[0], ("erase",), ("label",))[0].values
    with probe.scorer.unchanged():
        attribute(probe, examples[0], ("erase",), ("label",))
        assert study(probe, examples, ("erase",)) == wanted
        np.testing.assert_array_equal(attribute(probe, examples[0], ("erase",), ("label",))[0].values, before)


def test_more_draws_of_the_weights_are_averaged_post_by_post(
    tiny_probe: Probe, tiny_rows: list[dict[str, Any]]
) -> None:
    examples = [tiny_probe.encode(row | {"cues": [[0, 4]]}) for row in [*tiny_rows, *tiny_rows][:5]]

    def correlation(seed: int, draws: int) -> dict[str, Any]:
        return compare(tiny_probe, examples, "weights", ("gradnorm",), seed, draws)["gradnorm"]

    first, second, both = correlation(7, 1), correlation(12, 1), correlation(7, 2)  # seeds 7 to 11; 12 to 16; all
    assert first["correlation"] != second["correlation"]
    for name in ("correlation", "correlation_null", "cue_auroc_after"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2)
    low, high = both["correlation_ci"]
    assert low <= both["correlation"] <= high and both["n"] == 5
    alone = compare(tiny_probe, examples[:4], "weights", ("gradnorm",), draws=2)["gradnorm"]
    assert alone["correlation_ci"] is None and alone["cue_auroc_ci"] is None  # four posts give no interval


def test_adapter_kinds_and_their_table(
    tiny_model_dir: Path, adapter_dir: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    probe = Probe.from_pretrained(tiny_model_dir, adapter=adapter_dir, merge=False)
    found = study(probe, [probe.encode(tiny_rows[0] | {"cues": [[0, 4]]})], ("gradnorm",))
    assert set(found["kinds"]) == {"weights", "adapter_off", "adapter_b"}
    assert all(
        0 <= one["gradnorm"][k] <= 1 for one in found["kinds"].values() for k in ("correlation", "correlation_null")
    )
    lines = randomisation(found)
    assert [line["what"] for line in lines[:3]] == [
        "all weights, another draw per post", "adapter switched off", "adapter drawn anew"
    ]  # fmt: skip
    assert len(lines) == 3 + len(found["cascade"]) - 1 and all("→" in line["cue"] for line in lines[:3])


def test_error_rates_and_the_shortcut_that_fails() -> None:
    rates = error_rates.post_error_rates(40)
    assert {name for name, _, _ in rates} >= {"mass_ratio", "auroc_char", "iou_f1", "cosine", "plausibility_mass"}
    assert all(n >= 35 for _, n in rates.values())  # only posts where 0.05 can be reached count
    assert max(rate for rate, _ in rates.values()) <= 0.17  # 40 draws: 0.05 + 3.5 standard errors
    rng, by_characters, by_pieces = np.random.default_rng(1), [], []
    for _ in range(800):
        post = error_rates.null_post(rng, "words", (5, 20))
        values, mask = post["attributions"][0].char_values, np.zeros(post["length"], bool)
        mask[slice(*post["citations"][0].post_char[0])] = True
        by_characters.append(p_greater(shift_null(values, mask, "auroc")))
        starts, sizes = atoms(values)
        placed = np.add.reduceat(mask.astype(np.float64), starts) * 2 >= sizes
        by_pieces.append(p_greater(shift_null(values[starts], placed, "auroc")))
    assert np.mean(np.array(by_characters) <= 0.05) > 0.065
    assert np.mean(np.array(by_pieces) <= 0.05) <= 0.065


def test_checks_that_run_the_model_have_honest_p_values() -> None:
    rates = {one["id"]: one["value"] for one in gate_rates(40, 3)}
    assert set(rates) == {f"V10.{n}.erase" for n in ("faithfulness_corr", "comprehensiveness", "aopc_sufficiency")} | {
        "V10.gate", "V10.shuffled"
    }  # fmt: skip
    assert rates.pop("V10.gate") <= 0.25
    assert rates.pop("V10.shuffled") > 0.15 > max(rates.values())  # a random order of clauses is no null for a text


def test_the_data_set_tests_cover_what_is_printed_and_respect_authors() -> None:
    rates = error_rates.data_set_error_rates(15, authors=4)
    assert {name for name, _ in rates} >= {"excess", "cosine", "necessity", "sufficiency", "counterfactual",
                                           "excess against other posts", "any (Holm)"}  # fmt: skip
    rng, apart, together = np.random.default_rng(0), [], []
    for i in range(150):
        own = [error_rates.null_insertions(rng) for _ in range(4)]
        moved, authors = [one for one in own for _ in range(3)], [a for a in "wxyz" for _ in range(3)]
        for found, who in ((apart, list(map(str, range(12)))), (together, authors)):
            test = summary_module._counterfactual(moved, who, 0, 199, i)
            found.append(test is not None and test["p"] <= 0.05)
    assert np.mean(apart) > 0.1 and np.mean(together) <= 0.1  # repeated posts count once, not three times


def test_a_conclusion_is_a_test_and_not_an_interval() -> None:
    """Random citations of few posts with one cue each: the excess is below 0 in most, and its interval often is."""
    for clauses in ((10, 16), (20, 30)):
        rates = error_rates.conclusion_rates(5, clauses, 60, seed=1)
        assert max(rates.values()) <= 0.05
    rng = np.random.default_rng(0)
    below = 0
    for _ in range(60):
        made = [error_rates.null_evidence(rng, None, clauses=(20, 30), alike=True) for _ in range(5)]
        ci = stats.bootstrap_ci([e.excess["ig"][0] for e in made])
        below += ci is not None and ci[1] < 0
    assert below > 20  # what the interval alone would have called contradicted


def test_a_picture_of_the_text_is_not_taken_for_chance() -> None:
    """A map that only changes its sign when the weights are drawn anew has the largest likeness there is."""
    text = np.array([0.1, 2.0, 0.3, 0.9, 0.2, 0.1])
    assert randomise_module._likeness(text, -text)[0] == pytest.approx(1.0)
    assert randomise_module._likeness(text, np.roll(text, 3))[0] < 0.5
    assert math.isnan(randomise_module._likeness(text, np.ones(6))[0])


def test_permuted_columns_are_an_exact_test() -> None:
    rng, hits = np.random.default_rng(0), []
    for _ in range(400):
        left, right = rng.gamma(0.3, size=8), rng.gamma(0.3, size=8)  # rows and columns of very different size
        hits.append(stats.permutation_test([np.outer(left, right)], 99, int(rng.integers(2**31))).p <= 0.05)
    assert np.mean(hits) <= 0.075
    found = stats.permutation_test([np.eye(6), np.eye(5)], 999)
    assert (found.value, found.null_mean, found.n, found.p) == (1.0, 0.0, 11, 1 / 1000)
    assert stats.permutation_test([np.ones((1, 1))]) is None


def test_two_sided_and_authors_of_a_mean() -> None:
    low = [np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])] * 9
    assert stats.mean_test(low, 999).p == 1.0
    assert stats.mean_test(low, 999, two_sided=True).p == pytest.approx(2 / 1000)
    # One author, everything at one quantile: no more than one post's worth. Neither answer may be below the other's.
    high = [np.array([1.0, *np.zeros(19)])] * 6
    apart, together = stats.mean_test(high, 999), stats.mean_test(high, 999, clusters=["a"] * 6)
    assert apart.p == 1 / 1000 and together.p == pytest.approx(0.05, abs=0.02)
    rare = [np.array([0.4, *([0.0] * 18), 8.0])] * 6  # the most variance is not the most tail: 5 % are above 0.4
    assert stats.mean_test(rare, 999, clusters=["a"] * 6).p >= stats.mean_test(rare, 999).p


def test_pieces_of_a_map() -> None:
    values, mask = np.array([1.0, 1, 2, 3, 3, 3]), np.array([0, 0, 1, 1, 1, 1], bool)
    starts, sizes = atoms(values)
    assert starts.tolist() == [0, 2, 3] and sizes.tolist() == [2, 1, 3]
    null = atom_null(values, mask)
    assert len(null) == 3 and null[0] == pytest.approx(stats.mass_share(values, mask))
    assert null.mean() == pytest.approx(mask.mean())
    assert np.isnan(atom_null(-values, mask)).all()


def test_posts_by_one_author_are_not_independent() -> None:
    rng = np.random.default_rng(3)
    ignored, honest = [], []
    for i in range(400):
        own = [error_rates.null_evidence(rng, None).excess["ig"] for _ in range(3)]
        repeated, authors = [null for null in own for _ in range(4)], [a for a in "xyz" for _ in range(4)]
        for found, clusters in ((ignored, None), (honest, authors)):
            test = stats.mean_test(repeated, 199, i, clusters)
            assert test is not None
            found.append(test.p <= 0.05)
    assert np.mean(ignored) > 0.1 and np.mean(honest) <= 0.075


def test_authors_widen_the_intervals_of_a_summary() -> None:
    same = [dataclasses.replace(post_result(s % 5, name=f"p{s}"), user=str(s % 5)) for s in range(20)]
    free = [dataclasses.replace(r, user=None) for r in same]
    wide, narrow = (summarise(r, n_boot=400, draws=199) for r in (same, free))
    width = [s["mass_ratio_ci"]["ig"][1] - s["mass_ratio_ci"]["ig"][0] for s in (wide, narrow)]
    assert width[0] > 1.3 * width[1] and wide["n_users"] == 5 and narrow["n_users"] is None


def test_aligner_under_corruption() -> None:
    for rate in (0.1, 0.2):
        assert corrupt.span_f1(90, rate)["all"] >= 0.95
    assert corrupt.false_alarms(40) == 0.0


@pytest.mark.parametrize("world", [World(), World(language="zh", rule="and"), World(rule="twice", first="explanation")])
def test_planted_rows_say_what_was_planted(world: World) -> None:
    tokenizer = make_tokenizer(world)
    groups = vocabulary(world)
    for made in planted_rows(world, tokenizer, 20, 0):
        cues = [made["post"][a:b] for a, b in made["cues"]]
        assert all(cue in groups["cue0"] + groups["cue1"] for cue in cues)
        ones = sum(cue in groups["cue1"] for cue in cues)
        assert made["parsed_label"] == str(int(ones == len(cues)) if world.rule == "and" else int(ones > 0))
        ((a, b),) = made["decoys"]
        assert made["post"][a:b] in groups["decoy0"] + groups["decoy1"] and cues[0] in made["parsed_explanation"]
    liar = dataclasses.replace(world, faithful=False)
    one, other = (planted_rows(w, tokenizer, 1, 0)[0] for w in (world, liar))
    a, b = other["decoys"][0]
    assert one["post"] == other["post"] and other["post"][a:b] in other["parsed_explanation"]


def test_few_draws_have_a_wider_bound_and_many_the_usual_one() -> None:
    """Of 150 rows of 100 draws each a right test has some above 0.075: `--quick` said not to read verdicts."""
    assert false_alarms(1000) == false_alarms(3000) == 0.075 and false_alarms(200, 0.1) == 0.1
    assert false_alarms(100) == 0.12 and false_alarms(300) < 0.1
    rates = np.random.default_rng(0).binomial(100, 0.05, 150) / 100
    assert (rates > 0.075).any() and (rates <= false_alarms(100)).all()


def test_page_holds_every_row() -> None:
    rows = [row("V1.a", "x|y", 1e-7, 1e-5), row("V8.b", "z", 0.9, 0.95, ">=")]
    text = page(rows, quick=True, seed=3)
    assert "| V1.a | x\\|y | 1e-07 | <= 1e-05 | ok |" in text and "| V8.b | z | 0.9 | >= 0.95 | **FAILED** |" in text
    assert "2 rows, 1 failed: V8.b" in text and "--quick --seed 3" in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_validates() -> None:
    """The whole of `probes validate`: trains fifteen small models."""
    bad = [one for one in validate() if not one["ok"]]
    assert not bad, bad


def test_how_far_the_planted_truth_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(clauses=(3, 4), words=2, seed=3)
    planted = train(world)
    assert planted.cue_decides(32) >= 0.9
    guessing = Probe(make_model(world, planted.probe.tokenizer).eval(), planted.probe.tokenizer, "untrained")
    untrained = dataclasses.replace(planted, probe=guessing)
    assert untrained.cue_decides(32) <= 0.1
    asked: list[Example] = []

    def all_right(probe: Probe, examples: list[Example], label_only: bool = False) -> list[bool]:
        asked.extend(examples)
        return [label_only] * len(examples)

    monkeypatch.setattr("probes.validation.planted.answers_right", all_right)
    assert untrained.cue_decides(8) == 1.0 and len(asked) == 8  # of the label alone
    cues = [word for name in ("cue0", "cue1") for word in vocabulary(world)[name]]
    assert all(example.label == "2" and not any(cue in example.post for cue in cues) for example in asked)


# Nothing was chosen by looking at these: other architectures, words, posts and orders than validate.PAIRS.
HELD_OUT = (
    World(architecture="glm4", language="en", seed=101),
    World(architecture="qwen3", language="zh", place="early", clauses=(5, 9), seed=102),
    World(architecture="mistral", language="en", punctuation=False, layers=3, seed=103),
    World(architecture="gpt_neox", language="zh", clauses=(4, 7), words=6, seed=104),
    World(architecture="qwen2", language="en", place="late", hidden=48, seed=105),
    World(architecture="glm4", language="zh", first="explanation", layers=3, seed=106),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", HELD_OUT, ids=lambda world: f"{world.architecture}-{world.language}-{world.first}")
def test_planted_pairs_nobody_tuned_for(world: World) -> None:
    from probes.validation.validate import planted_pairs

    bad = [one for one in planted_pairs(worlds=(world,)) if not one["ok"]]
    assert not bad, bad


@pytest.mark.slow
def test_a_border_token_that_decides_is_not_the_posts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last planted pair passes V7's bound; where the border token went with the post, it does not."""
    planted = train(PAIRS[-1])
    found = {}
    for rule in ("stays", "goes with the post"):
        posts = probe_posts(planted, 32, ("ig", "erase"), ("label",))
        assert all(len(p.example.border) == (rule == "stays") for p in posts)
        found[rule] = {m: float(np.mean(cue_aurocs(posts, m))) for m in ("ig", "erase")}
        monkeypatch.setattr("probes.models.encode._fused", lambda *given: False)
    assert min(found["stays"].values()) >= 0.95 > max(found["goes with the post"].values()), found
