"""The benchmark beside people's rationales, on a small twin of IRF: the answer is learnt, every map is measured."""

import math

import numpy as np
import pytest
import torch

from benchmarks import irf, rationales
from mentalglm_jax.data.rationales import iter_irf
from mentalglm_jax.errors import InputError
from probes.checks.verdict import FAMILIES
from probes.intake.rows import Reader
from probes.probe import Probe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records of a twin of 60 posts, and a model that was trained for one step."""
    folder = tmp_path_factory.mktemp("irf")
    with pytest.warns(UserWarning, match="stand in their posts as they are"):
        records = list(iter_irf(irf.twin(folder, 60)))
    model = irf.trained([one for one in records if one.split == "train"], folder / "model", 1, 0)
    return records, Probe.from_pretrained(model), Reader(model)


def test_every_token_of_the_answer_is_learnt(made):
    """The first tells yes from no; a loss of the last alone has nothing to learn (it did, and F1 was 0)."""
    records, probe, reader = made
    rows = irf.asked(reader, records[:6])
    assert {row["parsed_label"] for row in rows} == {"yes", "no"} and len({len(row["prompt_ids"]) for row in rows}) > 1
    ids = [[*row["prompt_ids"], *row["output_ids"]] for row in rows]
    wanted = -probe.scorer.logprobs(ids, [len(row["prompt_ids"]) for row in rows]).sum()
    with torch.no_grad():
        found = irf.answer_loss(probe.model, rows)
    assert float(found) == pytest.approx(float(wanted) / sum(len(row["output_ids"]) for row in rows), rel=1e-5)


def test_every_map_stands_beside_what_people_marked(made, monkeypatch):
    records, probe, reader = made
    monkeypatch.setattr(rationales, "find_spec", lambda name: None)  # other people's packages: tests/clients
    marked = [one for one in records if one.split == "test" and one.rationales]
    post, _ = rationales.of_posts(probe, reader, marked[:2], 20, 0)
    assert {name.partition(",")[0] for name in post} == {*FAMILIES, *rationales.RANDOM, rationales.PEOPLE}
    people = post[rationales.PEOPLE]
    assert people["word F1"] == people["AUPRC"] == people["R"] == 1 and post["random stretch"]["word F1"] < 1
    assert all(0 <= row["AUPRC"] <= 1 and math.isfinite(row["cost"]) for row in post.values())
    answers = rationales.classified(probe, reader, records[-6:])
    assert answers["tested"] == 6 and 0 <= answers["F1"] <= 1 and 0 <= answers["AUROC"] <= 1
    with pytest.raises(InputError, match="belong: 0 marked posts in the test split; at least 3 are needed"):
        rationales.study(probe, reader, [one for one in records if one.split == "train"], 3, 20, 6, 0)


def test_what_hiding_words_costs(made):
    records, probe, reader = made
    example = probe.encode(irf.asked(reader, [one for one in records if one.rationales][:1], "yes")[0])
    one = irf.Asked(probe, example)
    spoken = " ".join(example.post[a:b] for (a, b), marked in zip(one.words, one.marked, strict=True) if marked)
    assert spoken.rstrip(",") == example.post[slice(*example.rationales[0])]
    none, all_ = np.array([], dtype=int), np.arange(len(one.words))
    found = rationales.costs(one, [none, one.marked.nonzero()[0], all_], ("some other words",), 0)
    assert found[0] == 0 and abs(found[1:]).min() > 0
    forward = probe.scorer.forward(example, ("label",))
    whole = float(forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool))[0, 0])
    assert one.odds([example.post])[0] == pytest.approx(whole, abs=1e-4)  # what LIME and SHAP ask is what we explain


def test_tables_say_who_is_above_shap_and_whether_agreement_goes_with_cost():
    rng = np.random.default_rng(0)
    posts = []
    for noise in rng.normal(0, 0.01, 40):
        base = {"P": 0.5, "R": 0.5, "word F1": 0.5}
        posts.append({
            "ig": base | {"F": 0.6 + noise, "AUPRC": 0.9 + noise, "cost": 3.0},
            "erase, words": base | {"F": 0.3 - noise, "AUPRC": 0.5, "cost": 2.0},
            "SHAP": base | {"F": 0.3, "AUPRC": 0.2, "cost": 1.0},
            "random words": base | {"F": 0.1, "AUPRC": 0.1, "cost": 9.0},
            rationales.PEOPLE: base | {"F": 0.9, "AUPRC": 1.0, "cost": -5.0},
        })  # fmt: skip
    found = rationales.tables(posts, 0)
    ig, erase = found["methods"]["ig"], found["methods"]["erase, words"]
    assert ig["less SHAP"][1] > 0.29 and ig["p by Holm"] == 2 * ig["p"] < 0.001
    assert erase["less SHAP"][1] < 0 < erase["less SHAP"][2] and erase["p by Holm"] > 0.05
    assert found["over maps"] == (1, 1, 1)  # random words and people's, which would make it -0.2, have no part in it
    assert "p by Holm" not in found["methods"]["random words"] and math.isnan(ig["over posts"][0])
    assert rationales.rouge1("A b, c d", "a b. e")[:2] == (0.5, 2 / 3)


def test_equal_values_are_ranked_at_random(made):
    """A clause map must not win by the place of its words."""
    records, probe, reader = made
    marked = [one for one in records if one.rationales][:1]
    one = irf.Asked(probe, probe.encode(irf.asked(reader, marked, "yes")[0]))
    flat = {"flat": np.zeros(len(one.words))}
    found = [rationales.measured(one, flat, ("some other words",), seed)["flat"]["word F1"] for seed in range(8)]
    assert len(set(found)) > 1


@pytest.mark.slow
def test_the_twin_is_learnt(tmp_path):
    with pytest.warns(UserWarning, match="stand in their posts as they are"):
        records = list(iter_irf(irf.twin(tmp_path)))
    model = irf.trained([one for one in records if one.split == "train"], tmp_path / "model", 400, 0)
    probe, reader = Probe.from_pretrained(model), Reader(model)
    for words in irf.QUESTIONS.values():
        about = [one for one in records if one.split == "test" and one.question == words]
        assert rationales.classified(probe, reader, about)["F1"] > 0.95
