r"""The empirical Fisher matrix of the alive weights as a model of the loss.

With the damping $\lambda$ and $\hat G = G / \sqrt{m \lambda}$,

$$
F = \lambda I + \frac1m G^T G = \lambda \left(I + \hat G^T \hat G\right)
$$

so that $\lambda$ cancels in changes of the weights, and is a common factor of saliencies, which are
left in units of it: every formula is that of a damping of one, whatever the gradients' scale.
Either $F$ is replaced by its diagonal blocks of $B$ consecutive weights, each inverted through the
smaller of $I + \hat G_b^T \hat G_b$ and $I + \hat G_b \hat G_b^T$, or the latter is summed over all
columns. Where some weights, $Q$, are removed and the kept ones, $S$, move:

* joint, $F_{SS}^{-1} F_{SQ} w_Q = -F^{-1}_{SQ} (F^{-1}_{QQ})^{-1} w_Q$, which minimizes
  $\frac12 \delta^T F \delta$:

  $$
  \delta_S = \left(I + \hat G_S^T \hat G_S\right)^{-1} \hat G_S^T t
           = \hat G_S^T \left(I + \hat G_S \hat G_S^T\right)^{-1} t,
  \qquad t = \hat G_Q w_Q
  $$

  Neither form subtracts anything. The first is well conditioned where a block keeps no more weights
  than there are gradients, the second where it keeps more;
* independent, as published: $-F^{-1} t$ with $t_q = w_q / [F^{-1}]_{qq}$, the sum of the changes
  that would be right for each weight alone.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST, InverseFactor, inverse_factor
from curvax.fisher.inverse._block_diagonal import (
    apply_inverse,
    combine,
    dots,
    factor_dual,
    factor_primal,
)
from curvax.fisher.inverse._full import guarded_diagonal
from curvax.pruning._rows import Rows

Kernel = Callable[..., Any]


class Answer(NamedTuple):
    """A vector of alive weights, and how many of its matrices were too ill conditioned."""

    vector: np.ndarray
    num_failed: int


class Model(Protocol):
    """What pruning needs from a Fisher matrix, in units of damping, for alive weights."""

    def diagonal(self) -> Answer:
        r"""The diagonal of $(I + \hat G^T \hat G)^{-1}$."""

    def solve(self, vector: np.ndarray) -> Answer:
        r"""$(I + \hat G^T \hat G)^{-1} v$."""

    def joint(self, removed: np.ndarray, kept: np.ndarray) -> Answer:
        """The best change of the kept weights for all removed values jointly."""


class ScaledRows(NamedTuple):
    r"""$\hat G$, chunk by chunk.

    Attributes:
      rows: $G$.
      size: the number of weights.
      damping: $\lambda$.
    """

    rows: Rows
    size: int
    damping: float

    @classmethod
    def of(cls, rows: Rows, damping: float, *, relative: bool, num_weights: int) -> "ScaledRows":
        """The damping in units of the mean square of the gradients' entries, or as it is."""
        if relative:
            largest, shares = cls(rows, num_weights, 1.0).map(_squares_by_largest)
            damping *= float(np.mean(np.square(largest, dtype=np.float64) * shares)) or 1.0
        return cls(rows, num_weights, damping)

    def block_size(self, wanted: int | None) -> int:
        """The size of blocks; at most a device's share, which None stands for."""
        share = self.rows.width.share
        return min(wanted or share, share)

    def chunk(self, index: int) -> jax.Array:
        scale = 1 / math.sqrt(self.rows.num_rows * self.damping)
        return _scaled(self.rows.chunk(index), scale)

    def chunks(self, *vectors: np.ndarray) -> Iterator[tuple[jax.Array, ...]]:
        """Each chunk, with the same part of the vectors."""
        width = self.rows.width
        for index in range(-(-self.size // width.chunk)):
            yield self.chunk(index), *(width.put(vector, index) for vector in vectors)

    def map(self, kernel: Kernel, *vectors: np.ndarray) -> Any:
        """Vectors from what a kernel makes of each chunk and of the same part of vectors."""
        compiled = _over_devices(kernel, self.rows.width.mesh)
        pieces = [jax.device_get(compiled(*parts)) for parts in self.chunks(*vectors)]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: self.size], *pieces)

    def products(self, changes: np.ndarray) -> np.ndarray:
        r"""$G \delta = \sqrt{m \lambda} \hat G \delta$, for each gradient, in float64."""
        sums = [np.asarray(dot(*parts), np.float64) for parts in self.chunks(changes)]
        return np.sqrt(self.rows.num_rows * self.damping) * np.sum(sums, axis=0)


class BlockFisher(NamedTuple):
    """The blocks of consecutive weights along the diagonal."""

    rows: ScaledRows
    block_size: int

    def diagonal(self) -> Answer:
        return self._map(_diagonal)

    def solve(self, vector: np.ndarray) -> Answer:
        return self._map(_solve, vector)

    def joint(self, removed: np.ndarray, kept: np.ndarray) -> Answer:
        vectors = removed, kept.astype(removed.dtype)
        few = self._keeps_few(kept)
        # Two programs: in one, a CPU runs both at once, and LAPACK's threads wait for each other.
        if few.all():
            return self._map(_joint_of_few, *vectors)
        answer = self._map(_joint_of_many, *vectors)
        if not few.any():
            return answer
        of_few = self._map(_joint_of_few, *vectors)
        return answer._replace(vector=np.where(few, of_few.vector, answer.vector))

    def _keeps_few(self, kept: np.ndarray) -> np.ndarray:
        """For each weight whether its block keeps no more weights than there are gradients."""
        starts = np.arange(0, self.rows.size, self.block_size)
        counts = np.add.reduceat(kept.astype(int), starts)
        return np.repeat(counts <= self.rows.rows.num_rows, self.block_size)[: self.rows.size]

    def _map(self, kernel: Kernel, *vectors: np.ndarray) -> Answer:
        vector, failed = self.rows.map(in_blocks(kernel, self.block_size), *vectors)
        return Answer(vector, int(np.count_nonzero(failed[:: self.block_size])))


class FullFisher(NamedTuple):
    """One matrix of all weights."""

    rows: ScaledRows

    def diagonal(self) -> Answer:
        factor = self._factor()
        parts = [np.asarray(_full_diagonal(factor, rows)) for (rows,) in self.rows.chunks()]
        return Answer(np.concatenate(parts)[: self.rows.size], int(factor.failed))

    def solve(self, vector: np.ndarray) -> Answer:
        factor = self._factor()
        inside = _apply(factor, self._dots(vector))
        rest = vector - self._combine(inside)
        image = _apply(factor, self._dots(rest) - inside)
        return Answer(rest - self._combine(image), int(factor.failed))

    def joint(self, removed: np.ndarray, kept: np.ndarray) -> Answer:
        target = self._dots(removed)
        if np.count_nonzero(kept) <= self.rows.rows.num_rows:
            return self._joint_of_few(target, kept)
        factor = self._factor(kept)
        changes = self._combine(_apply(factor, target))
        return Answer(np.where(kept, changes, 0), int(factor.failed))

    def _joint_of_few(self, target: jax.Array, kept: np.ndarray) -> Answer:
        """From the kept columns alone, where they are no more than the gradients."""
        chunk = self.rows.rows.width.chunk
        parts = [
            np.asarray(rows)[:, np.flatnonzero(kept[index * chunk : (index + 1) * chunk])]
            for index, (rows,) in enumerate(self.rows.chunks())
        ]
        columns = jnp.asarray(np.concatenate(parts, axis=1))
        factor = _factor(_products(columns.T))
        changes = np.zeros_like(kept, columns.dtype)
        changes[kept] = _apply(factor, dot(columns.T, target))
        return Answer(changes, int(factor.failed))

    def _factor(self, kept: np.ndarray | None = None) -> InverseFactor:
        flags = np.ones(self.rows.size, bool) if kept is None else kept
        total = sum(_products(rows * mask) for rows, mask in self.rows.chunks(flags))
        return _factor(total)

    def _dots(self, vector: np.ndarray) -> jax.Array:
        return sum(dot(rows, part) for rows, part in self.rows.chunks(vector))

    def _combine(self, weights: jax.Array) -> np.ndarray:
        parts = [np.asarray(dot(rows.T, weights)) for (rows,) in self.rows.chunks()]
        return np.concatenate(parts)[: self.rows.size]


def fisher_model(rows: ScaledRows, block_size: int | None) -> Model:
    """In blocks; one block of all weights where these are no more than the gradients."""
    if block_size is None and rows.size > rows.rows.num_rows:
        return FullFisher(rows)
    return BlockFisher(rows, rows.block_size(block_size))


@functools.cache
def in_blocks(kernel: Kernel, size: int) -> Kernel:
    """A kernel of blocks (n, m, B) and (n, B) as one of a chunk (m, n B) and (n B,)."""

    def of_chunk(rows: jax.Array, *vectors: jax.Array) -> Any:
        blocks = rows.reshape(len(rows), -1, size).transpose(1, 0, 2)
        results = kernel(blocks, *(vector.reshape(-1, size) for vector in vectors))
        return jax.tree.map(lambda array: array.reshape(-1), results)

    return of_chunk


@functools.cache
def _over_devices(kernel: Kernel, mesh: jax.sharding.Mesh | None) -> Kernel:
    """The compiled kernel; on a mesh each device does its own columns."""
    if mesh is None:
        return jax.jit(kernel)
    columns = jax.P(mesh.axis_names)

    def spread(rows: jax.Array, *vectors: jax.Array) -> jax.Array:
        specs = (jax.P(None, mesh.axis_names), *[columns] * len(vectors))
        mapped = jax.shard_map(
            kernel, mesh=mesh, in_specs=specs, out_specs=columns, check_vma=False
        )
        return mapped(rows, *vectors)

    return jax.jit(spread)


@jax.jit
def _scaled(rows: jax.Array, scale: Any) -> jax.Array:
    return rows * scale


def sums_of_squares(rows: jax.Array) -> jax.Array:
    """Of each column."""
    return jnp.sum(jnp.square(rows), axis=0)


def _squares_by_largest(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest entry of each column, and its sum of squares in units of that one's."""
    largest = jnp.max(jnp.abs(rows), axis=0)  # squares of entries below 1e-19 would underflow
    return largest, sums_of_squares(rows / jnp.where(largest > 0, largest, 1))


@jax.jit
def dot(rows: jax.Array, vector: jax.Array) -> jax.Array:
    """Each row times the vector."""
    return jnp.dot(rows, vector, precision=HIGHEST)


# Kernels of blocks (n, m, B): a vector (n, B), and for each entry whether its block failed.


def _diagonal(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the blocks' inverses; it lies between $1 / (1 + [G^T G]_{ii})$ and 1."""
    if _is_primal(rows):
        factor = factor_primal(rows, 1.0)
        diagonal = jnp.minimum(jnp.sum(jnp.square(factor.matrix), axis=1), 1)
    else:
        factor = factor_dual(rows, 1.0)
        diagonal = jax.lax.map(_guarded, (factor.matrix, rows))
    return diagonal, _failed(factor, diagonal)


def _solve(rows: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    if _is_primal(rows):
        factor = factor_primal(rows, 1.0)
        return apply_inverse(factor, vector), _failed(factor, vector)
    factor = factor_dual(rows, 1.0)
    # Split into a part in the span of the gradients and the rest, as `fisher.inverse._full` does.
    inside = apply_inverse(factor, dots(rows, vector))
    rest = vector - combine(rows, inside)
    solution = rest - combine(rows, apply_inverse(factor, dots(rows, rest) - inside))
    return solution, _failed(factor, vector)


def _joint_of_many(
    rows: jax.Array, removed: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
    alive = rows * kept[:, jnp.newaxis]
    factor = factor_dual(alive, 1.0)
    return combine(alive, apply_inverse(factor, dots(rows, removed))), _failed(factor, removed)


def _joint_of_few(
    rows: jax.Array, removed: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """From as many columns as there are gradients, among them all kept ones."""
    places = jnp.argsort(kept == 0, axis=1, stable=True)[:, : rows.shape[1]]
    alive = rows * kept[:, jnp.newaxis]
    columns = jnp.take_along_axis(alive, places[:, jnp.newaxis], axis=2)
    factor = factor_primal(columns, 1.0)
    changes = apply_inverse(factor, combine(columns, dots(rows, removed)))
    spread = jnp.zeros_like(removed)
    spread = jnp.put_along_axis(spread, places, changes, axis=1, inplace=False)
    return spread, _failed(factor, removed)


def _is_primal(rows: jax.Array) -> bool:
    return rows.shape[2] <= rows.shape[1]


def _guarded(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return guarded_diagonal(*pair, damping=1.0, normalizer=1.0)


def _failed(factor: InverseFactor, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(factor.failed[:, jnp.newaxis], like.shape)


# Kernels of the whole matrix.


@jax.jit
def _products(rows: jax.Array) -> jax.Array:
    return jnp.dot(rows, rows.T, precision=HIGHEST)


@jax.jit
def _factor(products: jax.Array) -> InverseFactor:
    return inverse_factor(products + jnp.eye(len(products), dtype=products.dtype))


@jax.jit
def _apply(factor: InverseFactor, vector: jax.Array) -> jax.Array:
    return factor.solve(vector[:, jnp.newaxis])[:, 0]


@jax.jit
def _full_diagonal(factor: InverseFactor, rows: jax.Array) -> jax.Array:
    return guarded_diagonal(factor.matrix, rows, damping=1.0, normalizer=1.0)
