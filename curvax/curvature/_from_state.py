"""One pass with the key and the refresh interval read from an optimizer's own state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax._checks import check_keywords
from curvax._trees import PyTree
from curvax.curvature._diagonal import value_grad_and_hessian_diag
from curvax.curvature._one_pass import OnePassFromState, Value
from curvax.curvature._probes import Distribution
from curvax.curvature._products import Mode
from curvax.curvature._refresh import decide, find_refresh_state, step_key


def from_state(
    one_pass: Callable[..., tuple[Value, PyTree, PyTree]],
) -> OnePassFromState[Value]:
    r"""Makes a one-pass function read its key and the refresh interval from the state.

    The optimizer's state holds the step count, whether the next step needs curvature, and the PRNG
    key. So a training loop needs no key of its own, and a checkpoint of state and params resumes a
    run bit for bit.

    Args:
      one_pass: a function ``(params, *args, key, **kwargs) -> (value, grads, diag)``:
        `curvax.value_grad_and_hessian_diag`, `curvax.value_grad_and_ggn_diag` and
        `curvax.value_grad_and_ggn_diag_from_outputs` make one, or write your own. Steps without
        curvature call its attribute ``value_and_grad``, which those three have. A function without
        it is called as usual and its ``diag`` dropped; under ``jit`` XLA removes the unused
        computation.

    Returns:
      A function ``(params, *args, state, refresh=None, **kwargs) -> (value, grads, diag)``.

      ``state`` is the optimizer's state, found inside ``optax.chain``, ``masked``,
      ``partition``, ``MultiSteps``, ``inject_hyperparams``, ``apply_if_finite`` and the
      ``opt_state`` of ``nnx.Optimizer``. If several optimizers keep curvature, pass the state of
      one.

      ``refresh`` is static. ``None`` follows the state: with an ``update_interval`` of 1 every step
      computes curvature; otherwise ``lax.cond`` decides in the compiled step. Between refreshes
      only the gradient is computed and ``diag`` is zeros, which the optimizer ignores. ``True``
      computes the product; ``False`` skips it and returns ``None`` for ``diag``. To use them,
      compile one step for each and choose on the host with `curvax.refresh_due`. Do that for
      convolutional networks on CPU, where XLA runs the gradients of a convolution 5 to 25 times
      slower inside a conditional.

    Raises:
      ValueError: if the state holds no such optimizer or several (their paths are listed), or
        ``refresh`` is not static.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> one_pass = curvax.from_state(
      ...     curvax.value_grad_and_ggn_diag_from_outputs(network, "squared_error")
      ... )
      >>> tx = optax.chain(optax.clip(1.0), curvax.adahessian(0.1, update_interval=5))
      >>> params, inputs, targets = jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1))
      >>> state = tx.init(params)
      >>> value, grads, diag = one_pass(params, inputs, targets, state=state)
      >>> updates, state = tx.update(grads, state, params, hessian_diag=diag)
      >>> print(updates.round(2)[:, 0])
      [0.1 0.1]
    """
    check_keywords("from_state", getattr(one_pass, "fun", one_pass), ("state", "refresh"))
    value_and_grad = getattr(one_pass, "value_and_grad", None)

    def value_grad_and_diag(
        params: PyTree, *args: Any, state: Any, refresh: bool | None = None, **kwargs: Any
    ) -> Any:
        found = find_refresh_state(state)
        due = decide(refresh, found)

        def with_diag() -> tuple[Any, PyTree, PyTree]:
            return one_pass(params, *args, key=step_key(found), **kwargs)

        def without_diag() -> tuple[Any, PyTree]:
            if value_and_grad is None:
                return with_diag()[:2]
            return value_and_grad(params, *args, **kwargs)

        def zeros() -> PyTree:
            return jax.tree.map(jnp.zeros_like, params)

        if not isinstance(due, bool):
            return jax.lax.cond(due, with_diag, lambda: (*without_diag(), zeros()))
        if due:
            return with_diag()
        return (*without_diag(), zeros() if refresh is None else None)

    return value_grad_and_diag


def value_grad_and_hessian_diag_from_state(
    fun: Callable[..., Value],
    *,
    has_aux: bool = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
) -> OnePassFromState[Value]:
    r"""`curvax.value_grad_and_hessian_diag` with key and interval from the optimizer's state.

    Short for ``curvax.from_state(curvax.value_grad_and_hessian_diag(fun, ...))``; see
    `curvax.from_state` for the returned function.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      has_aux: whether ``fun`` returns auxiliary data (new batch statistics, metrics).
      num_probes: the number of probes; the optimizer's own applies only with ``obj_fn``.
      distribution: ``"rademacher"`` or ``"normal"``.
      mode: how to compute the product; see `curvax.value_grad_and_hvp`.

    Returns:
      A function ``(params, *args, state, refresh=None, **kwargs) -> (value, grads, diag)``.

    Raises:
      ValueError: if an option is out of range; when called, as in `curvax.from_state`, or if the
        loss is not a real scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params) ** 4)
      >>> tx = optax.chain(optax.clip(1.0), curvax.adahessian(0.1, update_interval=5))
      >>> params, batch = jnp.ones(2), jnp.eye(2)
      >>> state = tx.init(params)
      >>> one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
      >>> value, grads, diag = one_pass(params, batch, state=state)
      >>> updates, state = tx.update(grads, state, params, hessian_diag=diag)
      >>> print(updates.round(3))
      [-0.017 -0.017]
    """
    return from_state(
        value_grad_and_hessian_diag(
            fun, has_aux=has_aux, num_probes=num_probes, distribution=distribution, mode=mode
        )
    )
