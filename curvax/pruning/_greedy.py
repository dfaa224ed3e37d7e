r"""Scores of a greedy removal: one weight at a time in each block, with updated saliencies.

After the removal of $p$ the inverse of the rest is
$F^{-1} - F^{-1} e_p e_p^T F^{-1} / [F^{-1}]_{pp}$, and the weights have moved by
$-F^{-1} e_p w_p / [F^{-1}]_{pp}$. With fewer gradients than weights the first inverse has entries
of the order of $1 / \lambda$, the last ones of $1 / F_{ii}$: the digits lost in such differences
are restored by recomputing inverse and weights from the gradients a few times.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST, inverse_factor
from curvax.fisher.inverse._block_diagonal import shifted, squares_of_blocks
from curvax.pruning._fisher import ScaledRows, in_blocks

_NUM_INVERSES = 16


def greedy_scores(rows: ScaledRows, values: np.ndarray, block_size: int) -> np.ndarray:
    r"""Scores whose order in each block is the order of removal one at a time.

    A weight's score is the largest saliency so far, and at least an ulp more than the score before
    it, so that a threshold on scores removes the first weights of each block.
    """
    scores: np.ndarray = rows.map(in_blocks(_greedy, block_size), values)
    return scores


def _greedy(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Scores of each block: ``rows`` (n, m, B), ``weights`` (n, B)."""
    size = rows.shape[2]
    squares = squares_of_blocks(rows)
    smallest = 1 / (1 + jnp.diagonal(squares, axis1=1, axis2=2))
    number_at_once = -(-size // _NUM_INVERSES)

    def remove_several(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        alive, scores, highest = carry
        inverse, moved = _inverse_and_weights(rows, squares, weights, alive)
        carry = (moved, inverse, alive, scores, highest)
        remove_one = partial(_remove_one, smallest)
        return jax.lax.fori_loop(0, number_at_once, remove_one, carry)[2:]

    start = (jnp.ones(weights.shape, bool), jnp.zeros_like(weights), jnp.zeros_like(weights[:, 0]))
    return jax.lax.fori_loop(0, _NUM_INVERSES, remove_several, start)[1]


def _inverse_and_weights(
    rows: jax.Array, squares: jax.Array, weights: jax.Array, alive: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse over the alive weights, and their values after the removal of the others."""
    both = alive[:, :, jnp.newaxis] & alive[:, jnp.newaxis]
    factor = inverse_factor(shifted(jnp.where(both, squares, 0), 1.0))
    inverse = factor.backward(factor.matrix)
    target = jnp.einsum("nmb,nb->nm", rows, jnp.where(alive, 0, weights), precision=HIGHEST)
    right = jnp.where(alive, jnp.einsum("nmb,nm->nb", rows, target, precision=HIGHEST), 0)
    change = jnp.einsum("nij,nj->ni", inverse, right, precision=HIGHEST)
    return inverse, jnp.where(alive, weights + change, 0)


def _remove_one(smallest: jax.Array, _: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    weights, inverse, alive, scores, highest = carry
    blocks = jnp.arange(len(weights))
    # The bound 1 / F_ii also holds for the remaining weights.
    diagonal = jnp.maximum(jnp.diagonal(inverse, axis1=1, axis2=2), smallest)
    saliency = jnp.where(alive, weights**2 / (2 * diagonal), jnp.inf)
    chosen = jnp.argmin(saliency, axis=1)
    any_alive = alive[blocks, chosen]  # False in an exhausted block, whose choice is void
    highest = jnp.where(
        any_alive,
        jnp.maximum(jnp.nextafter(highest, jnp.inf), saliency[blocks, chosen]),
        highest,
    )
    scores = scores.at[blocks, chosen].set(jnp.where(any_alive, highest, scores[blocks, chosen]))
    alive = alive.at[blocks, chosen].set(False)
    column = inverse[blocks, :, chosen]
    pivot = diagonal[blocks, chosen][:, jnp.newaxis]
    weights = weights - column * (weights[blocks, chosen][:, jnp.newaxis] / pivot)
    inverse = inverse - column[:, :, jnp.newaxis] * (column / pivot)[:, jnp.newaxis, :]
    return weights, inverse, alive, scores, highest
