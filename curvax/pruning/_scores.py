r"""Scores of single weights: what the loss is expected to rise by when one of them goes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher import InverseFisher, inverse_fisher
from curvax.fisher._block_inverse import BlockInverse
from curvax.fisher._window import wide_dtype
from curvax.pruning._leaves import Leaf
from curvax.pruning._packing import Packing


class FisherOptions(NamedTuple):
    """How the Fisher matrix of the alive weights is damped, cut and spread."""

    damping: float
    block_size: int | None
    scope: str
    mesh: jax.sharding.Mesh | None

    def packing(self, leaves: Sequence[Leaf]) -> Packing:
        """Side by side where weights are gone, so that shapes vary; not if blocks are per leaf."""
        some_are_gone = any(len(leaf.alive) < math.prod(leaf.shape) for leaf in leaves)
        sizes = [len(leaf.alive) for leaf in leaves]
        return Packing.of(sizes, packed=some_are_gone and self.scope == "tree")

    def invert(self, columns: Sequence[Any]) -> InverseFisher:
        return inverse_fisher(
            list(columns),
            self.damping,
            block_size=self.block_size,
            scope=self.scope,
            mesh=self.mesh,
        )


def magnitude_scores(leaves: Sequence[Leaf]) -> list[np.ndarray]:
    """$w^2 / 2$: the Fisher matrix is taken to be the identity."""
    return [leaf.weights**2 / 2 for leaf in leaves]


def fisher_scores(
    leaves: Sequence[Leaf], columns: Sequence[Any], damping: float
) -> list[np.ndarray]:
    r"""$w^2 F_{ii} / 2$: the Fisher matrix is taken to be diagonal."""
    pairs = zip(leaves, columns, strict=True)
    return [leaf.weights**2 * (damping + _mean_of_squares(rows)) / 2 for leaf, rows in pairs]


def obs_scores(leaves: Sequence[Leaf], diagonal: Sequence[Any]) -> list[np.ndarray]:
    r"""Optimal Brain Surgeon's $w^2 / (2 [F^{-1}]_{ii})$: the others make up for the loss."""
    pairs = zip(leaves, diagonal, strict=True)
    return [leaf.weights**2 / (2 * np.asarray(entries)) for leaf, entries in pairs]


def greedy_scores(
    leaves: Sequence[Leaf], columns: Sequence[Any], options: FisherOptions
) -> list[np.ndarray]:
    r"""Scores of a removal one at a time, each block by itself, with updated saliencies.

    After the removal of $p$ the inverse is that of the rest,
    $F^{-1} - F^{-1} e_p e_p^T F^{-1} / [F^{-1}]_{pp}$, and the weights have moved by
    $-F^{-1} e_p w_p / [F^{-1}]_{pp}$. A weight's score is the largest saliency up to its turn,
    and a rounding unit more than that of the one before, so that a threshold on scores takes the
    first ones of each block.
    """
    packing = options.packing(leaves)
    all_weights = packing.pack([leaf.weights for leaf in leaves])
    all_columns = packing.pack(columns)
    scores: list[np.ndarray] = []
    for group in options.invert(all_columns).groups:
        inverse = group.inverse
        assert isinstance(inverse, BlockInverse)
        part = slice(group.first, group.stop)
        dtype = inverse.columns.dtype
        weights = [jnp.asarray(leaf, dtype) for leaf in all_weights[part]]
        squares = [jnp.asarray(_mean_of_squares(rows), dtype) for rows in all_columns[part]]
        batches = zip(
            inverse.in_blocks(weights),
            inverse.in_blocks(squares),
            inverse.inverse_blocks(),
            strict=True,
        )
        pieces = [_greedy(w, 1 / (options.damping + f), block) for w, f, block in batches]
        scores += [np.asarray(leaf) for leaf in inverse.from_blocks(pieces)]
    return packing.unpack(scores)


@jax.jit
def _greedy(weights: jax.Array, smallest: jax.Array, inverse: jax.Array) -> jax.Array:
    """Scores of each block: ``weights`` and ``smallest`` (n, B), ``inverse`` (n, B, B)."""
    blocks = jnp.arange(len(weights))

    def remove_one(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, inverse, alive, scores, highest = carry
        # The bound 1 / F_ii holds for what is left, too, whatever the rounding.
        diagonal = jnp.maximum(jnp.diagonal(inverse, axis1=1, axis2=2), smallest)
        saliency = jnp.where(alive, weights**2 / (2 * diagonal), jnp.inf)
        chosen = jnp.argmin(saliency, axis=1)
        highest = jnp.maximum(jnp.nextafter(highest, jnp.inf), saliency[blocks, chosen])
        scores = scores.at[blocks, chosen].set(highest)
        alive = alive.at[blocks, chosen].set(False)
        column = inverse[blocks, :, chosen]
        pivot = diagonal[blocks, chosen][:, jnp.newaxis]
        weights = weights - column * (weights[blocks, chosen][:, jnp.newaxis] / pivot)
        inverse = inverse - column[:, :, jnp.newaxis] * (column / pivot)[:, jnp.newaxis, :]
        return weights, inverse, alive, scores, highest

    start = (
        weights,
        inverse,
        jnp.ones(weights.shape, bool),
        jnp.zeros_like(weights),
        jnp.zeros_like(weights[:, 0]),
    )
    return jax.lax.fori_loop(0, weights.shape[1], remove_one, start)[3]


def _mean_of_squares(rows: Any) -> np.ndarray:
    dtype = wide_dtype(rows)
    if isinstance(rows, np.ndarray):
        return np.einsum("mi,mi->i", rows, rows, dtype=dtype) / len(rows)
    return np.asarray(jnp.mean(rows.astype(dtype) ** 2, axis=0))
