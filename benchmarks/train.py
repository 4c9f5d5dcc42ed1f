"""One training step of ours against PEFT on transformers, in one process, same weights, batch, adapters and dtype.

    python -P benchmarks/train.py [--parts dense mix packing loss length rank] [--repeat 7] [--devices 2] [--json]
    python -P benchmarks/train.py --parts mix packing --data PATH --sequence 1024      records of the upstream files

(-P keeps this folder out of the import path.) Random GLM of 35 M parameters, float32, LoRA rank 16 on every linear
layer, AdamW with clipping on both sides. What is alternated within one round shares the machine's mood; medians over
rounds are printed, with the processor time beside the wall time because the machine may be shared.

* dense: full rows of random tokens, every token a target: what packing and answer-only projection cannot help.
* mix: instruction records, a random sample of the synthetic corpus or, with --data, of the upstream training files,
  under a vocabulary made of them. PEFT pads a batch to its longest record and projects every position onto the
  vocabulary, as transformers' Trainer does by default; ours packs the same records and projects the answers.
* packing: our step, packed against one record per row.
* loss: chunked over answers against all logits of all positions: peak memory of the compiled program, and time.
* length, rank: time and memory of our step as they grow. On a CPU attention holds all scores: quadratic in the length.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mentalglm_jax import save_adapter, save_pretrained
from mentalglm_jax.data.batches import Batch, Example, PackedBatches, encode_records
from mentalglm_jax.data.sources import load_upstream, present
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.devices.distributed import spread
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, add_lora, parameter_count
from mentalglm_jax.model.sharding import make_mesh, shard_model, split_cpu
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer, train_bpe
from mentalglm_jax.train.loss import answer_loss
from mentalglm_jax.train.recipe import TrainConfig
from mentalglm_jax.train.step import make_optimizer, make_step

GEOMETRY: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05, "pad_token_id": 0, "eos_token_id": (1, 2, 3),
}  # fmt: skip
SMALL: dict[str, Any] = {"vocab_size": 2560, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "head_dim": 16}  # fmt: skip
PARTS = ("dense", "mix", "packing", "loss", "length", "rank")


def new_model(geometry: dict[str, Any], rank: int = 16, remat: str = "none") -> Glm:
    """Random weights and an adapter that does something (PEFT's B starts at zero and would hide a mistake)."""
    model = Glm(GlmConfig(**geometry), rngs=nnx.Rngs(0), remat=remat)
    add_lora(model, LoraConfig(rank=rank, alpha=2.0 * rank), nnx.Rngs(1))
    for number, name in enumerate(("q_proj", "o_proj")):
        b = getattr(model.layers.self_attn, name).adapter.b
        b.set_value(0.02 * jax.random.normal(jax.random.key(number), b.shape))
    return model


class Ours:
    """Our step on ``devices`` CPU devices; ``step(batch)`` trains on it and gives its loss."""

    def __init__(self, model: Glm, rows: int, length: int, devices: int):
        self.rows, self.mesh = rows, make_mesh(data=devices, fsdp=1, tensor=1) if devices > 1 else None
        if self.mesh is not None:
            shard_model(model, self.mesh)
        config = TrainConfig(steps=1000, rows=rows, sequence_length=length, learning_rate=1e-4, warmup_ratio=0.0)
        self.function, self.state, self.frozen = make_step(
            model, make_optimizer(config, 1000), config, "lora", self.mesh
        )

    def placed(self, batch: Batch) -> dict[str, Any]:
        arrays = cast(dict[str, np.ndarray], batch)
        if self.mesh is None:
            return {name: jax.device_put(x[None]) for name, x in arrays.items()}
        return spread(arrays, self.rows, 1, self.mesh, None)

    def memory(self, batch: Batch) -> int:
        """Bytes of temporary arrays of the compiled step; compiles it."""
        state = self.state
        self.function: Any = self.function.lower(
            state.trainable, state.optimizer, self.frozen, self.placed(batch), jax.random.key(0)
        ).compile()
        return self.function.memory_analysis().temp_size_in_bytes

    def __call__(self, batch: Batch) -> float:
        state = self.state
        state.trainable, state.optimizer, out = self.function(
            state.trainable, state.optimizer, self.frozen, self.placed(batch), jax.random.key(0)
        )
        return float(out["loss"])


class Peft:
    """The step of PEFT on transformers with SDPA; ``step(batch)`` takes (tokens, mask, labels)."""

    def __init__(self, model: Glm, directory: Path, checkpointing: bool):
        if not directory.exists():
            save_adapter(model, directory / "adapter")
            graph, state = nnx.split(model)
            save_pretrained(nnx.merge(graph, state), directory / "base", merge=False)
        base = AutoModelForCausalLM.from_pretrained(
            directory / "base", attn_implementation="sdpa", dtype=torch.float32, use_cache=False
        )
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        self.model = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]) -> float:
        tokens, mask, labels = batch
        loss = self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def padded(examples: Sequence[Example], length: int, targets: int) -> Batch:
    """One example per row."""
    shape = (len(examples), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    index, ids = (np.zeros((len(examples), targets), np.int32) for _ in range(2))
    weights = np.zeros((len(examples), targets), np.float32)
    for line, item in enumerate(examples):
        size, count = len(item["tokens"]), len(item["target_ids"])
        tokens[line, :size], segments[line, :size], positions[line, :size] = item["tokens"], 1, np.arange(size)
        index[line, :count], ids[line, :count], weights[line, :count] = item["target_index"], item["target_ids"], 1
    return Batch(tokens=tokens, positions=positions, segment_ids=segments, target_index=index, target_ids=ids,
                 target_weights=weights, is_post=np.zeros(shape, bool))  # fmt: skip


def for_torch(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tokens, mask and labels padded to the longest example."""
    longest = max(len(item["tokens"]) for item in examples)
    tokens, mask, labels = (np.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for line, item in enumerate(examples):
        size = len(item["tokens"])
        tokens[line, :size], mask[line, :size] = item["tokens"], 1
        labels[line, item["target_index"] + 1] = item["target_ids"]
    return torch.from_numpy(tokens), None if mask.all() else torch.from_numpy(mask), torch.from_numpy(labels)


def alternated(sides: dict[str, Callable[[], Any]], repeat: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each side, all sides once per round after one round that does not count;
    ``ratio``: median over rounds of the first side's time over this one's (above 1: this one is faster)."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeat + 1):
        for name, side in sides.items():
            start, used = time.perf_counter(), time.process_time()
            side()
            if round_:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    first = next(iter(sides))

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[first], times[name], strict=True))

    return {
        name: {"seconds": statistics.median(wall[name]), "processor": statistics.median(processor[name]),
               "ratio": ratio(wall, name), "processor_ratio": ratio(processor, name)} for name in sides
    }  # fmt: skip


def random_rows(rows: int, length: int, vocabulary: int, answers: float = 1.0) -> list[Example]:
    """Full rows of random tokens whose last ``answers`` part are targets."""
    rng, found = np.random.default_rng(0), []
    for _ in range(rows):
        tokens = rng.integers(4, vocabulary, length).astype(np.int32)
        index = np.arange(max(0, length - 1 - round(answers * length)), length - 1, dtype=np.int32)
        found.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1]))
    return found


def records(args: argparse.Namespace) -> list[Example]:
    """``--records`` instruction records, all tasks, both languages, none longer than ``--sequence`` tokens."""
    if args.data is None:
        made = make_corpus(SyntheticConfig(n_train=args.records, n_dev=0, n_test=0))
        tokenizer = GlmTokenizer.load(BUILTIN)
    else:
        made = [record for record in load_upstream(args.data, present(args.data)) if record.split == "train"]
        texts = (text for record in made[:: 1 + len(made) // 4000] for text in (record.prompt, record.answer()))
        tokenizer = train_bpe(texts, GEOMETRY["vocab_size"])
    order = np.random.default_rng(args.seed).permutation(len(made))[: 2 * args.records]
    return encode_records([made[i] for i in order], tokenizer, args.sequence)[0][: args.records]


def against_peft(args: argparse.Namespace, geometry: dict[str, Any], examples: list[Example], packed: Batch) -> Any:
    """Losses of all sides before the first update, and their times; ``examples`` are what ``packed`` holds."""
    theirs = for_torch(examples)
    rows, length = packed["tokens"].shape
    with tempfile.TemporaryDirectory() as folder:
        # Exported from the model before its arrays are taken by the step.
        peft = {
            name: Peft(new_model(geometry), Path(folder) / "peft", checkpointing)
            for name, checkpointing in (("PEFT", False), ("PEFT, gradient checkpointing", True))
        }
    sides: dict[str, Any] = {name: (side, theirs) for name, side in peft.items()}
    sides["ours"] = Ours(new_model(geometry), rows, length, args.devices), packed
    if args.devices > 1 and args.one:
        sides["ours, one device"] = Ours(new_model(geometry), rows, length, 1), packed
    losses = {name: side(batch) for name, (side, batch) in sides.items()}
    apart = max(losses.values()) - min(losses.values())
    if apart > 1e-4:
        raise SystemExit(f"the losses differ by {apart:.1e}: {losses}")
    found = alternated({name: lambda s=side, b=batch: s(b) for name, (side, batch) in sides.items()}, args.repeat)
    return {"losses": losses, "records": len(examples), "shape": f"{rows} x {length}",
            "padded": f"{theirs[0].shape[0]} x {theirs[0].shape[1]}", "sides": found}  # fmt: skip


def dense(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    examples = random_rows(args.rows, args.length, geometry["vocab_size"])
    return against_peft(args, geometry, examples, padded(examples, args.length, args.length - 1))


def one_pack(args: argparse.Namespace) -> tuple[list[Example], Batch]:
    """``--records`` records, all of them in one batch of rows."""
    examples = records(args)
    settings: dict[str, Any] = {"sequence_length": args.sequence, "targets_per_row": None, "seed": 0}
    rows = PackedBatches(examples, rows=1, **settings).lengths.rows
    rows += -rows % args.devices
    return examples, next(iter(PackedBatches(examples, rows=rows, **settings)))


def mix(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    return against_peft(args, geometry, *one_pack(args))


def packing(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    examples, packed = one_pack(args)
    longest, most = (max(len(item[key]) for item in examples) for key in ("tokens", "target_ids"))
    longest += -longest % 8
    loose = padded(examples, longest, most)
    sides = {"one record per row": loose, "packed": packed}
    steps = {name: Ours(new_model(geometry), len(batch["tokens"]), batch["tokens"].shape[1], args.devices)
             for name, batch in sides.items()}  # fmt: skip
    memory = {name: steps[name].memory(batch) for name, batch in sides.items()}
    found = alternated({name: lambda n=name, b=batch: steps[n](b) for name, batch in sides.items()}, args.repeat)
    return {name: found[name] | {"mib": memory[name] / 2**20, "tokens": sides[name]["tokens"].size} for name in sides}


def loss(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    """Loss and gradient of the adapter; a third of the tokens are answers, as in instruction data."""
    model = new_model({**geometry, "vocab_size": args.vocabulary})
    graph, train, frozen = nnx.split(model, nnx.filterlib.to_predicate(lambda path, _: path[-1] in ("a", "b")), ...)
    examples = random_rows(args.rows, args.length, args.vocabulary, 1 / 3)
    batch: Any = padded(examples, args.length, max(len(item["target_ids"]) for item in examples))

    def chunked(train: Any) -> jax.Array:
        sums = answer_loss(nnx.merge(graph, train, frozen), batch, chunk=64)
        return sums.nll / sums.weight

    def naive(train: Any) -> jax.Array:
        logits = nnx.merge(graph, train, frozen)(batch["tokens"], batch["positions"], batch["segment_ids"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(batch["tokens"], -1, 1)[..., None], axis=-1)
        targets = np.zeros(batch["tokens"].shape, np.float32)
        np.put_along_axis(targets, batch["target_index"], batch["target_weights"], axis=1)
        return -(chosen[..., 0] * targets).sum() / targets.sum()

    programs = {name: jax.jit(jax.value_and_grad(f)).lower(train).compile()
                for name, f in (("all logits", naive), ("chunked, answers only", chunked))}  # fmt: skip
    values = {name: float(program(train)[0]) for name, program in programs.items()}
    if abs(values["all logits"] - values["chunked, answers only"]) > 1e-5:
        raise SystemExit(f"the losses differ: {values}")
    found = alternated({name: lambda p=p: jax.block_until_ready(p(train)) for name, p in programs.items()}, args.repeat)
    memory = {name: cast(Any, p.memory_analysis()).temp_size_in_bytes / 2**20 for name, p in programs.items()}
    return {name: found[name] | {"mib": memory[name], "loss": values[name]} for name in programs}


def growth(args: argparse.Namespace, geometry: dict[str, Any], cases: dict[str, tuple[int, int]]) -> Any:
    """Time and memory of our step on one device for (length, rank); full remat. Too large for ``--memory``: not run."""
    found: dict[str, Any] = {}
    for name, (length, rank) in cases.items():
        step = Ours(new_model(geometry, rank, "full"), 1, length, 1)
        batch = padded(random_rows(1, length, geometry["vocab_size"], 1 / 3), length, length)
        found[name] = {"mib": step.memory(batch) / 2**20}
        if found[name]["mib"] < args.memory:
            found[name] |= alternated({"": lambda s=step, b=batch: s(b)}, min(args.repeat, 3))[""]
    return found


def length(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    return growth(args, geometry, {f"length {n}": (n, 16) for n in args.lengths})


def rank(args: argparse.Namespace, geometry: dict[str, Any]) -> Any:
    return growth(args, geometry, {f"rank {n}": (args.length, n) for n in (4, 16, 64, 256)})


def table(part: str, found: dict[str, Any]) -> str:
    """Markdown."""
    lines, rows = [f"\n{part}"], found.get("sides", found)
    if "sides" in found:
        lines.append(f"{found['records']} records; ours {found['shape']}, PEFT {found['padded']}; losses before the "
                     f"first update {', '.join(f'{name} {x:.6f}' for name, x in found['losses'].items())}")  # fmt: skip
    lines += ["", "| | s | processor s | ratio | ratio of processor time | temporary MiB |", f"|{'---|' * 6}"]
    for name, row in rows.items():
        cells = (row.get("seconds"), row.get("processor"), row.get("ratio"), row.get("processor_ratio"), row.get("mib"))
        lines.append(f"| {name} | {' | '.join('–' if x is None else f'{x:.3f}' for x in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our training step against PEFT on transformers.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeat", type=int, default=7, help="rounds that count")
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of ours (mesh.cpu_devices); 1 is plain")
    parser.add_argument("--one", action="store_true", help="ours on one CPU device beside it")
    parser.add_argument("--rows", type=int, default=4, help="rows of dense and loss")
    parser.add_argument("--length", type=int, default=256, help="their tokens per row")
    parser.add_argument("--records", type=int, default=24, help="records of mix and packing")
    parser.add_argument("--data", type=Path, help="folder of the upstream data sets; default: the synthetic corpus")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of records")
    parser.add_argument("--vocabulary", type=int, default=32768, help="of loss")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--memory", type=float, default=4096, help="MiB a program of length and rank may take to run")
    parser.add_argument("--small", action="store_true", help="a tiny model: is everything in order?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # PyTorch's threads spin while they wait: if others want the cores, that made its step ten times slower.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        os.execve(sys.executable, [sys.executable, "-P", *sys.argv], environment)
    split_cpu(args.devices)
    geometry = GEOMETRY | (SMALL if args.small else {})
    parameters = parameter_count(nnx.eval_shape(lambda: Glm(GlmConfig(**geometry), rngs=nnx.Rngs(0))))
    result: dict[str, Any] = {"parameters": parameters, "devices": args.devices}
    for part in args.parts:
        result[part] = globals()[part](args, geometry)
        if not args.json:
            print(table(part, result[part]), flush=True)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
