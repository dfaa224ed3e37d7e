"""The rows of gradients as one matrix of shape (m, d) that is never built: columns on demand.

Columns are numbered as ``jax.flatten_util.ravel_pytree`` numbers the entries of a tree. Leaves of
NumPy, memory maps among them, stay where they are; only the columns asked for reach a device.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.window._dense import replicated


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes of leaves that lie side by side, and the dtype of what is computed with them."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype[Any]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)]

    @property
    def num_columns(self) -> int:
        return sum(self.sizes)

    def split(self, rows: jax.Array) -> list[jax.Array]:
        """The parts of ``rows``, of shape (..., d), that belong to each leaf."""
        triples = zip(self.starts, self.sizes, self.shapes, strict=False)
        return [
            rows[..., start : start + size].reshape(*rows.shape[:-1], *shape)
            for start, size, shape in triples
        ]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["centered", "stacked"],
)
@dataclasses.dataclass(frozen=True)
class Preparation:
    r"""What makes the rows of $G$ from gradients.

    Attributes:
      weights: $w$, of shape (m,): a row is $\sqrt{w_i} g_i$; None for ones.
      centered: whether the mean, weighted, is subtracted first.
      stacked: whether the imaginary parts follow the real ones as further rows.
    """

    weights: jax.Array | None = None
    centered: bool = False
    stacked: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether rows are the gradients as they are."""
        return self.weights is None and not self.centered and not self.stacked

    def rows(self, grads: jax.Array, dtype: Any) -> jax.Array:
        """The rows from gradients of shape (m, ...)."""
        rows = grads.astype(jnp.promote_types(dtype, jnp.complex64) if self.stacked else dtype)
        weights = self._weights(len(rows), dtype).reshape(-1, *[1] * (rows.ndim - 1))
        if self.centered:
            shares = (weights / jnp.sum(weights)).reshape(-1).astype(rows.dtype)
            # A product: XLA's CPU backend sums over the first axis many times slower.
            rows = rows - jnp.tensordot(shares, rows, 1, precision=HIGHEST)
        if self.weights is not None:
            rows = jnp.sqrt(weights) * rows
        return jnp.concatenate([jnp.real(rows), jnp.imag(rows)]) if self.stacked else rows

    def samples(self, values: jax.Array, dtype: Any) -> jax.Array:
        r"""Coefficients of the rows, from ones (k, m) of the weighted gradients."""
        if self.centered:
            # Their mean has no effect, but $K^{-1}$ multiplies it by $1 / (n \lambda)$, and then it
            # must cancel in $G^T x$.
            values = values - jnp.average(values, axis=1, weights=self.weights, keepdims=True)
        if self.weights is not None:
            values = values * jnp.sqrt(self._weights(len(self.weights), dtype))
        if self.stacked:
            values = jnp.concatenate([jnp.real(values), jnp.imag(values)], axis=-1)
        return values.astype(dtype)

    def _weights(self, number: int, dtype: Any) -> jax.Array:
        real = jnp.finfo(dtype).dtype
        return jnp.ones(number, real) if self.weights is None else self.weights.astype(real)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "preparation"],
    meta_fields=["dtype"],
)
@dataclasses.dataclass(frozen=True)
class Columns:
    """The leaves of a tree of gradients, ``(m, *shape)`` each, side by side."""

    leaves: tuple[Any, ...]
    dtype: np.dtype[Any]
    preparation: Preparation = Preparation()

    @property
    def layout(self) -> Layout:
        return Layout(tuple(tuple(leaf.shape[1:]) for leaf in self.leaves), self.dtype)

    @property
    def num_rows(self) -> int:
        return len(self.leaves[0]) * (2 if self.preparation.stacked else 1)

    @property
    def num_columns(self) -> int:
        return self.layout.num_columns

    @property
    def takes_complex_samples(self) -> bool:
        return self.preparation.stacked or np.issubdtype(self.dtype, np.complexfloating)

    def take(self, start: int, size: int) -> jax.Array:
        """``size`` columns from ``start`` on, zeros past the last: shape (m, size)."""
        layout = self.layout
        stop = min(start + size, layout.num_columns)
        parts = []
        for leaf, first, length in zip(self.leaves, layout.starts, layout.sizes, strict=False):
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                parts.append(self._prepared(_slice(leaf, low, high - low)))
        margin = start + size - max(stop, start)
        if margin:
            parts.append(jnp.zeros((self.num_rows, margin), self.dtype))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def parts(self, workspace_bytes: int) -> Iterator["Part"]:
        """All columns: a leaf on a device as a whole, a NumPy one some columns at a time."""
        width = max(1, workspace_bytes // (self.num_rows * self.dtype.itemsize))
        for index, leaf in enumerate(self.leaves):
            if not leaf.size:
                continue
            if not isinstance(leaf, np.ndarray):
                yield Part(index, None, self._prepared(leaf))
                continue
            flat = leaf.reshape(len(leaf), -1)
            for start in range(0, flat.shape[1], width):
                yield Part(
                    index, start, self._prepared(jnp.asarray(flat[:, start : start + width]))
                )

    def _prepared(self, grads: jax.Array) -> jax.Array:
        if self.preparation.is_plain:
            return grads.astype(self.dtype)
        return _prepare(self.preparation, grads, self.dtype)

    def on_host(self) -> bool:
        """Whether the leaves are NumPy's."""
        return any(isinstance(leaf, np.ndarray) for leaf in self.leaves)


class Part(NamedTuple):
    """Some columns of one leaf on the device; ``start`` is None where they are the whole leaf."""

    leaf: int
    start: int | None
    rows: jax.Array

    def of(self, vector: jax.Array) -> jax.Array:
        """The entries of a leaf's vector that belong to these columns."""
        if self.start is None:
            return vector
        return vector.reshape(-1)[self.start : self.start + self.rows.shape[1]]


@partial(jax.jit, static_argnames="dtype")
def _prepare(preparation: Preparation, grads: jax.Array, dtype: Any) -> jax.Array:
    return preparation.rows(grads, dtype)


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
