"""Evaluation results as terminal tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mentalglm_jax.evaluate.metrics import METRICS


def format_table(result: Mapping[str, Mapping[str, Any]]) -> Table:
    """``evaluate``'s result for people: a row per task, and per language where there are several, beside the floors;
    the label log-probability reading in a row of its own."""
    table = Table(title="Evaluation", title_justify="left", show_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for entry in result.values() for name in entry["floors"]))
    two = any(entry["label_reading"] for entry in result.values())
    calibrated = ("AUROC", "ECE") if two else ()
    table.add_column("task")
    for column in ("n", "weighted F1", "95 % CI", "micro F1", "macro F1", "unread", *calibrated, *names):
        table.add_column(column, justify="right")

    def add(
        title: str, scores: Mapping[str, Any], interval: str, beside: Sequence[str], calibration: Sequence[str]
    ) -> None:
        numbers = [f"{scores[metric]:.3f}" for metric in METRICS]
        unread = f"{scores['parse_failure_rate']:.1%}"
        table.add_row(title, str(scores["n"]), numbers[0], interval, *numbers[1:], unread, *calibration, *beside)

    tempered: list[str] = []
    for task, entry in result.items():
        beside = [f"{entry['floors'][name]['weighted_f1']:.3f}" if name in entry["floors"] else "" for name in names]
        empty, title = [""] * len(names), task
        if entry["n"]:
            add(task, entry, "{:.3f}–{:.3f}".format(*entry["ci95"]), beside, [""] * len(calibrated))
            for language, scores in entry["by_language"].items() if len(entry["by_language"]) > 1 else ():
                add(f"  {language}", scores, "", empty, [""] * len(calibrated))
            title, beside = "  label probability", empty
        if reading := entry["label_reading"]:
            found = [reading["calibration"][name] for name in ("auroc", "ece")]
            shown = ["–" if value is None else f"{value:.3f}" for value in found]
            if after := reading.get("calibrated"):
                shown[1] += f" → {after['ece']:.3f}"
                tempered.append(task)
            add(title if title != task else f"{task} (label probability)", reading,
                "{:.3f}–{:.3f}".format(*reading["ci95"]), beside, shown)  # fmt: skip
    cut = [f"{task} {entry['cut_off']}" for task, entry in result.items() if entry.get("cut_off")]
    levels = [f"{task} mean absolute error {scores['mae']:.2f} levels, quadratic weighted κ {kappa:.3f}"
              for task, entry in result.items() for scores in (entry if entry["n"] else entry["label_reading"] or {},)
              if (kappa := scores.get("quadratic_weighted_kappa")) is not None]  # fmt: skip
    notes = (
        levels
        + ["floors: weighted F1"] * bool(names)
        + ["ECE: before → after the temperature fitted on development records"] * bool(tempered)
        + [f"answers cut off by the token limit: {', '.join(cut)}"] * bool(cut)
    )
    table.caption = "\n".join(notes) or None
    return table


def format_comparison(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """``compare``'s result for people: first minus second, per task, reading and metric."""
    table = Table(title="First minus second", title_justify="left", show_edge=False, header_style="bold")
    table.add_column("task")
    for column in ("reading", "n", "metric", "difference", "95 % CI", "p (Holm)", "McNemar p (Holm)"):
        table.add_column(column, justify="right")
    for task, readings in result.items():
        for reading, entry in readings.items():
            for metric, test in entry["metrics"].items():
                exact = f"{entry['mcnemar']['p_holm']:.3g}" if metric == METRICS[0] else ""
                numbers = f"{test['difference']:+.3f}", "{:+.3f} to {:+.3f}".format(*test["ci95"])
                name = metric.replace("_f1", " F1")
                table.add_row(task, reading, str(entry["n"]), name, *numbers, f"{test['p_holm']:.3g}", exact)
    return table
