r"""The inverse of one empirical Fisher matrix over all columns, through the Gram matrix.

With $K = n \lambda I + G G^H = C C^H$, and $n$ the sum of the weights, the number of gradients if
there are none, a vector is split into a part that the rows span and the rest,
$v = G^H c + r$ with $c = K^{-1} G v$, and

$$
F^{-1} v = n\, G^H K^{-1} c + \frac1\lambda \left(r - G^H K^{-1} G r\right), \qquad
v^H F^{-1} v = \frac1\lambda \lVert r \rVert^2 + n \lVert c \rVert^2
$$

Both hold for the $c$ and $r$ that were computed, whatever their rounding errors. In exact
arithmetic $F^{-1} v = r / \lambda$, the published form, which amplifies errors of $c$ by
$1 / \lambda$.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax._settled import settled
from curvax.fisher._cholesky import HIGHEST, InverseFactor, inverse_factor
from curvax.fisher.inverse._columns import Columns, Layout
from curvax.fisher.inverse._gram import gram, squares_below
from curvax.fisher.window._dense import leaf_combine, leaf_dots, pairwise_sum

Leaves = Sequence[jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "factor", "damping", "normalizer"],
    meta_fields=["workspace_bytes"],
)
@dataclasses.dataclass(frozen=True)
class FullInverse:
    r"""$F^{-1}$ over all columns; a leaf on devices keeps its sharding, a NumPy one is streamed.

    Attributes:
      columns: $G$.
      factor: $C^{-1}$.
      damping: $\lambda$.
      normalizer: $n$.
      workspace_bytes: about how much memory the columns of NumPy arrays may take at a time.
    """

    columns: Columns
    factor: InverseFactor
    damping: jax.Array
    normalizer: jax.Array
    workspace_bytes: int

    @classmethod
    def of(
        cls,
        columns: Columns,
        damping: jax.Array,
        normalizer: jax.Array,
        *,
        workspace_bytes: int,
    ) -> "FullInverse":
        """Factors $K$."""
        total = sum(
            (settled(gram(part.rows)) for part in columns.parts(workspace_bytes)),
            start=jnp.zeros((columns.num_rows,) * 2, columns.dtype),
        )
        factor = _damped_factor(total, normalizer * damping)
        return cls(columns, factor, damping, normalizer, workspace_bytes)

    @property
    def takes_complex_samples(self) -> bool:
        return self.columns.takes_complex_samples

    @property
    def failed(self) -> jax.Array:
        return self.factor.failed

    @property
    def layout(self) -> Layout:
        return self.columns.layout

    def solve(self, vectors: Leaves) -> list[jax.Array]:
        """$F^{-1} v$."""
        coefficients, rest = self._split(vectors)
        weights = _weights_of_solution(
            self.factor, coefficients, self._dots(rest), self.normalizer, self.damping
        )
        spanned = self._combine(weights)
        return [leaf / self.damping + part for leaf, part in zip(rest, spanned, strict=True)]

    def solve_in_sample_space(self, samples: jax.Array) -> list[jax.Array]:
        """$F^{-1} G^H s$ for each row of an array (k, m): leaves of shape ``(k, *shape)``."""
        samples = self.columns.preparation.samples(samples, self.columns.dtype)
        return self._combine(self.normalizer * self.factor.solve(samples.T).T)

    def quadratic_form(self, vectors: Leaves) -> jax.Array:
        """$v^H F^{-1} v$, a sum of squares and so never negative."""
        coefficients, rest = self._split(vectors)
        outside = sum(map(_sum_of_squares, rest), start=jnp.zeros((), self.damping.dtype))
        return outside / self.damping + self.normalizer * _sum_of_squares(coefficients)

    def logdet(self) -> jax.Array:
        r"""$\log \det F$."""
        size = self.columns.num_rows
        inside = self.factor.logdet() - size * jnp.log(self.normalizer * self.damping)
        return self.layout.num_columns * jnp.log(self.damping) + inside

    def sample(self, key: jax.Array) -> list[jax.Array]:
        r"""A draw of $N(0, F^{-1})$: $F^{-1} (\sqrt\lambda\, z + G^H y / \sqrt n)$."""
        first, second = jax.random.split(key)
        white = normal_leaves(first, self.layout)
        inside = jax.random.normal(second, (self.columns.num_rows,), self.columns.dtype)
        outside = [leaf / jnp.sqrt(self.damping) for leaf in white]
        target = jnp.sqrt(self.normalizer) * inside - self._dots(outside)
        spanned = self._combine(_solve(self.factor, target))
        return [leaf + part for leaf, part in zip(outside, spanned, strict=True)]

    def diagonal(self) -> list[jax.Array]:
        """The diagonal of $F^{-1}$."""
        options = self.damping, self.normalizer
        parts = self.columns.parts(self.workspace_bytes)
        return self._assemble(
            (part.leaf, guarded_diagonal(self.factor.matrix, part.rows, *options)) for part in parts
        )

    def element(self, i: int, j: int) -> jax.Array:
        """$[F^{-1}]_{ij}$."""
        first, second = (self.columns.take(index, 1)[:, 0] for index in (i, j))
        options = self.damping, self.normalizer
        return dual_element(self.factor, first, second, *options, on_diagonal=i == j)

    def _split(self, vectors: Leaves) -> tuple[jax.Array, list[jax.Array]]:
        """$c$ and $r$."""
        coefficients = _solve(self.factor, self._dots(vectors))
        spanned = self._combine(coefficients)
        return coefficients, [v - part for v, part in zip(vectors, spanned, strict=True)]

    def _dots(self, vectors: Leaves) -> jax.Array:
        """$G v$."""
        parts = self.columns.parts(self.workspace_bytes)
        sums = [settled(leaf_dots(part.rows, part.of(vectors[part.leaf]))) for part in parts]
        return pairwise_sum(jnp.stack(sums, axis=1))

    def _combine(self, weights: jax.Array) -> list[jax.Array]:
        """$G^H x$ for weights (m,), or for each row of weights (k, m)."""
        parts = self.columns.parts(self.workspace_bytes)
        pieces = ((part.leaf, _combination(part.rows, weights)) for part in parts)
        return self._assemble(pieces, weights.shape[:-1])

    def _assemble(
        self, pieces: Iterator[tuple[int, jax.Array]], batch: tuple[int, ...] = ()
    ) -> list[jax.Array]:
        """Leaves from the pieces of each, in order."""
        collected: list[list[jax.Array]] = [[] for _ in self.columns.leaves]
        for index, piece in pieces:
            collected[index].append(piece)
        shapes = [(*batch, *shape) for shape in self.layout.shapes]
        dtype = self.columns.dtype
        return [_join(parts, shape, dtype) for parts, shape in zip(collected, shapes, strict=True)]


def normal_leaves(key: jax.Array, layout: Layout) -> list[jax.Array]:
    """Standard normal leaves."""
    keys = jax.random.split(key, len(layout.shapes))
    return [
        jax.random.normal(leaf_key, shape, layout.dtype)
        for leaf_key, shape in zip(keys, layout.shapes, strict=True)
    ]


@jax.jit
def _damped_factor(products: jax.Array, shift: jax.Array) -> InverseFactor:
    return inverse_factor(products + shift * jnp.eye(len(products), dtype=products.dtype))


@jax.jit
def _solve(factor: InverseFactor, vector: jax.Array) -> jax.Array:
    return factor.solve(vector[:, jnp.newaxis])[:, 0]


@jax.jit
def _weights_of_solution(
    factor: InverseFactor, inside: jax.Array, outside: jax.Array, normalizer: Any, damping: Any
) -> jax.Array:
    return _solve(factor, normalizer * inside - outside / damping)


@jax.jit
def _combination(rows: jax.Array, weights: jax.Array) -> jax.Array:
    if weights.ndim > 1:
        return jax.vmap(_combination, in_axes=(None, 0))(rows, weights)
    return jnp.conj(leaf_combine(rows, jnp.conj(weights), rows[0]))


def dual_element(
    factor: InverseFactor,
    first: jax.Array,
    second: jax.Array,
    damping: Any,
    normalizer: Any,
    *,
    on_diagonal: bool,
) -> jax.Array:
    """An entry from two columns of the gradients; on the diagonal, clipped to its bounds."""
    if on_diagonal:
        column = first[:, jnp.newaxis]
        return guarded_diagonal(factor.matrix, column, damping, normalizer)[0]
    images = factor.forward(jnp.stack([first, second], axis=-1))
    return -jnp.vdot(images[:, 0], images[:, 1], precision=HIGHEST) / damping


def _sum_of_squares(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(array)))


def _join(parts: list[jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not parts:
        return jnp.zeros(shape, dtype)
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    return jnp.concatenate(parts, axis=-1).reshape(shape)


def guarded_diagonal(
    triangle: jax.Array, rows: jax.Array, damping: Any, normalizer: Any
) -> jax.Array:
    r"""The diagonal of $F^{-1}$, clipped to its exact bounds.

    $1 / F_{ii} \le [F^{-1}]_{ii} \le 1 / \lambda$: the difference that gives the entry loses
    digits where it is small, and could even be negative.
    """
    projected, squares = squares_below(triangle, rows)
    entry = (1 - projected) / damping
    return jnp.clip(entry, 1 / (damping + squares / normalizer), 1 / damping)
