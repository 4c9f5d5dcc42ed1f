"""Characters that nobody sees, or that move what stands around them, on the pages that people judge by."""

import json
import re

import pytest

from mentalglm_jax.data.explain.review import render_form
from mentalglm_jax.evaluate import evaluate
from mentalglm_jax.evaluate.report import render
from mentalglm_jax.markdown import hidden
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.data.explain.test_review import records
from tests.mentalglm_jax.evaluate.test_report import rows

HIDDEN = {
    "an override": "\u202e",
    "an isolate": "\u2067",
    "no width": "\u200b",
    "a tag": "\U000e0041",
    "a bell": "\x07",
}


@pytest.mark.parametrize("attack", HIDDEN)
def test_an_evaluation_names_them(attack):
    mark = HIDDEN[attack]
    result = evaluate(rows("suicide_risk", 30), draws=5)
    floor = {k: result["suicide_risk"][k] for k in ("n", "weighted_f1", "micro_f1", "macro_f1", "ci95")}
    result["suicide_risk"]["floors"] = {f"floor{mark}1": floor}
    page = render(result, title=f"high{mark}wol", against=f"other{mark}")
    assert not any(map(hidden, page)) and page.count(f"[U+{ord(mark):04X}]") >= 3


@pytest.mark.parametrize("attack", HIDDEN)
def test_the_review_form_names_them(attack):
    mark = HIDDEN[attack]
    sample = records(2, post=f"a{mark}b\n{{}}", explanation=f"because{mark}")
    page = render_form(sample, "en")
    held = re.search(r'id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert held is not None
    data = json.loads(held[1])
    for item, record in zip(data["items"], sample, strict=True):
        assert item["id"] == record.id and not any(map(hidden, item["post"] + item["explanation"]))
        assert item["post"].startswith(f"a[U+{ord(mark):04X}]b\n")


def test_an_answer_with_them_is_read():
    said = "h\u200bigh"
    assert tasks.get_task("suicide_risk").read_short(said, "en") == ("high",)
