"""Which leaves are pruned: those that the user chooses and that can hold the structure."""

from collections.abc import Sequence
from typing import Any

from curvax._trees import PyTree
from curvax.pruning._options import Options
from curvax.pruning._structures import OutputUnits, why_unfit
from curvax.pruning._weights import Leaf, Skipped, Weights, chosen_leaves


def selection_of(
    params: PyTree, mask: PyTree | None, options: Options
) -> tuple[Weights, tuple[Skipped, ...]]:
    """The weights to prune, and the chosen leaves that the structure passes over."""
    structure, select = options.structure, options.select
    if isinstance(structure, OutputUnits) and structure.coupled:
        paths = structure.paths()

        def select(path: str, leaf: Any) -> bool:  # noqa: ARG001
            return path in paths

    chosen = chosen_leaves(params, select, options.layout)
    if isinstance(structure, OutputUnits) and structure.coupled:
        _check_found(structure, chosen)
    reasons = [why_unfit(leaf, structure) for leaf in chosen]
    skipped = tuple(
        Skipped(leaf.path, reason)
        for leaf, reason in zip(chosen, reasons, strict=True)
        if reason is not None
    )
    fitting = tuple(leaf for leaf, reason in zip(chosen, reasons, strict=True) if reason is None)
    if not fitting:
        listed = "; ".join(f"{leaf.path}: {leaf.reason}" for leaf in skipped)
        raise ValueError(f"no chosen leaf can hold {structure}: {listed}.")
    return Weights.of(params, mask, fitting), skipped


def _check_found(structure: OutputUnits, chosen: Sequence[Leaf]) -> None:
    missing = structure.paths() - {leaf.path for leaf in chosen}
    if missing:
        raise ValueError(
            f"OutputUnits(coupled=...) names leaves that params do not have: {sorted(missing)}."
        )
