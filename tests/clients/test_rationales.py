"""LIME, SHAP and Inseq by their own packages, as the benchmark beside people's rationales calls them."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import irf, rationales
from mentalglm_jax.data.rationales import iter_irf
from probes.intake.rows import Reader
from probes.probe import Probe

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
POST = "we ate, and nobody came to see me; nobody asked"


def linear(post: str) -> SimpleNamespace:
    """A model that adds up: 3 nats for "came", -2 for "ate,", 1 for each "nobody"."""

    def odds(texts):
        counts = {"came": 3.0, "ate,": -2.0, "nobody": 1.0}
        return np.array([sum(counts.get(word, 0.0) for word in text.split()) - 1 for text in texts])

    return SimpleNamespace(example=SimpleNamespace(post=post), words=irf.words_of(post), odds=odds)


def test_lime_and_shap_find_what_a_model_adds_up():
    one = linear(POST)
    words = [POST[a:b] for a, b in one.words]
    shap, lime = rationales.shap_scores(one, 500, 0), rationales.lime_scores(one, 500, 0)
    wanted = np.array([{"came": 3.0, "ate,": -2.0, "nobody": 1.0}.get(word, 0.0) for word in words])
    np.testing.assert_allclose(shap, wanted, atol=1e-6)  # Shapley values of a sum are its terms
    assert words[int(lime.argmax())] == "came" and words[int(lime.argmin())] == "ate,"
    assert len({value for value, word in zip(lime, words, strict=True) if word == "nobody"}) == 1


def test_the_benchmark_runs_whole_beside_all_three(tmp_path):
    records = list(iter_irf(irf.twin(tmp_path, 60)))
    model = irf.trained([one for one in records if one.split == "train"], tmp_path / "model", 20, 0)
    result = rationales.study(Probe.from_pretrained(model), Reader(model), records, 3, 40, 6, 0)
    for one in result.values():
        assert {"LIME", "SHAP", "Inseq"} <= set(one["methods"]) and one["posts"] == 3
        assert all("p" in row for name, row in one["methods"].items() if name not in ("SHAP", rationales.PEOPLE))
    rationales.show(result)
