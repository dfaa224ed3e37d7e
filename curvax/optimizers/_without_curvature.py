"""Hides the curvature arguments from later parts of a chain, such as a line search."""

import inspect
from typing import Any

import optax


def without_curvature(
    search: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a line search so that it can follow, in a chain, an optimizer that takes curvature.

    ``optax.chain`` passes every extra argument to each of its parts, and Optax's line searches
    raise on those that their ``value_fn`` does not take. With this wrapper, ``search`` gets only
    the extra arguments that its own ``update`` or ``value_fn`` names, and no ``hessian_diag``,
    ``obj_fn`` or ``refresh``. Its state is unchanged.

    Args:
      search: ``optax.scale_by_backtracking_linesearch(...)``,
        ``optax.scale_by_zoom_linesearch(...)``, or another transformation that rejects extra
        arguments.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(x):
      ...     return jnp.sum(x**4)
      >>> search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10)
      >>> tx = optax.chain(curvax.adahessian(1.0), curvax.without_curvature(search))
      >>> params = jnp.array([1.0, 2.0])
      >>> value, grads = jax.value_and_grad(loss)(params)
      >>> updates, state = tx.update(
      ...     grads,
      ...     tx.init(params),
      ...     params,
      ...     obj_fn=loss,
      ...     value=value,
      ...     grad=grads,
      ...     value_fn=loss,
      ... )
      >>> float(loss(params + updates)) < float(value)
      True
    """
    search = optax.with_extra_args_support(search)
    own = _names(search.update)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        value_fn = extra_args.get("value_fn")
        named = own if value_fn is None else own | _names(value_fn)
        known = {name: value for name, value in extra_args.items() if name in named}
        return search.update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(search.init, update)


def _names(fun: Any) -> set[str]:
    return set(inspect.signature(fun).parameters)
