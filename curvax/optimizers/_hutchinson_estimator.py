"""Hutchinson's estimate of the Hessian's diagonal as an Optax transformation, for Sophia."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from curvax._checks import as_key, check_choice, check_count
from curvax._trees import PyTree
from curvax.curvature._probes import Distribution
from curvax.curvature._products import Mode
from curvax.optimizers._curvature_input import curvature_of_function, given_diag


class HutchinsonEstimatorState(NamedTuple):
    """State of `curvax.hutchinson_estimator`.

    Attributes:
      refreshes: int32 scalar, the number of estimates so far.
      probe_key: PRNG key; estimate ``r`` draws its probes from ``fold_in(probe_key, r)``.
    """

    refreshes: jax.Array
    probe_key: jax.Array


def hutchinson_estimator(
    *,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the Hessian's diagonal as an Optax transformation.

    Its ``update`` replaces the gradients by $z \odot Hz$, averaged over probes. Use it as the
    ``hessian_diagonal_fn`` of ``optax.contrib.sophia``. It differs from
    ``optax.contrib.hutchinson_estimator_diag_hessian``: probes have each leaf's own dtype, so trees
    of mixed dtypes work; integer leaves get zeros; several probes can be averaged; and
    ``hessian_diag=`` passes on a diagonal computed with the gradient in one pass, where Optax's
    computes the gradient a second time.

    Args:
      num_probes: the number of probes, vectorized.
      distribution: ``"rademacher"`` or ``"normal"``.
      mode: how to compute the product; see `curvax.value_grad_and_hvp`.
      key: PRNG key for the probes, or an integer seed; ``jax.random.key(0)`` by default.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes ``hessian_diag``,
      ``obj_fn`` or ``value_fn``; the first one given is used, the others are ignored.

    Raises:
      ValueError: if an option is out of range; in ``update``, if no curvature is given.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = optax.contrib.sophia(
      ...     1e-2,
      ...     update_interval=1,
      ...     hessian_diagonal_fn=curvax.hutchinson_estimator(),
      ... )
      >>> params = {"w": jnp.ones(2), "scale": jnp.ones((), jnp.bfloat16)}
      >>> def loss(p):
      ...     return jnp.sum(p["w"] ** 2) * p["scale"]
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, obj_fn=loss)
      >>> updates["scale"].dtype
      dtype(bfloat16)

    References:
      Liu et al., [Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
      Pre-training](https://arxiv.org/abs/2305.14342), 2023, Algorithm 1.
    """
    check_count("num_probes", num_probes)
    check_choice("distribution", distribution, get_args(Distribution))
    check_choice("mode", mode, get_args(Mode))
    as_key(key)

    def init(params: optax.Params) -> HutchinsonEstimatorState:
        del params
        # A copy: donation of the state must not delete the caller's array.
        return HutchinsonEstimatorState(jnp.zeros((), jnp.int32), jnp.copy(as_key(key)))

    def update(
        updates: optax.Updates,
        state: HutchinsonEstimatorState,
        params: optax.Params | None = None,
        *,
        hessian_diag: PyTree | None = None,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HutchinsonEstimatorState]:
        del extra_args
        new_state = state._replace(refreshes=optax.safe_increment(state.refreshes))
        if hessian_diag is not None:
            return given_diag(hessian_diag, updates), new_state
        diag = curvature_of_function(
            obj_fn if obj_fn is not None else value_fn,
            params,
            jax.random.fold_in(state.probe_key, state.refreshes),
            num_probes=num_probes,
            distribution=distribution,
            mode=mode,
        )
        return diag, new_state

    return optax.GradientTransformationExtraArgs(init, update)
