"""A model is asked by a template of one's own; what it wrote is what is probed."""

import itertools
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from probes import cli
from probes.demo import PAIR
from probes.errors import ProbeInputError
from probes.intake.answer import answer, prompts
from probes.intake.rows import Reader, lay, read_candidates
from probes.intake.template import read_template
from probes.models.encode import read_generations
from probes.probe import Probe
from probes.results.store import read_run
from tests.fences import ROOT, blocks

ROWS = read_generations(PAIR / "faithful" / "generations.jsonl")[:2]
LABELS = {"high": "high", "low": "low"}
RECORDS = [{"id": "a", "post": "I ate, it rained.", "place": "Rome"}, {"id": "b", "post": "The dog", "place": "Ur"}]
TEMPLATE = "{{ place }} The dog says: {{ post }} Risk?"


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path) -> Reader:
    return Reader(tiny_model_dir)


def test_the_prompt_is_the_template_and_the_post_is_known(reader: Reader) -> None:
    found = prompts(reader, RECORDS, TEMPLATE, "T")
    assert found[0]["prompt"] == "Rome The dog says: I ate, it rained. Risk?"
    laid = lay(reader, found, LABELS, answered=False)
    assert [row["post"] for row in laid.rows] == ["I ate, it rained.", "The dog"]
    assert laid.rows[1]["post_span"] == [17, 24]  # the second of two places


@pytest.mark.parametrize(
    "template", ["{{ post | upper }}", "no post", "{{ post", "{{ 1 / 0 }}{{ post }}", "{{ plcae }}{{ post }}"]
)
def test_a_template_that_does_not_show_the_post_is_refused(reader: Reader, template: str) -> None:
    with pytest.raises(ProbeInputError, match="T: "):
        prompts(reader, RECORDS, template, "T")


def test_what_the_model_writes_is_kept_to_the_id(tiny_model_dir: Path, tmp_path: Path, reader: Reader) -> None:
    probe = Probe.from_pretrained(tiny_model_dir)
    asked = lay(reader, prompts(reader, RECORDS, TEMPLATE, "T"), LABELS, answered=False).rows
    found = answer(probe, asked, tmp_path / "out.jsonl", max_new_tokens=5)
    for row in found:
        ids = list(row["prompt_ids"])
        for index in row["output_ids"]:
            with torch.no_grad():
                assert int(probe.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == index
            ids.append(index)
        assert row["finish"] == ("length" if len(row["output_ids"]) == 5 else "stop")
    assert read_generations(tmp_path / "out.jsonl") == found


def test_an_interrupted_call_goes_on(tiny_model_dir: Path, tmp_path: Path, reader: Reader, monkeypatch: Any) -> None:
    probe, out = Probe.from_pretrained(tiny_model_dir), tmp_path / "out.jsonl"
    asked = lay(reader, prompts(reader, RECORDS, TEMPLATE, "T"), LABELS, answered=False).rows
    whole = answer(probe, asked, out, max_new_tokens=3)
    out.write_text(json.dumps(whole[0]) + "\n")
    calls: list[int] = []
    generate = probe.model.generate
    monkeypatch.setattr(probe.model, "generate", lambda **given: calls.append(1) or generate(**given))
    assert answer(probe, asked, out, max_new_tokens=3) == whole and len(calls) == 1
    with pytest.raises(ProbeInputError, match="was not written by this model and call"):
        answer(probe, asked, out, max_new_tokens=4)


def test_the_command(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    (tmp_path / "ask.jinja").write_text(TEMPLATE)
    out = tmp_path / "rows.jsonl"
    arguments = ["answer", tiny_model_dir, "--in", tmp_path / "posts.jsonl", "--prompt", tmp_path / "ask.jinja",
                 "--out", out, "--max-new-tokens", "3", "--json"]  # fmt: skip
    cli.main(list(map(str, arguments)))
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 2 and told["left_out"] == {}
    assert [row["id"] for row in read_generations(out)] == ["a", "b"]


def test_what_cannot_be_probed_is_said_with_what_to_look_at(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """A stranger's first call: a table of posts, a prompt, and candidates that the model does not write."""
    (tmp_path / "posts.csv").write_text("post\nI ate.\nThe dog ran.\n")
    (tmp_path / "ask.jinja").write_text("Post: {{ post }} Risk?")
    (tmp_path / "labels.json").write_text('{"unsaid one": "never said by it", "unsaid two": "nor this"}')
    call = ["answer", tiny_model_dir, "--in", tmp_path / "posts.csv", "--prompt", tmp_path / "ask.jinja", "--out",
            tmp_path / "g.jsonl", "--candidates", tmp_path / "labels.json", "--max-new-tokens", 3]  # fmt: skip
    cli.main(list(map(str, call)))
    said = capsys.readouterr().out
    cut = sum(row["finish"] == "length" for row in read_generations(tmp_path / "g.jsonl"))
    assert "2 rows, a label in 0 of them" in said and "--candidates" in said
    assert (f"{cut} of them ended at the limit of tokens (--max-new-tokens)" in said) == (cut > 0)


def test_a_prompt_in_place_of_its_file_is_told(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "posts.txt").write_text("I ate.\n")
    call = ["answer", tiny_model_dir, "--in", tmp_path / "posts.txt", "--prompt", "Risk? {{ post }}"]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, call), "--out", str(tmp_path / "g.jsonl")])
    assert end.value.code == 2 and "a file is wanted that holds this text" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["post\nI ate.\n", "I ate.\n"])
def test_posts_given_to_run_are_told_what_makes_rows(
    tiny_model_dir: Path, tmp_path: Path, capsys: Any, text: str
) -> None:
    (tmp_path / "posts.csv").write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(tiny_model_dir), "--in", str(tmp_path / "posts.csv"), "--out", str(tmp_path / "out")])
    assert (
        end.value.code == 2 and "`probes answer` and `probes rows` make rows of such a file" in capsys.readouterr().err
    )


def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: Any) -> None:
    """From a model directory and a table of posts to a report, as README.md and docs/probe-any-model.md say; on a
    model of the pair that ships, which is asked in its own words."""
    monkeypatch.chdir(tmp_path)
    for page in (ROOT / "README.md", ROOT / "docs" / "probe-any-model.md"):
        (block,) = [one for one in blocks(page) if "probes answer" in one.text]
        for line in block.text.splitlines():
            if line.startswith("echo "):
                subprocess.run(["sh", "-c", line], check=True)
                continue
            words = shlex.split(line.replace("MODEL", str(PAIR / "faithful")), comments=True)
            if words[:2] == ["probes", "answer"]:  # what was echoed is right for a chat model
                given = dict(itertools.pairwise(words))
                table, column = Path(given["--in"]), given.get("--text", "post")
                if table.parent.name:  # a file of ours
                    assert column in (ROOT / table).read_text("utf-8").splitlines()[0].split(",")
                table.parent.mkdir(parents=True, exist_ok=True)
                table.write_text(f"id,{column}\n" + "".join(f'{row["id"]},"{row["post"]}"\n' for row in ROWS))
                count = min(len(ROWS), int(given.get("--limit", len(ROWS))))
                asked = prompts(Reader(PAIR / "faithful"), ROWS, read_template("ask.jinja"), "ask.jinja")
                assert all(row["post"] in one["prompt"] for one, row in zip(asked, ROWS, strict=True))
                assert set(read_candidates("labels.json")) == {"positive", "negative"}
                Path("ask.jinja").write_text("[gMASK]<sop><|user|>post: {{ post }} risk?<|assistant|>")
                Path("labels.json").write_text(json.dumps(ROWS[0]["candidates"]))
            cli.main(words[1:])
        found = read_run("probed")
        assert found.summary["n"] == count and Path("probed/report.html").is_file()
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_what_was_kept_is_read_with_the_labels_of_now(tiny_model_dir: Path, tmp_path: Path, reader: Reader) -> None:
    """An answer half done, then --candidates or a record mended: nothing of the row but its ids was the model's."""
    probe, out = Probe.from_pretrained(tiny_model_dir), tmp_path / "out.jsonl"
    said = prompts(reader, RECORDS, TEMPLATE, "T")
    whole = answer(probe, lay(reader, said, LABELS, answered=False).rows, out, max_new_tokens=3)
    edited = whole[0] | {"parsed_label": "high", "label_text": "high", "output_text": "high", "user": "somebody"}
    out.write_text(json.dumps(edited) + "\n")
    mended = lay(reader, said, {"none": "no", "some": "yes"}, answered=False).rows
    again = answer(probe, mended, out, max_new_tokens=3)
    assert [row["candidates"] for row in again] == [{"none": "no", "some": "yes"}] * 2 and "user" not in again[0]
    assert [row["output_ids"] for row in again] == [row["output_ids"] for row in whole]
    assert again[0]["output_text"] == whole[0]["output_text"] and again[0]["parsed_label"] is None
