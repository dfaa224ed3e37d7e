"""A window's rows as one matrix of shape (m, d) that is never built: columns on demand.

Columns are numbered as ``jax.flatten_util.ravel_pytree`` numbers the entries of a tree. Leaves of
NumPy, memory maps among them, stay where they are; only the columns asked for reach a device.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher.window._dense import replicated


class Columns:
    """The leaves of a tree of rows, ``(m, *shape)`` each, side by side."""

    def __init__(self, leaves: Sequence[Any], dtype: Any) -> None:
        self.leaves = tuple(leaves)
        self.dtype = dtype
        self.shapes = [leaf.shape[1:] for leaf in leaves]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.starts = [0, *itertools.accumulate(self.sizes)]

    @property
    def num_rows(self) -> int:
        return len(self.leaves[0])

    @property
    def num_columns(self) -> int:
        return self.starts[-1]

    def take(self, start: int, size: int) -> jax.Array:
        """``size`` columns from ``start`` on, zeros past the last: shape (m, size)."""
        stop = min(start + size, self.num_columns)
        parts = []
        for leaf, first, length in zip(self.leaves, self.starts, self.sizes, strict=False):
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                parts.append(_slice(leaf, low, high - low).astype(self.dtype))
        margin = start + size - max(stop, start)
        if margin:
            parts.append(jnp.zeros((self.num_rows, margin), self.dtype))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def on_host(self) -> bool:
        """Whether the leaves are NumPy's."""
        return any(isinstance(leaf, np.ndarray) for leaf in self.leaves)

    def split(self, rows: jax.Array | np.ndarray) -> list[Any]:
        """The parts of ``rows``, of shape (k, d), that belong to each leaf."""
        pairs = zip(self.starts, self.sizes, self.shapes, strict=False)
        return [
            rows[:, start : start + size].reshape(len(rows), *shape) for start, size, shape in pairs
        ]


def _slice(leaf: Any, start: int, size: int) -> jax.Array:
    if isinstance(leaf, np.ndarray):
        return jnp.asarray(leaf.reshape(len(leaf), -1)[:, start : start + size])
    return _device_slice(leaf, start, size)


@partial(jax.jit, static_argnums=2)
def _device_slice(leaf: jax.Array, start: jax.Array, size: int) -> jax.Array:
    sharding = replicated(leaf)
    if sharding is not None:  # an explicitly sharded leaf cannot be flattened as it is
        leaf = jax.sharding.reshard(leaf, sharding)
    return jax.lax.dynamic_slice_in_dim(leaf.reshape(len(leaf), -1), start, size, axis=1)
