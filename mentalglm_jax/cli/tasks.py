"""``mentalglm tasks``: which tasks are known, what one looks like as a file, whether a file is one."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mentalglm_jax.cli.options import AsJson, TaskFile, make_known
from mentalglm_jax.cli.output import TYPER, cell, examples, print_json, say

tasks_app = typer.Typer(**TYPER, help="What a model can be asked; how a task of your own is written.",
                        epilog=examples("mentalglm tasks COMMAND --help"))  # fmt: skip


@tasks_app.command("list", epilog=examples("mentalglm tasks list"))
def tasks_list(tasks: TaskFile = None, json_: AsJson = False) -> None:
    """Every known task: its kind, languages and labels."""
    from mentalglm_jax.text.tasks import TASKS

    make_known(tasks)
    if json_:
        print_json({"tasks": [_summary(name) for name in TASKS]})
        return
    table = Table(show_edge=False, header_style="bold")
    for name in ("task", "kind", "languages", "labels", "what it is"):
        table.add_column(name, no_wrap=name in ("task", "kind"))
    for name in TASKS:
        one = _summary(name)
        labels = ", ".join(one["labels"][:4]) + (
            f" and {len(one['labels']) - 4} more" if len(one["labels"]) > 4 else ""
        )
        table.add_row(cell(name), one["kind"], ", ".join(one["languages"]), cell(labels), cell(one["description"]))
    say(table)


def _summary(name: str) -> dict[str, Any]:
    from mentalglm_jax.text.tasks import get_task

    task = get_task(name)
    return {"task": task.name, "kind": task.kind, "languages": list(task.languages), "labels": list(task.keys),
            "description": task.description}  # fmt: skip


@tasks_app.command("show", epilog=examples("mentalglm tasks show suicide_risk"))
def tasks_show(
    name: Annotated[str, typer.Argument(help="A known task, e.g. suicide_risk")], tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """A task as the file it is, to start one's own from, and what the model is asked and trained to answer."""
    from mentalglm_jax.text.tasks import get_task, task_record, tasks_text

    make_known(tasks)
    task = get_task(name)
    examples = {language: _example(name, language) for language in task.languages}
    if json_:
        print_json({"task": task.name, "definition": task_record(task), "examples": examples})
        return
    say(tasks_text([task]).rstrip("\n"))
    for language, example in examples.items():
        for part, text in example.items():
            lines = text.split("\n")
            say("\n".join([f"# {language}, {part}: {lines[0]}", *(f"#   {line}" for line in lines[1:])]))


def _example(name: str, language: str) -> dict[str, str]:
    """One rendered prompt and answer; the post and the explanation stand for themselves."""
    from mentalglm_jax.text.tasks import answer, get_task

    task = get_task(name)
    system = task.system(language)
    named = [label.key for label in task.labels if not label.whole] or list(task.keys)
    labels = named[:2] if task.arity == "multi" and len(named) > 1 else named[:1]
    found = {} if system is None else {"system": system}
    found["prompt"] = task.prompt("…", task.question(language), language)
    found["answer"] = answer(task, task.ordered(labels), "…", language)
    return found


@tasks_app.command("check", epilog=examples("mentalglm tasks check tasks.yaml"))
def tasks_check(
    file: Annotated[Path, typer.Argument(help="Task file, or a directory with tasks.yaml")], json_: AsJson = False
) -> None:
    """Whether a task file can be used: types, keys, languages, and labels that are told apart in an answer."""
    from mentalglm_jax.text.tasks import add_tasks, read_tasks

    found = read_tasks(file)
    add_tasks(found, str(file))
    if json_:
        print_json({"file": str(file), "tasks": [_summary(task.name) for task in found]})
        return
    for task in found:
        say(f"{task.name}: {task.kind}, {len(task.keys)} labels, {', '.join(task.languages)}")
