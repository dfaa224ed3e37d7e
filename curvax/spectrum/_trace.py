r"""The trace of an operator, from probes alone or after deflating its dominant part."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import as_key, check_choice, check_count
from curvax._trees import PyTree, tree_dot
from curvax.curvature._hutchinson import TraceEstimate
from curvax.curvature._operator import Operator, in_groups
from curvax.spectrum._basis import Basis
from curvax.spectrum._lanczos import ScaledProducts, breakdown

Method = Literal["hutchinson", "hutch++"]


def trace(
    operator: Operator,
    *,
    key: jax.Array | int,
    num_probes: int = 32,
    method: Method = "hutchinson",
    probe_batch_size: int = 1,
) -> TraceEstimate[Any]:
    r"""Estimates the trace of an operator, with a standard error.

    ``"hutchinson"`` averages $z^T A z$ over Rademacher probes. ``"hutch++"`` spends a third of its
    products on a basis $Q$ of the range of $A S$ with random $S$, a third on the exact trace of
    $Q^T A Q$, and a third on probes of the deflated operator, $(I - Q Q^T) A (I - Q Q^T)$: where a
    few eigenvalues dominate, as in networks, its variance is much smaller.

    Args:
      operator: a symmetric operator.
      key: a PRNG key for the probes, or an integer seed.
      num_probes: the number of probes; ``"hutch++"`` makes three products for each.
      method: ``"hutchinson"`` or ``"hutch++"``.
      probe_batch_size: the number of probes whose products are computed together, in one pass over
        the data: faster on an accelerator and with streamed data, but takes the memory of as many
        vectors. (The basis of ``"hutch++"`` is still built one vector at a time.)

    Returns:
      The estimate, in NumPy's float64. With ``"hutch++"`` it has no values per leaf (None), and no
      samples if the basis spans the whole space.

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
    check_choice("method", method, get_args(Method))
    key, products = as_key(key), ScaledProducts(operator)
    if method == "hutch++":
        number = min(num_probes, operator.size)
        return _hutch_plus_plus(operator, products, key, number, probe_batch_size)
    per_leaf = _samples(operator, products, key, num_probes, probe_batch_size)
    totals = sum(jax.tree.leaves(per_leaf), start=np.zeros(num_probes))
    means = jax.tree.map(lambda samples: float(samples.mean()), per_leaf)
    errors = jax.tree.map(_standard_error, per_leaf)
    value = float(totals.mean())
    return TraceEstimate(value, _standard_error(totals), means, errors, totals, num_probes)


def _samples(
    operator: Operator,
    products: ScaledProducts,
    key: jax.Array,
    number: int,
    together: int,
    basis: Basis | None = None,
) -> PyTree:
    """$z^T A z$ for random signs $z$, orthogonalized to the basis, leaf by leaf."""
    samples: list[PyTree] = []
    for keys in in_groups(jax.random.split(key, number), together):
        probes = [operator.random_vector(part, "rademacher") for part in keys]
        if basis is not None:
            probes = [basis.orthogonalized(probe)[1] for probe in probes]
        images = products.take(probes)
        samples += [_leaf_dots(*pair) for pair in zip(probes, images, strict=True)]
    return jax.tree.map(lambda *values: products.scale * np.array(values, np.float64), *samples)


@jax.jit
def _leaf_dots(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.sum(a * b), first, second)


def _hutch_plus_plus(
    operator: Operator, products: ScaledProducts, key: jax.Array, number: int, together: int
) -> TraceEstimate[Any]:
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
        left = np.zeros(0)
        return TraceEstimate(products.scale * dominant, 0.0, None, None, left, products.num_matvecs)
    per_leaf = _samples(operator, products, key_rest, number, together, basis)
    left = sum(jax.tree.leaves(per_leaf), start=np.zeros(number))
    value = products.scale * dominant + float(left.mean())
    return TraceEstimate(value, _standard_error(left), None, None, left, products.num_matvecs)


def _standard_error(samples: np.ndarray) -> float:
    if len(samples) < 2:
        return float("nan")
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))
