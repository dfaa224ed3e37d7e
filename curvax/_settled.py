"""Waiting for programs where too many at once would never end."""

from typing import Any, TypeVar

import jax

from curvax._checks import is_traced

Results = TypeVar("Results")


def settled(results: Results) -> Results:
    """The results of a program, computed if they lie on several devices of a CPU.

    These share one pool of threads, in which a program holds a thread for each device until all of
    them have reached its collective operation: where many programs were started and none awaited,
    each may hold some of the threads and wait for others. To be called in host loops.
    """
    if any(map(_shares_threads, jax.tree.leaves(results))):
        jax.block_until_ready(results)
    return results


def _shares_threads(leaf: Any) -> bool:
    if is_traced(leaf) or not isinstance(leaf, jax.Array) or leaf.sharding.num_devices == 1:
        return False
    device: Any = next(iter(leaf.sharding.device_set))
    return device.platform == "cpu"
