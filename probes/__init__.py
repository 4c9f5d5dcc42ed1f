"""Does the explanation say what the model used? Token saliency against generated explanations, with statistics.

>>> from probes import Probe, align, cross_check, rows, run_suite, summarise_swaps, write_report, selftest

Everything is loaded on first use (the names stand in ``__init__.pyi``): ``import probes`` costs nothing, reading a
finished run does not load torch.
"""

from probes import interpreter

interpreter.guard("probes", "probes")

# Only now: a file of one of these names may lie where `python -m probes` was called.
from typing import Any  # noqa: E402

import lazy_loader  # noqa: E402

from probes import notebook  # noqa: E402

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _render(value: Any) -> str | None:
    from probes.report.display import html

    return html(value)


notebook.renderer = _render
