"""What is the same on every device of a mesh: small matrices, and examples computed everywhere.

A constraint on the parameters' axes would spread to params and state, so there is none here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

from curvax._trees import PyTree

Result = TypeVar("Result")


def has_mesh() -> bool:
    """Whether several devices share the work, and JAX decides how."""
    return _mesh() is not None


def share_of(number: int) -> int:
    """How many of so many examples a device computes together: a few for each, or all of them."""
    mesh = _mesh()
    devices = 1 if mesh is None else mesh.size
    return devices * -(-number // devices**2)


def on_every_device(fun: Callable[..., Result], *arrays: jax.Array) -> Result:
    """``fun`` of small arrays, computed by every device alike, without communication."""
    mesh = _mesh()
    if mesh is None:
        return fun(*arrays)
    arrays = tuple(replicated(list(arrays)))
    result: Result = jax.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P())(*arrays)
    return result


def replicated(tree: PyTree) -> PyTree:
    """The tree with every array whole on every device of a mesh."""
    mesh = _mesh()
    if mesh is None:
        return tree
    if mesh.are_all_axes_explicit:
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), tree)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def free_of_types(array: jax.Array) -> jax.Array:
    """The array, replicated on an explicit mesh, where a sharded axis cannot be reshaped."""
    mesh = _mesh()
    return array if mesh is None or mesh.are_all_axes_auto else replicated(array)


def sharded_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array with its examples where the other's type has them, on an explicit mesh."""
    mesh = _mesh()
    if mesh is None or not mesh.are_all_axes_explicit:
        return array
    return jax.sharding.reshard(array, P(jax.typeof(other).sharding.spec[0]))


def _mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh._any_axis_manual else mesh
