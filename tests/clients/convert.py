"""llama.cpp's own converters in one process: what they import is imported once, each conversion runs in a fork.

Reads ``[{"out": FILE, "model": DIR} or {"out": FILE, "adapter": DIR, "base": DIR}, ...]`` from stdin; writes the last
line that each failed conversion printed, by ``out``, to stdout.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def main(converters: Path) -> None:
    """Converts everything; two at a time."""
    sys.path[:0] = [str(converters), str(converters / "gguf-py")]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch  # noqa: F401 - before the forks
    import transformers  # noqa: F401
    from conversion import get_model_class
    from conversion.base import TextModel

    for architecture in ("GlmForCausalLM", "Glm4ForCausalLM"):
        get_model_class(architecture)  # imports its module
    # llama.cpp knows a pre-tokenizer by a hash over published vocabularies; our small one splits text by the same rule.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "glm4"
    jobs, running, failed = json.load(sys.stdin), {}, {}

    def wait() -> None:
        child, status = os.wait()
        out = running.pop(child)
        if status:
            lines = [line for line in Path(f"{out}.log").read_text(encoding="utf-8").splitlines() if line.strip()]
            failed[out] = lines[-1] if lines else f"status {status}"

    for job in jobs:
        if len(running) == 2:
            wait()
        child = os.fork()
        if child == 0:
            _convert(converters, job)
        running[child] = job["out"]
    while running:
        wait()
    sys.stdout.write(json.dumps(failed))


def _convert(converters: Path, job: dict[str, str]) -> None:
    log = os.open(f"{job['out']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "model" in job:
        script, arguments = "convert_hf_to_gguf.py", [job["model"]]
    else:
        script, arguments = "convert_lora_to_gguf.py", ["--base", job["base"], job["adapter"]]
    sys.argv = [script, "--outtype", "f32", "--outfile", job["out"], *arguments]
    code = 1
    try:
        runpy.run_path(str(converters / script), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = 1 if error.code else 0
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
