"""Optimal Brain Surgeon pruning on the inverse empirical Fisher matrix, and its baselines."""

from curvax.pruning._gradient_files import load_gradients
from curvax.pruning._gradients import collect_gradients
from curvax.pruning._keep_pruned import KeepPrunedState, keep_pruned
from curvax.pruning._leaves import is_kernel
from curvax.pruning._one_shot import (
    geometric_sparsities,
    polynomial_sparsities,
    prune_gradually,
    prune_one_shot,
)
from curvax.pruning._prune import prune
from curvax.pruning._result import LayerSparsity, PruneResult
from curvax.pruning._structures import NM, OutputUnits, WeightBlocks

__all__ = [
    "NM",
    "KeepPrunedState",
    "LayerSparsity",
    "OutputUnits",
    "PruneResult",
    "WeightBlocks",
    "collect_gradients",
    "geometric_sparsities",
    "is_kernel",
    "keep_pruned",
    "load_gradients",
    "polynomial_sparsities",
    "prune",
    "prune_gradually",
    "prune_one_shot",
]
