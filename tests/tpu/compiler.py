"""The TPU compiler without a TPU: programs for chips that are only described.

It is part of libtpu. Set ``JAX_PLATFORMS=cpu``, or JAX looks for TPUs of this machine first.
"""

import functools
import importlib.metadata
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.contract.meshes import AXIS_TYPES

PyTree = Any

# What libtpu looks for when it is loaded. A machine that has TPUs must find its own.
if jax.config.jax_platforms == "cpu":
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # workers of pytest-xdist
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)


@functools.cache
def chips(topology: str) -> tuple[Any, ...]:
    """The devices of a topology, as ``v5e:2x4``."""
    return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def make_mesh(
    topology: str, shape: tuple[int, ...], names: tuple[str, ...], kind: str = "automatic"
) -> Mesh:
    devices = np.array(chips(topology)).reshape(shape)
    return Mesh(devices, names, axis_types=(AXIS_TYPES[kind],) * len(shape))


def one_chip() -> NamedSharding:
    """Where everything is on one chip of a v5e."""
    return NamedSharding(Mesh(np.array(chips("v5e:2x2")[:1]), ("x",)), P())


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


def trouble() -> str | None:
    """Why nothing can be compiled here, if so."""
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu is not installed: run `make test-tpu`."
    named = _libtpu_of_jax()
    # An older one may crash; newer ones understand what JAX hands them for half a year.
    if _numbers(libtpu) < _numbers(named):
        return f"libtpu {libtpu} is older than the {named} that the installed JAX asks for."
    try:
        compiled(lambda x: x + 1, array((8,), one_chip()))
    except Exception as error:
        return f"libtpu {libtpu} does not compile for a JAX that asks for {named}: {error}"
    return None


def _libtpu_of_jax() -> str:
    """The version that JAX's extra for TPUs names."""
    requirements = importlib.metadata.requires("jax") or []
    found = (re.match(r"libtpu==([\d.]+)", requirement) for requirement in requirements)
    return next((version[1].rstrip(".") for version in found if version), "0")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
