"""Extremal eigenpairs by Lanczos with thick restarts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_count, check_like, check_range
from curvax._trees import PyTree
from curvax.curvature._operator import Operator
from curvax.spectrum._basis import Basis, normalized
from curvax.spectrum._lanczos import breakdown, finite_product

_CHUNK = 5
_ROUNDING_OF_PRODUCTS = 10.0
ENDS = ("largest", "smallest", "both", "magnitude")


class Eigenpairs(NamedTuple):
    r"""Eigenvalues and eigenvectors.

    Attributes:
      values: of shape (k,), float64 of NumPy; in descending order (``"smallest"``: ascending, and
        ``"magnitude"`` by absolute value).
      vectors: a tree with leaves of shape ``(k, *leaf.shape)``, each of length one.
      residuals: $\lVert A v - \lambda v \rVert$, of shape (k,), not below what rounding leaves: an
        eigenvalue lies at most that far from the value.
      converged: of shape (k,), whether the residual is within the tolerance.
      num_products: the number of products with the operator.
    """

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray
    converged: np.ndarray
    num_products: int


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    which: str = "largest",
    tolerance: float = 1e-4,
    max_products: int = 1000,
    basis_size: int | None = None,
    start: PyTree | None = None,
) -> Eigenpairs:
    r"""Eigenpairs at an end of an operator's spectrum, with bounds of their errors.

    Lanczos with full orthogonalization; when the basis is full, the best Ritz vectors are kept and
    the rest is built anew (thick restart), so that memory is bounded by ``basis_size`` vectors. An
    exhausted Krylov space is left by a new random direction: an operator of few distinct
    eigenvalues has all their copies found, and those of a zero operator are zeros. Elsewhere, the
    first copy of an exactly multiple eigenvalue is found at once, and a further one only when
    rounding has brought it in, which a smaller ``tolerance`` gives time for.

    Args:
      operator: a symmetric operator.
      k: the number of pairs; at most the operator's size.
      key: a PRNG key for random directions.
      which: ``"largest"`` values, ``"smallest"``, ``"both"`` ends (half of the pairs each, the
        larger half largest), or largest ``"magnitude"``.
      tolerance: of each residual, relative to the absolute value of its eigenvalue, but not below
        what rounding leaves of the largest. An eigenvalue's error is at most its residual, and
        close to the residual's square over the gap to the next.
      max_products: where to stop if residuals stay larger; ``converged`` says which.
      basis_size: vectors in the basis; by default ``2 k + 20``.
      start: a tree like the operator's vectors, or earlier ``vectors`` with a further first axis,
        to start from: the pairs of a network after a few more steps take few products.

    Returns:
      The pairs.

    Raises:
      ValueError: if ``k`` is larger than the operator, a product is not finite, or an option is out
        of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> entries = jnp.array([1.0, -3.0, 2.0, 7.0])
      >>> operator = spectrum.Operator(lambda vector: entries * vector, jnp.zeros(4))
      >>> pairs = spectrum.top_eigenpairs(operator, 2, key=jax.random.key(0))
      >>> print(pairs.values.round(4), pairs.converged)
      [7. 2.] [ True  True]

    References:
      Wu and Simon, [Thick-restart Lanczos method for large symmetric eigenvalue
      problems](https://doi.org/10.1137/S0895479898334605), 2000.
    """
    _check_options(operator, k, which, tolerance, max_products, basis_size)
    capacity = min(operator.size, basis_size or 2 * k + 20)
    search = _Search(operator, capacity, key)
    search.begin(start)
    while True:
        # A few products at a time: a good start needs no full basis.
        more = min(max(k, _CHUNK), max_products - search.num_products)
        search.extend(min(capacity, search.number + more))
        values, weights, residuals = search.ritz()
        chosen = _ends(values, k, which)
        scale = float(np.abs(values).max())
        limit = np.maximum(tolerance * np.abs(values[chosen]), breakdown(operator, scale))
        converged = residuals[chosen] <= limit
        settled = converged.all() and not search.hides(values, k, which)
        if settled or search.is_complete() or search.num_products >= max_products:
            vectors = search.combined(weights[:, chosen])
            bounds = np.maximum(residuals[chosen], search.unseen(scale))
            return Eigenpairs(values[chosen], vectors, bounds, converged, search.num_products)
        if search.number < capacity:
            continue
        kept = _ends(values, min(capacity - 2, k + (capacity - k) // 2), which)
        search.restart(values[kept], weights[:, kept])


class _Search:
    """A growing basis $Q$, and $Q^T A Q$ on the host."""

    def __init__(self, operator: Operator, capacity: int, key: jax.Array) -> None:
        self.number = 0
        self.num_products = 0
        self._operator = operator
        self._key = key
        self._basis = Basis(operator.like, capacity)
        self._matrix = np.zeros((capacity, capacity))
        self._residual = np.inf  # the length of what is left after the last product
        self._next: PyTree = None
        self._dropped = 0.0  # the longest remainder that was taken for rounding
        self._is_fresh = False  # whether the next direction is a new random one

    def begin(self, start: PyTree | None) -> None:
        """Takes the first direction."""
        like = self._operator.like
        if start is not None:
            start = _start_like(start, like)
        direction, length = normalized(self._random() if start is None else start)
        if not (length > 0 and np.isfinite(length)):
            raise ValueError(f"start must have a finite positive length, got {length}.")
        self._next = direction

    def extend(self, capacity: int) -> None:
        """Adds a product for each new basis vector, up to ``capacity`` vectors."""
        while self.number < capacity:
            slot = self.number
            self._basis.put(self._next, 1.0, slot)
            image = finite_product(self._operator, self._next)
            self.num_products += 1
            self.number += 1
            coefficients, rest, length = self._basis.orthogonalized(image)
            self._matrix[: slot + 1, slot] = coefficients[: slot + 1]
            self._matrix[slot, : slot + 1] = coefficients[: slot + 1]
            scale = float(np.abs(self._matrix).max())
            # What a product's own rounding leaves, too, of a space that is exhausted.
            if length > _ROUNDING_OF_PRODUCTS * breakdown(self._operator, scale):
                self._residual, self._is_fresh = length, False
                self._next = jax.tree.map(lambda leaf, b=length: leaf / b, rest)
            elif self.is_complete():
                self._residual = 0.0
            else:
                # An invariant subspace: what lies outside is not known, unless a random direction
                # there is an eigenvector at once, which makes all of the outside one eigenspace.
                self._dropped = max(self._dropped, length)
                self._residual = 0.0 if self._is_fresh else np.inf
                self._next, self._is_fresh = self._new_direction(), True

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, vectors in the basis, and residuals."""
        used = slice(0, self.number)
        values, weights = np.linalg.eigh(self._matrix[used, used])
        last = np.abs(weights[-1])
        return values, weights, np.where(last == 0, 0.0, self._residual * np.maximum(last, 1e-300))

    def hides(self, values: np.ndarray, k: int, which: str) -> bool:
        """Whether the eigenspace outside of the basis has a value that is wanted too."""
        if self._residual > 0 or not self._is_fresh or self.is_complete():
            return False
        outside = self._matrix[self.number - 1, self.number - 1]
        return len(values) in _ends(np.append(values, outside), k, which)

    def unseen(self, scale: float) -> float:
        """What residuals may be larger by than they seem."""
        return max(self._dropped, breakdown(self._operator, scale))

    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.number == self._operator.size

    def combined(self, weights: np.ndarray) -> PyTree:
        return self._basis.combined(weights, self._operator.like)

    def restart(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Keeps Ritz vectors; the next product finds their couplings with the next vector."""
        self._basis.replace(self.combined(weights))
        self.number = len(values)
        self._matrix[:] = 0
        self._matrix[: self.number, : self.number] = np.diag(values)

    def _random(self) -> PyTree:
        self._key, key = jax.random.split(self._key)
        return self._operator.random_vector(key)

    def _new_direction(self) -> PyTree:
        """A random direction orthogonal to all so far."""
        _, rest, length = self._basis.orthogonalized(self._random())
        return jax.tree.map(lambda leaf: leaf / length, rest)


def _start_like(start: PyTree, like: PyTree) -> PyTree:
    """A start vector as it is, or the sum of earlier eigenvectors, along the leaves' first axes."""
    shapes = [jnp.shape(leaf)[1:] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(start)]
    if shapes == [leaf.shape for leaf in jax.tree.leaves(like)]:
        start = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), start)
    check_like("start", start, like, "operator.like")
    return jax.tree.map(lambda leaf, one: jnp.asarray(leaf, one.dtype), start, like)


def _ends(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """Which of the values are wanted, in order."""
    k = min(k, len(values))
    descending = np.argsort(-values, kind="stable")
    if which == "largest":
        return descending[:k]
    if which == "smallest":
        return descending[::-1][:k]
    if which == "magnitude":
        return np.argsort(-np.abs(values), kind="stable")[:k]
    low = k // 2
    return np.concatenate([descending[: k - low], descending[len(values) - low :]])


def _check_options(
    operator: Operator,
    k: int,
    which: str,
    tolerance: float,
    max_products: int,
    basis_size: int | None,
) -> None:
    check_count("k", k)
    check_choice("which", which, ENDS)
    check_range("tolerance", tolerance, low=0.0)
    check_count("max_products", max_products)
    if max_products < k:
        raise ValueError(f"k={k} pairs take at least as many products, got {max_products=}.")
    if k > operator.size:
        raise ValueError(f"k={k} pairs are more than the {operator.size} rows of the operator.")
    if basis_size is not None:
        check_count("basis_size", basis_size)
        if basis_size < min(k + 2, operator.size):
            raise ValueError(f"basis_size must be at least k + 2 = {k + 2}, got {basis_size}.")
