r"""Scores of the alive weights: the predicted rise of the loss when one of them is pruned.

They are compared with each other only, so a factor that all have in common is left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import as_key
from curvax.pruning._fisher import Answer, ScaledRows, sums_of_squares
from curvax.pruning._greedy import greedy_scores
from curvax.pruning._options import Options
from curvax.pruning._weights import Weights


def model_free_scores(weights: Weights, options: Options, step: int) -> np.ndarray:
    """Scores that need no gradients: magnitudes, or random ones."""
    if options.method == "random":
        key = jax.random.fold_in(as_key(options.key), step)
        return np.asarray(jax.random.uniform(key, weights.alive.shape))[weights.alive]
    return np.square(weights.values[weights.alive], dtype=np.float64) / 2


def scores_of(
    values: np.ndarray, rows: ScaledRows, diagonal: Callable[[], Answer], options: Options
) -> np.ndarray:
    r"""Scores from gradients.

    Args:
      values: the alive weights.
      rows: $\hat G$ of `curvax.pruning._fisher`.
      diagonal: the diagonal of the inverse, when it is asked for.
      options: with the method.
    """
    if options.method == "greedy":
        return greedy_scores(rows, values, rows.block_size(options.block_size))
    squares = np.square(values, dtype=np.float64)  # wide: those of 1e-24 are zero in float32
    if options.method == "fisher":
        return squares * (1 + rows.map(sums_of_squares)) / 2
    if options.method == "saliency":
        return np.abs(values * rows.map(_sums))
    return squares / (2 * diagonal().vector)


def _sums(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, axis=0)
