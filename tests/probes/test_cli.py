"""The command as a user meets it: one JSON object or a table, one line of reason, exit codes, Ctrl-C."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import probes
from probes import cli
from probes.results.store import SCHEMA_VERSION, read_run

ROOT = Path(__file__).parents[2]


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    try:
        cli.main([str(a) for a in arguments])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def same_signals_and_warnings(recwarn):
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tiny_generations, tmp_path_factory) -> Path:
    """A run directory made by the command itself."""
    out = tmp_path_factory.mktemp("finished") / "run"
    cli.main(
        ["run", str(tiny_model_dir), "--in", str(tiny_generations), "--out", str(out), "--device", "cpu", "--json"]
    )
    return out


def test_run_prints_one_json_object_and_progress_on_stderr(finished, tiny_model_dir, tiny_generations, capsys):
    code, out, err = call(
        capsys, "run", tiny_model_dir, "--in", tiny_generations, "--out", finished, "--device", "cpu", "--json"
    )
    assert code == 0
    printed = json.loads(out)
    assert out.count("\n") == 1
    assert printed.pop("report") == str(finished / "report.html")
    assert printed == json.loads((finished / "summary.json").read_text("utf-8"))
    assert "4 of 4" in err


def test_run_prints_a_table_the_safety_note_and_the_report(finished, tiny_model_dir, tiny_generations, capsys):
    code, out, _ = call(capsys, "run", tiny_model_dir, "--in", tiny_generations, "--out", finished, "--device", "cpu")
    assert code == 0
    assert "4 posts: inconclusive" in out and "label saliency in cited words (ig)" in out
    assert out.count("not a diagnosis") == 1 and f"report   {finished / 'report.html'}" in out
    rows = [json.loads(line) for line in tiny_generations.read_text("utf-8").splitlines()]
    assert not any(row["post"][:8] in out or row["parsed_explanation"] in out for row in rows)  # posts are not printed


def test_limit_and_budget_and_redact(tiny_model_dir, tiny_generations, tmp_path, capsys):
    options = ("--device", "cpu", "--limit", 2, "--budget", "fast", "--redact", "--json")
    code, out, _ = call(capsys, "run", tiny_model_dir, "--in", tiny_generations, "--out", tmp_path / "r", *options)
    assert code == 0 and json.loads(out)["n"] == 2
    run = read_run(tmp_path / "r")
    assert run.manifest["redact"] and run.results[0].post is None
    assert {a.method for a in run.results[0].attributions} == {"erase", "gradnorm"}


def test_rows_that_cannot_be_probed_have_an_exit_code_of_their_own(tiny_model_dir, tiny_generations, tmp_path, capsys):
    rows = [json.loads(line) for line in tiny_generations.read_text("utf-8").splitlines()[:2]]
    rows += [
        rows[0] | {"id": "gone", "post": "said nowhere", "cues": None},
        rows[1] | {"id": "none", "label_text": None},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = ("--in", file, "--device", "cpu", "--budget", "fast", "--out", tmp_path / "out")
    code, out, err = call(capsys, "run", tiny_model_dir, *options, "--json")
    found = json.loads(out)
    assert code == 3 and found["n"] == 2 and found["skipped"] == 2
    told = err.splitlines()
    assert told[0].startswith("warning: 2 of 4 rows left out: 1 ") and "said nowhere" not in err
    assert told[-1].startswith("probes: rows that cannot be probed: 1 the post is not in the prompt; the others are in")
    code, out, _ = call(capsys, "run", tiny_model_dir, *options)
    assert code == 3 and "rows left out" in out
    file.write_text("".join(json.dumps(rows[at]) + "\n" for at in (0, 1, 3)), "utf-8")
    code, _, err = call(capsys, "run", tiny_model_dir, *options)  # an answer without a label is a result
    assert code == 0 and "1 of 3 rows left out" in err
    code, out, err = call(capsys, "check", tmp_path / "out")
    assert code == 0 and "rows left out" in out


def test_check_alone_and_against(finished, capsys):
    code, out, _ = call(capsys, "check", finished, "--json")
    assert code == 0 and json.loads(out) == json.loads((finished / "summary.json").read_text("utf-8"))
    code, out, _ = call(capsys, "check", finished, "--against", finished, "--json")
    found = json.loads(out)
    assert code == 0 and found["n_pairs"] == 4 and found["n"] == 4
    assert found["diagnosticity"] == 0.5  # against itself: every pair a tie
    assert {"mass_ratio", "cosine"} <= set(found["by_check"])
    code, out, _ = call(capsys, "check", finished, "--against", finished)
    assert code == 0 and "P(this run scores higher)" in out and "4 pairs" in out


def test_randomise_prints_what_happens_to_the_maps(tiny_model_dir, adapter_dir, tiny_generations, capsys):
    options = (tiny_model_dir, "--in", tiny_generations, "--adapter", adapter_dir, "--limit", 1, "--device", "cpu")
    code, out, _ = call(capsys, "randomise", *options, "--json")
    found = json.loads(out)
    assert code == 0 and found["n"] == 1 and set(found["kinds"]) == {"weights", "adapter_off", "adapter_b"}
    assert found["cascade"][0]["down_to"] == "nothing" and found["cascade"][-1]["down_to"] == "embeddings"
    unlabelled = tiny_generations.parent / "unlabelled.jsonl"
    rows = [json.loads(line) | {"label_text": None} for line in tiny_generations.read_text("utf-8").splitlines()]
    unlabelled.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    code, _, err = call(capsys, "randomise", tiny_model_dir, "--in", unlabelled)
    assert code == 2 and err.count("\n") == 1 and "no row has a label" in err


def test_report_again_and_redacted(finished, capsys, tmp_path):
    code, out, _ = call(capsys, "report", finished, "--redact", "--json")
    path = Path(json.loads(out)["report"])
    assert code == 0 and path.name == "report.redacted.html"
    post = read_run(finished).results[0].post
    assert post is not None
    assert post[:5] in (finished / "report.html").read_text("utf-8") and post[:5] not in path.read_text("utf-8")
    code, out, _ = call(capsys, "report", finished, "--out", tmp_path / "x.html")
    assert code == 0 and (tmp_path / "x.html").exists() and "x.html" in out


def test_selftest_and_validate(monkeypatch, capsys, tmp_path):
    good = {"id": "V1.ig", "what": "linear model", "value": 1e-7, "bound": 1e-5, "ok": True}
    info = {"id": "V6.left", "what": "left padding", "value": 2.0, "bound": None, "ok": True}
    module = importlib.import_module("probes.validation.selftest")  # the name in the package is the function
    monkeypatch.setattr(module, "selftest", lambda: [good, info])
    code, out, _ = call(capsys, "selftest", "--json")
    assert code == 0 and json.loads(out) == {"ok": True, "rows": [good, info]}
    monkeypatch.setattr("probes.validation.validate.validate", lambda quick, seed, say: [good | {"side": "<="}, info])
    code, out, _ = call(capsys, "validate", "--quick", "--docs", str(tmp_path / "v.md"))
    assert (
        code == 0
        and "information" in out
        and "| V1.ig | linear model | 1e-07 | <= 1e-05 | ok |" in (tmp_path / "v.md").read_text("utf-8")
    )
    monkeypatch.setattr(module, "selftest", lambda: [good | {"ok": False, "value": 0.3}])
    code, out, err = call(capsys, "selftest", "--json")
    assert code == 1 and json.loads(out)["ok"] is False
    assert err.splitlines()[-1] == "probes: 1 of 1 checks failed (V1.ig): do not read verdicts here"


def test_verify(monkeypatch, capsys):
    found = {"max_abs_logit_diff": 2e-3, "max_abs_logit": 9.0, "greedy_identical": 3, "greedy_total": 4,
             "greedy_gap": 1e-3}  # fmt: skip
    monkeypatch.setattr("probes.models.verify.verify", lambda model, adapter, reference: found | {"adapter": adapter})
    code, out, _ = call(capsys, "verify", "m", "--adapter", "a", "--reference", "r.npz", "--json")
    assert code == 0 and json.loads(out) == found | {"adapter": "a"}
    code, out, err = call(capsys, "verify", "m", "--reference", "r.npz", "--tolerance", "1e-4")
    assert (
        code == 1 and "2.00e-03" in out and "identical: 3 of 4, others part where two logits are 1.0e-03 apart" in out
    )
    assert err.splitlines() == ["probes: max |Δ logit| 2.00e-03 is above 1.00e-04: not the same model"]
    monkeypatch.setattr("probes.models.verify.reopen", lambda model: {"tensors": 3, "parameters": 1234, "of": model})
    code, out, _ = call(capsys, "verify", "m", "--json")
    assert code == 0 and json.loads(out) == {"tensors": 3, "parameters": 1234, "of": "m"}
    code, _, err = call(capsys, "verify", "m", "--tolerance", "1e-4")
    assert code == 2 and "need --reference" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("frobnicate",), "no such command 'frobnicate'"),
        (("run",), "missing argument MODEL"),
        (("run", "M", "--in", "g.jsonl"), "missing option --out"),
        (("run", "M", "--in", "missing.jsonl", "--out", "{tmp}/o"), "missing.jsonl: cannot read"),
        (("run", "M", "--in", "{rows}", "--out", "{tmp}/o", "--budget", "huge"), "budget 'huge': choose from fast"),
        (("run", "M", "--in", "{rows}", "--out", "{tmp}/o", "--limit", "0"), "limit 0: at least 1"),
        (("run", "M", "--in", "{rows}", "--out", "{rows}"), "is what --in names, and would be replaced"),
        (("run", "M", "--in", "{rows}", "--out", "{broken}"), "a file is in the way"),
        (("run", "{tmp}/nowhere", "--in", "{rows}", "--out", "{tmp}/o"), "nowhere"),
        (("run", "{model}", "--in", "{rows}", "--out", "{tmp}/o", "--dtype", "int3"), "int3"),
        (("run", "{model}", "--in", "{empty}", "--out", "{tmp}/o"), "no rows"),
        (("run", "{model}", "--in", "{broken}", "--out", "{tmp}/o"), "broken.jsonl:2"),
        (("run", "{model}", "--in", "{moved}", "--out", "{tmp}/o"), "the post is not in the prompt"),
        (("check", "{tmp}"), "no manifest.json here"),
        (("check", "{cut}"), "the run is not finished; the same `probes run` command continues it"),
        (("check", "{old}"), "schema version 0"),
        (("report", "{tmp}/nothing"), "no manifest.json here"),
        (("verify", "{model}", "--reference", "{empty}"), "cannot read as npz"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_two(
    arguments, reason, capsys, tmp_path, tiny_model_dir, tiny_generations, tiny_rows
):
    for name, status, version in (("cut", "running", SCHEMA_VERSION), ("old", "done", 0)):
        (tmp_path / name).mkdir()
        manifest = {"kind": "probes", "status": status, "schema_version": version}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    row = json.dumps(tiny_rows[0])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(row + "\n{oops\n")
    (tmp_path / "moved.jsonl").write_text(json.dumps(tiny_rows[0] | {"post": "something else entirely"}))
    places = {
        "tmp": tmp_path,
        "rows": tiny_generations,
        "model": tiny_model_dir,
        **{name: tmp_path / f"{name}.jsonl" for name in ("empty", "broken", "moved")},
        **{name: tmp_path / name for name in ("cut", "old")},
    }
    filled = [word.format(**places) for word in arguments]
    code, out, err = call(capsys, *filled)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("probes: ") and reason in last and "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_unexpected_errors_are_one_line_with_code_one(monkeypatch, capsys, tmp_path):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error\nlong story")

    monkeypatch.setattr("probes.report.page.write_report", broken)
    code, out, err = call(capsys, "report", tmp_path)
    assert (code, out) == (1, "") and err == "probes: RuntimeError: CUDA error\n"
    with pytest.raises(RuntimeError, match="long story"):
        call(capsys, "report", tmp_path, "--debug")
    monkeypatch.setattr("probes.report.page.write_report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = call(capsys, "report", tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1) and "the same command continues" in err


def test_help_without_a_command(capsys):
    code, out, err = call(capsys)
    assert code == 2 and "run" in out + err and "selftest" in out + err
    assert call(capsys, "run", "--help")[0] == 0


def test_interrupted_run_keeps_what_is_done_and_continues(tiny_model_dir, tiny_rows, tmp_path):
    """A real process, stopped in the middle; the same command then does only the rest."""
    rows = [tiny_rows[i % len(tiny_rows)] | {"id": f"r{i}"} for i in range(200)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    out = tmp_path / "out"
    arguments = ["run", str(tiny_model_dir), "--in", str(data), "--out", str(out), "--device", "cpu", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "probes", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        while not (out / "cache").is_dir() or len(list((out / "cache").glob("*.json"))) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate()
    assert process.returncode == 1 and printed == ""
    assert errors.splitlines()[-1] == "probes: interrupted; finished posts are kept, the same command continues"
    assert "Traceback" not in errors
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "cache").glob("*.json")}
    assert 3 <= len(kept) < 200
    cli.main([*arguments, "--limit", "6"])
    run = read_run(out)
    assert len(run.results) == 6
    assert {name: (out / "cache" / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 1)])
def test_sigterm_is_the_same_as_ctrl_c_with_an_exit_code_of_its_own(capsys, monkeypatch, number, code):
    """75 is what a scheduler's loop takes for "try again"."""

    class Commands:
        def main(self, **given: object) -> None:
            signal.raise_signal(number)

    monkeypatch.setattr(cli, "_commands", Commands)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run"])
    said = "probes: interrupted; finished posts are kept, the same command continues\n"
    assert (stop.value.code, capsys.readouterr().err) == (code, said)


def test_public_names_are_functions_and_listed():
    code = (
        "import probes.citations.align, probes.validation.selftest, probes, sys;"
        "from probes import Probe, align, cross_check, run_suite, selftest, write_report;"
        "assert all(map(callable, (Probe, align, cross_check, run_suite, selftest, write_report)));"
        "assert align('“ab”', 'xx ab')[0].post_char == ((3, 5),);"
        "assert probes.align is align and set(probes.__all__) <= set(dir(probes))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = probes.nothing  # type: ignore[attr-defined]


def test_importing_costs_nothing_and_reading_a_run_needs_no_torch(finished):
    code = (
        "import sys, probes; assert 'numpy' not in sys.modules;"
        "from probes.cli import main; main(['check', sys.argv[1], '--json']); main(['report', sys.argv[1], '--json']);"
        "assert not {'torch', 'transformers', 'captum'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_share_the_posts_and_go_on_after_a_kill(tiny_model_dir, tiny_rows, tmp_path):
    """A real launcher with two processes, killed with no warning, started again: the same run as one process makes."""
    rows = [tiny_rows[i % len(tiny_rows)] | {"id": f"r{i}"} for i in range(16)]
    data, out, alone = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "alone"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    given = ["run", str(tiny_model_dir), "--in", str(data), "--device", "cpu", "--json", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "probes"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launch, *given, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=env,
        start_new_session=True,
    ) as process:  # fmt: skip
        while len(list(out.glob("cache/*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        for worker in _children(process.pid):
            os.kill(worker, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("cache/*.json")}
    assert 3 <= len(kept) < 16 and json.loads((out / "manifest.json").read_text("utf-8"))["status"] == "running"
    done = subprocess.run([*launch, *given, str(out)], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 1  # the first process speaks, the other does not
    assert {name: (out / "cache" / name).stat().st_mtime_ns for name in kept} == kept
    cli.main([*given, str(alone)])
    shared, single = read_run(out), read_run(alone)
    assert shared.manifest["cache"] == single.manifest["cache"] and shared.summary == single.summary
    assert json.loads(printed[0])["n"] == 16


def _children(pid: int) -> list[int]:
    """Every process below ``pid`` (torch's launcher puts its workers into sessions of their own)."""
    found = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    return found + [below for child in found for below in _children(child)]
