r"""The trace of an operator, by probes alone or with its dominant part taken out first."""

from typing import Any, NamedTuple

import jax
import numpy as np

from curvax._checks import check_choice, check_count
from curvax._trees import tree_dot
from curvax.spectrum._basis import Basis
from curvax.spectrum._lanczos import ScaledProducts, breakdown
from curvax.spectrum._operator import Operator, in_groups

METHODS = ("hutchinson", "hutch++")


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
      value: the estimate.
      standard_error: its standard error; zero where nothing is left to estimate, NaN for a single
        probe.
      samples: what each probe gave, of shape (num_probes,).
      num_matvecs: the number of matrix-vector products.
    """

    value: float
    standard_error: float
    samples: np.ndarray
    num_matvecs: int


def trace(
    operator: Operator,
    *,
    key: jax.Array,
    num_probes: int = 32,
    method: str = "hutchinson",
    probes_together: int = 1,
) -> Trace:
    r"""The trace of an operator, with a standard error.

    ``"hutchinson"`` averages $z^T A z$ over Rademacher probes. ``"hutch++"`` spends a third of its
    products on a basis $Q$ of the range of $A S$ with random $S$, a third on the exact trace of
    $Q^T A Q$, and a third on probes of what is left, $(I - Q Q^T) A (I - Q Q^T)$: where a few
    eigenvalues dominate, as in networks, its variance is much smaller.

    Args:
      operator: a symmetric operator.
      key: a PRNG key for the probes.
      num_probes: the number of probes; ``"hutch++"`` makes three products for each.
      method: ``"hutchinson"`` or ``"hutch++"``.
      probes_together: the number of probes whose products are taken together, in one pass over the
        data: faster on an accelerator and where data are streamed, for as many vectors of memory.
        (The basis of ``"hutch++"`` is built one vector after the other all the same.)

    Returns:
      The estimate.

    Raises:
      ValueError: if a product is not finite, or an option is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> matrix = jnp.array([[2.0, 0.5], [0.5, 3.0]])
      >>> operator = spectrum.Operator(lambda vector: matrix @ vector, jnp.zeros(2))
      >>> result = spectrum.trace(operator, key=jax.random.key(0), method="hutch++")
      >>> print(round(result.value, 4), result.standard_error)
      5.0 0.0

    References:
      Hutchinson, [A stochastic estimator of the
      trace](https://doi.org/10.1080/03610918908812806), 1989. Meyer et al.,
      [Hutch++](https://arxiv.org/abs/2010.09649), 2021, Algorithm 1.
    """
    check_count("num_probes", num_probes)
    check_count("probes_together", probes_together)
    check_choice("method", method, METHODS)
    products = ScaledProducts(operator)
    if method == "hutchinson":
        samples = _quadratic_forms(operator, products, key, num_probes, probes_together)
        return _result(0.0, samples, products)
    return _hutch_plus_plus(
        operator, products, key, min(num_probes, operator.size), probes_together
    )


def _quadratic_forms(
    operator: Operator,
    products: ScaledProducts,
    key: jax.Array,
    number: int,
    together: int,
    basis: Basis | None = None,
) -> np.ndarray:
    """$z^T A z$ for random signs $z$, without their part in the basis."""
    samples = []
    for keys in in_groups(jax.random.split(key, number), together):
        probes = [operator.random_vector(part, "rademacher") for part in keys]
        if basis is not None:
            probes = [basis.orthogonalized(probe)[1] for probe in probes]
        images = products.take(probes)
        samples += [float(tree_dot(*pair)) for pair in zip(probes, images, strict=True)]
    return np.array(samples)


def _hutch_plus_plus(
    operator: Operator, products: ScaledProducts, key: jax.Array, number: int, together: int
) -> Trace:
    basis = Basis(operator.like, number)
    dominant, size, scale = 0.0, 0, 0.0
    key_range, key_rest = jax.random.split(key)
    for part in jax.random.split(key_range, number):
        (image,) = products.take([operator.random_vector(part)])
        _, rest, length = basis.orthogonalized(image)
        scale = max(scale, length)
        if length <= breakdown(operator, scale):
            continue
        basis.put(rest, length, size)
        direction = jax.tree.map(lambda leaf, b=length: leaf / b, rest)
        dominant += float(tree_dot(direction, products.take([direction])[0]))
        size += 1
    if size == operator.size:
        return Trace(products.scale * dominant, 0.0, np.zeros(0), products.num_matvecs)
    rest_samples = _quadratic_forms(operator, products, key_rest, number, together, basis)
    return _result(dominant, rest_samples, products)


def _result(dominant: float, samples: np.ndarray, products: ScaledProducts) -> Trace:
    samples = products.scale * samples
    value = products.scale * dominant + float(samples.mean())
    return Trace(value, _standard_error(samples), samples, products.num_matvecs)


def _standard_error(samples: np.ndarray) -> Any:
    if len(samples) < 2:
        return float("nan")
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))
