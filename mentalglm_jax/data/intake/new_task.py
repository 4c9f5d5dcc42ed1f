"""A task made of the labels that a table holds: a closed set of them, a question and a label sentence per language."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mentalglm_jax.data.intake.rows import Row, fold
from mentalglm_jax.data.rows import shown
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tasks import Label, Task, task_of, task_record

MOST_LABELS, LONGEST_LABEL = 100, 60
_LISTED = 12  # labels that a question still lists
_NO_KEY = re.compile(r"[,;#\s]+")
# Wording that fits labels of any kind (nouns, yes and no, numbers); to be edited.
_QUESTIONS = {
    ("en", "single"): ("Which label fits the post: {}?", ", ", " or "),
    ("en", "multi"): ("Which labels fit the post: {}?", ", ", ", "),
    ("zh", "single"): ("哪个标签符合这个帖子：{}？", "、", "还是"),
    ("zh", "multi"): ("哪些标签符合这个帖子：{}？", "、", "、"),
}
_BARE = {"single": {"en": "Which label fits the post?", "zh": "哪个标签符合这个帖子？"},
         "multi": {"en": "Which labels fit the post?", "zh": "哪些标签符合这个帖子？"}}  # fmt: skip
_SENTENCES = {"single": {"en": "The label of this post is {}.", "zh": "这个帖子的标签是{}。"},
              "multi": {"en": "The labels of this post are: {}.", "zh": "这个帖子的标签有：{}。"}}  # fmt: skip


def make_task(name: str, rows: Iterable[Row], several: bool, source: str) -> Task:
    """The task ``name`` with the labels of ``rows``, in the languages of ``rows``. Names that differ in width, case or
    white space only are one label, in its most frequent spelling.

    Args:
        several: a post may have more than one.
        source: what was read, for messages.

    Raises:
        InputError: fewer than two labels, more than ``MOST_LABELS``, one too long to be one, labels that cannot be told
            apart in an answer; or a name that no task may have.
    """
    counts, languages = Counter[str](), Counter[str]()
    for row in rows:
        counts.update(row.names)
        languages[row.language] += 1
    spellings: dict[str, str] = {}
    for label, _ in counts.most_common():
        spellings.setdefault(fold(label), label)
    found = sorted(spellings.values())
    if longest := [label for label in found if len(label) > LONGEST_LABEL]:
        raise InputError(f"{source}: a label of {len(longest[0])} characters; is that the column with the labels?")
    if len(found) > MOST_LABELS:
        raise InputError(f"{source}: {len(found)} different labels; is that the column with the labels? Where a cell "
                         "holds several, say what separates them: --sep ';'")  # fmt: skip
    if len(found) < 2:
        only = shown(found[0]) if found else "none"
        raise InputError(f"{source}: all rows have one label ({only}); a task needs two at least")
    kind = "multi" if several else "single"
    spoken = [language for language in _SENTENCES[kind] if languages[language]]
    if not spoken:
        raise InputError(f"{source}: its posts are in {', '.join(languages)}; a task is made for posts in "
                         f"{' or '.join(_SENTENCES[kind])}, for others write one")  # fmt: skip
    task = Task(
        name=name,
        kind=kind,
        labels=tuple(Label(key, dict.fromkeys(spoken, label)) for key, label in zip(_keys(found), found, strict=True)),
        questions={language: _question(language, kind, found) for language in spoken},
        templates={language: _SENTENCES[kind][language] for language in spoken},
    )
    return task_of(name, task_record(task), source)  # checked as any task that people write


def _keys(names: Sequence[str]) -> list[str]:
    """A key for each name: the name itself where it can be one, else without the marks that a key cannot have, and with
    a number where that is another label's name or key."""
    taken, keys = {fold(name) for name in names}, []
    for name in names:
        key = first = _NO_KEY.sub("_", name).strip("_") or "label"
        number = 1
        while key != name and fold(key) in taken:
            key = f"{first}_{(number := number + 1)}"
        taken.add(fold(key))
        keys.append(key)
    return keys


def _question(language: str, kind: str, names: Sequence[str]) -> str:
    if len(names) > _LISTED:
        return _BARE[kind][language]
    wording, between, last = _QUESTIONS[language, kind]
    return wording.replace("{}", between.join(names[:-1]) + last + names[-1])
