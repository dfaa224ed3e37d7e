"""Functions of params lifted to functions of Flax NNX models."""

from collections.abc import Callable
from typing import Any

from curvax._extras import from_extra
from curvax._trees import PyTree


def for_nnx(
    transform: Callable[..., Callable[..., tuple[Any, PyTree, PyTree]]],
    fun: Callable[..., Any],
    *args: Any,
    wrt: Any = None,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    r"""Makes a one-pass function of an NNX model, like ``nnx.value_and_grad``.

    curvax differentiates pure functions of the params. The function made here splits the model into
    its params and the rest, evaluates the loss on a copy, and writes what the forward pass changed,
    such as batch statistics and dropout counters, back into the model once.

    Args:
      transform: makes a one-pass function from a pure function, and takes ``has_aux``:
        `curvax.value_grad_and_hessian_diag_from_state`, `curvax.value_grad_and_hessian_diag`, or a
        composition of such transforms, as below for the Gauss-Newton matrix.
      fun: a function ``fun(model, *args, **kwargs)`` that returns what ``transform`` expects: a
        loss, or with `curvax.value_grad_and_ggn_diag_from_outputs` the network's outputs.
      *args: further positional arguments of ``transform``.
      wrt: an NNX filter for the trained variables, ``nnx.Param`` by default. Use the same as for
        ``nnx.Optimizer``.
      has_aux: whether ``fun`` returns auxiliary data as well.
      **options: further options of ``transform``.

    Returns:
      A function ``(model, *args, **kwargs) -> (value, grads, diag)``; ``grads`` and ``diag`` are
      what ``nnx.Optimizer.update(model, grads, hessian_diag=diag)`` takes. With ``has_aux``,
      ``value`` is the pair ``(value, aux)``.

    Raises:
      ModuleNotFoundError: if Flax is not installed.
      ValueError: when called, if the first argument is not an NNX module; otherwise as
        ``transform``.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, curvax.adahessian(0.3), wrt=nnx.Param)
      >>> def loss_fn(model, inputs, targets):
      ...     return jnp.mean((model(inputs) - targets) ** 2)
      >>> one_pass = curvax.for_nnx(
      ...     curvax.value_grad_and_hessian_diag_from_state, loss_fn
      ... )
      >>> @nnx.jit
      ... def step(model, optimizer, inputs, targets):
      ...     loss, grads, diag = one_pass(
      ...         model, inputs, targets, state=optimizer.opt_state
      ...     )
      ...     optimizer.update(model, grads, hessian_diag=diag)
      ...     return loss
      >>> losses = [
      ...     step(model, optimizer, jnp.eye(2), jnp.ones((2, 1))) for _ in range(60)
      ... ]
      >>> bool(losses[-1] < 1e-2 < losses[0])
      True

      For the Gauss-Newton diagonal, pass the network's outputs in place of a loss:

      >>> def from_outputs(network, loss, **options):
      ...     one_pass = curvax.value_grad_and_ggn_diag_from_outputs(
      ...         network, loss, **options
      ...     )
      ...     return curvax.from_state(one_pass)
      >>> one_pass = curvax.for_nnx(
      ...     from_outputs, nnx.Linear.__call__, "squared_error"
      ... )
    """
    with from_extra("flax"):
        from flax import nnx

    trained = nnx.Param if wrt is None else wrt

    def pure_fun(params: PyTree, *args: Any, static_and_rest: Any, **kwargs: Any) -> Any:
        graphdef, rest = static_and_rest
        # A copy: the model's own variables must not change inside a transformation of JAX.
        model = nnx.merge(graphdef, params, rest, copy=True)
        result = fun(model, *args, **kwargs)
        value, aux = result if has_aux else (result, None)
        return value, (nnx.state(model, nnx.Not(trained)), aux)

    pure_pass = transform(pure_fun, *args, has_aux=True, **options)

    def one_pass(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, PyTree]:
        if not isinstance(model, nnx.Module):
            raise ValueError(f"the first argument must be an NNX module, got {type(model)!r}.")
        parts: Any = nnx.split(model, trained, ...)
        graphdef, params, rest = parts
        (value, (rest, aux)), grads, diag = pure_pass(
            params, *args, static_and_rest=(graphdef, rest), **kwargs
        )
        nnx.update(model, rest)
        return ((value, aux) if has_aux else value), grads, diag

    return one_pass
