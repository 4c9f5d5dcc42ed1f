"""The report page, figures for papers, what a notebook shows."""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submodules=["figures"])  # of the package's face
