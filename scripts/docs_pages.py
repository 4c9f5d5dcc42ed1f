"""Writes the pages of the site that are generated: python scripts/docs_pages.py [--out docs/reference]

Command lines from what `--help` says, keys of recipes from the typed models that check them, Python names from the
packages' own lists, and the root's SECURITY, CHANGELOG and CONTRIBUTING with their links turned. `make docs` does this
before it builds the site; nothing here is kept in version control.
"""

import argparse
import html
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reference"
ENTRIES = {"mentalglm": "mentalglm_jax.cli.main", "probes": "probes.cli"}
ABOUT = "Every command of `{0}`, as `{0} COMMAND --help` tells it. Every command takes `--debug` too."
COPIED = {"security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def command_page(entry: str) -> str:
    """All commands of one command line: what each does, how it is called, its arguments and options, an example."""
    top = typer.main.get_command(importlib.import_module(ENTRIES[entry]).app)
    parts = [f"# `{entry}`", ABOUT.format(entry), *(_command(path, one) for path, one in leaves(top, (entry,)))]
    return "\n\n".join(parts) + "\n"


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """("mentalglm data import", Click's object) of every command below ``command``."""
    if not (below := getattr(command, "commands", None)):
        yield " ".join(path), command
        return
    for name, one in below.items():
        yield from leaves(one, (*path, name))


def _command(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    rows = [record for one in command.params if (record := one.get_help_record(context))]
    table = [f"| {_code(names)} | {_cell(text)} |" for names, text in rows if not names.startswith("--help")]
    _, _, examples = (command.epilog or "").partition("\n")
    lines = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
    return "\n\n".join(
        [
            f"## {path}",
            _prose(command.help or ""),
            f"```text\n{usage}\n```",
            "\n".join(["| argument or option | |", "|---|---|", *table]),
            "\n".join(["```sh", *lines, "```"]),
        ]
    )


def recipe_page() -> str:
    """Every key of a training recipe and of a build recipe, from the models that check them."""
    from mentalglm_jax.data.explain.build import BuildRecipe
    from mentalglm_jax.train.recipe import Recipe

    parts = [
        "# Keys of a recipe",
        "Every key, what it may hold, and what it is when nothing is said. An unknown key is refused, with the nearest "
        "known one. `--set a.b=value` sets any of them: `--set lora.rank=8`, `--set stages.english.train.steps=10`.",
        "## A training recipe",
        *_sections(Recipe),
        "## A build recipe",
        "What `mentalglm data build` takes.",
        *_sections(BuildRecipe),
    ]
    return "\n\n".join(parts) + "\n"


def keys(model: Any) -> dict[str, tuple[str, list[str]]]:
    """Of every section below ``model`` its title in the schema, by name: where it stands first, and its keys."""
    schema = model.model_json_schema()
    return {name: (places[0], list(one["properties"])) for name, places, one in _walk(schema)}


def _sections(model: Any) -> Iterator[str]:
    schema = model.model_json_schema()
    where = {name: places[0] for name, places, _ in _walk(schema)}
    for _, places, one in _walk(schema):
        title = places[0] or "at the top"
        yield f"### {_code(title) if places[0] else title}"
        if len(places) > 1:
            yield "Also " + ", ".join(_code(place) for place in places[1:]) + "."
        if text := one.get("description"):
            yield _prose(text)
        needed = one.get("required", ())
        rows = [
            f"| {_code(key)} | {_cell(_kind(value, where))} | {'needed' if key in needed else _default(value)} |"
            for key, value in one["properties"].items()
        ]
        yield "\n".join(["| key | may be | else |", "|---|---|---|", *rows])


def _walk(schema: dict[str, Any]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """(name, dotted places, schema) of every section, the top first, each once."""
    found: dict[str, list[str]] = {"": [""]}
    todo = [("", schema)]
    while todo:
        place, one = todo.pop(0)
        for key, value in one.get("properties", {}).items():
            for name, many in _references(value):
                inner = f"{place}.{key}".lstrip(".") + ("[]" if many else "")
                new = name not in found
                found.setdefault(name, []).append(inner)
                if new:
                    todo.append((inner, schema["$defs"][name]))
    return [(name, places, schema["$defs"][name] if name else schema) for name, places in found.items()]


def _references(value: dict[str, Any], many: bool = False) -> Iterator[tuple[str, bool]]:
    if "$ref" in value:
        yield value["$ref"].rsplit("/", 1)[-1], many
    for one in (*value.get("anyOf", ()), *value.get("allOf", ())):
        yield from _references(one, many)
    if isinstance(value.get("items"), dict):
        yield from _references(value["items"], True)


def _kind(value: dict[str, Any], where: dict[str, str]) -> str:
    """What a key may hold, in words."""
    if "$ref" in value:
        name = where.get(value["$ref"].rsplit("/", 1)[-1], "")
        return f"a section, see {name}"
    if "anyOf" in value:
        return " or ".join(_kind(one, where) for one in value["anyOf"] if one.get("type") != "null")
    if "enum" in value or "const" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    kind = value.get("type")
    if kind == "array":
        items = value.get("items") or next(iter(value.get("prefixItems", ())), {})
        return f"list of {_kind(items, where)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping of names to {_kind(inner, where)}" if isinstance(inner, dict) and inner else "mapping"
    names = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    said = "path" if value.get("format") == "path" else names.get(str(kind), "any value")
    bounds = [("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below")]
    return " ".join([said, *(f"{word} {value[name]:,}" for name, word in bounds if name in value)])


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "nothing"
    given = value["default"]
    if given is None or given == [] or given == {}:
        return "nothing"
    if isinstance(given, dict):
        return "its own defaults"
    return _code(str(given).lower() if isinstance(given, bool) else str(given))


def api_page(package: str) -> str:
    """The public names of a package, in the order of its list; mkdocstrings fills in signatures and docstrings."""
    module = importlib.import_module(package)
    parts = [f"# `{package}`", _prose((module.__doc__ or "").partition("\n\n")[0])]
    for name in module.__all__:
        found = getattr(module, name)
        home = getattr(found, "__module__", None)
        parts.append(f"::: {found.__name__ if home is None else f'{home}.{found.__name__}'}")
    return "\n\n".join(parts) + "\n"


def copied_page(name: str) -> str:
    """A file of the root, its links as they are from the site."""
    text = (ROOT / name).read_text("utf-8")
    turned = {original: page for page, original in COPIED.items()}

    def turn(link: re.Match[str]) -> str:
        target = link[1]
        if target.startswith("docs/"):
            return f"](../{target.removeprefix('docs/')})"
        return f"]({turned.get(target, target)})"

    return re.sub(r"\]\(([^)]+)\)", turn, text)


PAGES: dict[str, Callable[[], str]] = {
    "mentalglm.md": lambda: command_page("mentalglm"),
    "probes.md": lambda: command_page("probes"),
    "recipe.md": recipe_page,
    "api-mentalglm_jax.md": lambda: api_page("mentalglm_jax"),
    "api-probes.md": lambda: api_page("probes"),
    "security.md": lambda: copied_page("SECURITY.md"),
    "changelog.md": lambda: copied_page("CHANGELOG.md"),
    "contributing.md": lambda: copied_page("CONTRIBUTING.md"),
}


def _prose(text: str) -> str:
    """A docstring as Markdown: its code marks, and no tag."""
    return html.escape(re.sub(r"``(.+?)``", r"`\1`", text.strip()), quote=False)


def _code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="directory to write (default: docs/reference)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, write in PAGES.items():
        (out / name).write_text(write(), "utf-8")


if __name__ == "__main__":
    main()
