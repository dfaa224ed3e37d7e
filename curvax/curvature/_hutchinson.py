r"""Estimates of the Hessian's diagonal and trace, with standard errors, and exact ones.

For a probe $z$ with $E[z z^T] = I$,

$$
E[z \odot Hz] = \operatorname{diag}(H), \qquad E[z^T H z] = \operatorname{tr}(H),
$$

so the mean over probes is the estimate, and their spread gives its standard error. The gradient is
linearized once; the linear map is applied to the probes in batches of ``probe_batch_size``, and
only running sums are kept. All of it is compiled once for a loss.
"""

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import (
    as_key,
    check_arrays,
    check_choice,
    check_count,
    check_keywords,
    warn_of_batch_stats,
)
from curvax._trees import Differentiable, PyTree, Tree, is_inexact, varying_like, widen
from curvax.curvature._compiled import Static, compiled_once
from curvax.curvature._modes import Mode
from curvax.curvature._probes import Distribution, random_probe, times_probe
from curvax.curvature._products import linearized_hvp

Method = Literal["hutchinson", "exact"]


class DiagEstimate(NamedTuple, Generic[Tree]):
    """An estimate of a Hessian's diagonal.

    Attributes:
      value: a tree like ``params``, in float32 or wider.
      standard_error: a tree like ``params``: one standard deviation of ``value``; NaN with a single
        probe, and 0 where the value is exact.
    """

    value: Tree
    standard_error: Tree


class TraceEstimate(NamedTuple, Generic[Tree]):
    """An estimate of a Hessian's or operator's trace, whole and leaf by leaf.

    Attributes:
      value: a float32 or wider scalar.
      standard_error: one standard deviation of ``value``; NaN with a single probe and 0
        where the value is exact.
      per_leaf: a tree like ``params`` of scalars, the trace of each leaf's diagonal block;
        they add up to ``value``. None where the method has none.
      per_leaf_standard_error: a tree like ``params`` of scalars, or None.
      samples: the estimate from each probe, of shape (num_probes,); of shape (0,) where the value
        is exact.
      num_matvecs: the number of matrix-vector products.
    """

    value: jax.Array | float
    standard_error: jax.Array | float
    per_leaf: Tree
    per_leaf_standard_error: Tree
    samples: jax.Array | np.ndarray
    num_matvecs: int


class _Options(NamedTuple):
    """The static options of an estimate."""

    num_probes: int
    probe_batch_size: int
    distribution: Distribution
    method: Method
    has_aux: bool
    mode: Mode


class _Moments(NamedTuple):
    """Running mean and sum of squared deviations over samples (Chan et al., 1979)."""

    num_samples: jax.Array
    mean: PyTree
    deviations: PyTree

    @classmethod
    def zeros(cls, like: PyTree) -> "_Moments":
        zeros = jax.tree.map(lambda s: varying_like(jnp.zeros(s.shape, s.dtype), s), like)
        return cls(jnp.zeros(()), zeros, zeros)

    def add(self, samples: PyTree, size: int) -> "_Moments":
        """The moments with ``size`` samples, along the leaves' first axes, added."""
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
    params: Tree,
    *args: Any,
    key: jax.Array | int | None = None,
    num_probes: int = 32,
    probe_batch_size: int = 1,
    distribution: Distribution = "rademacher",
    method: Method = "hutchinson",
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> DiagEstimate[Tree]:
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
      params: a tree of arrays, the point at which to evaluate the Hessian.
      *args: further arguments of ``fun``. Their arrays may change without recompilation; anything
        else, such as a Python number, is static. As under ``jax.jit``, ``fun`` sees the values that
        it closed over at the first call.
      key: a PRNG key or an integer seed; not needed by ``"exact"``.
      num_probes: the number of probes $S$.
      probe_batch_size: the number of products vectorized at a time. One takes the memory of a
        single product; larger is faster. (On a CPU the gradients of a convolution are slow inside
        the compiled estimate, whatever this is: there, average
        `curvax.value_grad_and_hessian_diag` over keys in a Python loop, and take a trace by
        `curvax.spectrum.trace`.)
      distribution: ``"rademacher"`` or ``"normal"``.
      method: ``"hutchinson"``, or ``"exact"``: one product per parameter, for models of up to about
        ten thousand parameters.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: how to compute products; see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A `curvax.DiagEstimate`: ``.value`` and ``.standard_error``, trees with the shapes of
      ``params`` in float32 or wider. A complex leaf holds
      $\partial^2/\partial x^2 + i\,\partial^2/\partial y^2$.

    Raises:
      ValueError: if an option is out of range, the key is missing, or the loss is not a real scalar
        or has a keyword that is an option here.

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
    options = _Options(num_probes, probe_batch_size, distribution, method, has_aux, mode)
    return _estimate("hessian_diag", _diag, fun, params, args, kwargs, key, options)


def hessian_trace(
    fun: Callable[..., Any],
    params: Tree,
    *args: Any,
    key: jax.Array | int | None = None,
    num_probes: int = 32,
    probe_batch_size: int = 1,
    distribution: Distribution = "rademacher",
    method: Method = "hutchinson",
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> TraceEstimate[Tree]:
    r"""Estimates the trace of a loss's Hessian, whole and leaf by leaf.

    $$
    \operatorname{tr}(H) \approx \frac{1}{S} \sum_{s=1}^{S} z_s^T H z_s
    $$

    The sum of $z \odot Hz$ over one leaf estimates the trace of that leaf's diagonal
    block, so layer-wise traces are free. With Rademacher probes the variance is
    $\frac{2}{S} \sum_{i \ne j} H_{ij}^2$.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      params: a tree of arrays, the point at which to evaluate the Hessian.
      *args: further arguments of ``fun``, see `curvax.hessian_diag`.
      key: a PRNG key or an integer seed; not needed by ``"exact"``.
      num_probes: the number of probes $S$.
      probe_batch_size: the number of products vectorized at a time; see `curvax.hessian_diag`.
      distribution: ``"rademacher"`` or ``"normal"``.
      method: ``"hutchinson"``, or ``"exact"``: one product per parameter.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: how to compute products; see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A `curvax.TraceEstimate` in float32 or wider. A complex leaf counts as two real ones.

    Raises:
      ValueError: if an option is out of range, the key is missing, or the loss is not a real scalar
        or has a keyword that is an option here.

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
    options = _Options(num_probes, probe_batch_size, distribution, method, has_aux, mode)
    estimate = _estimate("hessian_trace", _trace, fun, params, args, kwargs, key, options)
    num_matvecs = num_probes
    if method == "exact":
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params) if is_inexact(leaf)]
        num_matvecs = sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves)
    return estimate._replace(num_matvecs=num_matvecs)


def _estimate(
    name: str,
    estimator: Callable[..., Any],
    fun: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: jax.Array | int | None,
    options: _Options,
) -> Any:
    """Checks the options, and calls the estimator that is compiled for ``fun``."""
    check_choice("method", options.method, get_args(Method))
    check_choice("mode", options.mode, get_args(Mode))
    check_count("num_probes", options.num_probes)
    check_count("probe_batch_size", options.probe_batch_size)
    check_keywords(name, fun, ("key", *_Options._fields))
    check_arrays(params)
    warn_of_batch_stats(params)
    if key is None and options.method != "exact":
        raise ValueError('a random estimate needs a key; pass key= or method="exact".')
    arrays, static = Static.split((args, kwargs))
    compiled = compiled_once(_compiled, fun, estimator=estimator)
    return compiled(options, static, params, arrays, as_key(key))


def _compiled(fun: Callable[..., Any], *, estimator: Callable[..., Any]) -> Callable[..., Any]:
    def estimate(
        options: _Options, static: Static, params: PyTree, arrays: Any, key: jax.Array
    ) -> Any:
        args, kwargs = static.merge(arrays)
        product = linearized_hvp(
            fun, params, *args, has_aux=options.has_aux, mode=options.mode, **kwargs
        )
        return estimator(product, params, key, options)

    return jax.jit(estimate, static_argnums=(0, 1))


def _diag(
    product: Callable[[Tree], Tree], params: Tree, key: jax.Array, options: _Options
) -> DiagEstimate[Tree]:
    if options.method == "exact":
        value = _exact_diag(product, params, options.probe_batch_size)
        return DiagEstimate(value, jax.tree.map(jnp.zeros_like, value))

    def sample(probe_key: jax.Array) -> tuple[PyTree, None]:
        probe = random_probe(probe_key, params, options.distribution)
        return jax.tree.map(_wide_real, times_probe(probe, product(probe))), None

    moments, _ = _sample_moments(sample, key, options)
    pair = moments.mean, moments.standard_error()
    return DiagEstimate(*(jax.tree.map(_as_leaf, params, tree) for tree in pair))


def _trace(
    product: Callable[[Tree], Tree], params: Tree, key: jax.Array, options: _Options
) -> TraceEstimate[Tree]:
    if options.method == "exact":
        diag = _exact_diag(product, params, options.probe_batch_size)
        per_leaf = jax.tree.map(lambda d: jnp.sum(_wide_real(d)), diag)
        zeros = jax.tree.map(jnp.zeros_like, per_leaf)
        total = _sum(per_leaf)
        none = jnp.zeros(0, total.dtype)
        return TraceEstimate(total, jnp.zeros_like(total), per_leaf, zeros, none, 0)

    def sample(probe_key: jax.Array) -> tuple[tuple[jax.Array, PyTree], jax.Array]:
        probe = random_probe(probe_key, params, options.distribution)
        diag = jax.tree.map(_wide_real, times_probe(probe, product(probe)))
        per_leaf = jax.tree.map(jnp.sum, diag)
        total = _sum(per_leaf)
        return (total, per_leaf), total

    moments, samples = _sample_moments(sample, key, options)
    (value, per_leaf), errors = moments.mean, moments.standard_error()
    return TraceEstimate(value, errors[0], per_leaf, errors[1], samples, 0)


def _sum(per_leaf: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(per_leaf), start=jnp.zeros(()))


def _sample_moments(
    sample: Callable[[jax.Array], tuple[PyTree, Any]], key: jax.Array, options: _Options
) -> tuple[_Moments, Any]:
    """Moments of the samples, taken a batch at a time, and what is kept of each sample."""
    keys = jax.random.split(key, options.num_probes)
    moments = _Moments.zeros(jax.eval_shape(sample, keys[0])[0])
    batch = min(options.probe_batch_size, options.num_probes)
    whole = options.num_probes // batch * batch

    def step(moments: _Moments, keys: jax.Array) -> tuple[_Moments, Any]:
        if len(keys) == 1:  # some kernels do not support vmap
            samples, kept = jax.tree.map(lambda x: x[jnp.newaxis], sample(keys[0]))
        else:
            samples, kept = jax.vmap(sample)(keys)
        return moments.add(samples, len(keys)), kept

    batches = keys[:whole].reshape(whole // batch, batch, *keys.shape[1:])
    moments, kept = jax.lax.scan(step, moments, batches)
    kept = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), kept)
    if whole < options.num_probes:
        moments, rest = step(moments, keys[whole:])
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, rest)
    return moments, kept


def _exact_diag(product: Callable[[Tree], Tree], params: Tree, batch_size: int) -> Tree:
    """One product for each real coordinate, ``batch_size`` of them vectorized."""
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
