r"""Exact updates of a layer: least squares for a given mask, and removals one at a time (OBC).

With $w$ the weights of an output unit and $S$ those that are kept, the least squares solution is
$H_{SS} v_S = (H w)_S$. It is found for all units together by conjugate gradients, whose products
are of $H$ with a matrix. OBC removes the weight with the lowest $w_p^2 / [H^{-1}]_{pp}$, moves the
others by $-H^{-1} e_p w_p / [H^{-1}]_{pp}$ and takes row and column $p$ out of $H^{-1}$.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST, inverse_factor

_WORKSPACE_BYTES = 2**28


class _Conjugate(NamedTuple):
    """The state of conjugate gradients, with a column for each output unit."""

    values: jax.Array
    residual: jax.Array
    direction: jax.Array
    product: jax.Array  # r^T D^-1 r, of shape (outputs,)
    number: jax.Array


@jax.jit
def least_squares(
    weights: jax.Array, gram: jax.Array, pruned: jax.Array, start: jax.Array
) -> jax.Array:
    """The kept weights that minimize $(w - v)^T H (w - v)$ for each output unit.

    Args:
      weights: the weights $w$ before pruning, of shape (features, outputs).
      gram: $H$.
      pruned: which of them are zero, of the same shape.
      start: a first guess, such as what a sweep has left.

    Returns:
      The weights $v$, to about the precision of the dtype.
    """
    size = len(weights)
    tolerance = float(jnp.finfo(weights.dtype).eps) ** 0.6  # 7e-5; the error goes with its square
    scale = 1 / jnp.diagonal(gram)[:, jnp.newaxis]

    def free(array: jax.Array) -> jax.Array:
        return jnp.where(pruned, 0, array)

    right = free(_product(gram, weights))
    bound = tolerance**2 * jnp.sum(right * right * scale, axis=0)

    def unfinished(state: _Conjugate) -> jax.Array:
        return jnp.any(state.product > bound) & (state.number < 2 * size)

    def improve(state: _Conjugate) -> _Conjugate:
        image = free(_product(gram, state.direction))
        step = _ratio(state.product, jnp.sum(state.direction * image, axis=0))
        values = state.values + step * state.direction
        residual = state.residual - step * image
        product = jnp.sum(residual * residual * scale, axis=0)
        direction = scale * residual + _ratio(product, state.product) * state.direction
        return _Conjugate(values, residual, direction, product, state.number + 1)

    values = free(start)
    residual = right - free(_product(gram, values))
    product = jnp.sum(residual * residual * scale, axis=0)
    first = _Conjugate(values, residual, scale * residual, product, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, improve, first).values


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """The quotient; 0 for an output unit that has converged exactly."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 0)


def removed_greedily(
    weights: jax.Array,
    gram: jax.Array,
    pruned: np.ndarray,
    target: int,
    n_of_m: tuple[int, int] | None,
) -> np.ndarray:
    """Which weights OBC removes, one at a time in each output unit.

    Without N:M, each unit's removals are followed to the end, and the layer takes those with the
    lowest rises of the error, in the order of each unit.

    Args:
      weights: of shape (features, outputs).
      gram: $H$.
      pruned: the weights that are removed first, of the same shape.
      target: how many weights of the layer are removed in the end.
      n_of_m: how many of each group of consecutive features are kept.

    Returns:
      The removed weights, of the same shape.
    """
    kept, length = n_of_m or (0, 1)
    steps = len(weights)
    if n_of_m:
        per_group = pruned.reshape(-1, length, pruned.shape[1]).sum(axis=1)
        steps = int(np.maximum(per_group, length - kept).sum(axis=0).max())
    at_once = max(1, _WORKSPACE_BYTES // (4 * gram.nbytes))
    scores, ranks = _traces(weights.T, gram, pruned.T, kept, length, steps, at_once)
    if n_of_m:
        removed_at = np.asarray(ranks).T
        return removed_at < steps
    order = np.lexsort((np.asarray(ranks).reshape(-1), np.asarray(scores).reshape(-1)))
    removed = np.zeros(len(order), bool)
    removed[order[: max(target, int(pruned.sum()))]] = True
    return removed.reshape(scores.shape).T


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _traces(
    rows: jax.Array,
    gram: jax.Array,
    pruned: jax.Array,
    kept: int,
    length: int,
    steps: int,
    at_once: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores of all weights and the step at which each is removed, of shape (outputs, features)."""
    factor = inverse_factor(gram)
    inverse = factor.backward(factor.matrix)
    smallest = 1 / jnp.diagonal(gram)

    def trace(unit: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = (
            unit[0],
            inverse,
            jnp.full(unit[0].shape, jnp.inf, unit[0].dtype),
            jnp.full(unit[0].shape, steps, jnp.int32),
            jnp.asarray(-1, unit[0].dtype),
        )
        remove = functools.partial(_remove, smallest, unit[1], kept, length, steps)
        return jax.lax.fori_loop(0, steps, remove, first)[2:4]

    return jax.lax.map(trace, (rows, pruned), batch_size=min(at_once, len(rows)))


def _remove(
    smallest: jax.Array,
    pruned: jax.Array,
    kept: int,
    length: int,
    steps: int,
    number: Any,
    carry: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """One removal; a score is the largest rise of the error so far."""
    weights, inverse, scores, ranks, highest = carry
    alive = ranks == steps
    left = jnp.sum(alive.reshape(-1, length), axis=1) > kept
    # The bound 1 / H_ii also holds for the features that are left.
    diagonal = jnp.maximum(jnp.diagonal(inverse), smallest)
    rises = jnp.where(jnp.repeat(left, length), jnp.square(weights) / diagonal, jnp.inf)
    rises = jnp.where(alive, jnp.where(pruned, -1, rises), jnp.inf)
    chosen = jnp.argmin(rises)
    valid = jnp.isfinite(rises[chosen])
    highest = jnp.where(valid, jnp.maximum(highest, rises[chosen]), highest)
    scores = scores.at[chosen].set(jnp.where(valid, highest, scores[chosen]))
    ranks = ranks.at[chosen].set(jnp.where(valid, number, ranks[chosen]))
    column = jnp.where(valid, inverse[chosen], 0) / diagonal[chosen]
    weights = weights - column * weights[chosen]
    inverse = inverse - column[:, jnp.newaxis] * inverse[chosen]
    return weights, inverse, scores, ranks, highest


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)
