"""Which weights are pruned: those of lowest score in a layer, an output, a block, a group."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def block_counts(pruned: np.ndarray, target: int, block_size: int) -> np.ndarray:
    """How many weights each block of features prunes, the same share of its alive ones.

    Args:
      pruned: the weights pruned beforehand, of shape (features, outputs).
      target: how many weights are pruned in the end.
      block_size: the features of a block.

    Returns:
      A count for each block; they sum to ``target``, or to what is pruned already if that is more.
    """
    edges = [*range(0, len(pruned), block_size), len(pruned)]
    cumulated = np.concatenate([[0], np.cumsum(pruned.sum(axis=1, dtype=np.int64))])
    done = cumulated[edges]
    alive = np.asarray(edges) * pruned.shape[1] - done
    more = max(target - int(done[-1]), 0)
    shares = [round(more * (int(part) / max(int(alive[-1]), 1))) for part in alive]
    return np.diff(done + np.asarray(shares)).astype(np.int32)


def chosen_by_scores(
    scores: np.ndarray,
    pruned: np.ndarray,
    target: int,
    n_of_m: tuple[int, int] | None,
    *,
    per_output: bool,
) -> np.ndarray:
    """The weights of lowest score, of shape (features, outputs).

    Args:
      scores: of shape (features, outputs).
      pruned: the weights pruned beforehand, which are chosen in any case.
      target: how many weights are pruned in the end.
      n_of_m: how many of each group of consecutive features are kept, whatever ``target``.
      per_output: whether each output prunes the same share, or the layer its lowest weights.

    Returns:
      Which weights are pruned.
    """
    scores = np.where(pruned, -1, scores)
    if n_of_m:
        kept, length = n_of_m
        groups = scores.reshape(-1, length, scores.shape[1])
        return pruned | _lowest_of_rows(groups, np.asarray(length - kept)).reshape(scores.shape)
    if not per_output:
        count = max(target, int(pruned.sum()))
        return _lowest_of_rows(scores.reshape(-1, 1), np.asarray(count)).reshape(scores.shape)
    return _lowest_of_rows(scores, block_counts(pruned.T, target, 1))


def _lowest_of_rows(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether an entry is one of the lowest along the axis before the last."""
    order = np.argsort(scores, axis=-2, kind="stable")
    first = np.arange(scores.shape[-2])[:, np.newaxis] < counts
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, np.broadcast_to(first, order.shape), axis=-2)
    return chosen


def lowest(scores: jax.Array, count: Any) -> jax.Array:
    """Whether an entry of a vector is one of the ``count`` lowest; the first ones among equals."""
    order = jnp.argsort(scores)
    return jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(len(scores)) < count)


def below_rank(scores: jax.Array, count: int) -> jax.Array:
    """Whether an entry is one of the ``count`` lowest along the first axis, which is short."""
    number = jnp.arange(len(scores))
    other, this = scores[:, jnp.newaxis], scores[jnp.newaxis]
    earlier = (number[:, jnp.newaxis] < number)[(..., *(jnp.newaxis,) * (scores.ndim - 1))]
    rank = jnp.sum((other < this) | ((other == this) & earlier), axis=0)
    return rank < count
