r"""The spectral density by stochastic Lanczos quadrature.

From a random start vector $v$ of length one, Lanczos gives nodes $\theta_i$ and weights
$\tau_i = (e_1^T s_i)^2$ that integrate polynomials up to degree $2k - 1$ exactly against the
measure $\sum_j (v^T u_j)^2\, \delta_{\lambda_j}$, whose expectation over $v$ is the density
$\frac1d \sum_j \delta_{\lambda_j}$.
"""

from typing import NamedTuple

import jax
import numpy as np

from curvax._checks import as_key, check_count, check_range
from curvax._progress import progress_bar
from curvax.curvature._operator import Operator, in_groups
from curvax.spectrum._lanczos import Reorthogonalization, lanczos_together

_RESAMPLES = 200


class SpectralDensity(NamedTuple):
    r"""A spectral density, smoothed on a grid, and the raw quadrature.

    Attributes:
      grid: eigenvalues, of shape (g,).
      density: the smoothed density there; it integrates to one.
      standard_error: its standard error over probes; NaN for a single probe.
      nodes: a list of arrays, the Ritz values of each probe.
      weights: a list of arrays, their weights, which sum to one for each probe.
      bandwidth: the standard deviation of the smoothing Gaussian.
      wasserstein_error: an estimated bound on the Wasserstein distance to the true density, in
        units of eigenvalues: the spread over probes (97.5 % of bootstrap resamples) plus, for the
        truncation, the range of the nodes divided by the order. Infinite for a single probe.
      num_matvecs: the number of matrix-vector products.
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    nodes: list[np.ndarray]
    weights: list[np.ndarray]
    bandwidth: float
    wasserstein_error: float
    num_matvecs: int

    def smoothed(self, grid: np.ndarray, bandwidth: float) -> np.ndarray:
        """The density on another grid, with another bandwidth."""
        return np.mean(_smooth(self.nodes, self.weights, grid, bandwidth), axis=0)


def spectral_density(
    operator: Operator,
    *,
    key: jax.Array | int,
    order: int = 64,
    num_probes: int = 8,
    probe_batch_size: int = 1,
    bandwidth: float | None = None,
    grid_size: int = 1024,
    reorthogonalize: Reorthogonalization = "full",
    progress: bool = False,
) -> SpectralDensity:
    r"""The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    It takes the memory of ``probe_batch_size`` Lanczos bases of ``order`` vectors each (three with
    ``reorthogonalize="none"``).

    Args:
      operator: a symmetric operator.
      key: a PRNG key for the probes, or an integer seed.
      order: the number of Lanczos steps $k$ for each probe; at most the operator's size.
      num_probes: the number of probes. The error falls with the square root of this number, and
        with the square root of the operator's size.
      probe_batch_size: the number of probes whose products are computed together, in one pass over
        the data: faster on an accelerator and with streamed data.
      bandwidth: the standard deviation of the Gaussians; by default the range divided by
        ``2 order``.
      grid_size: the number of grid points.
      reorthogonalize: as in `lanczos`.
      progress: whether a progress bar is shown.

    Returns:
      The density with its errors, nodes and weights.

    Raises:
      ValueError: if a product is not finite, or an option is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> entries = jnp.where(jnp.arange(100) < 25, 3.0, 1.0)
      >>> operator = spectrum.Operator(
      ...     lambda vector: entries * vector, jnp.zeros(100)
      ... )
      >>> result = spectrum.spectral_density(
      ...     operator, key=jax.random.key(0), num_probes=20
      ... )
      >>> above = result.grid > 2
      >>> share = (result.density[above] * (result.grid[1] - result.grid[0])).sum()
      >>> bool(abs(share - 0.25) < 0.05)
      True

    References:
      Ubaru, Chen and Saad, [Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature](https://doi.org/10.1137/16M1104974), 2017. Ghorbani, Krishnan and Xiao, [An
      investigation into neural net optimization via Hessian eigenvalue
      density](https://arxiv.org/abs/1901.10159), 2019.
    """
    check_count("order", order)
    check_count("num_probes", num_probes)
    check_count("probe_batch_size", probe_batch_size)
    check_count("grid_size", grid_size)
    if bandwidth is not None:
        check_range("bandwidth", bandwidth, low=0.0, open_low=True)
    nodes, weights, num_matvecs = [], [], 0
    with progress_bar(num_probes, "probes", progress) as advance:
        for keys in in_groups(jax.random.split(as_key(key), num_probes), probe_batch_size):
            starts = [operator.random_vector(probe_key) for probe_key in keys]
            for result in lanczos_together(
                operator, starts, order, reorthogonalize=reorthogonalize
            ):
                values, vectors = result.eigh()
                nodes.append(values)
                weights.append(vectors[0] ** 2)
                num_matvecs += result.num_matvecs
                advance()
    low, high = min(map(np.min, nodes)), max(map(np.max, nodes))
    extent = high - low
    size = max(abs(low), abs(high)) or 1.0
    width = bandwidth or max(extent, 1e-6 * size) / (2 * order)
    grid = np.linspace(low - 4 * width, high + 4 * width, grid_size)
    curves = _smooth(nodes, weights, grid, width)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (
            curves.std(axis=0, ddof=1) / np.sqrt(num_probes)
            if num_probes > 1
            else np.full(grid_size, np.nan)
        )
    error = _bootstrap(nodes, weights) + extent / min(order, operator.size)
    if all(len(values) == operator.size for values in nodes):
        error = _bootstrap(nodes, weights)  # nothing is truncated
    return SpectralDensity(
        grid, curves.mean(axis=0), spread, nodes, weights, width, error, num_matvecs
    )


def wasserstein_distance(
    nodes: np.ndarray, weights: np.ndarray, others: np.ndarray, other_weights: np.ndarray
) -> float:
    """The distance between two weighted sets of points: the area between their cumulative sums.

    Args:
      nodes: the points of the first set, of shape (n,).
      weights: their positive weights; only ratios matter.
      others: the points of the second set, of shape (k,).
      other_weights: their weights.

    Returns:
      The Wasserstein distance of order one, in the units of the points.

    Example:
      >>> import numpy as np
      >>> from curvax import spectrum
      >>> spectrum.wasserstein_distance(
      ...     np.array([0.0, 1.0]), np.ones(2), np.ones(1), np.ones(1)
      ... )
      0.5
    """
    points = np.concatenate([nodes, others])
    signed = np.concatenate([weights / weights.sum(), -other_weights / other_weights.sum()])
    order = np.argsort(points)
    return float(np.abs(np.cumsum(signed[order])[:-1]) @ np.diff(points[order]))


def _smooth(
    nodes: list[np.ndarray], weights: list[np.ndarray], grid: np.ndarray, width: float
) -> np.ndarray:
    """The smoothed density of each probe, of shape (probes, grid)."""

    def of_probe(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
        distances = (grid[:, np.newaxis] - values) / width
        return np.exp(-(distances**2) / 2) @ shares / (width * np.sqrt(2 * np.pi))

    return np.stack([of_probe(*pair) for pair in zip(nodes, weights, strict=True)])


def _bootstrap(nodes: list[np.ndarray], weights: list[np.ndarray]) -> float:
    """The 97.5 % quantile of resamples' distances to the mean over all probes."""
    number = len(nodes)
    if number == 1:
        return np.inf
    generator = np.random.default_rng(0)
    points = np.concatenate(nodes)
    owners = np.repeat(np.arange(number), [len(values) for values in nodes])
    shares = np.concatenate(weights) / number
    order = np.argsort(points)
    gaps = np.diff(points[order])
    distances = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(generator.integers(number, size=number), minlength=number)
        signed = shares * (counts[owners] - 1)
        distances.append(np.abs(np.cumsum(signed[order])[:-1]) @ gaps)
    return float(np.quantile(distances, 0.975))
