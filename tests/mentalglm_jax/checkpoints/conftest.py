"""What transformers saves, once per module."""

import pytest


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    """Directories as transformers saves them."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("glm", "glm4", "edge", "tied"):
        hf.variant(name).save_pretrained(root / name)
    return root


RELATIVES = ("llama", "llama-3", "llama-wide-heads", "mistral", "qwen2", "qwen2-tied-yarn", "glm4v", "glm46v")


@pytest.fixture(scope="module")
def relatives(hf, tmp_path_factory):
    """The same of GLM's relatives."""
    root = tmp_path_factory.mktemp("relatives")
    for name in RELATIVES:
        hf.variant(name).save_pretrained(root / name)
    return root
