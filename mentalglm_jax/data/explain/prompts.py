"""What the teacher is asked: per task a role and criteria, the same rules for all, examples by experts, the gold label.

The wording stands in ``assets/prompts/LANGUAGE.yaml`` (or the user's file of the same form), with a version that the
datasheet repeats beside the file's hash.
"""

import hashlib
import random
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from pydantic import Field, ValidationError

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.splits import normalize_post
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import read_yaml
from mentalglm_jax.settings import Settings, first_problem
from mentalglm_jax.text import tasks

Message = dict[str, str]


class TaskPrompt(Settings):
    """``criteria`` per label key; a label without one is named only."""

    role: str
    criteria: dict[str, str] = Field(default_factory=dict)


class Prompts(Settings):
    """One language's wording. ``system`` holds ``{role}``, ``{criteria}`` and ``{rules}``; ``request`` ``{post}``,
    ``{question}`` and ``{label}``. ``other`` serves tasks without an entry."""

    version: int
    language: str
    system: str
    rules: tuple[str, ...]
    request: str
    tasks: dict[str, TaskPrompt]
    other: TaskPrompt
    sha256: str = ""

    def messages(self, record: Record, examples: Sequence[Record]) -> list[Message]:
        """The chat that asks for an explanation of ``record``'s gold label; each example is a turn of its own."""
        task = tasks.get_task(record.task)
        prompt = self.tasks.get(record.task, self.other)
        lines = [
            f"- {label.name(self.language)}：{text}" if self.language == "zh" else f"- {label.name('en')}: {text}"
            for label in task.labels
            if (text := prompt.criteria.get(label.key))
        ]
        rules = "\n".join(f"{number}. {rule}" for number, rule in enumerate(self.rules, start=1))
        system = self.system.format(role=prompt.role, criteria="\n".join(lines), rules=rules)
        chat = [{"role": "system", "content": system.strip()}]
        for example in examples:
            chat += [{"role": "user", "content": self._request(example)},
                     {"role": "assistant", "content": example.answer()}]  # fmt: skip
        return [*chat, {"role": "user", "content": self._request(record)}]

    def _request(self, record: Record) -> str:
        label = tasks.get_task(record.task).sentence(record.gold, record.language)
        return self.request.format(post=record.post, question=record.question, label=label).strip()


def load_prompts(language: str, path: str | Path | None = None) -> Prompts:
    """The shipped wording of ``language``, or the user's. Raises: InputError naming the file and what is wrong."""
    if path is None:
        with resources.as_file(resources.files("mentalglm_jax") / "assets" / "prompts" / f"{language}.yaml") as place:
            name, (wording, data) = f"prompts/{language}.yaml", read_yaml(place)
    else:
        name, (wording, data) = str(path), read_yaml(Path(path))
    try:
        prompts = Prompts.model_validate(wording | {"sha256": hashlib.sha256(data).hexdigest()})
        _check_places(prompts.system, ("role", "criteria", "rules"))
        _check_places(prompts.request, ("post", "question", "label"))
    except ValidationError as error:
        raise InputError(f"{name}: {first_problem(error, Prompts)}") from None
    except ValueError as error:
        raise InputError(f"{name}: a wording holds an unknown place {{{error}}}") from None
    if prompts.language != language:
        raise InputError(f"{name}: is written for language {prompts.language!r}, the records are {language!r}")
    for task, prompt in prompts.tasks.items():
        known = tasks.get_task(task).keys
        if unknown := [key for key in prompt.criteria if key not in known]:
            raise InputError(f"{name}: tasks.{task}.criteria: unknown label {unknown[0]!r}; known: {', '.join(known)}")
    return prompts


def _check_places(wording: str, places: Sequence[str]) -> None:
    """Raises: ValueError unless each place in braces is one of ``places``, without a format that could widen it."""
    for _, name, form, conversion in string.Formatter().parse(wording):
        if name is not None and (name not in places or form or conversion):
            raise ValueError(repr(name) if name not in places else repr(f"{name}:{form}"))


def pick_examples(record: Record, experts: Iterable[Record], per_class: int, seed: int) -> list[Record]:
    """``per_class`` random experts' examples of each label of the record's task and language, in random order; the
    record's own post is never among them. The choice depends on ``seed`` and the record's id alone."""
    own = normalize_post(record.post)
    pool = sorted(
        (one for one in experts if (one.task, one.language) == (record.task, record.language)
         and one.explanation and normalize_post(one.post) != own),
        key=lambda one: one.id,
    )  # fmt: skip
    draw = random.Random(f"{seed} {record.id}")
    chosen: dict[str, Record] = {}
    for key in tasks.get_task(record.task).keys:
        of_class = [one for one in pool if key in one.gold and one.id not in chosen]
        chosen |= {one.id: one for one in draw.sample(of_class, min(per_class, len(of_class)))}
    examples = list(chosen.values())
    draw.shuffle(examples)
    return examples
