"""How well scores predict what models that are trained on other subsets of the data do."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from curvax.influence._results import InfluenceScores


class LinearDatamodelingScore(NamedTuple):
    """A linear datamodeling score.

    Attributes:
      value: the mean over test examples, from -1 to 1.
      standard_error: of that mean over test examples.
      per_test: the rank correlation of each test example, of shape (num_test,).
    """

    value: float
    standard_error: float
    per_test: np.ndarray


def linear_datamodeling_score(
    scores: InfluenceScores | ArrayLike, subsets: ArrayLike, outputs: ArrayLike
) -> LinearDatamodelingScore:
    r"""The rank correlation of predicted and measured outputs of models trained on subsets.

    A score $s_{ji}$ predicts that a model trained on the subset $S$ has the output
    $\sum_{i \in S} s_{ji}$ on test example $j$, up to a constant. The linear datamodeling score is
    Spearman's correlation of that with the measured output over the subsets, averaged over test
    examples. Seeds of training are noise: average outputs over several for each subset.

    Args:
      scores: of shape (num_test, num_train).
      subsets: of shape (num_subsets, num_train), bool: which examples each model was trained on.
      outputs: of shape (num_subsets, num_test): the measure of each model on each test example,
        with the sign that scores have, such as minus the loss.

    Returns:
      The score.

    Raises:
      ValueError: if shapes do not match, ``subsets`` is not bool, there are fewer than three
        subsets, or numbers are not finite.

    Example:
      >>> import numpy as np
      >>> from curvax import influence
      >>> scores = np.array([[3.0, 1.0, -2.0]])
      >>> subsets = np.eye(3) == 0  # each without one example
      >>> outputs = np.array([[-1.0], [2.0], [4.0]])
      >>> influence.linear_datamodeling_score(scores, subsets, outputs).value
      1.0

    References:
      Park et al., [TRAK: attributing model behavior at scale](https://arxiv.org/abs/2303.14186),
      2023, Definition 2.3.
    """
    given = scores.scores if isinstance(scores, InfluenceScores) else scores
    matrix, measured = (np.asarray(array, np.float64) for array in (given, outputs))
    chosen = np.asarray(subsets)
    _check(matrix, chosen, measured)
    predicted = _ranks(chosen.astype(np.float64) @ matrix.T)
    per_test = _correlations(predicted, _ranks(measured))
    error = np.std(per_test, ddof=1) / len(per_test) ** 0.5 if len(per_test) > 1 else np.nan
    return LinearDatamodelingScore(float(per_test.mean()), float(error), per_test)


def _check(scores: np.ndarray, subsets: np.ndarray, outputs: np.ndarray) -> None:
    if scores.ndim != 2 or subsets.ndim != 2 or subsets.shape[1] != scores.shape[-1]:
        raise ValueError(
            "scores must have shape (num_test, num_train) and subsets (num_subsets, num_train), "
            f"got {scores.shape} and {subsets.shape}."
        )
    if subsets.dtype != bool:
        raise ValueError(
            f"subsets must be bool, True where an example was trained on, got {subsets.dtype}: "
            "convert counts with subsets > 0."
        )
    if outputs.shape != (len(subsets), len(scores)) or len(subsets) < 3:
        raise ValueError(
            f"outputs must have shape (num_subsets, num_test) = ({len(subsets)}, {len(scores)}), "
            f"with at least three subsets, got {outputs.shape}."
        )
    if not (np.isfinite(scores).all() and np.isfinite(outputs).all()):
        raise ValueError("scores and outputs must be finite.")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each column, from 0; equal values share the mean of theirs."""
    ranks = np.empty_like(values)
    for column, target in zip(values.T, ranks.T, strict=True):
        _, places, counts = np.unique(column, return_inverse=True, return_counts=True)
        target[:] = (np.cumsum(counts) - (counts + 1) / 2)[places]
    return ranks


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each pair of columns; 0 where one is constant."""
    first, second = (x - x.mean(axis=0) for x in (first, second))
    lengths = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    products = np.sum(first * second, axis=0)
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
