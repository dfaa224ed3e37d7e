"""Rows that are kept: the gradients of examples, weighted and centred."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from curvax._trees import Leaves
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
    if weights is None:
        return rows - jnp.mean(rows, axis=0) if centered else rows
    column = weights.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    if centered:
        rows = rows - jnp.sum(column * rows, axis=0) / jnp.sum(column)
    return jnp.sqrt(column) * rows


def stored_rows(
    leaves: Any, weights: jax.Array | None, *, centered: bool, dtype: Any
) -> StoredRows:
    """Rows of gradients whose coordinates have shape ``(n, r, *shape)``: r rows an example."""

    def prepared(rows: jax.Array) -> jax.Array:
        rows = weighted_and_centered(rows.astype(dtype), weights, centered=centered)
        return rows.reshape(-1, *rows.shape[2:])

    return StoredRows([prepared(rows) for rows in leaves])
