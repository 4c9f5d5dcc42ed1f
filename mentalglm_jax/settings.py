"""Short YAML checked by a typed model before anything runs: training recipes, build recipes.

Unknown keys are refused with the nearest known one; ``--set a.b=c`` overrides any value. Lists are addressed by name
where their items have one (``stages.english.train.steps=10``) or by position (``stages.0.train.steps=10``);
``train.KEY`` is that key of every stage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mentalglm_jax.errors import InputError, nearest
from mentalglm_jax.foreign import MAX_YAML_BYTES, parse_yaml, read_text


class Settings(BaseModel):
    """A section: no unknown key, no infinite number, no path that is none, not changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _is_a_name(cls, value: Any) -> Any:
        """No path holds a zero byte: the system's calls raise for one, each in its own way."""
        if isinstance(value, Path) and "\0" in str(value):
            raise ValueError("a file's name cannot hold a zero byte")
        return value


S = TypeVar("S", bound=Settings)


def load_settings(path: str | Path, model: type[S], overrides: Sequence[str] = ()) -> S:
    """Reads and checks a recipe.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` strings; values are YAML.

    Raises:
        InputError: missing file, bad YAML, unknown key (names the nearest known one), value of the wrong type. Of an
            override the key is named, never the value: it may be a secret.
    """
    path = Path(path)
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error.strerror})") from None
    raw = parse_yaml(text.removeprefix("\ufeff"), str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, this file is {type(raw).__name__}")
    return _checked(_unshared(raw), model, overrides, str(path))


def settings_of(model: type[S], overrides: Sequence[str]) -> S:
    """``load_settings`` where there is no file. Raises: InputError as that."""
    return _checked({}, model, overrides, "--set")


def _checked(raw: dict[str, Any], model: type[S], overrides: Sequence[str], where: str) -> S:
    for override in overrides:
        _override(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error, model)}") from None


def _unshared(node: Any) -> Any:
    """A copy in which YAML aliases are separate values, so that an override reaches only the place it names."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"--set {key[:200]}"
    if not equals or not key:
        raise InputError(f"{where}: write it as section.key=value")
    value = parse_yaml(text, where, "the value is not valid YAML")
    if key.startswith("train.") and isinstance(stages := raw.get("stages"), list) and "train" not in raw:
        for number in range(len(stages)):
            _override(raw, f"stages.{number}.{override}")
        return
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        if isinstance(node, list):
            node = _item(node, parent, where)
        elif isinstance(node, dict):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        else:
            raise InputError(f"{where}: {parent!r} is below a plain value")
    if not isinstance(node, dict):
        what = "one item of a list cannot be set, give the whole list" if isinstance(node, list) else "a plain value"
        raise InputError(f"{where}: {'.'.join(parents)} is {what}")
    node[last] = value


def _item(items: list[Any], key: str, where: str) -> Any:
    for index, item in enumerate(items):
        if key == str(index) or (isinstance(item, dict) and item.get("name") == key):
            return item
    names = [item.get("name", index) for index, item in enumerate(items) if isinstance(item, dict)]
    raise InputError(f"{where}: no item {key!r}; there are {', '.join(map(str, names))}")


def more_than(value: Any, most: int) -> bool:
    """Whether a JSON value holds more than ``most`` values: pydantic takes a kilobyte for each one that is wrong."""
    level, count = [value], 1
    while level and count <= most:
        parts = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for part in parts for child in part]
        count += len(level)
    return count > most


def first_problem(error: ValidationError, model: type[Settings]) -> str:
    """What is wrong, at which key, in one line."""
    # A key that is missing may be the one that is misspelt.
    problem = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
    location = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        inner: Any = model
        for part in problem["loc"][:-1]:
            if isinstance(part, str) and part in getattr(inner, "model_fields", {}):
                inner = _model_of(inner.model_fields[part].annotation)
        known = getattr(inner, "model_fields", {})
        return f"unknown key {location!r}{nearest(str(problem['loc'][-1]), known)}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{location}: {message}{more}" if location else f"{message}{more}"


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_of(argument)) is not None:
            return found
    return None
