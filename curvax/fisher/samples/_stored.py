"""Rows that are kept: the gradients of examples, weighted and centred."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from curvax._trees import Leaves
from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.samples._mesh import has_mesh, replicated
from curvax.fisher.samples._products import (
    products_with,
    products_with_themselves,
    products_with_vector,
)
from curvax.fisher.window._dense import leaf_combine


class Rows(Protocol):
    """What a natural gradient needs of the rows of $G$."""

    def gram_and_dots(self, vector: Leaves | None) -> tuple[jax.Array, jax.Array | None]:
        """$G G^T$, of shape (m, m), and $G v$, of shape (m,), if a vector is given."""

    def combine(self, weights: jax.Array) -> Leaves:
        """$G^T x$ for weights of shape (m,)."""


class StoredRows(NamedTuple):
    """Rows as arrays.

    Attributes:
      leaves: the real coordinates of the rows, of shape ``(m, *shape)`` each.
    """

    leaves: Leaves

    def gram_and_dots(self, vector: Leaves | None) -> tuple[jax.Array, jax.Array | None]:
        if has_mesh():
            products = products_with(self.leaves, replicated(self.leaves))
        else:
            products = products_with_themselves(self.leaves)
        return products, None if vector is None else products_with_vector(self.leaves, vector)

    def combine(self, weights: jax.Array) -> Leaves:
        return [leaf_combine(rows, weights, rows[0]) for rows in self.leaves]


def weighted_and_centered(
    rows: jax.Array, weights: jax.Array | None, *, centered: bool
) -> jax.Array:
    r"""Rows $\sqrt{w_i} (g_{ir} - \bar g_r)$ of gradients of shape ``(n, r, *shape)``."""
    if centered:
        rows = rows - _mean(rows, weights)
    if weights is None:
        return rows
    return jnp.sqrt(weights).astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)) * rows


def _mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    if has_mesh():
        return jnp.average(rows, axis=0, weights=weights)
    number = len(rows)
    shares = jnp.full(number, 1 / number) if weights is None else weights / jnp.sum(weights)
    # A product: XLA's CPU backend sums over the first axis many times slower.
    return jnp.tensordot(shares.astype(rows.dtype), rows, 1, precision=HIGHEST)


def stored_rows(
    leaves: Any, weights: jax.Array | None, *, centered: bool, dtype: Any
) -> StoredRows:
    """Rows of gradients whose coordinates have shape ``(n, r, *shape)``: r rows an example."""

    def prepared(rows: jax.Array) -> jax.Array:
        rows = weighted_and_centered(rows.astype(dtype), weights, centered=centered)
        return rows.reshape(-1, *rows.shape[2:])

    return StoredRows([prepared(rows) for rows in leaves])
