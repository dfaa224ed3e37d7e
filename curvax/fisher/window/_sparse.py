r"""The sliding window of sparse gradients: the largest entries of each block.

A row keeps the $k$ largest entries of each block of a leaf, as values and 16-bit positions; the
rest goes into the optimizer's error feedback, so that over time every entry counts. At a density of
1 % a gradient takes 0.06 bytes per entry instead of 4.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, Tree, named_leaves, shape_of
from curvax.fisher.window._blocks import Blocks
from curvax.fisher.window._chunks import Chunks, insert
from curvax.fisher.window._dense import (
    pairwise_sum,
    round_to,
    row_dtype,
    stacked_zeros,
    takes_part,
)


class SparseRow(NamedTuple):
    """The entries of one gradient: trees like params of shape ``(k, *grid)``."""

    values: PyTree
    positions: PyTree


class SparseWindow(NamedTuple):
    """The largest entries of every gradient, by blocks.

    Attributes:
      values: a tree like ``params`` with leaves of shape ``(k, *grid, m)``, where ``grid`` is
        the number of blocks along each axis of the leaf.
      positions: the same in int16, the position of each value in its block.
    """

    values: PyTree
    positions: PyTree

    @classmethod
    def empty(cls, params: PyTree, num_grads: int, dtype: Any | None, density: float) -> Self:
        """A window of zeros; in the params' dtypes, float32 or wider, if ``dtype`` is None."""
        for name, leaf in named_leaves(params):
            if takes_part(leaf):
                Blocks.of(shape_of(leaf)).check_devices(name, _sharding(leaf))

        def zeros(leaf: Any, of_dtype: Any) -> jax.Array:
            if not takes_part(leaf):
                return stacked_zeros(leaf, 0, of_dtype)
            blocks = Blocks.of(leaf.shape)
            # Made from the leaf, so that the rows have its sharding.
            block = blocks.split(jnp.zeros_like(leaf, dtype=of_dtype))[..., :1]
            shape = (kept_per_block(blocks, density), *blocks.grid, num_grads)
            return jnp.broadcast_to(block, shape)

        return cls(
            jax.tree.map(lambda leaf: zeros(leaf, row_dtype(leaf, dtype)), params),
            jax.tree.map(lambda leaf: zeros(leaf, jnp.int16), params),
        )

    def compress(self, grads: Tree, *, recall: float = 1.0) -> tuple[SparseRow, Tree]:
        """The row for ``grads``; below a ``recall`` of 1 TPUs may miss some of the largest."""
        leaves, treedef = jax.tree.flatten(grads)
        parts = [
            _largest(leaf, rows, recall) if rows.size else _empty_row(leaf, rows)
            for leaf, rows in zip(leaves, jax.tree.leaves(self.values), strict=True)
        ]
        values, positions, kept = (
            jax.tree.unflatten(treedef, [part[i] for part in parts]) for i in range(3)
        )
        return SparseRow(values, positions), kept

    def push(self, row: SparseRow, slot: jax.Array, accept: Any = True) -> Self:
        def push(rows: jax.Array, new: jax.Array) -> jax.Array:
            return insert(rows, new, slot, accept) if rows.size else rows

        return jax.tree.map(push, self, type(self)(*row))

    def dots(self, vector: PyTree, dtype: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(vector) if takes_part(leaf)]
        if not leaves:
            return jnp.zeros((), dtype)
        blocks = [Blocks.of(leaf.shape).split(leaf).astype(dtype) for leaf in leaves]
        return _dots(self._rows(), blocks)

    def combine(self, weights: jax.Array, like: Tree) -> Tree:
        leaves, treedef = jax.tree.flatten(like)
        wide = [jnp.zeros_like(leaf, dtype=weights.dtype) for leaf in leaves]
        pairs = zip(leaves, wide, strict=True)
        chosen = [zeros for leaf, zeros in pairs if takes_part(leaf)]
        layouts = [Blocks.of(leaf.shape) for leaf in chosen]
        zeros = [layout.split(leaf) for layout, leaf in zip(layouts, chosen, strict=True)]
        total = _combination(weights, self._rows(), zeros)
        joined = iter(layout.join(blocks) for layout, blocks in zip(layouts, total, strict=True))
        pairs = zip(leaves, wide, strict=True)
        combined = [next(joined) if takes_part(leaf) else zeros for leaf, zeros in pairs]
        return jax.tree.unflatten(treedef, combined)

    def _rows(self) -> list[Chunks]:
        pairs = zip(jax.tree.leaves(self.values), jax.tree.leaves(self.positions), strict=True)
        return [Chunks(values, positions) for values, positions in pairs if values.size]


@jax.jit
def _dots(rows: list[Chunks], vector: list[jax.Array]) -> jax.Array:
    """Products of the rows with a vector in blocks, of shape (m,)."""
    # Blocks are summed after the loops, so that devices communicate once, not once a chunk.
    sums = [_by_platform(_block_sums, *leaf) for leaf in zip(rows, vector, strict=True)]
    totals = [jnp.sum(leaf, axis=tuple(range(1, leaf.ndim - 1))) for leaf in sums]
    return rows[0].joined(pairwise_sum(jnp.stack(totals, axis=-1)))


@jax.jit
def _combination(weights: jax.Array, rows: list[Chunks], zeros: list[jax.Array]) -> list[jax.Array]:
    """The weighted sum of the rows, in blocks."""
    pairs = zip(rows, zeros, strict=True)
    return [_by_platform(_leaf_combination, *pair, weights) for pair in pairs]


def _by_platform(function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    return jax.lax.platform_dependent(
        *args,
        cpu=functools.partial(function, in_cache=True),
        default=functools.partial(function, in_cache=False),
    )


def _block_sums(rows: Chunks, blocks: jax.Array, *, in_cache: bool) -> jax.Array:
    """Products of the rows with each block, of shape ``(number, *grid, size)``."""

    def add(total: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
        return total + jnp.sum(values.astype(blocks.dtype) * _take(blocks, positions), axis=0)

    # Made from the rows, so that it has their sharding.
    zeros = jnp.zeros_like(rows.values[0, ..., : rows.size], dtype=blocks.dtype)

    def chunk_sums(index: jax.Array) -> jax.Array:
        return rows.accumulate(add, zeros, index, in_cache=in_cache)

    return jax.lax.map(chunk_sums, jnp.arange(rows.number))


def _leaf_combination(
    rows: Chunks, zeros: jax.Array, weights: jax.Array, *, in_cache: bool
) -> jax.Array:
    def add_chunk(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        weight = rows.weights(weights, index)

        def add(total: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
            return _add_at(total, positions, weight * values.astype(weight.dtype))

        return rows.accumulate(add, total, index, in_cache=in_cache), None

    return jax.lax.scan(add_chunk, zeros, jnp.arange(rows.number))[0]


def kept_per_block(blocks: Blocks, density: float) -> int:
    """The entries kept of each block: the density times its part of the leaf, at least one."""
    if density == 1:
        return blocks.size
    mean_size = math.prod(blocks.shape) / math.prod(blocks.grid)
    return max(1, math.floor(density * mean_size + 1e-9))


@functools.partial(jax.jit, static_argnums=2)
def _largest(
    grad: jax.Array, rows: jax.Array, recall: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest entries of each block, where they are, and the leaf that holds only them."""
    layout = Blocks.of(grad.shape)
    blocks = layout.split(grad)
    # With a recall of one this is the exact top-k, and unlike lax.top_k it gathers no shards.
    _, positions = jax.lax.approx_max_k(jnp.abs(blocks), len(rows), recall_target=recall)
    positions = jnp.moveaxis(positions, -1, 0)
    values = round_to(_take(blocks, positions), rows.dtype)
    kept = _add_at(jnp.zeros_like(blocks), positions, values.astype(blocks.dtype))
    return values, positions.astype(jnp.int16), layout.join(kept)


def _empty_row(grad: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for a leaf without gradients."""
    return rows, rows.astype(jnp.int16), jnp.zeros_like(grad)


def _sharding(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.typeof(leaf).sharding
    return getattr(leaf, "sharding", None)


# Positions have an axis of the entries of a block before the axes of blocks, and rows may follow.


def _take(blocks: jax.Array, positions: jax.Array) -> jax.Array:
    """The entries at positions of each block."""
    last = blocks.ndim - 1
    return jax.lax.gather(
        blocks,
        positions.astype(jnp.int32)[..., jnp.newaxis],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(last,),
            start_index_map=(last,),
            operand_batching_dims=tuple(range(last)),
            start_indices_batching_dims=tuple(range(1, last + 1)),
        ),
        slice_sizes=(1,) * blocks.ndim,
        mode="promise_in_bounds",
    )


def _add_at(blocks: jax.Array, positions: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values at positions of each block, distinct in a row."""
    last = blocks.ndim - 1
    return jax.lax.scatter_add(
        blocks,
        positions.astype(jnp.int32)[..., jnp.newaxis],
        values,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(last,),
            scatter_dims_to_operand_dims=(last,),
            operand_batching_dims=tuple(range(last)),
            scatter_indices_batching_dims=tuple(range(1, last + 1)),
        ),
        unique_indices=positions.ndim == blocks.ndim,
        mode="promise_in_bounds",
    )
