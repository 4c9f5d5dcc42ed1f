"""The judge itself: it must see what it is there to see."""

import pytest

from tests.hostile.attack import Outcome, child, refused, run


@pytest.mark.parametrize(
    "err",
    [
        "",
        "mentalglm: x.json: wrong\nand more\n",
        "mentalglm: ValueError: x.json: wrong\n",
        "mentalglm: x.json: wrong \x1b[31m\n",
        "mentalglm: another file: wrong\n",
        "mentalglm: x.json: wrong (--debug shows where)\n",
    ],
    ids=["silent", "two lines", "foreign error", "control characters", "another place", "unexpected error"],
)
def test_a_bad_refusal_is_seen(err):
    with pytest.raises(AssertionError):
        refused(Outcome(2, "", err, 0.1), r"x\.json: wrong")


def test_a_wrong_exit_code_is_seen():
    with pytest.raises(AssertionError, match="exit code 1"):
        refused(Outcome(1, "", "mentalglm: x.json: wrong\n", 0.1), "wrong")


@pytest.mark.parametrize("name", ["mentalglm", "probes"])
def test_an_unknown_option_is_refused(name, capsys):
    refused(run([name, "--no-such"], capsys), "[Nn]o such option")


def test_a_child_is_the_console_script(tmp_path):
    refused(child(["mentalglm", "convert", "nowhere", "out", "--to", "glm"], tmp_path), "nowhere: no such directory")
