"""Rotary frequencies, and what stretches them over a longer context than the model was trained on.

Each kind is what transformers calls its ``rope_type``, with the fields of its block in ``config.json``; the arithmetic
is rounded where ``transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`` rounds.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import Fields, short

MOST_POSITIONS = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """What all kinds share: ``factor`` is how much longer the context becomes."""

    KIND: ClassVar[str]
    factor: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name == "attention_factor" and value is None:
                continue
            if not (type(value) in (int, float) and 1e-30 < value < 1e30):
                raise InputError(
                    f"model config: {name} of a {self.KIND} rope must be a positive number, got {short(value)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(RopeScaling):
    """All frequencies divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595)."""

    KIND: ClassVar[str] = "linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are interpolated, cosines and sines get a factor."""

    KIND: ClassVar[str] = "yarn"
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
    """Llama 3.1's: wavelengths above context / ``low_freq_factor`` are divided by ``factor``, those below context /
    ``high_freq_factor`` are kept, between them it goes smoothly (Dubey et al. 2024, arXiv 2407.21783)."""

    KIND: ClassVar[str] = "llama3"
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"model config: high_freq_factor {self.high_freq_factor!r} of a llama3 rope must be above "
                f"low_freq_factor {self.low_freq_factor!r}"
            )


KINDS: dict[str, type[RopeScaling]] = {kind.KIND: kind for kind in (Linear, Yarn, Llama3)}


def read_scaling(rope: Mapping[str, Any], positions: int) -> RopeScaling | None:
    """The scaling that a rope block of ``config.json`` states; None is the plain rope.

    Args:
        rope: what ``spellings.rope_of`` found.
        positions: ``max_position_embeddings``, which the trained context is where the block does not say it.

    Raises:
        InputError: another kind, a missing number, or an option that is not supported.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"config.json: rope type {short(kind)} is not supported (default, {', '.join(KINDS)} are)")
    odd = [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    if odd := odd + ["truncate"] * (not rope.get("truncate", True)):
        raise InputError(f"config.json: rope_parameters: {odd[0]} {short(rope[odd[0]])} is not supported")
    read = Fields(rope, "config.json: rope_parameters")
    stated: dict[str, Any] = {}
    for field in dataclasses.fields(KINDS[kind]):
        if field.name == "original_max_position_embeddings":
            stated[field.name] = read.integer(field.name, 1, MOST_POSITIONS, positions)
        elif field.default is dataclasses.MISSING or rope.get(field.name) is not None:
            stated[field.name] = read.number(field.name, 0.0)
    return KINDS[kind](**stated)


def written(scaling: RopeScaling | None) -> dict[str, Any]:
    """The block that ``read_scaling`` reads back, without what is None."""
    if scaling is None:
        return {"rope_type": "default"}
    stated = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    return {"rope_type": scaling.KIND, **stated}


def rope_frequencies(size: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Radians per position ``[size / 2]`` in float32, and the factor of cosines and sines (1 without YaRN).

    On the host, rounded where HF rounds: a compiled float32 power is some ulp off, 0.002 rad at position 131,000.

    Args:
        size: how many dimensions of a head are rotated.
        theta: the base.
    """
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers = (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if isinstance(scaling, Linear):
        return frequencies / np.float32(scaling.factor), 1.0
    if isinstance(scaling, Llama3):
        return _llama3(frequencies, scaling), 1.0
    if isinstance(scaling, Yarn):
        return _yarn(powers, size, theta, scaling)
    return frequencies, 1.0


def _llama3(frequencies: np.ndarray, rope: Llama3) -> np.ndarray:
    one, factor, context = np.float32(1), np.float32(rope.factor), rope.original_max_position_embeddings
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    slow = wavelengths > np.float32(context / rope.low_freq_factor)
    fast = wavelengths < np.float32(context / rope.high_freq_factor)
    found = np.where(slow, frequencies / factor, frequencies)
    smooth = (one / wavelengths * np.float32(context) - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (one - smooth) * found / factor + smooth * found
    return np.where(~fast & ~slow, between, found)


def _yarn(powers: np.ndarray, size: int, theta: float, rope: Yarn) -> tuple[np.ndarray, float]:
    def dimension_of(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), size - 1)
    span = high - low or 0.001  # below 0 where a small base or swapped betas turn the ramp round, as in transformers
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(span)
    keep = 1 - np.clip(ramp, 0, 1)  # 1: fast pairs, as trained; 0: slow pairs, interpolated
    scale = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
    kept = np.float32(1) / powers
    return np.float32(1) / (np.float32(rope.factor) * powers) * (1 - keep) + kept * keep, scale
