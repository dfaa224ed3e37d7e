r"""The sliding window of sparse gradients: the largest entries of each block.

A row keeps the $k$ largest entries of each block of a leaf, as values and 16-bit positions; the
rest goes into the optimizer's error feedback, so that over time every entry counts. At a density of
1 % a gradient takes 0.06 bytes an entry instead of 4.

Rows are visited one after another in a loop: positions are widened to 32 bits for a single row
at a time, never for the window.
"""

import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, Tree
from curvax.fisher.window._blocks import Blocks
from curvax.fisher.window._dense import (
    insert_row,
    pairwise_sum,
    round_to,
    row_dtype,
    stacked_zeros,
    takes_part,
)

Pairs = list[tuple[jax.Array, jax.Array]]  # values and positions of each leaf


class SparseRow(NamedTuple):
    """The entries of one gradient: trees like params of shape ``(*grid, k)``."""

    values: PyTree
    positions: PyTree


class SparseWindow(NamedTuple):
    """The largest entries of every gradient, by blocks.

    Attributes:
      values: a tree like ``params`` with leaves of shape ``(m, *grid, k)``, where ``grid`` is
        the number of blocks along each axis of the leaf.
      positions: the same in int16, the position of each value in its block.
    """

    values: PyTree
    positions: PyTree

    @classmethod
    def empty(cls, params: PyTree, num_grads: int, dtype: Any | None, density: float) -> Self:
        """A window of zeros; in the params' dtypes, float32 or wider, if ``dtype`` is None."""

        def zeros(leaf: Any, of_dtype: Any) -> jax.Array:
            if not takes_part(leaf):
                return stacked_zeros(leaf, 0, of_dtype)
            blocks = Blocks.of(leaf.shape)
            kept = kept_per_block(blocks, density)
            # Made from the leaf, so that the rows have its sharding.
            row = blocks.split(jnp.zeros_like(leaf, dtype=of_dtype))[..., :kept]
            return jnp.broadcast_to(row, (num_grads, *row.shape))

        return cls(
            jax.tree.map(lambda leaf: zeros(leaf, row_dtype(leaf, dtype)), params),
            jax.tree.map(lambda leaf: zeros(leaf, jnp.int16), params),
        )

    def compress(self, grads: Tree) -> tuple[SparseRow, Tree]:
        leaves, treedef = jax.tree.flatten(grads)
        parts = [
            _largest(leaf, rows) if len(rows) else _empty_row(leaf, rows)
            for leaf, rows in zip(leaves, jax.tree.leaves(self.values), strict=True)
        ]
        values, positions, kept = (
            jax.tree.unflatten(treedef, [part[i] for part in parts]) for i in range(3)
        )
        return SparseRow(values, positions), kept

    def push(self, row: SparseRow, slot: jax.Array) -> Self:
        return type(self)(
            insert_row(self.values, row.values, slot),
            insert_row(self.positions, row.positions, slot),
        )

    def dots(self, vector: PyTree, dtype: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(vector) if takes_part(leaf)]
        if not leaves:
            return jnp.zeros((), dtype)
        blocks = [Blocks.of(leaf.shape).split(leaf).astype(dtype) for leaf in leaves]
        return _dots(self._pairs(), blocks)

    def combine(self, weights: jax.Array, like: Tree) -> Tree:
        leaves, treedef = jax.tree.flatten(like)
        chosen = [leaf for leaf in leaves if takes_part(leaf)]
        zeros = [
            Blocks.of(leaf.shape).split(jnp.zeros_like(leaf, dtype=weights.dtype))
            for leaf in chosen
        ]

        total = _combination(weights, self._pairs(), zeros)
        joined = iter(
            Blocks.of(leaf.shape).join(blocks) for leaf, blocks in zip(chosen, total, strict=True)
        )
        combined = [
            next(joined) if takes_part(leaf) else jnp.zeros_like(leaf, dtype=weights.dtype)
            for leaf in leaves
        ]
        return jax.tree.unflatten(treedef, combined)

    def _pairs(self) -> Pairs:
        pairs = zip(jax.tree.leaves(self.values), jax.tree.leaves(self.positions), strict=True)
        return [(values, positions) for values, positions in pairs if len(values)]


@jax.jit
def _dots(pairs: Pairs, blocks: list[jax.Array]) -> jax.Array:
    """Products of the rows with a vector in blocks, of shape (m,)."""
    dtypes = [values.dtype for values, _ in pairs]

    def block_sums(row: Pairs) -> list[jax.Array]:
        return [
            jnp.sum(_from_bits(bits, dtype, block.dtype) * _take(block, positions), axis=-1)
            for (bits, positions), block, dtype in zip(row, blocks, dtypes, strict=True)
        ]

    # Blocks are summed after the loop, so that devices communicate once, not once a row.
    sums = jax.lax.map(block_sums, _as_bits(pairs))
    totals = [jnp.sum(leaf, axis=tuple(range(1, leaf.ndim))) for leaf in sums]
    return pairwise_sum(jnp.stack(totals, axis=-1))


@jax.jit
def _combination(weights: jax.Array, pairs: Pairs, zeros: list[jax.Array]) -> list[jax.Array]:
    """The weighted sum of the rows, in blocks."""
    dtypes = [values.dtype for values, _ in pairs]

    def add(total: list[jax.Array], row: tuple[jax.Array, Pairs]) -> tuple[list[jax.Array], None]:
        weight, pairs = row
        return [
            _scatter_add(blocks, positions, weight * _from_bits(bits, dtype, weight.dtype))
            for blocks, (bits, positions), dtype in zip(total, pairs, dtypes, strict=True)
        ], None

    return jax.lax.scan(add, zeros, (weights, _as_bits(pairs)))[0]


def _as_bits(pairs: Pairs) -> Pairs:
    """Bfloat16 values as integers: XLA's CPU backend widens the rows of a loop all at once."""

    def bits(values: jax.Array) -> jax.Array:
        if values.dtype != jnp.bfloat16:
            return values
        return jax.lax.bitcast_convert_type(values, jnp.uint16)

    return [(bits(values), positions) for values, positions in pairs]


def _from_bits(bits: jax.Array, dtype: Any, wide: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype).astype(wide)


def kept_per_block(blocks: Blocks, density: float) -> int:
    """The entries kept of each block: the density times its part of the leaf, at least one."""
    if density == 1:
        return blocks.size
    mean_size = math.prod(blocks.shape) / math.prod(blocks.grid)
    return max(1, math.floor(density * mean_size + 1e-9))


@jax.jit
def _largest(grad: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest entries of each block, where they are, and the leaf that holds only them."""
    layout = Blocks.of(grad.shape)
    blocks = layout.split(grad)
    # With a recall of one this is the exact top-k, and unlike lax.top_k it gathers no shards.
    _, positions = jax.lax.approx_max_k(jnp.abs(blocks), rows.shape[-1], recall_target=1.0)
    values = round_to(_take(blocks, positions), rows.dtype)
    kept = _scatter_add(jnp.zeros_like(blocks), positions, values.astype(blocks.dtype))
    return values, positions.astype(jnp.int16), layout.join(kept)


def _empty_row(grad: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for a leaf without gradients."""
    return rows, rows.astype(jnp.int16), jnp.zeros_like(grad)


def _take(blocks: jax.Array, positions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(
        blocks, positions.astype(jnp.int32), axis=-1, mode="promise_in_bounds"
    )


def _scatter_add(blocks: jax.Array, positions: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values at distinct positions of each block."""
    last = blocks.ndim - 1
    batch = tuple(range(last))
    return jax.lax.scatter_add(
        blocks,
        positions.astype(jnp.int32)[..., jnp.newaxis],
        values,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(last,),
            scatter_dims_to_operand_dims=(last,),
            operand_batching_dims=batch,
            scatter_indices_batching_dims=batch,
        ),
        unique_indices=True,
        mode="promise_in_bounds",
    )
