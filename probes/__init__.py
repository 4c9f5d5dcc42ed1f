"""Does the explanation say what the model used? Token saliency against generated explanations, with statistics.

>>> from probes import Probe, align, cross_check, run_suite, write_report, selftest

Everything is loaded on first use: ``import probes`` costs nothing, reading a finished run does not load torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.align import align
    from probes.crosscheck import cross_check
    from probes.model import Probe
    from probes.report import write_report
    from probes.selftest import selftest
    from probes.suite import run_suite

__all__ = ["Probe", "align", "cross_check", "run_suite", "selftest", "write_report"]

_HOMES = {
    "Probe": "probes.model",
    "align": "probes.align",
    "cross_check": "probes.crosscheck",
    "run_suite": "probes.suite",
    "selftest": "probes.selftest",
    "write_report": "probes.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(types.ModuleType):
    """``align`` and ``selftest`` name a function and its module. The function wins, whoever imports first."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a submodule on its package, which would hide the function from here on.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
