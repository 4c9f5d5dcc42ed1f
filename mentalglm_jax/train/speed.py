"""How fast a run goes, and how much of the hardware that is.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311) counts what the mathematics needs, not what the
program does: real tokens only (no padding), nothing that is computed twice (remat), and

* 4 FLOPs per matrix parameter and token where the base is frozen (2 forward, 2 for the gradient of the input), 6 where
  its own gradient is computed as well; the vocabulary projection at answer tokens only, where our loss needs it;
* half of causal attention: 12 H h FLOPs per visible query-key pair and layer (4 forward, 8 backward);
* adapters, norms and element-wise work are left out.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax

from mentalglm_jax.devices.hardware import chip_of
from mentalglm_jax.model.glm import GlmConfig


def matrix_parameters(config: GlmConfig) -> tuple[int, int]:
    """Parameters of the matrices that every token meets, and of the vocabulary projection."""
    size, heads = config.hidden_size, config.head_dim
    attention = size * heads * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * size * config.intermediate_size), size * config.vocab_size


def train_flops(config: GlmConfig, *, tokens: float, targets: float, pairs: float, frozen: bool) -> float:
    """FLOPs that training on these tokens needs, by the convention above.

    Args:
        config: the model.
        tokens: real ones.
        targets: answer tokens.
        pairs: visible query-key pairs: for a segment of n tokens n (n + 1) / 2.
        frozen: whether the base is.
    """
    body, head = matrix_parameters(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return (4 if frozen else 6) * (body * tokens + head * targets) + attention


def peak_flops() -> float | None:
    """FLOP/s of all devices of the run together in bfloat16; None for a device that is not in the table (a CPU)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops / chip.devices * jax.device_count()


@dataclasses.dataclass
class Speedometer:
    """Counts what steps did since the first one ended, which holds the compilation.

    Args:
        config: the model.
        frozen: whether the base is.
        peak: FLOP/s of all of them; None where it is not known.
    """

    config: GlmConfig
    frozen: bool
    peak: float | None
    tokens: float = 0.0
    targets: float = 0.0
    pairs: float = 0.0
    started: float | None = None
    paused: float = 0.0  # seconds that do not count: evaluation

    def count(self, tokens: float, targets: float, pairs: float) -> None:
        """One step is done; the first call starts the clock."""
        if self.started is None:
            self.started = time.perf_counter()
            return
        self.tokens, self.targets, self.pairs = self.tokens + tokens, self.targets + targets, self.pairs + pairs

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def rates(self) -> dict[str, float]:
        """``tokens_per_second`` (real ones), ``answer_tokens_per_second`` and, where the peak is known, ``mfu``."""
        passed = 0.0 if self.started is None else time.perf_counter() - self.started - self.paused
        seconds = max(passed, 1e-9)
        rates = {"tokens_per_second": self.tokens / seconds, "answer_tokens_per_second": self.targets / seconds}
        if self.peak is not None:
            flops = train_flops(self.config, tokens=self.tokens, targets=self.targets, pairs=self.pairs,
                                frozen=self.frozen)  # fmt: skip
            rates["mfu"] = flops / seconds / self.peak
        return rates

    def text(self) -> str:
        """The rates in one short line; nothing before there is something to say."""
        if not self.tokens:
            return ""
        rates = self.rates()
        mfu = f", MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        return f"{rates['tokens_per_second']:,.0f} tokens/s ({rates['answer_tokens_per_second']:,.0f} answer{mfu})"
