"""A thread that works ahead draws from the global generator; the properties of other tests are drawn all the same."""

import random
import sys
import threading

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
