r"""The trace of an operator, by probes alone or with its dominant part taken out first."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_count
from curvax._trees import PyTree, tree_dot
from curvax.curvature._hutchinson import TraceEstimate
from curvax.curvature._operator import Operator, in_groups
from curvax.spectrum._basis import Basis
from curvax.spectrum._lanczos import breakdown, finite_product, finite_products


def trace(
    operator: Operator,
    *,
    key: jax.Array,
    num_probes: int = 32,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    probe_batch_size: int = 1,
) -> TraceEstimate:
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
      probe_batch_size: the number of probes whose products are taken together, in one pass over
        the data: faster on an accelerator and where data are streamed, for as many vectors of
        memory. (The basis of ``"hutch++"`` is built one vector after the other all the same.)

    Returns:
      The estimate, in NumPy's float64. With ``"hutch++"`` it has no values by leaf (None), and no
      samples where nothing is left to estimate.

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
    check_count("probe_batch_size", probe_batch_size)
    check_choice("method", method, ("hutchinson", "hutch++"))
    if method == "hutch++":
        return _hutch_plus_plus(operator, key, min(num_probes, operator.size), probe_batch_size)
    per_leaf = _samples(operator, key, num_probes, probe_batch_size)
    totals = sum(jax.tree.leaves(per_leaf), start=np.zeros(num_probes))
    means = jax.tree.map(lambda samples: float(samples.mean()), per_leaf)
    errors = jax.tree.map(_standard_error, per_leaf)
    value = float(totals.mean())
    return TraceEstimate(value, _standard_error(totals), means, errors, totals, num_probes)


def _samples(
    operator: Operator, key: jax.Array, number: int, together: int, basis: Basis | None = None
) -> PyTree:
    """$z^T A z$ for random signs $z$, without their part in the basis, leaf by leaf."""
    samples = []
    for keys in in_groups(jax.random.split(key, number), together):
        probes = [operator.random_vector(part, "rademacher") for part in keys]
        if basis is not None:
            probes = [basis.orthogonalized(probe)[1] for probe in probes]
        images = finite_products(operator, probes)
        samples += [_leaf_dots(*pair) for pair in zip(probes, images, strict=True)]
    return jax.tree.map(lambda *values: np.array(values, np.float64), *samples)


@jax.jit
def _leaf_dots(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.sum(a * b), first, second)


def _hutch_plus_plus(
    operator: Operator, key: jax.Array, number: int, together: int
) -> TraceEstimate:
    basis = Basis(operator.like, number)
    dominant, size, num_matvecs = 0.0, 0, 0
    key_range, key_rest = jax.random.split(key)
    scale = 0.0
    for part in jax.random.split(key_range, number):
        image = finite_product(operator, operator.random_vector(part))
        num_matvecs += 1
        _, rest, length = basis.orthogonalized(image)
        scale = max(scale, length)
        if length <= breakdown(operator, scale):
            continue
        basis.put(rest, length, size)
        direction = jax.tree.map(lambda leaf, b=length: leaf / b, rest)
        dominant += float(tree_dot(direction, finite_product(operator, direction)))
        num_matvecs += 1
        size += 1
    if size == operator.size:
        return TraceEstimate(dominant, 0.0, None, None, np.zeros(0), num_matvecs)
    per_leaf = _samples(operator, key_rest, number, together, basis)
    left = sum(jax.tree.leaves(per_leaf), start=np.zeros(number))
    value = dominant + float(left.mean())
    return TraceEstimate(value, _standard_error(left), None, None, left, num_matvecs + number)


def _standard_error(samples: np.ndarray) -> float:
    if len(samples) < 2:
        return float("nan")
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))
