"""The signed Hessian diagonal with value and gradient, in one pass."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from curvax._checks import as_key, check_choice, check_count, check_keywords
from curvax._trees import Differentiable, PyTree, is_inexact, widen
from curvax.curvature._one_pass import OnePass, Value
from curvax.curvature._probes import Distribution, random_probe, times_probe
from curvax.curvature._products import Mode, loss_of_leaves, value_grad_and_hvp


def value_grad_and_hessian_diag(
    fun: Callable[..., Value],
    *,
    has_aux: bool = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
) -> OnePass[Value]:
    r"""Makes a function that returns a loss, its gradient and its Hessian's diagonal.

    The diagonal is Hutchinson's signed estimate, the mean over $S$ probes:

    $$
    D = \frac{1}{S} \sum_{s=1}^{S} z_s \odot \nabla^2 f(\theta)\, z_s,
    \qquad E[D] = \operatorname{diag} \nabla^2 f(\theta)
    $$

    One entry of a single Rademacher probe has variance $\sum_{j \ne i} H_{ij}^2$. So
    the mean of $D^2$, which AdaHessian keeps, is
    $H_{ii}^2 + \frac{1}{S} \sum_{j \ne i} H_{ij}^2$: more probes make it smaller as well as less
    noisy, and a learning rate tuned for one $S$ does not transfer to another.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      has_aux: whether ``fun`` returns auxiliary data (new batch statistics, metrics).
      num_probes: the number of probes $S$, vectorized: one forward and backward pass, and
        ``num_probes`` times the time and memory of the tangents.
      distribution: ``"rademacher"`` or ``"normal"``.
      mode: how to compute the product; see `curvax.value_grad_and_hvp`.

    Returns:
      A function ``(params, *args, key, **kwargs) -> (value, grads, diag)``. ``key`` is a
      PRNG key or an integer seed; pass a new one at each call. ``diag`` has the shapes and dtypes
      of ``params``; a complex leaf holds $\partial^2/\partial x^2 + i\,\partial^2/\partial y^2$.
      With ``has_aux``, ``value`` is the pair ``(value, aux)``. The attribute ``value_and_grad`` of
      the function is the same without key and diagonal.

    Raises:
      ValueError: if an option is out of range, or the loss is not a real scalar.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 4)
      >>> params, batch = {"w": jnp.ones(2)}, jnp.eye(2)
      >>> one_pass = jax.jit(curvax.value_grad_and_hessian_diag(loss))
      >>> value, grads, diag = one_pass(params, batch, key=jax.random.key(0))
      >>> float(value), grads["w"], diag["w"]  # the Hessian is diagonal: D is exact
      (1.0, Array([2., 2.], dtype=float32), Array([6., 6.], dtype=float32))

    References:
      Yao et al., [ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
      Learning](https://arxiv.org/abs/2006.00719), 2020, Eq. 9.
    """
    check_count("num_probes", num_probes)
    check_choice("distribution", distribution, get_args(Distribution))
    check_keywords("value_grad_and_hessian_diag", fun, ("key",))
    one_pass = value_grad_and_hvp(fun, has_aux=has_aux, mode=mode)

    def value_grad_and_diag(
        params: PyTree, *args: Any, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        def sample(probe: PyTree) -> tuple[Any, PyTree, PyTree]:
            value, grads, product = one_pass(params, probe, *args, **kwargs)
            return value, grads, times_probe(probe, product)

        return mean_over_probes(sample, key, params, num_probes, distribution)

    def value_and_grad(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        tree = Differentiable.of(params)
        loss = loss_of_leaves(fun, tree, args, kwargs, has_aux=has_aux)
        leaves = tree.select(tree.leaves)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(leaves)
        return ((value, aux) if has_aux else value), tree.tangent(grads)

    return OnePass(fun, value_grad_and_diag, value_and_grad)


def mean_over_probes(
    sample: Callable[[PyTree], tuple[Any, PyTree, PyTree]],
    key: jax.Array | int,
    like: PyTree,
    num_probes: int,
    distribution: Distribution,
) -> tuple[Any, PyTree, PyTree]:
    """Value, gradient and the mean of the estimates of vectorized probes like ``like``."""
    key = as_key(key)

    def from_probe(index: int | jax.Array) -> tuple[Any, PyTree, PyTree]:
        return sample(random_probe(jax.random.fold_in(key, index), like, distribution))

    if num_probes == 1:
        return from_probe(0)
    # Value and gradient do not depend on the probe, so vmap leaves them unbatched.
    vectorized = jax.vmap(from_probe, out_axes=(None, None, 0))
    value, grads, samples = vectorized(jnp.arange(num_probes))
    return value, grads, jax.tree.map(_mean, samples)


def _mean(samples: jax.Array) -> jax.Array:
    if not is_inexact(samples):
        return samples[0]
    return jnp.mean(widen(samples), axis=0).astype(samples.dtype)
