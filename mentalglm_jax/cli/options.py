"""Options that several commands take, so that each has one name and one line of help."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a value: --set a.b=c (repeatable)")]
ReplaceSurrogates = Annotated[
    bool, typer.Option("--replace-surrogates", help="U+FFFD where a text holds half of a UTF-16 surrogate pair")
]
SetNames = Annotated[
    list[str], typer.Option("--set-name", help="Upstream data set to read, e.g. sos_hl_1k (repeatable)")
]
