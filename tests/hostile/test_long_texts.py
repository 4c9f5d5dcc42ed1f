"""Long texts of strangers in what is quadratic by nature, or was. The clock of the processor counts, whatever else the
machine does."""

import signal

import pytest

from mentalglm_jax.data.conversations import Conversation, apart_from
from mentalglm_jax.data.explain.quotes import quotes_occur
from mentalglm_jax.data.records import Record
from probes.intake.labels import read_label
from tests.hostile.foreign_files import RECORD

SECONDS = 30  # of the processor; what each took before is several times that


class TooLong(Exception):
    """The processor has worked for ``SECONDS``."""


@pytest.fixture(autouse=True)
def bounded():
    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


WORDS = [f"{i:06d} I cannot sleep any more since that day in May" for i in range(400)]
QUOTED = {
    "almost right": [word.replace("cannot", "can") for word in WORDS],
    "with gaps": ["…".join(word.replace("cannot", "can") for word in WORDS)],
    "one many times": ["I can sleep any more since that day"] * 20_000,
}


@pytest.mark.parametrize("quoted", QUOTED)
def test_quotes_of_a_reply_that_are_almost_in_a_long_post(quoted):
    """Each alignment was bounded, their number was not."""
    said = "".join(f"“{quote}”" for quote in QUOTED[quoted])
    assert quotes_occur(said, ". ".join(WORDS) * 20) == (quoted == "one many times")


@pytest.mark.parametrize(
    "answer", [" " * 200_000, " \n" * 100_000, "\u3000" * 200_000], ids=["spaces", "lines", "wide"]
)
def test_an_answer_without_a_word(answer):
    assert read_label(answer, {"one": "low", "two": "high"}) == (None, None)
    assert read_label(answer + "Low.", {"one": "low", "two": "high"})[0] == "one"


@pytest.mark.parametrize("held", [False, True])
def test_a_turn_in_which_held_out_posts_may_begin_at_every_character(held):
    """Each of them was looked for at each place, by a copy of it."""
    posts = [Record(**RECORD | {"id": str(n), "post": f"{'a' * n}b", "split": "test"}) for n in range(24, 1524)]
    said = "a" * 400_000 + "b" * held
    turns = ({"role": "user", "content": said}, {"role": "assistant", "content": "Yes."})
    assert apart_from([Conversation("c", turns)], posts)[1] == held
