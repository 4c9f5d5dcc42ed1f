"""``reference_logits.npz``: what JAX computed with an export, so that ``probes verify`` can compare without JAX."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mentalglm_jax.devices.distributed import on_host, placed
from mentalglm_jax.devices.together import on_primary
from mentalglm_jax.files import write_bytes
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import BATCH_AXES, on_mesh
from mentalglm_jax.model.sharding import mesh_of
from mentalglm_jax.text.tokenizer import GlmTokenizer


def write_reference(path: Path, model: Glm, texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]],
                    greedy: Sequence[Sequence[int]], tokenizer: GlmTokenizer) -> None:  # fmt: skip
    """What JAX saw, for ``probes verify``: float32 logits [N, S, V] of right-padded ``tokens``, greedy answers."""
    tokens = _padded(texts, tokenizer.pad_id)
    lengths = np.asarray([len(text) for text in texts], np.int32)
    segments = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    logits = _logits(model, tokens, segments)
    buffer = io.BytesIO()
    np.savez(
        buffer, tokens=tokens, lengths=lengths, logits=logits, prompt_ids=_padded(prompts, tokenizer.pad_id),
        prompt_lengths=np.asarray([len(p) for p in prompts], np.int32), greedy_ids=_padded(greedy, -1),
        eos_ids=np.asarray(tokenizer.eos_ids, np.int32),
    )  # fmt: skip
    on_primary(lambda: write_bytes(path, buffer.getvalue(), private=True))  # token ids are posts


def _logits(model: Glm, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[N, S, V], whole on this host; on a mesh with rows and positions spread as in training."""
    graph, state = nnx.split(model)
    mesh, rows = mesh_of(model), len(tokens)

    @jax.jit
    def compute(state: nnx.State, tokens: Any, segments: Any) -> Any:
        with on_mesh(mesh):
            return nnx.merge(graph, state)(tokens, None, segments)

    if mesh is not None:
        spare = [(0, -rows % (mesh.shape["data"] * mesh.shape["fsdp"])), (0, 0)]
        tokens, segments = placed((np.pad(tokens, spare), np.pad(segments, spare)), mesh, BATCH_AXES)
    return on_host(compute(state, tokens, segments))[:rows]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
