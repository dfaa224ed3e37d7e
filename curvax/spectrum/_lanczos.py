r"""Lanczos tridiagonalization, driven from the host with one compiled product.

$A Q = Q T + \beta_k q_{k+1} e_k^T$ with orthonormal $Q$ and tridiagonal $T$. In exact arithmetic
three terms suffice; in floating-point numbers the vectors lose orthogonality as soon as an
eigenvalue converges, and copies of it appear ("ghosts"). Full reorthogonalization costs two passes
over the basis a step. Selective reorthogonalization follows an estimate of the loss and makes these
passes only once it reaches the square root of the machine epsilon, which keeps $T$ exact to full
precision (Simon, 1984).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_count, check_like
from curvax._trees import PyTree, tree_dot, tree_norm
from curvax.curvature._operator import Operator
from curvax.spectrum._basis import Basis, normalized

Reorthogonalization = Literal["full", "selective", "none"]


class Lanczos(NamedTuple):
    r"""A tridiagonal matrix that represents an operator on the Krylov space of a start vector.

    Attributes:
      diagonal: $\alpha$, of shape (k,), float64 of NumPy.
      off_diagonal: $\beta_1, \dots, \beta_{k-1}$, of shape (k - 1,).
      residual: $\beta_k$, the length of the remainder; zero if the Krylov space was exhausted, so
        that the eigenvalues of $T$ are exact.
      num_matvecs: the number of matrix-vector products.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    residual: float
    num_matvecs: int

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of $T$ in ascending order, and its eigenvectors as columns."""
        matrix = np.diag(self.diagonal)
        matrix += np.diag(self.off_diagonal, 1) + np.diag(self.off_diagonal, -1)
        return np.linalg.eigh(matrix)


def lanczos(
    operator: Operator, start: PyTree, order: int, *, reorthogonalize: Reorthogonalization = "full"
) -> Lanczos:
    r"""Lanczos tridiagonalization of an operator.

    The compiled functions do not depend on ``order``. Vectors have the shardings of the operator's
    vectors.

    Args:
      operator: a symmetric operator.
      start: the start vector, a tree like ``operator.like``.
      order: the number of steps $k$, at most the number of rows. The iteration ends early if the
        Krylov space is exhausted.
      reorthogonalize: ``"full"`` and ``"selective"`` keep $k$ vectors, ``"none"`` keeps three, for
        models so large that $k$ copies do not fit in memory. It produces spurious copies of
        eigenvalues, which hardly distort a density.

    Returns:
      The tridiagonal matrix.

    Raises:
      ValueError: if a product is not finite, the start vector is zero, or an option is out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> entries = jnp.array([1.0, 2.0, 5.0])
      >>> operator = spectrum.Operator(lambda vector: entries * vector, jnp.zeros(3))
      >>> result = spectrum.lanczos(operator, jnp.ones(3), 3)
      >>> print(result.eigh()[0].round(5))
      [1. 2. 5.]

    References:
      Golub and Meurant, Matrices, Moments and Quadrature, 2010, Chapter 4. Simon, [The Lanczos
      algorithm with partial
      reorthogonalization](https://doi.org/10.1090/S0025-5718-1984-0725988-X), 1984.
    """
    return lanczos_together(operator, [start], order, reorthogonalize=reorthogonalize)[0]


def lanczos_together(
    operator: Operator,
    starts: Sequence[PyTree],
    order: int,
    *,
    reorthogonalize: Reorthogonalization = "full",
) -> list[Lanczos]:
    """Tridiagonalizations from several start vectors, whose products are taken together."""
    check_count("order", order)
    check_choice("reorthogonalize", reorthogonalize, get_args(Reorthogonalization))
    products = ScaledProducts(operator)
    recurrences = [_Recurrence(operator, start, order, reorthogonalize) for start in starts]
    while running := [recurrence for recurrence in recurrences if not recurrence.finished]:
        images = products.take([recurrence.current for recurrence in running])
        for recurrence, image in zip(running, images, strict=True):
            recurrence.advance(image)
    return [recurrence.result(products.scale) for recurrence in recurrences]


class _Recurrence:
    """One tridiagonalization in progress: pass it $A$ times ``current`` until it is finished."""

    def __init__(self, operator: Operator, start: PyTree, order: int, reorthogonalize: str) -> None:
        check_like("the start vector", start, operator.like)
        start = jax.tree.map(lambda leaf, one: leaf.astype(one.dtype), start, operator.like)
        self.current, length = normalized(start)
        if not (length > 0 and np.isfinite(length)):
            raise ValueError(f"the start vector must have a finite positive length, got {length}.")
        self._operator = operator
        self._order = min(order, operator.size)
        self._reorthogonalize = reorthogonalize
        self._basis = None
        if reorthogonalize != "none":
            self._basis = Basis(operator.like, self._order)
            self._basis.put(self.current, 1.0, 0)
        self._loss = _OrthogonalityLoss(self._order, precision_of(operator.like))
        self._previous = self.current
        self._alphas: list[float] = []
        self._betas: list[float] = []  # the one after the last alpha included
        self.finished = False

    def advance(self, image: PyTree) -> None:
        beta = self._betas[-1] if self._betas else 0.0
        alpha, rest, beta_next = three_terms(image, self.current, self._previous, beta)
        self._alphas.append(float(alpha))
        pairs = zip(self._alphas, [*self._betas, 0.0], strict=True)
        scale = max(abs(a) + abs(b) for a, b in pairs)
        if self._is_due(float(beta_next)):
            assert self._basis is not None
            _, rest, beta_next = self._basis.orthogonalized(rest)
        beta = float(beta_next)
        exhausted = beta <= breakdown(self._operator, scale)
        self._betas.append(0.0 if exhausted else beta)
        self.finished = exhausted or len(self._alphas) == self._order
        if not self.finished:
            self._previous = self.current
            self.current = jax.tree.map(lambda leaf: leaf / beta, rest)
            if self._basis is not None:
                self._basis.put(self.current, 1.0, len(self._alphas))

    def _is_due(self, beta: float) -> bool:
        """Whether the next vector must be made orthogonal to all previous ones."""
        if self._reorthogonalize == "selective":
            return self._loss.is_large(self._alphas, self._betas, beta)
        return self._reorthogonalize == "full"

    def result(self, scale: float) -> Lanczos:
        """The matrix of the operator itself, ``scale`` times that of the scaled products."""
        alphas, betas = scale * np.array(self._alphas), scale * np.array(self._betas)
        return Lanczos(alphas, betas[:-1], float(betas[-1]), len(alphas))


class _OrthogonalityLoss:
    r"""Simon's recurrence for $\omega_{jk} \approx q_j^T q_k$."""

    def __init__(self, order: int, epsilon: float) -> None:
        self._epsilon = epsilon
        self._limit = epsilon**0.5
        self._previous = np.zeros(order + 1)
        self._current = np.zeros(order + 1)
        self._current[0] = 1.0
        self._again = False

    def is_large(self, alphas: list[float], betas: list[float], beta: float) -> bool:
        """Whether the next vector must be reorthogonalized, as must the one after it."""
        k = len(alphas) - 1
        following = np.zeros_like(self._current)
        if beta > 0 and k > 0:
            a, b = np.array(alphas), np.array(betas)  # b[j] couples j and j + 1
            inner = np.arange(k)
            omega = b[inner] * self._current[inner + 1]
            omega += (a[inner] - a[k]) * self._current[inner]
            omega[1:] += b[inner[1:] - 1] * self._current[inner[1:] - 1]
            omega -= b[k - 1] * self._previous[inner]
            noise = self._epsilon * (b[inner] + beta) * 0.3
            following[:k] = (omega + np.copysign(noise, omega)) / beta
        following[k] = self._epsilon
        following[k + 1] = 1.0
        large = self._again or bool(np.abs(following[: k + 1]).max() > self._limit)
        if large:
            following[: k + 1] = self._epsilon
        self._again = large and not self._again
        self._previous, self._current = self._current, following
        return large


@jax.jit
def three_terms(
    image: PyTree, current: PyTree, previous: PyTree, beta: Any
) -> tuple[jax.Array, PyTree, jax.Array]:
    alpha = tree_dot(current, image)
    rest = jax.tree.map(lambda w, q, p: w - alpha * q - beta * p, image, current, previous)
    # Removes what rounding left of the current vector.
    again = tree_dot(current, rest)
    rest = jax.tree.map(lambda r, q: r - again * q, rest, current)
    return alpha + again, rest, tree_norm(rest)


class ScaledProducts:
    """Products with an operator divided by a power of two close to its norm.

    Later computations neither overflow nor underflow, whatever the scale of the operator.

    Attributes:
      scale: the power of two, known from the first product that is not zero.
      num_matvecs: the products made so far.
    """

    def __init__(self, operator: Operator) -> None:
        self.scale = 1.0
        self.num_matvecs = 0
        self._operator = operator
        self._is_known = False

    def take(self, vectors: Sequence[PyTree]) -> list[PyTree]:
        """The scaled products of several vectors, or an error where one is not finite."""
        images = self._operator.products(vectors)
        self.num_matvecs += len(vectors)
        lengths = [float(tree_norm(image)) for image in images]
        if not np.all(np.isfinite(lengths)):
            raise ValueError(
                "a product with the operator is not finite: check the loss, the parameters and the "
                "precision."
            )
        if not self._is_known and max(lengths) > 0:
            self._is_known = True
            largest = jnp.finfo(jnp.result_type(*jax.tree.leaves(self._operator.like))).maxexp - 2
            self.scale = 2.0 ** max(-largest, min(largest, round(math.log2(max(lengths)))))
        return [_divided(image, self.scale) for image in images]


@jax.jit
def _divided(vector: PyTree, number: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / number.astype(leaf.dtype), vector)


def breakdown(operator: Operator, scale: float) -> float:
    """The length up to which a remainder is rounding error, for an operator of norm ``scale``.

    Vectors have length one, so it does not grow with their size.
    """
    return 10 * precision_of(operator.like) * max(scale, np.finfo(np.float64).tiny)


def precision_of(like: PyTree) -> float:
    """The machine epsilon of the widest dtype."""
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(like))).eps)
