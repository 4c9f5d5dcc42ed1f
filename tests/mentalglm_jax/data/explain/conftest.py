"""Posts, experts' explanations and recipes for ``data build``."""

import pytest

from mentalglm_jax.data.explain.build import BuildRecipe
from mentalglm_jax.data.records import Record, write_records
from mentalglm_jax.text import tasks

WORDS = (
    "今天下班很晚地铁上人很多我一直在想明天的会议觉得自己什么都做不好可是同事说已经很不错了夜里醒来好几次窗外下着雨"
    "猫睡在脚边早上煮了面条味道还行收到一封信没有打开楼下的树开花了孩子们在笑我坐了很久才回去把东西整理好写完了日记"
)


def post(number):
    return "".join(WORDS[(number * 7 + step * (number + 3)) % len(WORDS)] for step in range(40))


def records(count=12, offset=0, **more):
    risk, distortion = tasks.TASKS["suicide_risk"], tasks.TASKS["cognitive_distortion"]
    found = []
    for n in range(offset, offset + count):
        split = "dev" if n % 6 == 5 else "train"
        if n % 2:
            labels = ("labeling", "mind_reading") if n % 4 == 1 else ("labeling",)
            found.append(Record(f"r{n}", distortion.name, "zh", post(n), distortion.question("zh"), labels=labels,
                                split=split, source="made", **more))  # fmt: skip
        else:
            found.append(Record(f"r{n}", risk.name, "zh", post(n), risk.question("zh"), split=split, source="made",
                                label="high" if n % 4 else "low", **more))  # fmt: skip
    return found


@pytest.fixture
def made(tmp_path):
    """A function that gives the recipe for an endpoint, over files in ``tmp_path``."""
    write_records(tmp_path / "posts.jsonl", records())
    write_records(tmp_path / "experts.jsonl", records(16, 100, explanation="专家写道“可以”。"))

    def recipe(url, **more):
        teacher = {"model": "oracle", "base_url": url, "backoff": 0.0, "timeout": 20.0, "concurrency": 3}
        return BuildRecipe.model_validate({
            "out": tmp_path / "out", "cache": tmp_path / "cache", "data": {"root": tmp_path / "posts.jsonl"},
            "experts": tmp_path / "experts.jsonl", "teacher": teacher | more.pop("teacher", {}), **more,
        })  # fmt: skip

    return recipe
