"""Rows of the Jacobian of examples' outputs at one point."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import Leaves
from curvax.curvature._batches import over_examples
from curvax.fisher.samples._mesh import sharded_like
from curvax.fisher.samples._stored import StoredRows, stored_rows


@dataclasses.dataclass(frozen=True)
class JacobianRows:
    r"""Rows $\sqrt{w_i}\,(b_{ir}^T J_i - \bar g_r)$ for n examples with k outputs and r rows each.

    Attributes:
      outputs: ``(point, examples) -> outputs``, real, of shape (n, k).
      point: the real coordinates at which it is differentiated.
      examples: a tree of arrays with n examples along the first axis; scalars belong to all.
      directions: $b_{ir}$, of shape (n, r, k).
      weights: $w$, of shape (n,); None for ones.
      centered: whether the weighted mean $\bar g_r$ is subtracted.
      dtype: that of rows and products.
    """

    outputs: Callable[[Leaves, Any], jax.Array]
    point: Leaves
    examples: Any
    directions: jax.Array
    weights: jax.Array | None
    centered: bool
    dtype: Any

    @property
    def roots(self) -> jax.Array:
        r"""$\sqrt w$."""
        if self.weights is None:
            return jnp.ones(len(self.directions), self.dtype)
        return jnp.sqrt(self.weights).astype(self.dtype)

    @property
    def shares(self) -> jax.Array:
        r"""$w / \sum_i w_i$."""
        number = len(self.directions)
        if self.weights is None:
            return jnp.full(number, 1 / number, self.dtype)
        return (self.weights / jnp.sum(self.weights)).astype(self.dtype)

    def stored(self) -> StoredRows:
        """All rows at once."""
        leaves = self.of_examples(self.examples, self.directions)
        return stored_rows(leaves, self.weights, centered=self.centered, dtype=self.dtype)

    def of_examples(self, examples: Any, directions: jax.Array) -> Leaves:
        """$b_{ir}^T J_i$ of some examples, of shape ``(n, r, *shape)``."""

        def of_one(example: tuple[Any, jax.Array]) -> Leaves:
            single, chosen = example
            outputs, pullback = jax.vjp(lambda p: self.outputs(p, single)[0], self.point)
            return jax.vmap(lambda b: pullback(b.astype(outputs.dtype))[0])(chosen[0])

        return over_examples(of_one, (examples, directions))

    def pulled_back(self, examples: Any, cotangents: jax.Array) -> Leaves:
        """The sum over some examples of $J_i^T u_i$, for cotangents of shape (n, k)."""
        outputs, pullback = jax.vjp(lambda p: self.outputs(p, examples), self.point)
        cotangents = sharded_like(cotangents.astype(outputs.dtype), outputs)
        return [leaf.astype(self.dtype) for leaf in pullback(cotangents)[0]]
