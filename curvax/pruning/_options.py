"""The options of pruning: choices, and keyword options that are passed on."""

from pathlib import Path
from typing import Literal, TypedDict

import jax

from curvax._layouts import Layout
from curvax._trees import Select
from curvax.fisher.inverse._input import BlockScope
from curvax.pruning._structures import Structure

__all__ = [
    "BlockScope",
    "Method",
    "OneShotOptions",
    "PruneOptions",
    "Scope",
    "Storage",
    "Update",
]

Method = Literal["obs", "greedy", "fisher", "magnitude"]
Update = Literal["joint", "independent", "none"]
Scope = Literal["global", "layer"]
Storage = Literal["device", "host"]


class PruneOptions(TypedDict, total=False):
    """What `prune_one_shot` passes on to `prune`."""

    select: Select
    scope: Scope
    structure: Structure | None
    layout: Layout
    damping: float
    block_size: int | None
    block_scope: BlockScope
    mesh: jax.sharding.Mesh | None


class OneShotOptions(PruneOptions, total=False):
    """What `prune_gradually` passes on to `prune_one_shot`."""

    method: Method
    update: Update | None
    recomputations: int
    num_grads: int
    per_example: bool
    micro_batch_size: int | None
    has_aux: bool
    storage: Storage | Path
    progress: bool
