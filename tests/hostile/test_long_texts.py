"""Long texts of strangers in what is quadratic by nature, or was. The clock of the processor counts, whatever else the
machine does."""

import random
import signal

import pytest

from mentalglm_jax.data import conversations
from mentalglm_jax.data.conversations import Conversation, apart_from
from mentalglm_jax.data.explain.quotes import quotes_occur
from mentalglm_jax.data.records import Record
from mentalglm_jax.inference.spoken import Piece, Spoken
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from probes.intake.labels import read_label
from tests.hostile.foreign_files import RECORD
from tests.timing import grows_at_most

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


def test_a_long_turn_and_many_held_out_posts_that_begin_alike(monkeypatch):
    """Each of them was looked for in all of the turn. Posts that answer a form do begin alike."""

    for name in ("add", "near"):  # what takes longest, and is none of this
        monkeypatch.setattr(conversations.NearIndex, name, lambda *_: [])
    monkeypatch.setattr(conversations, "signature", lambda *_: None)

    def work(size: int) -> None:
        posts = [Record(**RECORD | {"id": str(n), "post": f"{'a' * 24}{n}b", "split": "test"}) for n in range(size)]
        said = ("a" * 24 + "x") * 6 * size
        turns = ({"role": "user", "content": said}, {"role": "assistant", "content": "Yes."})
        assert apart_from([Conversation("c", turns)], posts)[1] == 0

    grows_at_most(work, 500, 4000, 16)


@pytest.mark.parametrize("head", [4, 8, 2048])
def test_posts_that_begin_alike_are_found_as_if_each_were_looked_for(monkeypatch, head):
    monkeypatch.setattr(conversations, "_HEAD", head)
    monkeypatch.setattr(conversations, "NEAR_FROM", 4)
    monkeypatch.setattr(conversations.NearIndex, "near", lambda *_: [])
    draw, held = random.Random(0), 0
    for _ in range(300):
        posts = ["".join(draw.choice("ab") for _ in range(draw.randrange(4, 14))) for _ in range(draw.randrange(1, 6))]
        said = "".join(draw.choice("ab") for _ in range(draw.randrange(12, 40)))
        records = [Record(**RECORD | {"id": str(n), "post": post, "split": "test"}) for n, post in enumerate(posts)]
        turns = ({"role": "user", "content": said}, {"role": "assistant", "content": "Yes."})
        found = apart_from([Conversation("c", turns)], records)[1] == 1
        assert found == any(post in said for post in posts) or any(post == said for post in posts)
        held += found
    assert 50 < held < 250


TOKENIZER = GlmTokenizer.load(BUILTIN)
BYTES = {TOKENIZER.bytes_of(token): token for token in range(TOKENIZER.vocab_size)}


def spoken(data: bytes) -> list[Piece]:
    """What is said of an answer of single bytes."""
    ids, under_way = [BYTES[bytes([one])] for one in data], Spoken(TOKENIZER)
    pieces = [*map(under_way.add, ids), under_way.end()]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert [number for piece in pieces for number in piece.tokens] == list(range(len(ids)))
    return pieces


def test_an_answer_of_bytes_that_are_no_character():
    """All of it was waited for, and decoded anew at every token."""
    assert any(piece.text for piece in spoken(b"\x80" * 20)[:10])
    grows_at_most(lambda size: spoken(b"\x80" * size), 500, 4000, 16)


@pytest.mark.parametrize("end", ["😀", "好", "é", "a", "\ufffd"])
@pytest.mark.parametrize("cut", range(4))
def test_a_character_behind_bytes_that_are_none_is_whole(end, cut):
    for before in (b"\x80", b"\xf0\x9f", b"\xe5\xa5", b"\xff\xf0"):
        for count in range(1, 14):
            spoken(before * count + end.encode()[: len(end.encode()) - cut])


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("letter", ["😀", "好", "é"])
def test_special_tokens_within_a_character(letter, count):
    """They have no text; behind eight of them the bytes before were taken for no character."""
    special, bytes_ = TOKENIZER.special_ids, letter.encode()
    for cut in range(1, len(bytes_)):
        ids = [BYTES[bytes_[at : at + 1]] for at in range(len(bytes_))]
        ids[cut:cut] = (sorted(special) * 3)[:count]
        under_way = Spoken(TOKENIZER)
        pieces = [*map(under_way.add, ids), under_way.end()]
        assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids) == letter
        told = [number for piece in pieces for number in piece.tokens]
        assert told == [number for number, one in enumerate(ids) if one not in special]
