"""Scores of generated answers: task metrics with confidence intervals, baselines to beat, checks of explanations.

``answers`` reads files so that gold and prediction cannot lose alignment; ``metrics`` and ``statistics`` are the
numbers; ``readings`` the label log-probabilities and their calibration; ``baselines`` the floors; ``explanations`` what
explanations quote, repeat and imply; ``scores`` puts them together; ``report`` shows them.
"""

from mentalglm_jax.evaluate.answers import read_generations, read_label_scores
from mentalglm_jax.evaluate.baselines import floors
from mentalglm_jax.evaluate.explanations import consistency, overlap, quotes
from mentalglm_jax.evaluate.readings import score_records
from mentalglm_jax.evaluate.scores import compare, evaluate
from mentalglm_jax.evaluate.tables import format_comparison, format_table

__all__ = [
    "compare",
    "consistency",
    "evaluate",
    "floors",
    "format_comparison",
    "format_table",
    "overlap",
    "quotes",
    "read_generations",
    "read_label_scores",
    "score_records",
]
