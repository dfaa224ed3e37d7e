"""The TPU compiler without a TPU: programs for chips that are only described."""

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.contract.meshes import AXIS_TYPES

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("these tests need libtpu: make test-tpu", allow_module_level=True)

PyTree = Any


@functools.cache
def chips(topology: str) -> tuple[Any, ...]:
    """The devices of a topology, as ``v5e:2x4``."""
    try:
        described = topologies.get_topology_desc(topology_name=topology, platform="tpu")
    except Exception as error:
        pytest.fail(
            f"libtpu {importlib.metadata.version('libtpu')} does not describe {topology} to jaxlib "
            f"{importlib.metadata.version('jaxlib')}; `pip show jax` names the libtpu that fits, "
            f"in the extra jax[tpu]. It says: {error}",
            pytrace=False,
        )
    return tuple(described.devices)


def make_mesh(
    topology: str, shape: tuple[int, ...], names: tuple[str, ...], kind: str = "automatic"
) -> Mesh:
    devices = np.array(chips(topology)).reshape(shape)
    return Mesh(devices, names, axis_types=(AXIS_TYPES[kind],) * len(shape))


def one_chip() -> NamedSharding:
    """Where everything is on one chip of a v5e."""
    return NamedSharding(make_mesh("v5e:1x1", (1,), ("x",)), P())


def array(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any = np.float32
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def state_of(tx: Any, params: PyTree) -> PyTree:
    """The optimizer's state, sharded as its parameters."""
    shapes, shardings = jax.eval_shape(tx.init, params), curvax.state_shardings(tx, params)
    return jax.tree.map(lambda leaf, where: array(leaf.shape, where, leaf.dtype), shapes, shardings)


def num_bytes(tree: PyTree) -> int:
    """The bytes of a tree on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled(
    fun: Callable[..., Any], *args: PyTree, donate: tuple[int, ...] = (), optimized: bool = False
) -> jax.stages.Compiled:
    """The function compiled for the chips of its arguments; quickly, if not ``optimized``."""
    previous = jax.config.jax_optimization_level
    mesh = jax.tree.leaves(args)[0].sharding.mesh
    jax.config.update("jax_optimization_level", previous if optimized else "O0")
    try:
        with jax.set_mesh(mesh):
            return jax.jit(fun, donate_argnums=donate).lower(*args).compile()
    finally:
        jax.config.update("jax_optimization_level", previous)
