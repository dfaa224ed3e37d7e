"""One run: a network pruned by a method to a target, judged on test data; time and memory."""

import time
from typing import Any, NamedTuple

import jax
import timing

from sparsity.methods import METHODS, SETTINGS, Target
from sparsity.networks import Network


class Cell(NamedTuple):
    """What a run depends on; the seed is that of the training and of the data seen in pruning."""

    network: str
    method: str  # or "dense"
    target: str  # "0.9", "2:4"
    seed: int


def run(cell: Cell, network: Network) -> dict[str, Any]:
    """The numbers on test data, the share of zeros, seconds and bytes of the pruning itself.

    Seconds hold compilations: a run is what its user waits for.
    """
    variables = pruned = network.trained(cell.seed)
    seconds, memory = 0.0, 0
    if cell.method != "dense":
        method = {**METHODS, **SETTINGS}[cell.method]
        before = timing.peak_memory(reset=True)
        start = time.perf_counter()
        pruned = method(network, variables, Target.of(cell.target), cell.seed)
        jax.block_until_ready(pruned)
        seconds = time.perf_counter() - start
        memory = timing.peak_memory() - before
    return {
        **network.judged(pruned, cell.seed),
        "zeros": network.share_of_zeros(pruned.params),
        "seconds": round(seconds, 2),
        "bytes": memory,
    }
