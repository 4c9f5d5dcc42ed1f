"""Output over input: a command that was told to write over a file it reads says so, and the file stays as it was."""

import os

import pytest

from tests.hostile.attack import refused, run

COMMANDS = {
    "mentalglm generate": ("generate", "MODEL", "--task", "suicide_risk", "--in", "FILE"),
    "mentalglm data inspect": ("data", "inspect", "FILE"),
    "mentalglm bench": ("bench", "FILE"),
    "mentalglm leaderboard": ("leaderboard", "other.json", "FILE"),
    "probes rows": ("rows", "MODEL", "--in", "FILE"),
    "probes answer": ("answer", "MODEL", "--in", "other.json", "--prompt", "FILE"),
    "probes answer candidates": ("answer", "MODEL", "--in", "other.json", "--prompt", "o", "--candidates", "FILE"),
    "probes rank": ("rank", "MODEL", "--in", "FILE"),
}
NAMES = {
    "itself": lambda file: file,
    "another spelling": lambda file: file.parent / "." / "sub" / ".." / file.name,
    "a link": lambda file: (file.with_name("link").symlink_to(file), file.with_name("link"))[1],
    "a second name": lambda file: (os.link(file, file.with_name("hard")), file.with_name("hard"))[1],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_read_is_not_written_over(command, name, tmp_path, capsys):
    file = tmp_path / "mine.json"
    (tmp_path / "sub").mkdir()
    file.write_text("mine")
    (tmp_path / "other.json").write_text("{}")
    words = [str(file) if word == "FILE" else str(tmp_path / word) if word == "other.json" else word
             for word in COMMANDS[command]]  # fmt: skip
    outcome = run([command.split()[0], *words, "--out", NAMES[name](file)], capsys)
    refused(outcome, r"--out .*: is what \S+ names, and would be replaced; name another file")
    assert file.read_text() == "mine"
