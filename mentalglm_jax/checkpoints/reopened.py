"""Whether transformers takes what was written: asked in a process of its own, for this package never imports torch."""

import importlib.util
import subprocess
from pathlib import Path

from mentalglm_jax.checkpoints.orbax_files import PARAMS
from mentalglm_jax.errors import RunError
from mentalglm_jax.foreign import read_json
from mentalglm_jax.interpreter import environment, module_command
from mentalglm_jax.model.relatives import RELATIVES


def transformers_installed() -> bool:
    """Whether this environment has the PyTorch side, looked up without importing it."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "probes"))


def reopen_with_transformers(directory: Path) -> bool:
    """Has a child process open ``directory`` with transformers (``probes verify``): config, generation config,
    tokenizer, and every tensor by name and shape; no weight is read. False where it has no causal language model for
    what is there: chatglm, a parameter tree, a vision-language model.

    Raises:
        RunError: transformers does not take it.
    """
    kind = read_json(directory / "config.json").get("model_type")
    if kind not in ("glm", "glm4", *RELATIVES) or (directory / PARAMS).exists():
        return False
    command = module_command("probes", "verify", directory.absolute(), "--json")
    child = subprocess.run(command, capture_output=True, text=True, env=environment(HF_HUB_OFFLINE="1"))
    if child.returncode != 0:
        reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RunError(f"the result does not open in transformers, so it was not kept: {reason[0]}")
    return True
