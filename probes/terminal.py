"""What the ``probes`` command writes: lines, tables, one JSON object, a bar.

Results go to stdout, progress and reasons to stderr. No post and no explanation is ever printed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.foreign import plain

SAFETY = (
    "A research instrument, not a diagnosis. If someone may be in danger, a person has to help: "
    "call the local emergency number or a crisis line."
)

LINE = 900  # characters of one line on stderr
_PIPED = 240  # columns of a table that does not go to a terminal

# Of the report's facts, those that the terminal tells as well.
_TOLD = ("Labels given", "Mean |log-odds| of the label", "Label scores that are no plain contrast",
         "Labels in other words", "Tokens at the ends not varied", "Posts cut into", "Rows left out",
         "Swap pairs left out")  # fmt: skip


class _Table(Table):
    """What a run directory of a stranger says (names of methods, labels) is text here, and moves no cursor."""

    def __init__(self, title: str, **given: Any) -> None:
        super().__init__(title=plain(title, LINE), **given)

    def add_row(self, *cells: Any, **given: Any) -> None:
        super().add_row(*(plain(cell, LINE) for cell in cells), **given)


def console(stderr: bool = False) -> Console:
    """Prints what it is given as it is: no markup, no emoji codes, no colours for what looks like a number. As wide as
    the terminal; a file or a pipe has no width of its own."""
    wide = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=None if wide else _PIPED)


def say(line: str) -> None:
    """One line on stdout."""
    console().print(plain(line, LINE), soft_wrap=True)


def tell(line: str) -> None:
    """One line on stderr."""
    console(stderr=True).print(plain(line, LINE), soft_wrap=True)


def warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """In place of ``warnings.showwarning``: one line."""
    name = "" if issubclass(category, ProbeWarning) else f"{category.__name__}: "
    sys.stderr.write(f"warning: {name}{plain(message, LINE)}\n")


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n".join(["\b", "Example:" if len(commands) == 1 else "Examples:", *(f"  {one}" for one in commands)])


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):  # another locale, or half a surrogate pair
        text = json.dumps(value, allow_nan=False)
    sys.stdout.write(text + "\n")


@contextlib.contextmanager
def progress(what: str) -> Iterator[Any]:
    """A bar on stderr; a line at every quarter where stderr is not a terminal."""
    screen = console(stderr=True)
    quarter = -1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=screen, disable=not screen.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int | float, total: int) -> None:
            nonlocal quarter
            bar.update(task, completed=done, total=total)
            if not screen.is_terminal and 4 * done // max(total, 1) > quarter:
                quarter = 4 * done // max(total, 1)
                screen.print(f"{what}: {int(done)} of {total}", highlight=False)

        yield advance


def print_summary(summary: dict[str, Any]) -> None:
    """The numbers of a run."""
    from probes.report.view import interval, p_value, percent

    table = _Table(title=f"{summary['n']} posts: {summary['conclusion']}", title_justify="left", show_edge=False)
    for name, side in (("", "left"), ("value", "right"), ("95 %", "right"), ("beside", "left")):
        table.add_column(name, justify=side, no_wrap=name in ("", "value"))  # type: ignore[arg-type]
    for method, value in summary["mass_ratio"].items():
        p = p_value(summary["p_holm"].get(method), "p (Holm)")
        beside = f"by length {percent(summary['mass_ratio_null'][method])}, {p}"
        name = f"label saliency in cited words ({method})"
        table.add_row(name, percent(value), interval(summary["mass_ratio_ci"][method]), beside)
    for method, value in summary["cue_auroc"].items():
        if value is not None:
            table.add_row(f"planted cues found, AUROC ({method})", f"{value:.3f}", "", "chance 0.5")
    from probes.report import pairs
    from probes.report.overview import facts

    for title, value, note in facts(summary):
        if title in _TOLD:
            table.add_row(title[0].lower() + title[1:], value, "", note)
    for title, value, note in pairs.facts(summary):
        table.add_row(title[0].lower() + title[1:], value, "", note)
    quotes = f"of {summary['n_quotes']} quotes"
    table.add_row("quotes that are not in the post", percent(summary["fabricated_quote_rate"]), "", quotes)
    table.add_row("explanations that cite nothing", str(summary["abstained"]), "", "")
    if summary.get("cut_off"):
        table.add_row("answers cut off by the token limit", str(summary["cut_off"]), "", "")
    for name, count in summary["verdicts"].items():
        chance = summary["verdicts_by_chance"].get(name)
        table.add_row(name, str(count), "", "" if chance is None else f"{chance:.1f} expected from random citations")
    console().print(table)
    say(SAFETY)


def print_comparison(found: dict[str, Any]) -> None:
    """Two runs over the same posts."""
    table = _Table(title=f"{found['n_pairs']} pairs of posts", title_justify="left", show_edge=False)
    for name, side in (("P(this run scores higher)", "left"), ("value", "right"), ("95 %", "right"), ("n", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for name, methods in found["by_check"].items():
        for method, one in methods.items():
            if one is not None:
                ci = f"{one['ci'][0]:.2f}–{one['ci'][1]:.2f}"
                table.add_row(f"{name.replace('_', ' ')} ({method})", f"{one['value']:.3f}", ci, str(one["n"]))
    console().print(table)
    if found["erased_otherwise"] is not None:
        say(found["erased_otherwise"])


def print_study(found: dict[str, Any]) -> None:
    """What randomised weights did to the maps."""
    from probes.report.overview import randomisation

    table = _Table(title=f"{found['n']} posts, maps on clauses", title_justify="left", show_edge=False)
    for name, side in (("drawn anew", "left"), ("method", "left"), ("r with the real map", "right"),
                       ("AUROC of marked cues", "right")):  # fmt: skip
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in randomisation(found):
        table.add_row(row["what"], row["method"], row["r"], row["cue"])
    console().print(table)


def print_rows(title: str, rows: Sequence[dict[str, Any]], json_: bool) -> None:
    """Checks with their bounds; fails where one did."""
    failed = [row["id"] for row in rows if not row["ok"]]
    if json_:
        print_json({"ok": not failed, "rows": list(rows)})
    else:
        table = _Table(title=title, title_justify="left", show_edge=False)
        for name, side in (("id", "left"), ("what", "left"), ("value", "right"), ("bound", "right"), ("", "left")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for row in rows:
            bound = "information" if row["bound"] is None else f"{row.get('side', '<=')} {row['bound']:.2g}"
            table.add_row(row["id"], row["what"], f"{row['value']:.3g}", bound, "ok" if row["ok"] else "FAILED")
        console().print(table)
    if failed:
        raise ProbeError(f"{len(failed)} of {len(rows)} checks failed ({', '.join(failed)}): do not read verdicts here")


def print_written(found: Sequence[dict[str, Any]], left_out: Mapping[str, int], out: object, json_: bool) -> None:
    """What a command that writes rows to probe has written to ``out``, and left out by reason."""
    labelled = sum(bool(row.get("label_text")) for row in found)
    if json_:
        print_json({"rows": len(found), "labelled": labelled, "left_out": dict(left_out), "out": str(out)})
        return
    say(f"{out}: {len(found)} rows, a label in {labelled} of them")
    if labelled < len(found):
        cut = sum(row.get("finish") == "length" and not row.get("label_text") for row in found)
        ended = f"; {cut} of them ended at the limit of tokens (--max-new-tokens)" if cut else ""
        say(f"without a label nothing can be probed{ended}: compare output_text with --candidates")


def print_leaderboard(lines: Sequence[Any], json_: bool) -> None:
    """Metrics of faithfulness, the best of each setting first."""
    if json_:
        print_json({"lines": [asdict(line) for line in lines]})
        return
    for setting in dict.fromkeys(line.setting for line in lines):
        table = _Table(title=f"P(faithful > unfaithful), {setting}", title_justify="left", show_edge=False)
        for name, side in (("metric", "left"), ("value", "right"), ("95 %", "right"), ("models", "right"),
                           ("sequences a post", "right"), ("type I", "right"), ("power", "right")):  # fmt: skip
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        chosen = [line for line in lines if line.setting == setting]
        for line in sorted(chosen, key=lambda one: -(one.whole.value if one.whole else 0.0)):
            value, ci, models = "–", "", ""
            if line.whole is not None:
                value, models = f"{line.whole.value:.3f}", f"{line.whole.models}"
                ci = "" if line.whole.low is None else f"{line.whole.low:.2f}–{line.whole.high:.2f}"
            counts = ["–" if pair is None else f"{pair[0]} of {pair[1]}" for pair in (line.type_one, line.power)]
            table.add_row(line.name.replace("_", " "), value, ci, models, f"{line.forwards:.0f}", *counts)
        console().print(table)


def print_pair(models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """The verdicts of several models over the same posts, each beside the number that random citations would have had.

    Args:
        models: of each what its explanations quote, and its summary.
    """
    from probes.results.summary import VERDICTS

    posts = " and ".join(dict.fromkeys(str(summary["n"]) for _, summary in models))
    table = _Table(title=f"{posts} posts each; in brackets: expected if the citations were placed at random",
                  title_justify="left", show_edge=False)  # fmt: skip
    table.add_column("the explanations quote")
    for name in VERDICTS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("all posts together")
    for quotes, summary in models:
        table.add_row(quotes, *(_count(summary, name) for name in VERDICTS), summary["conclusion"])
    console().print(table)
    say(SAFETY)


def _count(summary: Mapping[str, Any], verdict: str) -> str:
    chance = summary["verdicts_by_chance"]
    expected = chance[verdict] if verdict in chance else max(0.0, summary["n"] - sum(chance.values()))
    return f"{summary['verdicts'][verdict]} ({expected:.1f})"


def guarded(command: Any) -> Any:
    """A command of Click with its subcommands, each of which refuses to write over a file that it reads, before it does
    anything: what was to be probed would be gone."""
    for one in getattr(command, "commands", {}).values():
        guarded(one)
    if not hasattr(command, "commands"):
        command.invoke = functools.partial(_invoked, command.invoke)
    return command


def _invoked(invoke: Callable[[Any], Any], context: Any) -> Any:
    for written in ("out", "docs"):
        out = context.params.get(written)
        if out is None or not os.path.isfile(out):
            continue
        for option in context.command.params:
            read = context.params.get(option.name)
            if option.name != written and _is_file(read) and os.path.samefile(read, out):
                said = f"is what {option.opts[0]} names, and would be replaced; name another file"
                raise ProbeInputError(f"--{written} {out}: {said}")
    return invoke(context)


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and "\0" not in os.fspath(value) and os.path.isfile(value)


def usage(error: Exception, message: str) -> str:
    """What is wrong with a command line, of Click's ``message``: our names bare, what was typed in quotes."""
    named = r"^(Missing \w+|Invalid value for|Option) '([^']+)'(?: / '-[^']+')*"
    said = re.sub(named, r"\1 \2", message.partition("\n")[0])
    said = f"{said[:1].lower()}{said[1:]}".strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    return f"{said} ({context.command_path} --help says more)" if context is not None else said


def silence_loaders() -> None:
    """transformers draws its own bars and warnings; on stderr they would bury ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
