"""What a notebook shows of our objects. Records do not know HTML: the face of the package says who draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

renderer: Callable[[Any], str | None] | None = None  # set by probes/__init__.py, so that nothing here imports upwards


class Shown:
    """A base for what a notebook may show: ``renderer`` gives the HTML, or None for the plain ``repr``."""

    def _repr_html_(self) -> str | None:
        return None if renderer is None else renderer(self)
