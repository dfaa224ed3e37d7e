r"""AdaHessian's average of squared curvature; each leaf accepts or rejects an estimate.

All leaves share one weight $w$, the average of ones, so that $\hat v = v / w$. A leaf with a
non-finite estimate averages in its own $\hat v$ instead, which leaves $\hat v$ unchanged whatever
happens to $w$; so does an entry of zero, if zeros are skipped. The first accepted estimate counts
for all observations before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, count_true, is_inexact, wide_dtype, widest_dtype


class SquaredAverage(NamedTuple):
    """The average of squared curvature.

    Attributes:
      nu: a tree like the params, the average of squares.
      weight: scalar, the same average of ones.
      refreshes: int32 scalar, the number of estimates so far.
      refusals: int32, for each leaf how many of them were refused.
    """

    nu: PyTree
    weight: jax.Array
    refreshes: jax.Array
    refusals: jax.Array

    @classmethod
    def empty(cls, params: PyTree) -> "SquaredAverage":
        return cls(
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            weight=jnp.zeros((), widest_dtype(params)),
            refreshes=jnp.zeros((), jnp.int32),
            refusals=jnp.zeros(len(jax.tree.leaves(params)), jnp.int32),
        )

    def known(self) -> jax.Array:
        """A bool for each leaf: whether it has accepted an estimate."""
        return self.refreshes > self.refusals

    def corrected(self) -> PyTree:
        """The weighted mean of the squares so far; zero where there is none."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        return jax.tree.map(lambda v: v / weight.astype(v.dtype), self.nu)

    def filled(self) -> PyTree:
        """The same, but an entry without observations gets the mean of the leaf's others."""

        def leaf(square: jax.Array) -> jax.Array:
            curved = jnp.maximum(count_true(square > 0), 1).astype(square.dtype)
            typical = jnp.sum(square) / curved
            return jnp.where(square > 0, square, typical)

        return jax.tree.map(leaf, self.corrected())

    def fold_in(
        self, squares: PyTree, decay: jax.Array, due: bool | jax.Array, *, skip_zeros: bool = False
    ) -> "SquaredAverage":
        """The average with ``squares`` at a weight of ``1 - decay``; unchanged if not ``due``."""
        if not jax.tree.leaves(squares):
            return self._replace(refreshes=self.refreshes + due)
        finite = jax.tree.map(lambda square: jnp.all(jnp.isfinite(square)), squares)
        entries = jax.tree.leaves(finite)
        real = [is_inexact(square) for square in jax.tree.leaves(squares)]
        judged = [ok for ok, judge in zip(entries, real, strict=True) if judge] or entries
        accepted = jnp.any(jnp.stack(judged)) & due
        weight = jnp.where(accepted, decay * self.weight + (1 - decay), self.weight)

        def leaf(
            old: jax.Array, mean: jax.Array, new: jax.Array, finite: jax.Array, known: jax.Array
        ) -> jax.Array:
            kept = decay.astype(old.dtype)
            if skip_zeros:
                finite, known = finite & (new != 0), known & (old != 0)
            folded = kept * old + (1 - kept) * jnp.where(finite, new, mean)
            folded = jnp.where(known | ~finite, folded, weight.astype(old.dtype) * new)
            return jnp.where(accepted, folded, old)

        known = jax.tree.unflatten(jax.tree.structure(finite), list(self.known()))
        return SquaredAverage(
            nu=jax.tree.map(leaf, self.nu, self.corrected(), squares, finite, known),
            weight=weight,
            refreshes=self.refreshes + due,
            refusals=self.refusals + (~jnp.stack(entries) & due),
        )
