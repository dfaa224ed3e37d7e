"""The sparse rows of a leaf, read in chunks.

Positions are widened to 32 bits and values to float32 for a chunk of rows, never for the window,
and in large leaves for one entry of each block at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MOST_ROWS = 128  # a TPU reads as many at once
_MOST_ENTRIES = 2**21  # at once: 16 MB, and the indices that XLA makes


class Chunks(NamedTuple):
    """Rows in ``number`` chunks of ``size``; the last overlaps the one before if it must.

    Attributes:
      values: of shape ``(k, *grid, m)``.
      positions: the same.
    """

    values: jax.Array
    positions: jax.Array

    @property
    def size(self) -> int:
        return min(self._num_rows, _MOST_ROWS)

    @property
    def number(self) -> int:
        return -(-self._num_rows // self.size)

    @property
    def _num_rows(self) -> int:
        return self.values.shape[-1]

    def accumulate(
        self,
        add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        start: jax.Array,
        index: jax.Array,
        *,
        in_cache: bool,
    ) -> jax.Array:
        """``add(total, values, positions)`` over the entries of a chunk, from ``start``.

        One entry of each block at a time ``in_cache``, as CPUs like it, or if all are too many.
        """

        def add_slots(total: jax.Array, first: jax.Array | int, number: int) -> jax.Array:
            return add(total, *(self._read(leaf, first, number, index) for leaf in self))

        slots = len(self.values)
        if not in_cache and self.values.size // self._num_rows * self.size <= _MOST_ENTRIES:
            return add_slots(start, 0, slots)
        return jax.lax.fori_loop(0, slots, lambda slot, total: add_slots(total, slot, 1), start)

    def weights(self, weights: jax.Array, index: jax.Array) -> jax.Array:
        """The weights of a chunk's rows; zeros for rows that are also in the chunk before."""
        number = self._first_row(index) + jnp.arange(self.size)
        chosen = jax.lax.dynamic_slice_in_dim(weights, self._first_row(index), self.size)
        return jnp.where(number >= index * self.size, chosen, 0)

    def joined(self, results: jax.Array) -> jax.Array:
        """Results of shape ``(number, size)`` as one for each row."""
        overlap = self.number * self.size - self._num_rows
        return jnp.concatenate([results[:-1].ravel(), results[-1, overlap:]])

    def _read(
        self, leaf: jax.Array, first: jax.Array | int, number: int, index: jax.Array
    ) -> jax.Array:
        entries = jax.lax.dynamic_slice_in_dim(_as_bits(leaf), first, number)
        rows = jax.lax.dynamic_slice_in_dim(entries, self._first_row(index), self.size, axis=-1)
        return jax.lax.bitcast_convert_type(rows, leaf.dtype)

    def _first_row(self, index: jax.Array) -> jax.Array:
        return jnp.minimum(index * self.size, self._num_rows - self.size)


def insert(rows: jax.Array, row: jax.Array, slot: jax.Array, accept: Any) -> jax.Array:
    """The entries of rows, on the last axis, with ``row`` in ``slot`` if ``accept``, in place."""
    return jax.lax.platform_dependent(
        rows, row, slot, accept, cpu=_insert_in_conditional, default=_insert_in_chunk
    )


def _insert_in_conditional(
    rows: jax.Array, row: jax.Array, slot: jax.Array, accept: Any
) -> jax.Array:
    # Elsewhere than in a conditional XLA's CPU backend widens or copies rows of bfloat16.
    return jax.lax.cond(
        accept,
        lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, slot, axis=-1),
        lambda rows, _: rows,
        rows,
        row,
    )


def _insert_in_chunk(rows: jax.Array, row: jax.Array, slot: jax.Array, accept: Any) -> jax.Array:
    # For a single row TPUs would choose a layout that suits no reading, and copy all.
    size = min(rows.shape[-1], _MOST_ROWS)
    start = jnp.minimum(slot // size * size, rows.shape[-1] - size)
    old = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=-1)
    chosen = (start + jnp.arange(size) == slot) & accept
    chunk = jnp.where(chosen, row[..., jnp.newaxis], old)
    return jax.lax.dynamic_update_slice_in_dim(rows, chunk, start, axis=-1)


def _as_bits(leaf: jax.Array) -> jax.Array:
    """Bfloat16 as integers: XLA's CPU backend widens the rows of a loop all at once."""
    if leaf.dtype != jnp.bfloat16:
        return leaf
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16)
