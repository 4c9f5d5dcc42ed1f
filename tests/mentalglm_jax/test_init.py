"""The public face: names arrive on first use, and importing costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import mentalglm_jax as mg


def test_importing_does_not_load_jax():
    program = "import sys, mentalglm_jax as mg; mg.__version__; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize("name", mg.__all__)
def test_every_public_name_is_there(name):
    assert getattr(mg, name).__name__ == name
    assert name in dir(mg)


def test_generate_stays_the_function_whatever_is_imported_first():
    program = "import mentalglm_jax.inference.generate as module, mentalglm_jax as mg; "
    program += "from mentalglm_jax import generate; assert mg.generate is generate is module.generate"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute lode"):
        mg.lode  # noqa: B018
