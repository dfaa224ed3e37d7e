"""The signed mean of a diagonal over micro-batches.

The curvature of a batch is the mean of its micro-batches' signed products. It must be taken
before any absolute value or square: squares of micro-batches average to more than the square
of the average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax._checks import check_count
from curvax._trees import widen


class AccumulateHessianDiagState(NamedTuple):
    """State of `curvax.accumulate_hessian_diag`.

    Attributes:
      mini_step: int32 scalar, the number of micro-steps taken in this step.
      mean: a tree like ``params`` in float32 or wider, the signed mean over them.
    """

    mini_step: jax.Array
    mean: optax.Updates


def accumulate_hessian_diag(every_k: int) -> optax.GradientTransformationExtraArgs:
    r"""Averages the signed diagonal over the micro-steps of a step.

    $$
    \bar D_i = \frac{1}{i} \sum_{j=1}^{i} z \odot H_j z, \qquad i = 1, \dots, k
    $$

    It is an Optax transformation: ``update(diag, state)`` returns the running mean, which at
    micro-step $k$ is the mean over the whole step. It then starts over. With ``optax.MultiSteps``,
    pass the running mean at every micro-step: only the last one takes effect. All micro-steps of a
    step share one probe, because `curvax.value_grad_and_hessian_diag_from_state` derives it from
    the optimizer's count, which does not change within a step. So $\bar D_k$ is exactly the full
    batch's $z \odot Hz$.

    A non-finite micro-batch makes the mean non-finite until the step ends, and AdaHessian then
    keeps its previous curvature.

    Args:
      every_k: the number of micro-steps $k$ per step, like ``every_k_schedule`` of
        ``optax.MultiSteps``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes one extra argument,
      ``mini_step``: the index of this micro-step, if something else keeps count. Pass
      ``mini_step=multi_steps_state.mini_step`` if ``optax.MultiSteps`` may skip some.

    Raises:
      ValueError: if ``every_k`` is not an integer of at least 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params - 1.0) ** 2)
      >>> tx = optax.MultiSteps(curvax.adahessian(0.5), every_k_schedule=2)
      >>> mean_diag = curvax.accumulate_hessian_diag(every_k=2)
      >>> params = jnp.zeros(2)
      >>> state, diag_state = tx.init(params), mean_diag.init(params)
      >>> one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
      >>> for micro_batch in (jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])):
      ...     value, grads, diag = one_pass(params, micro_batch, state=state)
      ...     diag, diag_state = mean_diag.update(diag, diag_state)
      ...     updates, state = tx.update(grads, state, params, hessian_diag=diag)
      >>> print(updates.round(2))
      [0.5  0.17]
    """
    check_count("every_k", every_k)

    def init(params: optax.Params) -> AccumulateHessianDiagState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        return AccumulateHessianDiagState(jnp.zeros((), jnp.int32), zeros)

    def update(
        updates: optax.Updates,
        state: AccumulateHessianDiagState,
        params: optax.Params | None = None,
        *,
        mini_step: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateHessianDiagState]:
        del params, extra_args
        index = jnp.asarray(state.mini_step if mini_step is None else mini_step, jnp.int32)

        def running_mean(mean: jax.Array, diag: jax.Array) -> jax.Array:
            step = (diag.astype(mean.dtype) - mean) / (index + 1).astype(mean.dtype)
            # Without the where, a non-finite step would leak into the next one.
            return jnp.where(index == 0, diag.astype(mean.dtype), mean + step)

        mean = jax.tree.map(running_mean, state.mean, updates)
        return mean, AccumulateHessianDiagState((index + 1) % every_k, mean)

    return optax.GradientTransformationExtraArgs(init, update)
