"""Extremal eigenpairs by Lanczos with thick restarts."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import as_key, check_choice, check_count, check_like, check_range
from curvax._trees import PyTree
from curvax.curvature._operator import Operator
from curvax.spectrum._basis import Basis, normalized
from curvax.spectrum._lanczos import ScaledProducts, breakdown, three_terms

End = Literal["largest", "smallest", "both", "magnitude"]
_CHUNK = 5
_ROUNDING_OF_PRODUCTS = 10.0
_MISSED = 0.01  # the probability that a copy is missed


class Eigenpairs(NamedTuple):
    r"""Eigenvalues and eigenvectors.

    Attributes:
      values: of shape (k,), float64 of NumPy; in descending order (``"smallest"``: ascending, and
        ``"magnitude"`` by absolute value).
      vectors: a tree with leaves of shape ``(k, *leaf.shape)``, each of length one.
      residuals: $\lVert A v - \lambda v \rVert$, of shape (k,), at least the rounding error: an
        eigenvalue lies within that distance of the value.
      converged: of shape (k,), whether the residual is within the tolerance and, with a probability
        of 99 %, no eigenvalue that should come before it was missed, copies of multiple ones
        included.
      num_matvecs: the number of matrix-vector products.
    """

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray
    converged: np.ndarray
    num_matvecs: int


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    key: jax.Array | int,
    which: End = "largest",
    tolerance: float = 1e-4,
    max_matvecs: int = 1000,
    basis_size: int | None = None,
    start: PyTree | None = None,
) -> Eigenpairs:
    r"""Computes eigenpairs at an end of an operator's spectrum, with bounds on their errors.

    It uses Lanczos with full orthogonalization. When the basis is full, the best Ritz vectors are
    kept and the rest is rebuilt (thick restart), so memory is bounded by ``basis_size`` vectors.

    A Krylov space contains each distinct eigenvalue once, whatever its multiplicity. So once the
    residuals are small, the operator is deflated, $C = (I - V V^T) A (I - V V^T)$, and a Lanczos
    run from a random vector $r$ looks for another wanted eigenvalue of $C$. With the orthonormal
    polynomials $p_i$ of that run, an eigenvector at $\lambda$ beyond its Ritz values has a
    component in $r$ of at most $1 / \sqrt{\sum_i p_i(\lambda)^2}$. The run ends when that is
    improbably small, or when a Ritz value lies beyond the wanted ones; in that case the search
    continues from $r$.

    Args:
      operator: a symmetric operator, of any scale.
      k: the number of pairs; at most the operator's size.
      key: a PRNG key for random directions, or an integer seed.
      which: ``"largest"`` values, ``"smallest"``, ``"both"`` ends (half of the pairs each, the
        larger half largest), or largest ``"magnitude"``.
      tolerance: bound on each residual relative to the absolute value of its eigenvalue, but not
        below the rounding error of the largest. An eigenvalue's error is at most its residual, and
        close to the residual's square divided by the gap to the next eigenvalue.
      max_matvecs: the maximum number of products; ``converged`` says which pairs are certain by
        then.
      basis_size: the number of vectors in the basis; ``2 k + 20`` by default.
      start: a tree like the operator's vectors, or earlier ``vectors`` with an extra leading axis,
        which save products when the pairs are recomputed after a few training steps.

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
      problems](https://doi.org/10.1137/S0895479898334605), 2000. Van Dorsselaer, Hochstenbach and
      van der Vorst, [Computing probabilistic bounds for extreme eigenvalues of symmetric matrices
      with the Lanczos method](https://doi.org/10.1137/S0895479800370251), 2001.
    """
    _check_options(operator, k, which, tolerance, max_matvecs, basis_size)
    capacity = min(operator.size, basis_size or 2 * k + 20)
    search = _Search(operator, capacity, max_matvecs, as_key(key))
    search.begin(start)
    while True:
        # A few products at a time: with a good start no full basis is needed.
        search.extend(min(capacity, search.number + max(k, _CHUNK)), at_least=k)
        values, weights, residuals = search.ritz()
        chosen = _ends(values, k, which)
        floor = breakdown(operator, float(np.abs(values).max()))
        limit = np.maximum(tolerance * np.abs(values[chosen]), floor)
        small = residuals[chosen] <= limit
        sure = np.full(k, search.is_complete)
        missed = False
        if small.all() and not search.is_complete:
            # An eigenvalue of C is off by at most a residual's square over the gap.
            loose = max(limit.max(), 0.1 * tolerance**0.5 * np.abs(values[chosen]).min())
            deflated = np.union1d(chosen, np.flatnonzero(residuals <= loose))
            margin = np.maximum(limit, _ROUNDING_OF_PRODUCTS * floor)
            bounds = _bounds(values[chosen], margin, which)
            sure, missed = search.verify(weights[:, deflated], *bounds)
        if (small & sure).all() or search.is_spent:
            vectors = search.combined(weights[:, chosen])
            residuals = np.maximum(residuals[chosen], max(search.rounding, floor))
            scale = search.products.scale
            return Eigenpairs(
                scale * values[chosen],
                vectors,
                scale * residuals,
                small & sure,
                search.products.num_matvecs,
            )
        if not missed and not small.all():
            search.choose_candidate(weights[:, chosen[~small]])
        if search.number == capacity:
            kept = _ends(values, min(capacity - 2, k + (capacity - k) // 2), which)
            search.restart(values[kept], weights[:, kept])


class _Candidate(NamedTuple):
    r"""A direction $f$ orthogonal to the basis, with its coupling $c$: $A Q = Q H + \sum f c^T$."""

    direction: PyTree
    coupling: np.ndarray


class _Search:
    """A growing basis $Q$, and $H = Q^T A Q$ on the host.

    Attributes:
      number: the vectors in the basis.
      products: products with the scaled operator; all numbers here are in its units.
      rounding: the norm of the largest remainder that was dropped as rounding error.
    """

    def __init__(self, operator: Operator, capacity: int, max_matvecs: int, key: jax.Array) -> None:
        self.number = 0
        self.products = ScaledProducts(operator)
        self.rounding = 0.0
        self._operator = operator
        self._max_matvecs = max_matvecs
        self._key = key
        self._capacity = capacity
        self._basis = Basis(operator.like, capacity)
        self._matrix = np.zeros((capacity, capacity))
        self._candidates: list[_Candidate] = []  # the last is next

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.number == self._operator.size

    @property
    def is_spent(self) -> bool:
        """Whether no further product may be made."""
        return self.products.num_matvecs >= self._max_matvecs

    def begin(self, start: PyTree | None) -> None:
        """Takes the first direction."""
        like = self._operator.like
        if start is not None:
            start = _start_like(start, like)
        direction, length = normalized(self._random() if start is None else start)
        if not (length > 0 and np.isfinite(length)):
            raise ValueError(f"start must have a finite positive length, got {length}.")
        self._candidates.append(_Candidate(direction, np.zeros(self._capacity)))

    def extend(self, number: int, *, at_least: int) -> None:
        """Adds basis vectors and their products, up to ``number`` vectors.

        On breakdown it ends early, or restarts from a random direction below ``at_least`` vectors.
        """
        while self.number < number and not self.is_spent:
            if not self._candidates:
                if self.number >= at_least:
                    return
                self.add_direction(self._random())
            slot = self.number
            direction = self._candidates.pop().direction
            self._basis.put(direction, 1.0, slot)
            (image,) = self.products.take([direction])
            self.number += 1
            coefficients, rest, length = self._basis.orthogonalized(image)
            self._matrix[: slot + 1, slot] = coefficients[: slot + 1]
            self._matrix[slot, : slot + 1] = coefficients[: slot + 1]
            if self.is_complete:
                self._candidates = []
            elif self._is_rounding(length):
                self.rounding = max(self.rounding, length)
            else:
                coupling = np.zeros(self._capacity)
                coupling[slot] = length
                self._candidates.append(_Candidate(_scaled(rest, length), coupling))

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, vectors in the basis, and bounds of residuals."""
        used = slice(0, self.number)
        values, weights = np.linalg.eigh(self._matrix[used, used])
        parts = [np.abs(candidate.coupling[used] @ weights) for candidate in self._candidates]
        return values, weights, np.sum(parts, axis=0) if parts else np.zeros(self.number)

    def choose_candidate(self, weights: np.ndarray) -> None:
        """Continues with the direction in which these Ritz vectors have the largest residuals."""
        couplings = [candidate.coupling[: self.number] for candidate in self._candidates]
        sizes = [np.abs(coupling @ weights).max() for coupling in couplings]
        best = int(np.argmax(sizes))
        if best < len(sizes) - 1:
            candidate = self._candidates.pop(best)
            self.add_direction(candidate.direction, candidate.coupling)

    def add_direction(self, vector: PyTree, coupling: np.ndarray | None = None) -> None:
        """The part of a unit vector orthogonal to the basis becomes the next direction."""
        _, rest, length = self._basis.orthogonalized(vector)
        coupling = np.zeros(self._capacity) if coupling is None else length * coupling
        self._candidates.append(_Candidate(_scaled(rest, length), coupling))

    def verify(
        self, deflated: np.ndarray, lows: np.ndarray, highs: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """Whether the eigenvalues of the deflated operator are within bounds.

        Lanczos without stored vectors, until an eigenvector beyond the bounds would have to be
        improbably close to orthogonal to the start, or a Ritz value lies beyond them.

        Returns:
          For each pair of bounds, whether it holds with certainty; and whether a Ritz value lies
          beyond one, in which case the search continues from the start vector.
        """
        projector = np.zeros((self._capacity, self._capacity))
        projector[: self.number, : self.number] = deflated @ deflated.T
        points, signs = np.stack([highs, lows]), np.array([[1.0], [-1.0]])
        sure = np.isinf(points)
        points = np.where(sure, 0, points)
        needed = (self._operator.size - deflated.shape[1]) / _MISSED**2
        _, start, length = self._basis.orthogonalized(self._random(), projector)
        start = current = previous = _scaled(start, length)
        polynomial, last, total, beta = (
            np.ones(points.shape),
            np.zeros(points.shape),
            np.ones(points.shape),
            0.0,
        )
        while not self.is_spent:
            (image,) = self.products.take([current])
            alpha, rest, _ = three_terms(image, current, previous, beta)
            _, rest, length = self._basis.orthogonalized(rest, projector)
            above = signs * (points - float(alpha)) * polynomial - beta * last
            if (above[~sure] <= 0).any():  # a sign change: Sturm's sequence
                self.add_direction(start)
                return sure.all(axis=0), True
            if self._is_rounding(length):
                return np.ones(len(highs), bool), False
            beta, last, polynomial = length, polynomial, np.where(sure, 0, above / length)
            total = total + polynomial**2
            sure |= total >= needed
            if sure.all():
                break
            previous, current = current, _scaled(rest, length)
        return sure.all(axis=0), False

    def combined(self, weights: np.ndarray) -> PyTree:
        return self._basis.combined(weights, self._operator.like)

    def restart(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Keeps Ritz vectors; further products give their couplings with the next vectors."""
        self._basis.replace(self.combined(weights))
        margin = (0, self._capacity - len(values))
        self._candidates = [
            candidate._replace(coupling=np.pad(candidate.coupling[: self.number] @ weights, margin))
            for candidate in self._candidates
        ]
        self.number = len(values)
        self._matrix[:] = 0
        self._matrix[: self.number, : self.number] = np.diag(values)

    def _is_rounding(self, length: float) -> bool:
        """Whether the rest of a product is only its rounding error."""
        scale = max(float(np.abs(self._matrix).max()), 1e-300)
        return length <= _ROUNDING_OF_PRODUCTS * breakdown(self._operator, scale)

    def _random(self) -> PyTree:
        self._key, key = jax.random.split(self._key)
        return self._operator.random_vector(key)


def _scaled(vector: PyTree, length: float) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / length, vector)


def _start_like(start: PyTree, like: PyTree) -> PyTree:
    """A start vector, or the sum of earlier eigenvectors along the leaves' first axes."""
    shapes = [jnp.shape(leaf)[1:] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(start)]
    if shapes == [leaf.shape for leaf in jax.tree.leaves(like)]:
        start = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), start)
    check_like("start", start, like, "operator.like")
    return jax.tree.map(lambda leaf, one: jnp.asarray(leaf, one.dtype), start, like)


def _bounds(values: np.ndarray, margin: np.ndarray, which: End) -> tuple[np.ndarray, np.ndarray]:
    """The bounds beyond which an eigenvalue would come before each of the wanted ones."""
    lows, highs = np.full(len(values), -np.inf), np.full(len(values), np.inf)
    if which == "magnitude":
        return -np.abs(values) - margin, np.abs(values) + margin
    number = {"largest": len(values), "smallest": 0, "both": len(values) - len(values) // 2}[which]
    highs[:number] = (values + margin)[:number]
    lows[number:] = (values - margin)[number:]
    return lows, highs


def _ends(values: np.ndarray, k: int, which: End) -> np.ndarray:
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
    which: End,
    tolerance: float,
    max_matvecs: int,
    basis_size: int | None,
) -> None:
    check_count("k", k)
    check_choice("which", which, get_args(End))
    check_range("tolerance", tolerance, low=0.0)
    check_count("max_matvecs", max_matvecs)
    if max_matvecs < k:
        raise ValueError(f"k={k} pairs take at least {k} products, got {max_matvecs=}.")
    if k > operator.size:
        raise ValueError(f"k must be at most the operator's {operator.size} rows, got {k}.")
    if basis_size is not None:
        check_count("basis_size", basis_size)
        if basis_size < min(k + 2, operator.size):
            raise ValueError(f"basis_size must be at least k + 2 = {k + 2}, got {basis_size}.")
