"""Waits for programs where too many in flight would deadlock."""

from typing import Any, TypeVar

import jax

from curvax._checks import is_traced

Results = TypeVar("Results")


def settled(results: Results) -> Results:
    """The results of a program; waits for them if they lie on several devices of a CPU.

    The devices share one thread pool. A program holds one thread per device until all devices have
    reached its collective operation, so many programs in flight may each hold some threads and wait
    for others. Call this in host loops.
    """
    if any(map(_shares_threads, jax.tree.leaves(results))):
        jax.block_until_ready(results)
    return results


def _shares_threads(leaf: Any) -> bool:
    if is_traced(leaf) or not isinstance(leaf, jax.Array) or leaf.sharding.num_devices == 1:
        return False
    device: Any = next(iter(leaf.sharding.device_set))
    return device.platform == "cpu"
