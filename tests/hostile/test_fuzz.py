"""Every reader of foreign bytes of ``mentalglm_jax`` on damaged files: a value or a refusal, never a foreign exception,
five seconds or two GiB. ``fuzzing.py`` says how inputs are made and judged; ``fuzz_models.py`` and ``fuzz_data.py``
have the readers, ``test_probes_fuzz.py`` the other side's.
"""

from pathlib import Path

import pytest

from mentalglm_jax.errors import MentalGLMError
from mentalglm_jax.text import chat_template
from tests.hostile import fuzz_data, fuzz_models
from tests.hostile.fuzzing import AT_LENGTH, EXAMPLES, attack, check

READERS = fuzz_models.READERS | fuzz_data.READERS


@pytest.fixture(autouse=True)
def nothing_is_made(monkeypatch):
    """No arrays for an adapter that passed, no process for a template."""
    monkeypatch.setattr("mentalglm_jax.checkpoints.adapters.add_lora", fuzz_models.checked)
    monkeypatch.setattr(chat_template, "_rendered", fuzz_models.rendered)


def fuzzed(name: str, place: Path, count: int) -> None:
    check(attack(name, READERS[name](place), MentalGLMError, count))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz(tmp_path, name):
    fuzzed(name, tmp_path, EXAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz_at_length(tmp_path, name):
    fuzzed(name, tmp_path, AT_LENGTH)
