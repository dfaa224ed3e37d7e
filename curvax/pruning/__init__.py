"""Optimal Brain Surgeon pruning on the inverse empirical Fisher matrix, and its baselines."""

from curvax.pruning._gradient_files import load_gradients
from curvax.pruning._gradients import collect_gradients
from curvax.pruning._gradually import prune_gradually
from curvax.pruning._keep_pruned import KeepPrunedState, keep_pruned
from curvax.pruning._on_schedule import PruneOnScheduleState, prune_on_schedule
from curvax.pruning._one_shot import prune_one_shot
from curvax.pruning._prune import prune
from curvax.pruning._result import LayerSparsity, PruneResult
from curvax.pruning._statistics import reestimate_statistics
from curvax.pruning._structures import NM, OutputUnits, WeightBlocks
from curvax.pruning._targets import geometric_sparsities, polynomial_sparsities
from curvax.pruning._weights import Skipped, is_kernel, mask_of_zeros
from curvax.pruning.layerwise._gram import InputGram, conv_patches, input_gram
from curvax.pruning.layerwise._layer import LayerResult, prune_layer
from curvax.pruning.layerwise._result import LayersResult, PrunedLayer
from curvax.pruning.layerwise._walk import prune_layers

__all__ = [
    "NM",
    "InputGram",
    "KeepPrunedState",
    "LayerResult",
    "LayerSparsity",
    "LayersResult",
    "OutputUnits",
    "PruneOnScheduleState",
    "PruneResult",
    "PrunedLayer",
    "Skipped",
    "WeightBlocks",
    "collect_gradients",
    "conv_patches",
    "geometric_sparsities",
    "input_gram",
    "is_kernel",
    "keep_pruned",
    "load_gradients",
    "mask_of_zeros",
    "polynomial_sparsities",
    "prune",
    "prune_gradually",
    "prune_layer",
    "prune_layers",
    "prune_on_schedule",
    "prune_one_shot",
    "reestimate_statistics",
]
