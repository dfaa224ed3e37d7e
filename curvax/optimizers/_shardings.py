"""The shardings of an optimizer's state, from those of its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from curvax._trees import is_hole, path_name
from curvax.fisher.window._blocks import Blocks


def state_shardings(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
    """Returns shardings of ``tx``'s state such that each leaf follows its parameter.

    Under automatic mesh axes a jitted ``init`` loses the parameters' shardings, for Adam as for any
    optimizer, because zeros do not depend on the parameters. Pass the result to ``jax.jit`` as
    ``out_shardings``, or to a checkpoint library as the target of a restore.

    A state leaf with its parameter's shape gets the parameter's sharding. Extra leading axes, as in
    M-FAC's window, are unsharded. In M-FAC's sparse rows, which have blocks in place of entries,
    the sharding applies to the axes of blocks. Everything else (counts, keys) is replicated.

    Args:
      tx: any Optax transformation.
      params: a tree of arrays, or of ``jax.ShapeDtypeStruct`` with shardings.

    Returns:
      A tree like ``tx.init(params)`` with a sharding for each array.

    Raises:
      ValueError: if ``params`` has no leaves, or leaves without a sharding; if the blocks of
        M-FAC's sparse rows cannot be divided evenly among a leaf's devices.

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
        jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params),
        transform_non_params=lambda _: replicated,
        is_leaf=is_hole,  # from optax.masked and optax.partition
    )


def _like_its_parameter(leaf: Any, param: Any, name: str) -> Any:
    if is_hole(leaf):
        return leaf
    if leaf.shape == param.shape:
        return param.sharding
    if not isinstance(param.sharding, NamedSharding):
        return _replicated(param.sharding)
    rank = len(param.shape)
    extra = len(leaf.shape) - rank
    spec = (*param.sharding.spec, *(None,) * (rank - len(param.sharding.spec)))
    if extra == _SPARSE_AXES and leaf.shape[1:-1] == (blocks := Blocks.of(param.shape)).grid:
        blocks.check_devices(name, param.sharding)
        return param.sharding.update(spec=PartitionSpec(None, *spec, None))
    if extra > 0 and leaf.shape[extra:] == param.shape:
        return param.sharding.update(spec=PartitionSpec(*(None,) * extra, *spec))
    return _replicated(param.sharding)


# Sparse rows have the entries of a block first, then an axis of blocks for each axis of the
# parameter, and rows last.
_SPARSE_AXES = 2


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=PartitionSpec())
    return sharding
