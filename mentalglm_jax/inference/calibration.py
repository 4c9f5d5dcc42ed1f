"""From scores of label sentences to odds and to probabilities, calibrated on held-out answers. Needs no JAX."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from mentalglm_jax.errors import InputError


def log_odds(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """``log(p / (1 - p))`` of each candidate, p being its share of the probability of all K (at least 2)."""
    if scores.shape[1] < 2:
        raise InputError("log_odds: one candidate alone has no odds; score at least two")
    others = np.stack([_log_sum(np.delete(scores, k, axis=1)) for k in range(scores.shape[1])], axis=1)
    return scores - others


def _log_sum(scores: np.ndarray) -> np.ndarray:
    largest = scores.max(axis=1)
    return largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Candidate scores to probabilities: ``softmax(scores / temperature + bias)``.

    A temperature undoes over-confidence (Guo et al. 2017, arXiv 1706.04599), a bias per label what the wording of its
    sentence is worth without the post (Zhao et al. 2021, arXiv 2102.09690). The default changes nothing.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()

    def probabilities(self, scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
        """Rows add up to 1.

        Raises:
            InputError: ``bias`` is for another number of candidates.
        """
        if self.bias and len(self.bias) != scores.shape[1]:
            raise InputError(f"calibration: fitted on {len(self.bias)} candidates, these scores have {scores.shape[1]}")
        logits = scores / self.temperature + np.asarray(self.bias or 0.0)
        return np.exp(logits - _log_sum(logits)[:, None])


def fit_calibration(
    scores: Float[np.ndarray, "N K"], truth: Int[np.ndarray, " M"], *, bias: bool = True
) -> Calibration:
    """The ``Calibration`` with the least mean negative log-likelihood of ``truth`` (indices of the true candidates).

    The bias is pulled towards 0 as by one observation per candidate, so that a label that never occurs keeps a finite
    one. Fit on records that no result is reported on.

    Args:
        bias: fit one per candidate too, not the temperature alone.

    Raises:
        InputError: no rows, or an index that is no candidate.
    """
    from scipy.optimize import minimize

    count, labels = scores.shape
    if count == 0 or len(truth) != count or not 0 <= truth.min() <= truth.max() < labels:
        raise InputError(f"fit_calibration: needs one true candidate (0..{labels - 1}) for each of at least one row")

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        inverse, shift = np.exp(-x[0]), x[1:] if bias else np.zeros(labels)
        logits = scores * inverse + shift
        probabilities = np.exp(logits - _log_sum(logits)[:, None])
        error = probabilities - np.eye(labels)[truth]
        nll = -(logits[np.arange(count), truth] - _log_sum(logits)).sum() + 0.5 * (shift**2).sum()
        slope = np.concatenate([[-(error * scores).sum() * inverse], error.sum(axis=0) + shift if bias else []])
        return nll / count, slope / count

    start = np.zeros(1 + labels * bias)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(-7, 7)] + [(-50, 50)] * (labels * bias)).x
    return Calibration(float(np.exp(found[0])), tuple(map(float, found[1:])))


def fit_pairs(odds: Float[np.ndarray, "N K"], present: Bool[np.ndarray, "N K"]) -> tuple[float, float]:
    """Temperature and bias with the least mean negative log-likelihood of ``present``, each (row, candidate) pair for
    itself: the probability of a pair is ``sigmoid(odds / temperature + bias)`` (Platt 1999).

    Both are kept finite by one pair more of either outcome, at odds 0. Fit on records that no result is reported on.

    Raises:
        InputError: no pairs.
    """
    from scipy.optimize import minimize

    if odds.size == 0:
        raise InputError("fit_pairs: no pair to fit on; give at least one")
    x = np.concatenate([odds.ravel(), [0.0, 0.0]])
    sign = np.where(np.concatenate([present.ravel(), [True, False]]), 1.0, -1.0)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        inverse = np.exp(-at[0])
        margin = sign * (x * inverse + at[1])
        wrong = -sign * np.exp(-np.logaddexp(0, margin))  # slope of the loss, of each pair's logit
        return np.logaddexp(0, -margin).mean(), np.array([-(wrong * x).mean() * inverse, wrong.mean()])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-7, 7), (-50, 50)]).x
    return float(np.exp(found[0])), float(found[1])
