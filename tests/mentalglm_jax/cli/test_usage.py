"""A command that is called wrongly says so in one line, each name in the same quotation marks."""

import pytest

from mentalglm_jax.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ""),
        (["data"], ""),
        (["nosuch"], "mentalglm: No such command 'nosuch'."),
        (["data", "inspekt"], "mentalglm: No such command 'inspekt'. Did you mean 'inspect'?"),
        (["generate"], "mentalglm: Missing argument 'model'."),
        (["generate", "m"], "mentalglm: Missing option '--in'."),
        (["generate", "--foo"], "mentalglm: No such option '--foo' (Possible options: --out)"),
        (["plan", "r", "--topology"], "mentalglm: Option '--topology' requires an argument."),
        (["data", "inspect", "x", "y"], "mentalglm: Got unexpected extra argument(s) (y)"),
        (["data", "inspect", "x", "--threshold", "y"], "mentalglm: Invalid value for '--threshold': Input should be a "
         "valid number, unable to parse string as a number"),
    ],
)  # fmt: skip
def test_wrong_usage(capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.strip() == says
    assert bool(said.out) == (not says)  # without a command: the help
