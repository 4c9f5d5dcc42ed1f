"""Tasks that do not come with the package, one of each kind, as a user would write them."""

from typing import Any

from mentalglm_jax.text import tasks

MOOD: dict[str, Any] = {
    "kind": "single", "question": {"en": "What is the mood of this post?"},
    "sentence": {"en": "The mood of this post is {}."},
    "labels": {key: {"name": {"en": key}} for key in ("calm", "tense", "mixed")},
}  # fmt: skip
DISTORTED: dict[str, Any] = {
    "kind": "multi", "description": "Ways in which a thought can be distorted.",
    "question": {"en": "How is the thought distorted?", "zh": "这个想法有什么歪曲？"},
    "sentence": {"en": "The thought is distorted by {}.", "zh": "这个想法的歪曲是：{}。"},
    "labels": {
        "filter": {"name": {"en": "a filter", "zh": "过滤"}},
        "blame": {"name": {"en": "blame", "zh": "怪罪"}},
        "musts": {"name": {"en": "musts", "zh": "必须"}},
        "none": {"sentence": {"en": "The thought is not distorted.", "zh": "这个想法没有歪曲。"}},
    },
}  # fmt: skip
TENSION: dict[str, Any] = {
    "kind": "ordinal", "question": {"en": "How tense is this post, from 0 to 3?", "zh": "这个帖子有多紧张（0到3）？"},
    "sentence": {"en": "This post shows tension {}.", "zh": "这个帖子的紧张程度是{}级。"},
    "labels": {str(level): {} for level in range(4)}, "positive": "3",
}  # fmt: skip
PATH: dict[str, Any] = {
    "kind": "hierarchy", "question": {"en": "What does the post show?"}, "sentence": {"en": "It shows {}."},
    "parents": {"event": {"name": {"en": "Event"}}, "feeling": {"name": {"en": "Feeling"}}},
    "labels": {
        "loss": {"parent": "event"}, "quarrel": {"parent": "event"}, "fear": {"parent": "feeling"},
    },
}  # fmt: skip
WEATHER: dict[str, Any] = {
    "kind": "single", "question": {"en": "Which weather is it?", "zh": "这是什么天气？"},
    "sentence": {"en": "The weather is {}.", "zh": "天气是{}。"}, "positive": "storm",
    "labels": {
        "sun": {"name": {"zh": "晴"}}, "rain": {"name": {"zh": "雨"}},
        "storm": {"name": {"en": "stormy", "zh": "暴风雨"}, "aliases": ["gale"]},
    },
}  # fmt: skip
OWN = {"mood": MOOD, "distorted": DISTORTED, "tension": TENSION, "path": PATH, "weather": WEATHER}


def definitions(*names: str) -> tuple[tasks.Task, ...]:
    """The tasks of ``names`` (all), not added."""
    return tasks.tasks_of({name: OWN[name] for name in names or OWN}, "own_tasks.py")
