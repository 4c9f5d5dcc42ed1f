"""The PyTorch side of ``mentalglm bench``: PEFT's training step, a cut model's logits, and seconds per probed post.

``python -m probes.bench SPEC OUT`` reads a JSON object and writes another one, anew after every measurement, so that
a process that is stopped leaves what it had. It is started by ``mentalglm bench`` and is no command of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from probes.files import write_text

STEPS = 20  # that are timed at most, after one that is not
Tell = Callable[[dict[str, Any]], None]


def peft_step(spec: dict[str, Any], tell: Tell) -> None:
    """LoRA by PEFT on transformers' GLM: SDPA, gradient checkpointing, AdamW with clipping, on the rows that the JAX
    side packed. Rows are taken as they are, each one sequence: nothing is padded, and attention crosses examples.

    ``spec``: ``config`` (of the model), ``rows`` (npz), ``dtype``, ``rank``, ``alpha``, ``seconds``.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    deadline = time.monotonic() + spec["seconds"]
    model: Any = _model(spec)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    rows, device = np.load(spec["rows"]), model.device
    tokens = torch.from_numpy(rows["tokens"]).long().to(device)
    labels = torch.full_like(tokens, -100)
    line, slot = np.nonzero(rows["target_weights"])
    places = rows["target_index"][line, slot] + 1
    labels[line, places] = tokens[line, places]
    real, answers = int((rows["segments"] > 0).sum()), len(line)
    micro = len(tokens) // spec["accumulate"]
    times: list[float] = []
    while len(times) <= STEPS and (len(times) < 2 or time.monotonic() < deadline):
        began, last = time.perf_counter(), 0.0
        for start in range(0, len(tokens), micro):
            part = slice(start, start + micro)
            loss = model(input_ids=tokens[part], labels=labels[part]).loss / spec["accumulate"]
            loss.backward()
            last = float(loss.detach()) * spec["accumulate"]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if len(times) > 1:
            seconds = statistics.median(times[1:])
            tell({"steps": len(times) - 1, "step_seconds": seconds, "tokens_per_second": real / seconds,
                  "answer_tokens_per_second": answers / seconds, "loss": last, "peak_bytes": _peak(),
                  "rows": len(tokens), "device": str(device)})  # fmt: skip


def logits(spec: dict[str, Any], tell: Tell) -> None:
    """Transformers' logits of the model in ``spec["directory"]``, on this device in ``spec["dtype"]``, beside those in
    its ``logits.npz``; and transformers' own in float32, which tells what the dtype alone costs."""
    import torch
    from transformers import AutoModelForCausalLM

    directory, device = Path(spec["directory"]), _device()
    kept = np.load(directory / "logits.npz")
    ours, tokens = kept["logits"], torch.from_numpy(kept["tokens"]).long().to(device)

    def theirs(dtype: str) -> np.ndarray:
        model: Any = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=getattr(torch, dtype))
        with torch.no_grad():
            return model.to(device)(tokens).logits.float().cpu().numpy()

    same, exact = theirs(spec["dtype"]), theirs("float32")
    tell({
        "dtype": spec["dtype"], "device": str(device), "largest_logit": float(np.abs(exact).max()),
        "largest_difference": float(np.abs(ours - same).max()),
        "from_float32": {"jax": float(np.abs(ours - exact).max()), "transformers": float(np.abs(same - exact).max())},
        "same_most_probable": float((ours.argmax(-1) == same.argmax(-1)).mean()), "positions": int(tokens.numel()),
    })  # fmt: skip


def posts(spec: dict[str, Any], tell: Tell) -> None:
    """Seconds and memory per post of ``fast`` and ``standard`` at this geometry: random weights, invented posts."""
    import tempfile

    from probes.probe import Probe
    from probes.suite import run_suite
    from probes.validation.planted import World, make_tokenizer, planted_rows

    deadline = time.monotonic() + spec["seconds"]
    world = World(clauses=(40, 50))
    tokenizer = make_tokenizer(world)
    rows = planted_rows(world, tokenizer, 2, seed=0)
    probe = Probe(_model(spec).eval(), tokenizer)
    found: dict[str, Any] = {"prompt_tokens": len(rows[0]["prompt_ids"]), "posts": len(rows), "budgets": {}}
    for budget in ("fast", "standard"):
        if found["budgets"] and time.monotonic() > deadline:
            break
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            run_suite(probe, rows, out, budget=budget, n_boot=10)
        seconds = (time.perf_counter() - began) / len(rows)
        found["budgets"][budget] = {"seconds_per_post": seconds, "peak_bytes": _peak()}
        tell(found)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _model(spec: dict[str, Any]) -> Any:
    """A model of ``spec["config"]`` (transformers' own names) with random weights, made on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"pad_token_id": 0, "eos_token_id": 1}  # a recipe's geometry names none
    fields: dict[str, Any] = {**spec["config"], **own}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    try:
        with _device():
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)


KINDS: dict[str, Callable[[dict[str, Any], Tell], None]] = {"peft": peft_step, "logits": logits, "probes": posts}


def main(spec: str, out: str) -> None:
    """Reads SPEC, measures, writes OUT."""
    read = json.loads(Path(spec).read_text(encoding="utf-8"))
    KINDS[read["kind"]](read, lambda found: write_text(Path(out), json.dumps(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
