r"""Rows that are not kept, but computed for a few examples at a time.

The Gram matrix is computed block by block, for one pair of micro-batches after another, and $G^T x$
is one vector-Jacobian product of all outputs. The rows of two micro-batches are in memory. Those of
one are computed once, and again for half of the others: on a CPU that doubles the time with 16
micro-batches (``benchmarks/natural_gradient.py``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import Leaves, varying_like
from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.samples._jacobian import JacobianRows
from curvax.fisher.samples._mesh import free_of_types, has_mesh, replicated, sharded_like
from curvax.fisher.samples._products import (
    products_with,
    products_with_themselves,
    products_with_vector,
)


class _Cut(NamedTuple):
    """Examples cut into micro-batches: number ``j`` has ``j, j + parts, j + 2 * parts, ...``.

    So each device has a share of every micro-batch where examples are sharded.
    """

    examples: int
    parts: int
    size: int

    @classmethod
    def of(cls, examples: int, most: int) -> "_Cut":
        parts = -(-examples // most)
        return cls(examples, parts, -(-examples // parts))

    def of_tree(self, tree: Any, *, fill: bool) -> Callable[[jax.Array], Any]:
        """A function that takes a micro-batch; the last are filled with the first, or zeros."""
        margin = self.parts * self.size - self.examples

        def cut(leaf: jax.Array) -> jax.Array:
            if margin:
                first = leaf[:1] if fill else jnp.zeros_like(leaf[:1])
                leaf = jnp.concatenate([leaf, *[first] * margin])
            return leaf.reshape(self.size, self.parts, *leaf.shape[1:])

        blocks = jax.tree.map(lambda leaf: cut(leaf) if jnp.ndim(leaf) else leaf, tree)

        def take(index: jax.Array) -> Any:
            def of_leaf(leaf: Any) -> Any:
                if not jnp.ndim(leaf):
                    return leaf
                return jax.lax.dynamic_index_in_dim(leaf, index, axis=1, keepdims=False)

            return jax.tree.map(of_leaf, blocks)

        return take


def in_micro_batches(
    outputs: Callable[[Leaves, Any], jax.Array], point: Leaves, examples: Any, most: int | None
) -> jax.Array:
    """Outputs of all examples, of at most so many at a time, or of all together."""
    if most is None:
        return outputs(point, examples)
    number = next(len(leaf) for leaf in jax.tree.leaves(examples) if jnp.ndim(leaf))
    cut = _Cut.of(number, most)
    take = cut.of_tree(examples, fill=True)
    parts = jax.lax.map(lambda index: outputs(point, take(index)), jnp.arange(cut.parts))
    # From (parts, size, k): examples were dealt out in turn.
    return jnp.swapaxes(parts, 0, 1).reshape(-1, parts.shape[-1])[:number]


class MicroBatchedRows(NamedTuple):
    """Rows of a few examples at a time.

    Attributes:
      jacobian: what the rows are made of.
      size: the largest number of examples in a micro-batch.
    """

    jacobian: JacobianRows
    size: int

    def gram_and_dots(self, vector: Leaves | None) -> tuple[jax.Array, jax.Array | None]:
        number, per_example, _ = self.jacobian.directions.shape
        cut = _Cut.of(number, self.size)
        rows_of = self._rows(cut)
        shape = cut.size, cut.parts, per_example

        def put(gram: jax.Array, block: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
            block = free_of_types(block).reshape(cut.size, 1, per_example, cut.size, 1, per_example)
            return jax.lax.dynamic_update_slice(gram, block, (0, row, 0, 0, column, 0))

        def of_micro_batch(index: jax.Array, sums: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            gram, dots = sums
            first = rows_of(index)
            if not has_mesh():
                gram = put(gram, products_with_themselves(first), index, index)
            if vector is not None:
                part = free_of_types(products_with_vector(first, vector))
                part = part.reshape(cut.size, 1, per_example)
                dots = jax.lax.dynamic_update_slice_in_dim(dots, part, index, axis=1)

            def pair(shift: jax.Array, gram: jax.Array) -> jax.Array:
                other = (index + shift) % cut.parts
                block = products_with(first, rows_of(other, everywhere=True))
                return put(put(gram, block, index, other), block.T, other, index)

            # Half of the others, around a circle: each pair is met once, or twice if opposite.
            return jax.lax.fori_loop(int(not has_mesh()), cut.parts // 2 + 1, pair, gram), dots

        zeros = free_of_types(jnp.zeros(shape, self.jacobian.dtype))
        square = free_of_types(jnp.zeros(shape * 2, zeros.dtype))
        start = square, None if vector is None else zeros
        gram, dots = jax.lax.fori_loop(0, cut.parts, of_micro_batch, self._varying(start))
        total = number * per_example
        square = gram.reshape(zeros.size, zeros.size)[:total, :total]
        return square, None if dots is None else dots.reshape(-1)[:total]

    def combine(self, weights: jax.Array) -> Leaves:
        number, per_example, _ = self.jacobian.directions.shape
        weights = weights.reshape(number, per_example) * self.jacobian.roots[:, jnp.newaxis]
        if self.jacobian.centered:
            weights -= self.jacobian.shares[:, jnp.newaxis] * jnp.sum(weights, axis=0)
        return self._pulled_back(weights)

    def _rows(self, cut: _Cut) -> Callable[..., Leaves]:
        """A function that computes the rows of a micro-batch, weighted and centred.

        On a mesh, ``everywhere`` says that each device computes all of them: that costs less than
        to send rows.
        """
        examples = cut.of_tree(self.jacobian.examples, fill=True)
        directions = cut.of_tree(self.jacobian.directions, fill=True)
        roots, mean = cut.of_tree(self.jacobian.roots, fill=True), self._mean()

        def rows_of(index: jax.Array, *, everywhere: bool = False) -> Leaves:
            parts = examples(index), directions(index), roots(index)
            part, chosen, root = replicated(parts) if everywhere else parts
            leaves = self.jacobian.of_examples(part, chosen)

            def prepared(rows: jax.Array, mean: jax.Array) -> jax.Array:
                column = root.reshape(-1, *[1] * (rows.ndim - 1))
                rows = column * (rows.astype(self.jacobian.dtype) - mean)
                return rows.reshape(-1, *rows.shape[2:])

            return [prepared(rows, middle) for rows, middle in zip(leaves, mean, strict=True)]

        return rows_of

    def _mean(self) -> Leaves:
        """The mean rows, of shape ``(r, *shape)``; zero unless they are subtracted."""
        if not self.jacobian.centered:
            return [jnp.zeros((), self.jacobian.dtype)] * len(self.jacobian.point)
        shares = self.jacobian.shares[:, jnp.newaxis]
        basis = jnp.eye(self.jacobian.directions.shape[1], dtype=self.jacobian.dtype)
        return jax.lax.map(lambda one: self._pulled_back(shares * one), basis)

    def _pulled_back(self, weights: jax.Array) -> Leaves:
        r"""$\sum_{ir} x_{ir} J_i^T b_{ir}$ for $x$ of shape (n, r)."""
        directions = self.jacobian.directions
        weights = sharded_like(weights, directions)
        cotangents = jnp.einsum("nr,nrk->nk", weights, directions, precision=HIGHEST)
        cut = _Cut.of(len(cotangents), self.size)
        examples = cut.of_tree(self.jacobian.examples, fill=True)
        chosen = cut.of_tree(cotangents, fill=False)

        def add(index: jax.Array, total: Leaves) -> Leaves:
            part = self.jacobian.pulled_back(examples(index), chosen(index))
            return [a + b for a, b in zip(total, part, strict=True)]

        zeros = [jnp.zeros_like(leaf, self.jacobian.dtype) for leaf in self.jacobian.point]
        return jax.lax.fori_loop(0, cut.parts, add, self._varying(zeros))

    def _varying(self, start: Any) -> Any:
        return varying_like(start, (self.jacobian.point, self.jacobian.examples))
