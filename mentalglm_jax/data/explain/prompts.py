"""What the teacher is asked: per task a role and criteria, the same rules for all, examples by experts, the gold label.

The wording stands in ``assets/prompts/LANGUAGE.yaml`` (or the user's file of the same form), with a version that the
datasheet repeats beside the file's hash.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.sources import normalize_post
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import MAX_YAML_BYTES, parse_yaml, read_bytes
from mentalglm_jax.text import tasks

Message = dict[str, str]


class TaskPrompt(BaseModel):
    """``criteria`` per label key; a label without one is named only."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: str
    criteria: dict[str, str] = {}


class Prompts(BaseModel):
    """One language's wording. ``system`` holds ``{role}``, ``{criteria}`` and ``{rules}``; ``request`` ``{post}``,
    ``{question}`` and ``{label}``. ``other`` serves tasks without an entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    language: tasks.Language
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
        place = resources.files("mentalglm_jax") / "assets" / "prompts" / f"{language}.yaml"
        name, data = f"prompts/{language}.yaml", place.read_bytes()
    else:
        name = str(path)
        try:
            data = read_bytes(Path(path), MAX_YAML_BYTES)
        except OSError as error:
            raise InputError(f"{path}: cannot read the prompts ({error.strerror})") from None
    try:
        wording = parse_yaml(data.decode("utf-8"), name) | {"sha256": hashlib.sha256(data).hexdigest()}
        prompts = Prompts.model_validate(wording)
        prompts.system.format(role="", criteria="", rules="")
        prompts.request.format(post="", question="", label="")
    except (UnicodeDecodeError, TypeError) as error:
        raise InputError(f"{name}: not a YAML mapping in UTF-8 ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{name}: {where}: {problem['msg']}") from None
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{name}: a wording holds an unknown place {{{error}}}") from None
    if prompts.language != language:
        raise InputError(f"{name}: is written for language {prompts.language!r}, the records are {language!r}")
    for task, prompt in prompts.tasks.items():
        known = tasks.get_task(task).keys
        if unknown := [key for key in prompt.criteria if key not in known]:
            raise InputError(f"{name}: tasks.{task}.criteria: unknown label {unknown[0]!r}; known: {', '.join(known)}")
    return prompts


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
