"""An orthonormal basis of trees, kept leaf by leaf like M-FAC's window, and compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from curvax._trees import PyTree, tree_norm
from curvax.fisher import DenseWindow
from curvax.fisher._cholesky import HIGHEST


class Basis:
    """Up to ``capacity`` orthonormal trees; each keeps the sharding of ``like``."""

    def __init__(self, like: PyTree, capacity: int) -> None:
        self.capacity = capacity
        self._window = DenseWindow.empty(like, capacity, None)

    def orthogonalized(
        self, vector: PyTree, projector: np.ndarray | None = None
    ) -> tuple[np.ndarray, PyTree, float]:
        """Coefficients in the basis, the rest of the vector, and the rest's length.

        With a ``projector`` of shape (capacity, capacity), the vector is only made orthogonal to
        that part of the span.
        """
        coefficients, rest, length = orthogonalized(self._window, vector, projector)
        return np.asarray(coefficients, np.float64), rest, float(length)

    def put(self, vector: PyTree, length: float, slot: int) -> None:
        """``vector / length`` becomes basis vector number ``slot``."""
        self._window = _put(self._window, vector, length, slot)

    def combined(self, weights: np.ndarray, like: PyTree) -> PyTree:
        """The combinations with the columns of ``weights``, stacked along a new first axis."""
        padded = np.zeros((self.capacity, weights.shape[1]))
        padded[: len(weights)] = weights
        return _combined(self._window, jnp.asarray(padded), like)

    def replace(self, vectors: PyTree) -> None:
        """The stacked vectors become the first ones, the rest zeros."""
        self._window = _replaced(self._window, vectors)


def normalized(vector: PyTree) -> tuple[PyTree, float]:
    """A vector of length one in its direction, and its length."""
    length = float(tree_norm(vector))
    if length == 0:
        return vector, length
    return jax.tree.map(lambda leaf: leaf / length, vector), length


@jax.jit
def orthogonalized(
    window: DenseWindow, vector: PyTree, projector: jax.Array | None = None
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Gram-Schmidt, twice: a third pass would gain nothing."""
    dtype = jnp.result_type(*jax.tree.leaves(vector))
    total, rest = jnp.zeros((), dtype), vector
    for _ in range(2):
        coefficients = window.dots(rest, dtype)
        if projector is not None:
            coefficients = jnp.matmul(projector.astype(dtype), coefficients, precision=HIGHEST)
        spanned = window.combine(coefficients, rest)
        rest = jax.tree.map(lambda a, b: a - b.astype(a.dtype), rest, spanned)
        total = total + coefficients
    return total, rest, tree_norm(rest)


@functools.partial(jax.jit, donate_argnums=0)
def _put(window: DenseWindow, vector: PyTree, length: jax.Array, slot: jax.Array) -> DenseWindow:
    return window.push(jax.tree.map(lambda leaf: leaf / length, vector), slot)


@jax.jit
def _combined(window: DenseWindow, weights: jax.Array, like: PyTree) -> PyTree:
    def leaf(rows: jax.Array, one: jax.Array) -> jax.Array:
        if not len(rows):  # a leaf without entries
            return jnp.zeros((weights.shape[1], *one.shape), one.dtype)
        columns = weights.astype(rows.dtype)
        combined = jax.lax.dot_general(columns, rows, (((0,), (0,)), ((), ())), precision=HIGHEST)
        return combined.astype(one.dtype)

    return jax.tree.map(leaf, window.rows, like)


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(window: DenseWindow, vectors: PyTree) -> DenseWindow:
    def leaf(rows: jax.Array, new: jax.Array) -> jax.Array:
        if not len(rows):
            return rows
        rows = jnp.zeros_like(rows)
        return jax.lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), 0, axis=0)

    return window._replace(rows=jax.tree.map(leaf, window.rows, vectors))
