r"""Estimates of the Hessian's diagonal and trace, with standard errors, and exact ones.

For a probe $z$ with $E[z z^T] = I$,

$$
E[z \odot Hz] = \operatorname{diag}(H), \qquad E[z^T H z] = \operatorname{tr}(H),
$$

so the mean over probes estimates, and the spread over probes tells how well. The gradient is
linearized once; the probes then run through the linear map in batches of
``probe_batch_size``, and only running sums are kept.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax._checks import check_choice, check_count
from curvax._trees import Differentiable, PyTree, is_inexact, widen
from curvax.curvature._probes import Distribution, random_probe, times_probe
from curvax.curvature._products import Mode, linearized_hvp

Method = Literal["hutchinson", "exact"]


class DiagEstimate(NamedTuple):
    """An estimate of a Hessian's diagonal.

    Attributes:
      value: a tree like ``params``, in float32 or wider.
      standard_error: a tree like ``params``: one standard deviation of ``value``; NaN with a
        single probe, which tells nothing of its spread, and 0 where the value is exact.
    """

    value: PyTree
    standard_error: PyTree


class TraceEstimate(NamedTuple):
    """An estimate of a Hessian's trace, whole and leaf by leaf.

    Attributes:
      value: a float32 or wider scalar.
      standard_error: one standard deviation of ``value``; NaN with a single probe and 0
        where the value is exact.
      per_leaf: a tree like ``params`` of scalars, the trace of each leaf's diagonal block;
        they add up to ``value``.
      per_leaf_standard_error: a tree like ``params`` of scalars.
    """

    value: jax.Array
    standard_error: jax.Array
    per_leaf: PyTree
    per_leaf_standard_error: PyTree


class _Moments(NamedTuple):
    """Running mean and sum of squared deviations over samples (Chan et al., 1979)."""

    num_samples: jax.Array
    mean: PyTree
    deviations: PyTree

    @classmethod
    def zeros(cls, like: PyTree) -> "_Moments":
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        return cls(jnp.zeros(()), zeros, zeros)

    def add(self, samples: PyTree) -> "_Moments":
        """The moments with a batch of samples, along the leaves' first axes, added."""
        size = jax.tree.leaves(samples)[0].shape[0]
        mean = jax.tree.map(lambda s: jnp.mean(s, axis=0), samples)
        total = self.num_samples + size

        def joint_mean(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + (new - old) * (size / total).astype(old.dtype)

        def joint_deviations(
            old: jax.Array, old_mean: jax.Array, new: jax.Array, batch: jax.Array
        ) -> jax.Array:
            between = jnp.square(new - old_mean) * (self.num_samples * size / total).astype(
                old.dtype
            )
            return old + jnp.sum(jnp.square(batch - new), axis=0) + between

        return _Moments(
            total,
            jax.tree.map(joint_mean, self.mean, mean),
            jax.tree.map(joint_deviations, self.deviations, self.mean, mean, samples),
        )

    def standard_error(self) -> PyTree:
        divisor = self.num_samples * (self.num_samples - 1)
        return jax.tree.map(lambda d: jnp.sqrt(d / divisor.astype(d.dtype)), self.deviations)


def hessian_diag(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    key: jax.Array | None = None,
    num_probes: int = 32,
    probe_batch_size: int = 1,
    distribution: Distribution = "rademacher",
    method: Method = "hutchinson",
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> DiagEstimate:
    r"""Estimates the diagonal of a loss's Hessian, with its standard error.

    $$
    \operatorname{diag}(H) \approx \frac{1}{S} \sum_{s=1}^{S} z_s \odot H z_s
    $$

    With Rademacher probes the variance of an entry is
    $\frac{1}{S} \sum_{j \ne i} H_{ij}^2$; normal probes add
    $\frac{2}{S} H_{ii}^2$.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      params: a tree of arrays, the point at which the Hessian is taken.
      *args: further arguments of ``fun``.
      key: a PRNG key; not needed by ``"exact"``.
      num_probes: the number of probes $S$.
      probe_batch_size: how many products are vectorized; the rest follow one batch after
        the other. One keeps the memory at that of a single product; larger is faster. (On
        CPU the gradients of a convolution are slow in any loop: there set it to
        ``num_probes``.)
      distribution: ``"rademacher"`` or ``"normal"``.
      method: ``"hutchinson"``, or ``"exact"``: one product for each parameter, for models
        of up to some ten thousand of them.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: how products are taken, see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A `curvax.DiagEstimate`: ``.value`` and ``.standard_error``, trees with the shapes of
      ``params`` in float32 or wider. A complex leaf holds
      $\partial^2/\partial x^2 + i\,\partial^2/\partial y^2$.

    Raises:
      ValueError: on an option out of range, a missing key, or a loss that is not a real
        scalar.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> def loss(x):
      ...     return x @ matrix @ x / 2
      >>> curvax.hessian_diag(loss, jnp.ones(2), method="exact").value
      Array([2., 3.], dtype=float32)
      >>> estimate = curvax.hessian_diag(loss, jnp.ones(2), key=jax.random.key(1))
      >>> error = jnp.abs(estimate.value - jnp.array([2.0, 3.0]))
      >>> bool(jnp.all(error < 4 * estimate.standard_error))
      True

    References:
      Bekas et al., [An estimator for the diagonal of a
      matrix](https://doi.org/10.1016/j.apnum.2007.01.003), 2007.
    """
    product = linearized_hvp(fun, params, *args, has_aux=has_aux, mode=mode, **kwargs)
    if _is_exact(method):
        value = _exact_diag(product, params, probe_batch_size)
        return DiagEstimate(value, jax.tree.map(jnp.zeros_like, value))

    def sample(probe_key: jax.Array) -> PyTree:
        probe = random_probe(probe_key, params, distribution)
        return jax.tree.map(_wide_real, times_probe(probe, product(probe)))

    moments = _sample_moments(sample, key, num_probes, probe_batch_size)
    pair = moments.mean, moments.standard_error()
    return DiagEstimate(*(jax.tree.map(_as_leaf, params, tree) for tree in pair))


def hessian_trace(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    key: jax.Array | None = None,
    num_probes: int = 32,
    probe_batch_size: int = 1,
    distribution: Distribution = "rademacher",
    method: Method = "hutchinson",
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> TraceEstimate:
    r"""Estimates the trace of a loss's Hessian, whole and leaf by leaf.

    $$
    \operatorname{tr}(H) \approx \frac{1}{S} \sum_{s=1}^{S} z_s^T H z_s
    $$

    The sum of $z \odot Hz$ over one leaf estimates the trace of that leaf's diagonal
    block, so layer-wise traces cost nothing more. With Rademacher probes the variance is
    $\frac{2}{S} \sum_{i \ne j} H_{ij}^2$.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      params: a tree of arrays, the point at which the Hessian is taken.
      *args: further arguments of ``fun``.
      key: a PRNG key; not needed by ``"exact"``.
      num_probes: the number of probes $S$.
      probe_batch_size: how many products are vectorized, see `curvax.hessian_diag`.
      distribution: ``"rademacher"`` or ``"normal"``.
      method: ``"hutchinson"``, or ``"exact"``: one product for each parameter.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: how products are taken, see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A `curvax.TraceEstimate`: ``.value``, ``.standard_error``, ``.per_leaf`` and
      ``.per_leaf_standard_error``, in float32 or wider. A complex leaf counts as two real
      ones.

    Raises:
      ValueError: on an option out of range, a missing key, or a loss that is not a real
        scalar.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def loss(params):
      ...     return jnp.sum(params["a"] ** 2) + 3 * params["a"][0] * params["b"]
      >>> params = {"a": jnp.ones(2), "b": jnp.array(1.0)}
      >>> trace = curvax.hessian_trace(loss, params, method="exact")
      >>> float(trace.value), float(trace.per_leaf["a"]), float(trace.per_leaf["b"])
      (4.0, 4.0, 0.0)

    References:
      Hutchinson, [A stochastic estimator of the trace of the influence
      matrix](https://doi.org/10.1080/03610918908812806), 1989.
    """
    product = linearized_hvp(fun, params, *args, has_aux=has_aux, mode=mode, **kwargs)
    if _is_exact(method):
        diag = _exact_diag(product, params, probe_batch_size)
        per_leaf = jax.tree.map(lambda d: jnp.sum(_wide_real(d)), diag)
        zeros = jax.tree.map(jnp.zeros_like, per_leaf)
        total = _sum(per_leaf)
        return TraceEstimate(total, jnp.zeros_like(total), per_leaf, zeros)

    def sample(probe_key: jax.Array) -> tuple[jax.Array, PyTree]:
        probe = random_probe(probe_key, params, distribution)
        diag = jax.tree.map(_wide_real, times_probe(probe, product(probe)))
        per_leaf = jax.tree.map(jnp.sum, diag)
        return _sum(per_leaf), per_leaf

    moments = _sample_moments(sample, key, num_probes, probe_batch_size)
    (value, per_leaf), errors = moments.mean, moments.standard_error()
    return TraceEstimate(value, errors[0], per_leaf, errors[1])


def _is_exact(method: Method) -> bool:
    check_choice("method", method, ("hutchinson", "exact"))
    return method == "exact"


def _sum(per_leaf: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(per_leaf), start=jnp.zeros(()))


def _sample_moments(
    sample: Callable[[jax.Array], PyTree],
    key: jax.Array | None,
    num_probes: int,
    probe_batch_size: int,
) -> _Moments:
    """The moments of ``num_probes`` samples, of which one batch is alive at a time."""
    check_count("num_probes", num_probes)
    check_count("probe_batch_size", probe_batch_size)
    if key is None:
        raise ValueError('a random estimate needs a key; pass key= or method="exact".')
    keys = jax.random.split(key, num_probes)
    moments = _Moments.zeros(jax.eval_shape(sample, keys[0]))
    batch = min(probe_batch_size, num_probes)
    whole = num_probes // batch * batch

    def step(moments: _Moments, keys: jax.Array) -> tuple[_Moments, None]:
        return moments.add(jax.vmap(sample)(keys)), None

    batches = keys[:whole].reshape(whole // batch, batch, *keys.shape[1:])
    moments, _ = jax.lax.scan(step, moments, batches)
    if whole < num_probes:
        moments, _ = step(moments, keys[whole:])
    return moments


def _exact_diag(product: Callable[[PyTree], PyTree], params: PyTree, batch_size: int) -> PyTree:
    """One product for each real coordinate, ``batch_size`` of them vectorized."""
    check_count("probe_batch_size", batch_size)
    tree = Differentiable.of(params)

    def leaf_diag(position: int, leaf: jax.Array) -> jax.Array:
        def entry(index: jax.Array, unit: complex) -> jax.Array:
            where = jnp.unravel_index(index, leaf.shape)
            basis = [jnp.zeros_like(other) for other in tree.leaves]
            basis[position] = basis[position].at[where].set(unit)
            column = jax.tree.leaves(product(tree.treedef.unflatten(basis)))[position]
            return widen(column[where])

        def entries(unit: complex) -> jax.Array:
            indices = jnp.arange(leaf.size)
            found = jax.lax.map(lambda i: entry(i, unit), indices, batch_size=batch_size)
            return found.reshape(leaf.shape)

        if not is_inexact(leaf) or leaf.size == 0:
            return _wide_real(jnp.zeros_like(leaf))
        if jnp.iscomplexobj(leaf):
            return jax.lax.complex(jnp.real(entries(1)), -jnp.imag(entries(1j)))
        return entries(1)

    return tree.treedef.unflatten(map(leaf_diag, range(len(tree.leaves)), tree.leaves))


def _wide_real(leaf: jax.Array) -> jax.Array:
    """A leaf as real numbers in float32 or wider, a complex one with a last axis of two."""
    if jnp.iscomplexobj(leaf):
        return jnp.stack([jnp.real(leaf), jnp.imag(leaf)], axis=-1)
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _as_leaf(leaf: jax.Array, real: jax.Array) -> jax.Array:
    return jax.lax.complex(real[..., 0], real[..., 1]) if jnp.iscomplexobj(leaf) else real
