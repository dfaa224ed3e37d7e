"""Meshes of eight virtual devices, and trees of sharded parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

AXIS_TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(kind: str, shape: tuple[int, ...] = (8,), names: tuple[str, ...] = ("x",)):
    return jax.make_mesh(shape, names, axis_types=(AXIS_TYPES[kind],) * len(shape))


# What a leaf is sharded over: everything but the spatial axes of a convolution.
SPECS = {
    "conv": {"kernel": P(None, None, None, "x")},
    "dense": {"bias": P("x"), "kernel": P("x", None)},
    "head": {"kernel": P(None, "x")},
    "scale": P(),
}


def network() -> PyTree:
    shapes = {
        "conv": {"kernel": (3, 3, 2, 8)},
        "dense": {"bias": (16,), "kernel": (512, 3)},
        "head": {"kernel": (4, 8)},
        "scale": (),
    }

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(np.cos(np.arange(1.0, math.prod(shape) + 1.0)).reshape(shape))

    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


def sharded(params: PyTree, mesh: jax.sharding.Mesh, specs: PyTree = SPECS) -> PyTree:
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P)
    )
    return jax.device_put(params, shardings)


def shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
