"""The shardings of an optimizer's state, from those of its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

PyTree = Any


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The shardings of ``tx``'s state when each leaf follows its parameter.

    A jitted ``init`` under automatic mesh axes loses the parameters' shardings, for Adam as
    for any optimizer, because zeros depend on nothing. Hand the result to ``jax.jit`` as
    ``out_shardings``, or to a checkpoint library as the target of a restore.

    A leaf of the state that has its parameter's shape gets its sharding; one with further
    axes in front, as M-FAC's window has, gets it behind as many unsharded axes. Everything
    else (counts, keys) is replicated.

    Args:
      tx: any Optax transformation.
      params: a tree of arrays, or of ``jax.ShapeDtypeStruct`` with shardings.

    Returns:
      A tree like ``tx.init(params)`` with a sharding for each array.

    Raises:
      ValueError: if ``params`` has leaves without a sharding, or none at all.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> sharding = jax.NamedSharding(mesh, jax.P("model"))
      >>> params = {"w": jax.device_put(jnp.ones((4, 2)), sharding)}
      >>> tx = curvax.adahessian(0.1)
      >>> shardings = curvax.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state[0].nu["w"].sharding.spec
      P('model',)
    """
    leaves = jax.tree.leaves(params)
    if not leaves or any(getattr(leaf, "sharding", None) is None for leaf in leaves):
        raise ValueError(
            "state_shardings needs params whose leaves have a sharding: arrays, or "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    state = jax.eval_shape(tx.init, params)
    replicated = _replicated(leaves[0].sharding)
    return optax.tree.map_params(
        tx,
        _like_its_parameter,
        state,
        params,
        transform_non_params=lambda _: replicated,
    )


def _like_its_parameter(leaf: jax.ShapeDtypeStruct, param: Any) -> Sharding:
    extra = len(leaf.shape) - len(param.shape)
    if extra < 0 or leaf.shape[extra:] != param.shape:
        return _replicated(param.sharding)
    if extra and isinstance(param.sharding, NamedSharding):
        spec = PartitionSpec(*(None,) * extra, *param.sharding.spec)
        return param.sharding.update(spec=spec)
    return param.sharding


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=PartitionSpec())
    return sharding
