"""The training run that nothing happened to."""

import pytest

from tests.mentalglm_jax.runs import run
from tests.mentalglm_jax.tiny import rows


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run that nothing happened to: (result, parameters, rows of metrics.jsonl, its directory)."""
    directory = tmp_path_factory.mktemp("whole")
    result, values = run(directory)
    return result, values, rows(directory), directory
