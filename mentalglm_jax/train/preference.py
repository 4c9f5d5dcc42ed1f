"""Preference losses: of two answers to one prompt, the chosen one is made likelier than the rejected one.

Both are segments of one packed row, so that a pair never crosses devices. What the model said of them when the stage
began stands in the batch (``reference.py``): no second model is in memory. Adapter dropout is off, as the log-ratios
would measure it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field, model_validator

from mentalglm_jax.data.batches import Batch
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.settings import Settings
from mentalglm_jax.train.loss import answer_scores


class Objective(Settings):
    """What a preference stage minimises: the loss ``kind`` (``LOSSES``) over the pairs of the file ``pairs`` (see
    ``data.pairs``), and ``sft_weight`` times the negative log-likelihood per token of the chosen answers (None: 1 for
    orpo, whose paper has it, else 0). ``beta`` is the paper's: of dpo and ipo how strongly the model is held where the
    stage began, of orpo the weight of the odds ratio. ``label_smoothing`` is the share of pairs taken to be the wrong
    way round (dpo)."""

    kind: Literal["dpo", "ipo", "orpo"]
    pairs: Path
    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    sft_weight: Annotated[float, Field(ge=0, le=1000)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> "Objective":
        if self.label_smoothing and self.kind != "dpo":
            raise ValueError(f"label_smoothing is for kind: dpo; {self.kind} has none")
        return self

    @property
    def likelihood(self) -> float:
        """``sft_weight``, said or not."""
        return self.sft_weight if self.sft_weight is not None else float(self.kind == "orpo")


class Answers(NamedTuple):
    """Sums over the tokens of P pairs of answers a row, the chosen one first: log-probability (nats), the same less
    that at the stage's start, and number of tokens (at least 1)."""

    log_p: Float[Array, "B P 2"]
    ratio: Float[Array, "B P 2"]
    length: Float[Array, "B P 2"]


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """``reward`` is what the loss compares of the two answers, ``loss`` the loss of the difference of the rewards."""

    paper: str
    reward: Callable[[Objective, Answers], Float[Array, "B P 2"]]
    loss: Callable[[Objective, Float[Array, "B P"]], Float[Array, "B P"]]


def _log_odds(a: Answers) -> Float[Array, "B P 2"]:
    """Of the geometric mean of the tokens' probabilities; log(1 - p) by Mächler 2012."""
    log_p = jnp.minimum(a.log_p / a.length, -1e-6)
    near = log_p > -0.6931472
    rest = jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, log_p, -1.0))), jnp.log1p(-jnp.exp(log_p)))
    return log_p - rest


def _smoothed(o: Objective, gap: Float[Array, "B P"]) -> Float[Array, "B P"]:
    right, wrong = jax.nn.log_sigmoid(gap), jax.nn.log_sigmoid(-gap)
    return -(1 - o.label_smoothing) * right - o.label_smoothing * wrong


LOSSES: Mapping[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(
        "Rafailov et al. 2023, arXiv 2305.18290, eq. 7; smoothing: Mitchell 2023, a note on DPO with noisy preferences",
        lambda o, a: o.beta * a.ratio,
        _smoothed,
    ),
    "ipo": PreferenceLoss(
        "Azar et al. 2023, arXiv 2310.12036, eq. 17, with log-ratios per token as its authors ran it (said in TRL)",
        lambda o, a: a.ratio / a.length,
        lambda o, gap: (gap - 1 / (2 * o.beta)) ** 2,
    ),
    "orpo": PreferenceLoss(
        "Hong, Lee & Thorne 2024, arXiv 2403.07691, eq. 6 and 7; beta is its lambda",
        lambda o, a: _log_odds(a),
        lambda o, gap: -o.beta * jax.nn.log_sigmoid(gap),
    ),
}


class PreferenceSums(NamedTuple):
    """Sums over pairs, or tokens, that add up over micro-batches and devices; ``total`` over ``weight`` is the loss."""

    total: Float[Array, ""]
    weight: Float[Array, ""]  # pairs
    right: Float[Array, ""]
    margin: Float[Array, ""]
    targets: Float[Array, ""]
    kl: Float[Array, ""]
    nll: Float[Array, ""]  # of the chosen answers
    chosen: Float[Array, ""]  # their tokens

    def means(self) -> dict[str, Float[Array, ""]]:
        """What a step tells: ``loss``; ``accuracy``, the share of pairs whose chosen answer has the larger reward;
        ``margin``, the mean difference of the rewards; ``kl``, an estimate in nats per token of how far the model is
        from the stage's start; ``chosen_loss`` (nats per token); the mean lengths of the answers in tokens;
        ``targets``."""
        weight = jnp.maximum(self.weight, 1)
        return {
            "loss": self.total / weight,
            "accuracy": self.right / weight,
            "margin": self.margin / weight,
            "kl": self.kl / jnp.maximum(self.targets, 1),
            "chosen_loss": self.nll / jnp.maximum(self.chosen, 1),
            "chosen_length": self.chosen / weight,
            "rejected_length": (self.targets - self.chosen) / weight,
            "targets": self.targets,
        }


MEASURES = ("margin", "kl", "chosen_loss", "chosen_length", "rejected_length")  # beside those of every step


def pairs_per_token(batches: Mapping[str, Array]) -> Float[Array, ""]:
    """Pairs over tokens of chosen answers, of all micro-batches of a step."""
    tokens = (batches["target_weights"] * _is_chosen(batches["target_segments"])).sum()
    return batches["pair_weights"].sum() / jnp.maximum(tokens, 1)


def _is_chosen(segments: Array) -> Array:
    return (segments % 2 == 1).astype(jnp.float32)


def preference_loss(
    model: Glm, batch: Batch, objective: Objective, share: Float[Array, ""], *, chunk: int
) -> PreferenceSums:
    """The sums of one micro-batch.

    Args:
        model: the model as it is now.
        batch: packed rows of pairs, with the log-probabilities at the stage's start.
        objective: what is minimised.
        share: ``pairs_per_token`` of the whole step: a mean over tokens and one over pairs are added, and divided by
            the number of pairs once at the end.
        chunk: see ``loss.answer_loss``.
    """
    scores = answer_scores(model, batch, chunk=chunk)
    arrays: Mapping[str, Array] = {name: jnp.asarray(x) for name, x in batch.items()}
    weights, pairs, segments = (arrays[name] for name in ("target_weights", "pair_weights", "target_segments"))
    ratio = (scores.log_p - arrays["reference"]) * weights
    part = jax.nn.one_hot(segments - 1, 2 * pairs.shape[1], dtype=jnp.float32)  # an unused slot is of no answer

    def by_answer(x: Array) -> Array:
        return jnp.einsum("bm,bms->bs", x, part, precision=jax.lax.Precision.HIGHEST).reshape(*pairs.shape, 2)

    log_p = scores.log_p * weights
    answers = Answers(by_answer(log_p), by_answer(ratio), jnp.maximum(by_answer(weights), 1))
    table = LOSSES[objective.kind]
    reward = table.reward(objective, answers)
    gap = reward[..., 0] - reward[..., 1]
    chosen = _is_chosen(segments)
    nll = -(log_p * chosen).sum()
    total = (table.loss(objective, gap) * pairs).sum() + objective.likelihood * share * nll
    # Schulman 2020, "Approximating KL divergence", k3: never negative, and unbiased where the start model was sampled.
    kl = ((jnp.expm1(ratio) - ratio) * weights).sum()
    return PreferenceSums(total, pairs.sum(), ((gap > 0) * pairs).sum(), (gap * pairs).sum(), weights.sum(), kl, nll,
                          (weights * chosen).sum())  # fmt: skip
