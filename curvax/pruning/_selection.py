"""From scores to the weights to prune: pools, targets, and the order within a pool."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from curvax._checks import check_range
from curvax.pruning._leaves import Leaf
from curvax.pruning._options import Scope
from curvax.pruning._structures import NM, Structure, not_among_the_best, unit_numbers

Sparsity = float | Mapping[str, float]


class Pool(NamedTuple):
    """Leaves whose weights compete with each other, and the sparsity they reach together."""

    leaves: list[int]
    sparsity: float


def check_sparsity(sparsity: Any) -> None:
    """Raises unless a sparsity, or each of several, is in [0, 1)."""
    values = sparsity.items() if isinstance(sparsity, Mapping) else [("", sparsity)]
    if not values:
        raise ValueError("sparsity must name at least one pattern, got an empty mapping.")
    for pattern, value in values:
        if not isinstance(pattern, str):
            raise ValueError(f"sparsity's keys are patterns of paths, got {pattern!r}.")
        name = f"sparsity[{pattern!r}]" if pattern else "sparsity"
        check_range(name, value, low=0.0, high=1.0, open_high=True)


def pools(leaves: Sequence[Leaf], sparsity: Sparsity, scope: Scope) -> list[Pool]:
    """One pool for each sparsity, or for each leaf.

    A mapping gives sparsities by patterns of ``re.search`` on the paths; the first match counts,
    and leaves without a match are not pruned.
    """
    targets = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    members: dict[str, list[int]] = {pattern: [] for pattern in targets}
    for number, leaf in enumerate(leaves):
        pattern = next((p for p in targets if re.search(p, leaf.path)), None)
        if pattern is not None:
            members[pattern].append(number)
    for pattern, numbers in members.items():
        if not numbers:
            paths = ", ".join(leaf.path for leaf in leaves)
            raise ValueError(
                f"sparsity[{pattern!r}] matches no selected leaf, or only leaves that earlier "
                f"patterns match; the selected leaves are: {paths}."
            )
    if scope == "global":
        return [Pool(numbers, targets[pattern]) for pattern, numbers in members.items()]
    return [Pool([n], targets[pattern]) for pattern, numbers in members.items() for n in numbers]


def number_to_prune(leaves: Sequence[Leaf], sparsity: float) -> int:
    """How many more weights to prune to reach ``sparsity``, rounded down."""
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    num_pruned = total - sum(len(leaf.alive) for leaf in leaves)
    # The margin undoes the rounding of a product such as 0.29 * 100.
    number = math.floor(sparsity * total + 1e-6) - num_pruned
    if number < 0:
        raise ValueError(
            f"sparsity={sparsity} is below the current {num_pruned / total:.6g} of "
            f"{', '.join(leaf.path for leaf in leaves)}: pruned weights stay pruned."
        )
    return number


def weights_to_prune(
    leaves: Sequence[Leaf],
    scores: Sequence[np.ndarray],
    sparsity: Sparsity,
    scope: Scope,
    structure: Structure | None,
) -> list[np.ndarray]:
    """For each leaf a bool for each alive weight: whether to prune it."""
    pruned = [np.zeros(len(leaf.alive), bool) for leaf in leaves]
    for pool in pools(leaves, sparsity, scope):
        members = [leaves[number] for number in pool.leaves]
        whole = _is_whole(pool.sparsity, structure)
        flags = _prune_pool(
            members,
            [scores[number] for number in pool.leaves],
            0 if whole else number_to_prune(members, pool.sparsity),
            structure,
            whole,
        )
        for number, flag in zip(pool.leaves, flags, strict=True):
            pruned[number] = flag
    return pruned


def _is_whole(sparsity: float, structure: Structure | None) -> bool:
    """Whether to prune all that N:M allows."""
    if not isinstance(structure, NM):
        return False
    most = 1 - structure.n / structure.m
    if sparsity > most + 1e-9:
        raise ValueError(f"{structure} allows a sparsity of at most {most:.6g}, got {sparsity}.")
    return sparsity > most - 1e-9


def _prune_pool(
    leaves: list[Leaf],
    scores: list[np.ndarray],
    number: int,
    structure: Structure | None,
    whole: bool,
) -> list[np.ndarray]:
    units, start = [], 0
    for leaf in leaves:
        own = unit_numbers(leaf, structure)
        units.append(own + start)
        start += int(own.max(initial=-1)) + 1
    ends = np.cumsum([len(own) for own in units])[:-1]
    all_units, all_scores = np.concatenate(units), np.concatenate(scores)
    if isinstance(structure, NM):
        candidates = not_among_the_best(all_scores, all_units, structure.n)
        flags = candidates if whole else _lowest(all_scores, number, candidates)
    elif structure is None:
        flags = _lowest(all_scores, number, np.ones(len(all_scores), bool))
    else:
        flags = _lowest_units(all_scores, all_units, number)
    return np.split(flags, ends)


def _lowest(scores: np.ndarray, number: int, candidates: np.ndarray) -> np.ndarray:
    """The ``number`` candidates of lowest score; of equal ones, the first."""
    places = np.flatnonzero(candidates)
    order = places[np.argsort(scores[places], kind="stable")]
    flags = np.zeros(len(scores), bool)
    flags[order[:number]] = True
    return flags


def _lowest_units(scores: np.ndarray, units: np.ndarray, number: int) -> np.ndarray:
    """Whole units of lowest mean score, skipping those above the ``number`` left."""
    sizes = np.bincount(units)
    means = np.bincount(units, weights=scores) / np.maximum(sizes, 1)
    order = np.argsort(np.where(sizes > 0, means, np.inf), kind="stable")
    taken = np.zeros(len(sizes), bool)
    for unit in order:
        if 0 < sizes[unit] <= number:
            taken[unit] = True
            number -= sizes[unit]
    return taken[units]
