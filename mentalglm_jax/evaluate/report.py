"""What a run leaves behind: one HTML page, JSON, CSV and a model card; a leaderboard over several runs.

The page works from disk without a network. Everything is escaped by Jinja2, hidden characters are named, the style is
named by hash in a Content-Security-Policy that allows nothing else, and no post or explanation is in it.
"""

import base64
import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mentalglm_jax.data.cells import to_cell
from mentalglm_jax.evaluate.published import figures_beside
from mentalglm_jax.files import write_card, write_json, write_text
from mentalglm_jax.markdown import escaped, seen
from mentalglm_jax.text import tasks

SAFETY = (
    "A research instrument, not a diagnosis: it must not decide about a person. Whoever is in a crisis needs a person: "
    "a doctor, a crisis line, someone they trust."
)
RESULTS_NOTE = (
    "`text`: label read from the generated answer, what cannot be read is wrong; `label`: the label sentence the model "
    "finds most probable. Weighted F1 with its 95 % bootstrap interval over posts. `cut off`: answers ended by the "
    "token limit; floors: weighted F1 of what any system should beat."
)
CARD = "model_card.md"
_CSV_COLUMNS = ("task", "reading", "language", "class", "metric", "value", "n")


def write_report(
    directory: str | Path,
    result: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    compared: Mapping[str, Any] | None = None,
    against: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Writes ``evaluation.json``, ``.csv``, ``.html``, ``model_card.md``, with a comparison ``comparison.json``, with
    tasks that do not come with the package ``tasks.yaml``.

    Args:
        directory: made when missing.
        result: what ``evaluate`` returned, with or without floors.
        title: what was evaluated.
        compared: what ``compare`` returned.
        against: the other run's name.
        notes: what a reader must know of the training data, one sentence each; stands in the card.

    Raises:
        InputError: as ``keep_tasks``.
        RunError: the file system refused.
    """
    directory = Path(directory)
    write_json(directory / "evaluation.json", result)
    write_text(directory / "evaluation.csv", csv_text(result))
    write_text(directory / "evaluation.html", render(result, title=title, compared=compared, against=against))
    write_card(directory / CARD, model_card(result, title=title, notes=notes))
    if compared is not None:
        write_json(directory / "comparison.json", compared)
    tasks.keep_tasks(directory, tasks.added_tasks(result))


def render(
    result: Mapping[str, Mapping[str, Any]], *, title: str, compared: Mapping[str, Any] | None = None, against: str = ""
) -> str:
    """The page as a string (``write_report``)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mentalglm_jax.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: seen(value) if type(value) is str else value,  # what is markup is ours
    )
    style = environment.get_template("style.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("evaluation.html").render(
        csp=f"default-src 'none'; style-src 'sha256-{digest}'",
        style=style,
        title=title,
        made=_today(),
        safety=SAFETY,
        tasks=result,
        kinds={name: tasks.get_task(name).arity for name in result},
        bars=[bar for name, entry in result.items() for bar in _bars(name, entry)],
        published={name: figures_beside(name, entry.get("data_set")) for name, entry in result.items()},
        compared=compared,
        against=against,
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _bars(name: str, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    floors = [{"name": floor, "value": scores["weighted_f1"]} for floor, scores in entry["floors"].items()]
    for reading, scores in readings(entry):
        low, high = scores["ci95"]
        yield {"name": f"{name}, {reading}", "value": scores["weighted_f1"], "low": low, "high": high, "floors": floors}


def readings(entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("text", scores) and ("label", scores) of one task, those that are there."""
    if entry["n"]:
        yield "text", entry
    if entry["label_reading"]:
        yield "label", entry["label_reading"]


def csv_text(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Every number in long form: task, reading ("text", "label" or a floor's name), language, class, metric, value, n.
    Empty language and class mean all."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_CSV_COLUMNS)

    def write(row: Sequence[Any]) -> None:
        writer.writerow([to_cell(one) if isinstance(one, str) else one for one in row])

    for task, entry in result.items():
        for reading, scores in readings(entry):
            for row in _long(scores):
                write((task, reading, *row, scores["n"]))
            for name, value in scores.get("calibration", {}).items():
                if name in ("ece", "ece_if_right", "brier", "auroc") and value is not None:
                    write((task, reading, "", "", name, value, scores["n"]))
            for name, value in (scores.get("calibrated") or {}).items():
                if name in ("ece", "ece_if_right", "brier"):
                    write((task, reading, "", "", f"calibrated.{name}", value, scores["n"]))
        for name, value in _numbers(entry.get("explanation", {})):
            write((task, "text", "", "", f"explanation.{name}", value, entry["n"]))
        for floor, scores in entry["floors"].items():
            for name, value in _numbers({k: v for k, v in scores.items() if k != "n"}):
                write((task, floor, "", "", name, value, scores["n"]))
    return out.getvalue()


def _long(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(language, class, metric, value)"""
    skipped = {"n", "ci95", "per_class", "confusion", "by_language", "explanation", "floors", "label_reading",
               "calibration", "calibrated", "parse_status"}  # fmt: skip
    for name, value in _numbers({k: v for k, v in scores.items() if k not in skipped}):
        yield "", "", name, value
    for language, part in scores["by_language"].items():
        for name, value in _numbers(part):
            yield language, "", name, value
    for key, part in scores["per_class"].items():
        for name, value in _numbers(part):
            yield "", key, name, value


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number below ``tree``; intervals become ``.low`` and ``.high``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) == 2:
            yield from ((f"{prefix}{name}.low", value[0]), (f"{prefix}{name}.high", value[1]))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def model_card(result: Mapping[str, Mapping[str, Any]], *, title: str, notes: Sequence[str] = ()) -> str:
    """Text for a Hub model card (the part under the YAML head): measured numbers, floors, limits and safety."""
    return "\n".join([
        f"# {escaped(title)}",
        "",
        f"> {SAFETY}",
        "",
        "## Results",
        "",
        f"{RESULTS_NOTE} Measured on {_today()}.",
        "",
        results_table(result),
        "",
        *(["## Training data", "", *(f"* {escaped(note)}" for note in notes), ""] if notes else []),
        "## Use",
        "",
        "For research on explainable analysis of posts about mental health. Not for diagnosis, triage, moderation or "
        "any decision about a person. Labels come from annotators who read single posts; explanations are generated "
        "text and can be fluent and wrong: check them (`probes run`).",
        "",
    ])  # fmt: skip


def results_table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The numbers of a card as a Markdown table (``RESULTS_NOTE`` says what the columns are)."""
    lines = [
        "| task | reading | n | weighted F1 (95 % CI) | micro F1 | macro F1 | unread | cut off | floors |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for task, entry in result.items():
        for reading, scores in readings(entry):
            low, high = scores["ci95"]
            floors = ", ".join(f"{escaped(name)} {floor['weighted_f1']:.3f}" for name, floor in entry["floors"].items())
            cut = scores.get("cut_off", "–")
            lines.append(f"| {escaped(task)} | {reading} | {scores['n']} | {scores['weighted_f1']:.3f} "
                         f"({low:.3f}–{high:.3f}) | {scores['micro_f1']:.3f} | {scores['macro_f1']:.3f} | "
                         f"{scores['parse_failure_rate']:.1%} | {cut} | {floors or '–'} |")  # fmt: skip
    return "\n".join(lines)
