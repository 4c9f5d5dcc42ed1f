"""What threads and other workers do meanwhile does not fail a test: they draw from the global generator, and write
compiled programs that another one reads."""

import os
import random
import subprocess
import sys
import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def drawing():
    """Another thread draws all the time, and is let in at nearly every step of this one."""
    stop, interval = threading.Event(), sys.getswitchinterval()

    def work():
        while not stop.is_set():
            random.getrandbits(32)  # as beartype does for each list that it checks

    thread = threading.Thread(target=work)
    sys.setswitchinterval(1e-6)
    thread.start()
    yield
    stop.set()
    sys.setswitchinterval(interval)
    thread.join()


@pytest.mark.usefixtures("drawing")
def test_a_property_is_drawn_beside_a_thread_that_draws():
    drawn = []

    @given(st.lists(st.integers()))
    def anything(numbers):
        drawn.append(numbers)

    anything()
    assert len(drawn) >= 100


def test_half_a_compiled_program_is_compiled_again(tmp_path):
    """Here and in child processes, which have the same directory of programs."""
    command = [sys.executable, "-P", "-c", "import jax; print(jax.jit(lambda x: x + 1)(1))"]

    def run(**more):
        return subprocess.run(command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)} | more,
                              capture_output=True, text=True, timeout=600)  # fmt: skip

    assert run().stdout == "2\n"
    for written in tmp_path.glob("*-cache"):
        written.write_bytes(written.read_bytes()[:-20])
    said = run(PYTHONWARNINGS="default").stderr  # what JAX says, so that the filters are for that
    assert "Error reading persistent compilation cache entry" in said
    for written in tmp_path.glob("*-cache"):
        written.write_bytes(written.read_bytes()[:-20])
    again = run()
    assert (again.stdout, again.stderr) == ("2\n", "")
    warnings.warn(said[said.index("Error reading") :].splitlines()[0], UserWarning, stacklevel=1)
