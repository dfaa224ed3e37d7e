r"""Optimal Brain Surgeon in the order of a layer's input features, with lazy block updates.

SparseGPT takes $H^{-1} = U^T U$ with $U$ upper triangular, and after feature $j$ changes by
$e_j U_{jj}$ moves the features $i > j$ by $-U_{ji} e_j$. Its $U$ is the inverse of $M$ in
$H = M M^T$, $M$ upper triangular, and with $\delta = W - \hat W$ the errors are
$e = M^T \delta$. So no inverse is needed: with the features $P$ before a block $b$ done, the best
values of its features are

$$W_b + M_{bb}^{-T} M_{Pb}^T \delta_P,$$

one product a block. Inside a block the same holds with $M_{bb}$ in place of $M$, so that the sweep
is its own inner loop. $M$ is a Cholesky factor: with $J$ the reversal of the features and
$J H J = C C^T$, $M = J C J$.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.pruning.layerwise._choice import below_rank, lowest

_INNER = 16  # features done one by one before a product moves the rest of their block

# (values of a block, diagonal of its factor, pruned beforehand, number) -> pruned
Choose = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@jax.jit
def upper_factor(gram: jax.Array) -> jax.Array:
    """$M$ with $H = M M^T$, upper triangular; NaN where $H$ is not positive definite."""
    return jax.lax.linalg.cholesky(gram[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def swept(
    weights: jax.Array,
    factor: jax.Array,
    pruned: jax.Array,
    *,
    counts: np.ndarray | None = None,
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """The weights after a sweep over the features, and which of them are pruned.

    Args:
      weights: of shape (features, outputs).
      factor: $M$ of `upper_factor`.
      pruned: the weights that are pruned in any case, of the same shape as ``weights``.
      counts: how many weights each block prunes, chosen when the sweep reaches it.
      n_of_m: how many of each group of consecutive features are kept, chosen at the group's start.
        With neither ``counts`` nor ``n_of_m``, ``pruned`` alone is pruned.
      block_size: how many features are done before a product moves all later ones.

    Returns:
      The pair of new weights and pruned ones.
    """
    size = len(weights)
    group = n_of_m[1] if n_of_m else 1
    block = group * math.ceil(min(block_size, size) / group)
    margin = -size % block
    weights = jnp.pad(weights, [(0, margin), (0, 0)])
    pruned = jnp.pad(pruned, [(0, margin), (0, 0)])
    factor = jnp.pad(factor, (0, margin)) + jnp.diag(
        (jnp.arange(size + margin) >= size).astype(factor.dtype)
    )
    per_block = None if counts is None else jnp.asarray(counts)
    new, chosen = _swept(weights, factor, pruned, per_block, size, n_of_m, block)
    return new[:size], chosen[:size]


@functools.partial(jax.jit, static_argnames=("size", "n_of_m", "block"))
def _swept(
    weights: jax.Array,
    factor: jax.Array,
    pruned: jax.Array,
    counts: jax.Array | None,
    size: int,
    n_of_m: tuple[int, int] | None,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    outer: Choose | None = None
    inner: Choose | None = None
    if n_of_m:
        inner = functools.partial(_choose_n_of_m, n_of_m)
    elif counts is not None:
        outer = functools.partial(_choose_lowest, counts, size)
    step = n_of_m[1] if n_of_m else math.gcd(block, _INNER)
    return _sweep(((block, outer), (step, inner), (1, None)), weights, factor, pruned)


def _sweep(
    levels: tuple[tuple[int, Choose | None], ...],
    weights: jax.Array,
    factor: jax.Array,
    pruned: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A sweep by blocks of the first level's size, each of them by those of the next."""
    if not levels:
        return jnp.where(pruned, 0, weights), pruned
    (size, choose), *deeper = levels

    def one_block(number: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        change, pruned = carry
        first = number * size
        columns = jax.lax.dynamic_slice_in_dim(factor, first, size, axis=1)
        corner = jax.lax.dynamic_slice_in_dim(columns, first, size)
        before = jax.lax.dynamic_slice_in_dim(weights, first, size)
        flags = jax.lax.dynamic_slice_in_dim(pruned, first, size)
        # Changes of this block and later ones are still zero.
        values = before + _solved(corner, _product(columns.T, change))
        if choose is not None:
            flags = choose(values, jnp.diagonal(corner), flags, number)
        after, flags = _sweep(tuple(deeper), values, corner, flags)
        change = jax.lax.dynamic_update_slice_in_dim(change, before - after, first, axis=0)
        return change, jax.lax.dynamic_update_slice_in_dim(pruned, flags, first, axis=0)

    start = (jnp.zeros_like(weights), pruned)
    change, pruned = jax.lax.fori_loop(0, len(weights) // size, one_block, start)
    return jnp.where(pruned, 0, weights - change), pruned


def _solved(corner: jax.Array, right: jax.Array) -> jax.Array:
    """$M_{bb}^{-T}$ times the columns of ``right``."""
    if len(corner) == 1:
        return right / corner
    identity = jnp.eye(len(corner), dtype=corner.dtype)
    # The inverse of the small corner, then a product: a substitution of all outputs is slower.
    inverse = jax.lax.linalg.triangular_solve(corner, identity, left_side=True, lower=False)
    return _product(inverse.T, right)


def _choose_lowest(
    counts: jax.Array,
    size: int,
    values: jax.Array,
    diagonal: jax.Array,
    pruned: jax.Array,
    number: jax.Array,
) -> jax.Array:
    """The lowest of a block of features, over all outputs together."""
    scores = _scores(values, diagonal, pruned)
    padding = number * len(values) + jnp.arange(len(values)) >= size
    scores = jnp.where(padding[:, jnp.newaxis], jnp.inf, scores)
    return lowest(scores.reshape(-1), counts[number]).reshape(scores.shape)


def _choose_n_of_m(
    n_of_m: tuple[int, int],
    values: jax.Array,
    diagonal: jax.Array,
    pruned: jax.Array,
    number: jax.Array,
) -> jax.Array:
    """The lowest $m - n$ of a group, for each output."""
    del number
    kept, length = n_of_m
    return pruned | below_rank(_scores(values, diagonal, pruned), length - kept)


def _scores(values: jax.Array, diagonal: jax.Array, pruned: jax.Array) -> jax.Array:
    r"""$w_j^2 / U_{jj}^2 = (w_j M_{jj})^2$, below all of them what is pruned already."""
    return jnp.where(pruned, -1, jnp.square(values * diagonal[:, jnp.newaxis]))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)
