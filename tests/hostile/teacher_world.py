"""Three posts and a recipe, and servers that answer as they are told: what the attacks on teachers share."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mentalglm_jax.data.records import write_records
from tests.hostile.attack import Outcome, run
from tests.mentalglm_jax.data.explain.test_build import records
from tests.mentalglm_jax.endpoint import Behaviour, completion, oracle

KEY = "sk-hostile-0123456789abcdef"


class World:
    """Three posts and a recipe; ``build`` runs the command against a server."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self._capsys = folder, capsys
        write_records(folder / "posts.jsonl", records(3))
        write_records(folder / "experts.jsonl", records(16, 100, explanation="专家写道“可以”。"))

    def recipe(self, url: str, teacher: dict[str, Any], **more: Any) -> Path:
        whole = {
            "out": str(self.folder / "out"), "cache": str(self.folder / "cache"), "attempts": 1,
            "data": {"root": str(self.folder / "posts.jsonl")}, "experts": str(self.folder / "experts.jsonl"),
            "teacher": {"model": "m", "base_url": url, "backoff": 0.0, "timeout": 20.0, "retries": 1, "concurrency": 1,
                        "api_key_env": "HOSTILE_KEY"} | teacher, **more,
        }  # fmt: skip
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")
        return path

    def build(self, url: str, *arguments: str, **teacher: Any) -> Outcome:
        return run(["mentalglm", "data", "build", self.recipe(url, teacher), "--json", *arguments], self._capsys)

    def written(self) -> str:
        """All that the command left, names included."""
        files = [path for name in ("out", "cache") for path in (self.folder / name).rglob("*") if path.is_file()]
        return "\n".join(f"{path}\n{path.read_bytes().decode('utf-8', 'replace')}" for path in files)

    def paid(self) -> int:
        """Answers kept, of use or not."""
        return len(list((self.folder / "cache").glob("??/*.json")))


def accepted(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def said(text: Any, finish: str = "stop", **message: Any) -> Behaviour:
    return lambda asked: completion(asked, text, finish, **message)


def counted(**usage: Any) -> Behaviour:
    return lambda asked: completion(asked, oracle(asked["messages"])) | {"usage": usage}
