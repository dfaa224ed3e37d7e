"""How much memory a state takes, known before it is built."""

import itertools
import math
import os
from typing import Any

import jax
import optax

from curvax._checks import check_arrays
from curvax._trees import PyTree
from curvax.optimizers._shardings import state_shardings


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Computes the bytes that an optimizer's state takes on one device, from shapes alone.

    Nothing is allocated. If the params have shardings, each leaf counts only the part that one
    device holds when the state follows `curvax.state_shardings`.

    Args:
      tx: any Optax transformation.
      params: a tree of arrays or of ``jax.ShapeDtypeStruct``, with shardings or without.

    Returns:
      The number of bytes.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
      >>> dense = curvax.state_bytes(curvax.mfac(num_grads=1024), params)
      >>> sparse = curvax.state_bytes(
      ...     curvax.mfac(num_grads=1024, density=0.01), params
      ... )
      >>> dense // 10**6, sparse // 10**6  # a million parameters
      (4100, 69)
    """
    check_arrays(params)
    leaves = jax.tree.leaves(params)
    state = jax.eval_shape(tx.init, params)
    if not leaves or any(getattr(leaf, "sharding", None) is None for leaf in leaves):
        return sum(map(_bytes, jax.tree.leaves(state)))
    shardings = jax.tree.leaves(state_shardings(tx, params))
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
    )


def check_window_memory(
    window: PyTree, params: PyTree, *, num_grads: int, density: float | None
) -> None:
    """Raises if a window is larger than the memory of the device that is to hold it.

    Args:
      window: the window's shapes, one or several trees like ``params``.
      params: the parameters; under a trace, where no device is known, nothing is checked.
      num_grads: named in the error.
      density: named in the error.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    pairs = zip(jax.tree.leaves(window), itertools.cycle(leaves), strict=False)
    needed = sum(_bytes(rows) * _local_share(leaf) for rows, leaf in pairs)
    available = _device_memory(leaves)
    if needed > available:
        raise ValueError(
            f"M-FAC's window takes {needed / 2**30:.1f} GiB on a device that has "
            f"{available / 2**30:.1f} GiB: {_bytes(window):,} bytes in total for "
            f"num_grads={num_grads}, density={density}. Lower num_grads, set density (0.01 takes "
            "1.5 % of a dense window in float32), or shard the parameters; curvax.state_bytes "
            "computes the size in advance."
        )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _local_share(leaf: Any) -> float:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not leaf.size:
        return 1.0
    return math.prod(sharding.shard_shape(leaf.shape)) / leaf.size


def _device_memory(leaves: list[Any]) -> float:
    """The memory of the first array's device in bytes; of the machine, if that is unknown."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    devices = arrays[0].sharding.addressable_devices if arrays else jax.local_devices()
    statistics = next(iter(devices)).memory_stats() or {}
    return statistics.get("bytes_limit", _machine_memory())


def local_memory() -> float:
    """The memory of this process's devices together, in bytes."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":  # they share the machine's
        return _machine_memory()
    return sum((d.memory_stats() or {}).get("bytes_limit", math.inf) for d in devices)


def _machine_memory() -> float:
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
