"""What transformers saves, once per module."""

import pytest


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    """Directories as transformers saves them."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("glm", "glm4", "edge", "tied"):
        hf.variant(name).save_pretrained(root / name)
    return root
