"""Attacks on ``probes`` through rows, run directories, redaction, locks and the terminal."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from probes.citations.align import align
from probes.citations.clauses import clauses, pieces, words
from probes.citations.normalise import normalise
from probes.errors import ProbeInputError
from probes.models.encode import encode, read_generations
from probes.models.token_bytes import decode_bytes
from probes.models.verify import read_reference
from probes.results.cache import Cache, digest
from probes.results.export import summary_csv
from probes.results.lock import held
from probes.results.store import read_run
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import clean, edit, place, probe  # noqa: F401
from tests.timing import grows_at_most

DEEP = "[" * 5000 + "]" * 5000


def _first(folder: Path) -> dict:
    return json.loads((folder / "rows.jsonl").read_text("utf-8").splitlines()[0])


def _rows(text: str | bytes) -> Callable[[Path], object]:
    return lambda p: (p / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())


def _row(**changes) -> Callable[[Path], object]:
    return lambda p: (p / "rows.jsonl").write_text(json.dumps(_first(p) | changes))


def _special(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda p: ((p / "rows.jsonl").unlink(), make(p / "rows.jsonl"))


ROWS = {
    "a FIFO": (_special(os.mkfifo), r"rows\.jsonl: is a pipe"),
    "a device": (_special(lambda f: f.symlink_to("/dev/zero")), r"rows\.jsonl: is a pipe, socket or device"),
    "a directory": (_special(lambda f: f.mkdir()), r"rows\.jsonl: (is a directory|cannot read)"),
    "a link in a circle": (_special(lambda f: f.symlink_to(f)), r"rows\.jsonl: cannot read"),
    "deep": (_rows(DEEP), r"rows\.jsonl:1: .*levels deep"),
    "NaN": (_rows('{"id": NaN}'), r"rows\.jsonl:1: not JSON: NaN"),
    "infinite": (_rows('{"id": 1e999}'), r"rows\.jsonl:1: .*infinite"),
    "5000 digits": (_rows('{"id": ' + "7" * 5000 + "}"), r"rows\.jsonl:1: .*an integer of 5000 digits"),
    "UTF-16": (_rows('{"id": 1}'.encode("utf-16")), r"rows\.jsonl:1: not UTF-8"),
    "half a pair in a post": (_rows('{"id": "a", "post": "\\ud83d"}'), r":1: key 'post' holds half a surrogate pair"),
    "half a pair in a key": (_rows('{"\\ud83d": "a"}'), r":1: a key holds half a surrogate pair"),
    "half a pair deep": (_rows('{"a": {"b": ["\\udc00"]}}'), r":1: key 'b' holds half a surrogate pair"),
    "token id 10^18": (_row(prompt_ids=[10**18]), r"'prompt_ids' holds 10+…?, which no vocabulary has"),
    "token id 10^40": (_row(prompt_ids=[10**40]), r":1: not usable: an integer of 41 digits"),
    "token id beyond the model": (
        lambda p: _row(output_ids=[*_first(p)["output_ids"], 10**6])(p), r"token id 1000000 but the model has"),
    "token id true": (_row(prompt_ids=[True]), r"'prompt_ids' must hold non-negative integers"),
    "token id 1.5": (_row(output_ids=[1.5]), r"'output_ids' must hold non-negative integers"),
    "cue of text": (_row(cues=[["a", "b"]]), r"'cues'.*is not a \[start, end\)"),
    "cue of floats": (_row(cues=[[0.5, 1.5]]), r"'cues'.*is not a \[start, end\)"),
    "candidates to lists": (_row(candidates={"a": ["b"]}), r"'candidates' must map"),
    "labels of numbers": (_row(parsed_label=[1, {}]), r"'parsed_label' must hold labels"),
    "id with a control character": (_row(id="a\x1b[31m", post="x y", cues=None), r"a\\(x1b|u001b)\[31m"),
    "one id twice": (
        lambda p: (p / "rows.jsonl").write_text(f"{json.dumps(_first(p))}\n" * 2), r":2: id 'row-0' was used on line"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ROWS)
def test_rows(attack, place, capsys):  # noqa: F811
    damage, says = ROWS[attack]
    damage(place)
    refused(probe(place, capsys), says)
    assert not (place / "out").exists()


def test_a_byte_order_mark_is_no_letter(place):  # noqa: F811
    file = place / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_generations(file)) == 2


@pytest.fixture(scope="module")
def finished(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A finished run of the tiny model, redacted, and one that is not."""
    from probes import Probe, run_suite

    path = tmp_path_factory.mktemp("finished")
    model = Probe.from_pretrained(clean / "model")
    rows = [row | {"user": f"secret-user-{i}"} for i, row in enumerate(read_generations(clean / "rows.jsonl"))]
    run_suite(model, rows, path / "open", "fast", n_boot=50)
    run_suite(model, rows, path / "redacted", "fast", redact=True, n_boot=50)
    run_suite(model, rows, path / "redacted again", "fast", redact=True, n_boot=50)
    return path


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "open", tmp_path / "run")
    return tmp_path / "run"


def _entry(run_: Path) -> Path:
    return sorted((run_ / "cache").glob("*.json"))[0]


def _edited(run_: Path, **changes) -> None:
    stored = json.loads(_entry(run_).read_text("utf-8"))
    stored["value"] |= changes
    _entry(run_).write_text(json.dumps(stored), "utf-8")


def _crafted(run_: Path, **changes) -> None:
    """Edited by one who knows how digests are made."""
    name = _entry(run_).name
    value = json.loads(_entry(run_).read_text("utf-8"))["value"] | changes
    _entry(run_).write_text(json.dumps({"digest": digest(value, name=name), "value": value}), "utf-8")


def _flipped(run_: Path) -> None:
    data = bytearray(_entry(run_).read_bytes())
    at = data.index(b"f_input") + 12
    data[at] ^= 1
    _entry(run_).write_bytes(data)


def _swapped(run_: Path) -> None:
    one, two = sorted((run_ / "cache").glob("*.json"))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def _linked(file: Path) -> None:
    shutil.move(file, file.parent.parent / "moved")
    file.symlink_to(file.parent.parent / "moved")


REPAIRS = r"the same `probes run` command repairs it"
RUNS = {
    "a post was edited": (lambda r: _edited(r, label="low"), rf"damaged or edited since it was written; {REPAIRS}"),
    "a bit flipped": (_flipped, rf"cache/\w+\.json: .*{REPAIRS}"),
    "two posts were exchanged": (_swapped, r"damaged or edited"),
    "a post was cut": (lambda r: _entry(r).write_bytes(_entry(r).read_bytes()[:99]), rf"not JSON .*{REPAIRS}"),
    "a post is NaN": (lambda r: _entry(r).write_text('{"digest": NaN}'), rf"not JSON: NaN .*{REPAIRS}"),
    "a post is deep": (lambda r: _entry(r).write_text(DEEP), rf"levels deep; {REPAIRS}"),
    "a post is a FIFO": (lambda r: (_entry(r).unlink(), os.mkfifo(_entry_path(r))), r"is a pipe"),
    "a post is a link": (lambda r: _linked(_entry(r)), r"is a link, not a file of this run"),
    "a crafted span": (lambda r: _crafted(r, units=[[0, 10**9]]), r"a span does not fit the rest"),
    "a crafted gap": (lambda r: _crafted(r, units=[[1, 2]]), r"a clause does not fit the rest"),
    "a crafted type": (lambda r: _crafted(r, label={"a": 1}), r"id, task or label does not fit|PostResult"),
    "a crafted length": (lambda r: _crafted(r, length=10**12), r"does not fit the rest"),
    "a crafted map": (lambda r: _crafted(r, attributions=[1]), r"not a post as this version writes it"),
    "cache names ../": (lambda r: edit(r / "manifest.json", cache=["../manifest.json"]), r"is no name of a post"),
    "cache names an absolute path": (lambda r: edit(r / "manifest.json", cache=["/etc/passwd"]), r"no name of a post"),
    "cache names numbers": (lambda r: edit(r / "manifest.json", cache=[1]), r"cache: must be a list of strings"),
    "cache names nothing": (lambda r: edit(r / "manifest.json", cache=[]), r"names no post"),
    "the manifest is deep": (lambda r: (r / "manifest.json").write_text(DEEP), r"manifest\.json: .*levels deep"),
    "the manifest is NaN": (lambda r: (r / "manifest.json").write_text("NaN"), r"manifest\.json: not JSON: NaN"),
    "the manifest is a list": (lambda r: (r / "manifest.json").write_text("[]"), r"manifest\.json: a JSON list"),
    "the manifest is empty": (lambda r: (r / "manifest.json").write_text(""), r"manifest\.json: not JSON"),
    "the manifest is a FIFO": (
        lambda r: ((r / "manifest.json").unlink(), os.mkfifo(r / "manifest.json")), r"manifest\.json: is a pipe"),
    "the manifest is a link": (lambda r: _linked(r / "manifest.json"), r"manifest\.json: is a link"),
    "skipped is no list": (lambda r: edit(r / "manifest.json", skipped={"a": 1}), r"skipped: must be a list of rows"),
    "limits is text": (lambda r: edit(r / "manifest.json", limits="a"), r"limits: must be a list of strings"),
    "rows is text": (lambda r: edit(r / "manifest.json", rows="9"), r"rows: must be a number"),
    "authors of another number": (lambda r: edit(r / "manifest.json", authors=["a"]), r"authors: must name one"),
    "the summary was edited": (lambda r: edit(r / "summary.json", n=99), rf"summary\.json: damaged or.*{REPAIRS}"),
    "the summary is gone": (lambda r: (r / "summary.json").unlink(), r"summary\.json: cannot read"),
    "the summary is 5000 digits": (
        lambda r: (r / "summary.json").write_text('{"n": ' + "1" * 5000 + "}"), r"an integer of 5000 digits"),
    "a crafted summary": (
        lambda r: ((r / "summary.json").write_text('{"n": 2}'), edit(r / "manifest.json", summary=digest({"n": 2}))),
        r"holds no run as this version writes it"),
}  # fmt: skip


def _entry_path(run_: Path) -> Path:
    names = json.loads((run_ / "manifest.json").read_text("utf-8"))["cache"]
    return next(run_ / "cache" / name for name in names if not (run_ / "cache" / name).exists())


@pytest.mark.parametrize("command", ["check", "report"])
@pytest.mark.parametrize("attack", RUNS)
def test_a_run_directory(attack, command, done, capsys):
    damage, says = RUNS[attack]
    damage(done)
    refused(run(["probes", command, done], capsys), says)


def test_a_bad_post_is_made_again_and_said(done, place, capsys):  # noqa: F811
    shutil.move(done, place / "out")
    rows = [row | {"user": f"secret-user-{i}"} for i, row in enumerate(read_generations(place / "rows.jsonl"))]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = read_run(place / "out")
    _edited(place / "out", label="low")
    outcome = probe(place, capsys)
    assert outcome.code == 0 and outcome.err.count("warning: ") == 1
    assert f"{_entry(place / 'out').name}: damaged or edited since it was written; made again" in outcome.err
    after = read_run(place / "out")
    assert after.manifest["cache"] == before.manifest["cache"]
    assert [r.label for r in after.results] == [r.label for r in before.results]


def test_every_flipped_bit_of_a_post_is_seen(done):
    data = _entry(done).read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        _entry(done).write_bytes(damaged)
        try:
            read_run(done)
        except ProbeInputError:
            continue
        assert json.loads(damaged) == json.loads(data)  # white space, or a number written otherwise


def _everything(path: Path) -> Iterator[tuple[str, str]]:
    """Every artefact of a run but the private key, Parquet unpacked, as text; names too."""
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        yield name, name
        if file.is_file() and not name.startswith("private"):
            yield name, file.read_bytes().decode("utf-8", "replace")
            if file.suffix == ".parquet":
                yield name, json.dumps(pq.read_table(file).to_pylist(), ensure_ascii=False)


def _hashes(text: str) -> Iterator[str]:
    for form in (text, normalise(text).text, json.dumps(text)):
        for name in ("sha256", "sha1", "md5", "blake2b", "blake2s"):
            yield hashlib.new(name, form.encode()).hexdigest()[:16]


def test_a_redacted_run_holds_no_text_hash_name_or_path(finished, clean):  # noqa: F811
    rows = read_generations(clean / "rows.jsonl")
    secrets = {str(clean), str(finished), str(Path.home()) + "/", "secret-user", "感觉活着", "心情还可以", "今天和朋友"}
    for row in rows:
        for text in (row["post"], row["parsed_explanation"], row["label_text"], row["post"][slice(*row["cues"][0])]):
            secrets |= {text, *_hashes(text)}
    for name, text in _everything(finished / "redacted"):
        found = [secret for secret in secrets if secret in text]
        assert not found, f"{name} holds {found}"


def test_names_of_a_redacted_run_confirm_no_guess(finished):
    names = [{p.name for p in (finished / run_ / "cache").iterdir()} for run_ in ("redacted", "redacted again", "open")]
    assert not names[0] & names[1] and not names[0] & names[2]
    key = finished / "redacted" / "private" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    secret = key.read_bytes()
    for name, text in _everything(finished / "redacted"):
        assert secret.hex() not in text, name
        assert "private" in name or secret not in (finished / "redacted" / name).read_bytes() if "." in name else True


def test_a_redacted_run_is_continued_with_its_key(finished):
    first = Cache(finished / "redacted", redact=True).name(["x"])
    assert first == Cache(finished / "redacted", redact=True).name(["x"]) != Cache(finished / "open").name(["x"])


def test_the_cache_of_posts_is_its_owners(finished):
    assert stat.S_IMODE((finished / "open" / "cache").stat().st_mode) == 0o700


def test_a_damaged_key_is_refused(finished, tmp_path):
    shutil.copytree(finished / "redacted", tmp_path / "r")
    (tmp_path / "r" / "private" / "key").write_bytes(b"short")
    with pytest.raises(ProbeInputError, match="key: damaged"):
        Cache(tmp_path / "r", redact=True)


def test_two_runs_in_one_directory(place, capsys):  # noqa: F811
    code = (
        "import sys, time; from pathlib import Path; from probes.results.lock import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(place / "out")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        line = refused(probe(place, capsys), r"process \d+ on .* is at work in this directory")
        assert str(other.pid) in line
        other.kill()
    with held(place / "out"):  # the lock ended with the process that held it
        pass


def test_a_second_process_of_one_launch_waits_for_no_lock(place, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with held(place / "out"):
        assert probe(place, capsys).code == 0


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda f: f.symlink_to("/etc/passwd"), lambda f: f.mkdir()], ids=["fifo", "link", "dir"]
)
def test_something_in_place_of_the_lock(make, place, capsys):  # noqa: F811
    (place / "out").mkdir()
    make(place / "out" / "run.lock")
    refused(probe(place, capsys), r"run\.lock: is in the way")


@pytest.mark.parametrize("rank", ["x", "-1", "9" * 5000])
def test_a_rank_that_is_no_number(rank, place, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", rank)
    refused(probe(place, capsys), "both must be numbers")


def _archive(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def _npy(shape: str, descr: str = "'<i8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_npy("(10**6, 10**6)"), "cannot read as npz"),
        (_npy("(1000000, 1000000)"), "is not in it"),
        (_npy("(4,)", "'|O'") + b"\x80\x04cposix\nsystem\n", "cannot read as npz"),
        (_npy("(-1, 2)"), "cannot read as npz"),
        (b"", "cannot read as npz"),
        (b"\x93NUMPY\x09\x00", "cannot read as npz"),
    ],
    ids=["an expression", "8 terabytes", "a pickle", "a negative shape", "empty", "another version"],
)
def test_reference_logits(data, says, tmp_path):
    _archive(tmp_path / "reference.npz", tokens=data)
    with pytest.raises(ProbeInputError, match=says):
        read_reference(tmp_path / "reference.npz")


def test_reference_logits_of_no_text(tmp_path):
    """Nothing differs from nothing: any model would be the exported one."""
    none, ids = np.zeros((0, 3), np.int32), np.zeros(0, np.int32)
    np.savez(tmp_path / "r.npz", tokens=none, lengths=ids, logits=np.zeros((0, 3, 9), np.float32), prompt_ids=none,
             prompt_lengths=ids, greedy_ids=none, eos_ids=ids)  # fmt: skip
    with pytest.raises(ProbeInputError, match="holds no text, so nothing would be compared"):
        read_reference(tmp_path / "r.npz")


def test_reference_logits_that_are_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "reference.npz")
    with pytest.raises(ProbeInputError, match="is a pipe"):
        read_reference(tmp_path / "reference.npz")


def test_no_cell_of_the_csv_is_computed(finished):
    summary = json.loads((finished / "open" / "summary.json").read_text("utf-8"))
    summary["verdicts"] = {"=1+1": 2}
    for name in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1"):
        summary["mass_ratio"] = {name: -0.5}
        cells = [line.split(",")[2].strip('"') for line in summary_csv(summary).splitlines()]
        inert = "'" + name.replace("\t=", "\t'=")  # a tab may stand between two cells
        assert inert in cells and name not in cells
    assert ",-0.5," in summary_csv(summary)


def test_markup_and_control_characters_are_printed_inert(done, tmp_path, capsys):
    odd = tmp_path / "[red]a[bold]\x1b[31m"
    done.rename(odd)
    outcome = run(["probes", "report", odd], capsys)
    assert outcome.code == 0 and "[red]a[bold]\\u001b[31m" in outcome.out and "\x1b" not in outcome.out
    refused(run(["probes", "check", tmp_path / "[b]\x1b[2J\n"], capsys), r"\[b\]\\u001b\[2J")


def test_a_locale_without_our_characters(done):
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for more in ([], ["--json"]):
        command = [sys.executable, "-P", "-m", "probes", "check", str(done), *more]
        ended = subprocess.run(command, env=environment, capture_output=True, check=False, cwd=done.parent)
        assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["n"] == 2


TEXTS = {
    "quotation marks": '"', "opening marks": "“", "nested marks": "“「『", "short quotes": "“a”", "equal letters": "a",
    "equal characters": "难", "function words": "的", "spaces": " ", "commas": ",", "single letters": "a ",
    "emoji": "😭", "clauses": "难过。", "lines": "a\n", "ellipses": "a…", "apostrophes": "'a ",
    "cue verbs": "提到难过，",
    "wide spaces": "a\u3000 ", "combining marks": "a\u0301\u0301",
}  # fmt: skip


def _work(name: str, length: int) -> None:
    text = (TEXTS[name] * length)[:length]
    align(text, text)
    align(f"“{text}” {text}", text[: length // 2])
    normalise(text)
    pieces(text)
    clauses(text)
    words(text, 30)
    decode_bytes(text.encode()[:-1] + b"\xff" * len(text))


@pytest.mark.parametrize("name", TEXTS)
def test_time_is_linear_in_the_length_of_a_post(name):
    """Four times the text, at most eight times the time (a square would be sixteen)."""
    grows_at_most(functools.partial(_work, name), 400, 1600, 8)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TEXTS)
def test_200000_characters_take_no_minute(name):
    began = time.process_time()
    _work(name, 200_000)
    assert time.process_time() - began < 60


def test_a_post_of_equal_characters_is_found_in_linear_time():
    from probes.models.token_bytes import TokenBytes
    from tests.probes.tiny import make_tokenizer

    tokens, rows = TokenBytes(make_tokenizer(["a b"], 300)), {}
    for length in (5_000, 20_000):
        prompt, answer = tokens.encode("a" * 2 * length), tokens.encode("high")
        rows[length] = {
            "id": "x",
            "post": "a" * length,
            "prompt_ids": prompt,
            "output_ids": answer,
            "label_text": "high",
        }
    grows_at_most(lambda length: encode(rows[length], tokens), *rows, 8)
