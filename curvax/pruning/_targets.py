"""How a sparsity is distributed over leaves: pools of weights, and how many of each to prune."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from curvax._checks import check_range
from curvax.pruning._erk import erk_densities, erk_ratio
from curvax.pruning._weights import Leaf, Weights

Sparsity = float | Mapping[str, float]
Distribution = Literal["global", "uniform", "erk"]


class Pool(NamedTuple):
    """Leaves whose weights compete with each other, and the sparsity they reach together.

    Attributes:
      members: the numbers of the leaves among the chosen ones.
      sparsity: the share of their weights that is pruned in the end.
    """

    members: tuple[int, ...]
    sparsity: float

    def current_sparsity(self, weights: Weights) -> float:
        """The share that is pruned now."""
        alive, total = self._counts(weights)
        return 1 - alive / total

    def number_to_prune(self, weights: Weights) -> int:
        """How many more to prune, rounded down."""
        alive, total = self._counts(weights)
        # The margin undoes the rounding of a product such as 0.29 * 100.
        number = math.floor(self.sparsity * total + 1e-6) - (total - alive)
        paths = ", ".join(weights.leaves[member].path for member in self.members)
        if number < 0:
            raise ValueError(
                f"sparsity={self.sparsity} is below the current {1 - alive / total:.6g} of "
                f"{paths}: pruned weights stay pruned."
            )
        if number >= alive:
            raise ValueError(
                f"sparsity={self.sparsity} would leave none of the {total} weights of {paths}: "
                "lower it."
            )
        return number

    def _counts(self, weights: Weights) -> tuple[int, int]:
        spans = weights.spans()
        alive = sum(int(np.count_nonzero(weights.alive[spans[m]])) for m in self.members)
        return alive, sum(weights.leaves[member].size for member in self.members)


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


def pools(
    leaves: Sequence[Leaf], sparsity: Sparsity, distribution: Distribution
) -> tuple[Pool, ...]:
    """One pool for each sparsity, or for each leaf.

    A mapping gives sparsities by patterns of ``re.search`` on the paths; the first match counts,
    and leaves without a match are not pruned.
    """
    found: list[Pool] = []
    for target, members in _members(leaves, sparsity):
        if distribution == "global":
            found.append(Pool(tuple(members), target))
            continue
        targets = [target] * len(members)
        if distribution == "erk":
            chosen = [leaves[member] for member in members]
            ratios = [erk_ratio(leaf.layout, leaf.shape) for leaf in chosen]
            densities = erk_densities(ratios, [leaf.size for leaf in chosen], 1 - target)
            targets = [max(0.0, 1 - float(density)) for density in densities]
        found += [Pool((member,), own) for member, own in zip(members, targets, strict=True)]
    return tuple(found)


def _members(leaves: Sequence[Leaf], sparsity: Sparsity) -> list[tuple[float, list[int]]]:
    """The numbers of the leaves that each sparsity is meant for."""
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(range(len(leaves))))]
    members: dict[str, list[int]] = {pattern: [] for pattern in sparsity}
    for number, leaf in enumerate(leaves):
        pattern = next((p for p in sparsity if re.search(p, leaf.path)), None)
        if pattern is not None:
            members[pattern].append(number)
    for pattern, numbers in members.items():
        if not numbers:
            paths = ", ".join(leaf.path for leaf in leaves)
            raise ValueError(
                f"sparsity[{pattern!r}] matches no selected leaf, or only leaves that earlier "
                f"patterns match; the selected leaves are: {paths}."
            )
    return [(sparsity[pattern], numbers) for pattern, numbers in members.items()]
