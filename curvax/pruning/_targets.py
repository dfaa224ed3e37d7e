"""How far to prune: sparsities of the steps of a run, and of pools of leaves."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from curvax._checks import check_count, check_pattern, check_range
from curvax.pruning._erk import erk_densities, erk_ratio
from curvax.pruning._weights import Leaf, Skipped, Weights

Sparsity = float | Mapping[str, float]
Distribution = Literal["global", "uniform", "erk"]


class Pool(NamedTuple):
    """Leaves whose weights compete with each other, and the sparsity they reach together.

    Attributes:
      members: the indices of the leaves among the selected ones.
      sparsity: the final fraction of pruned weights.
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
    for pattern, value in values:
        name = f"sparsity[{pattern!r}]" if pattern else "sparsity"
        check_range(name, value, low=0.0, high=1.0, open_high=True)


def pools(
    leaves: Sequence[Leaf],
    sparsity: Sparsity,
    distribution: Distribution,
    skipped: Sequence[Skipped] = (),
) -> tuple[Pool, ...]:
    """One pool for each sparsity, or for each leaf.

    A mapping gives sparsities by patterns of ``re.search`` on the paths; the first match counts,
    and leaves without a match are not pruned. A pattern may match ``skipped`` ones alone.
    """
    found: list[Pool] = []
    for target, members in _members(leaves, sparsity, skipped):
        if distribution == "global":
            found.append(Pool(tuple(members), target))
            continue
        chosen = [leaves[member] for member in members]
        targets = (
            erk_sparsities(chosen, target) if distribution == "erk" else [target] * len(chosen)
        )
        found += [Pool((member,), own) for member, own in zip(members, targets, strict=True)]
    return tuple(found)


def erk_sparsities(leaves: Sequence[Leaf], sparsity: float) -> list[float]:
    """The sparsity of each leaf under the Erdős-Rényi-Kernel distribution."""
    ratios = [erk_ratio(leaf.layout, leaf.shape) for leaf in leaves]
    densities = erk_densities(ratios, [leaf.size for leaf in leaves], 1 - sparsity)
    return [max(0.0, 1 - float(density)) for density in densities]


def _members(
    leaves: Sequence[Leaf], sparsity: Sparsity, skipped: Sequence[Skipped]
) -> list[tuple[float, list[int]]]:
    """The indices of the leaves to which each sparsity applies."""
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(range(len(leaves))))]
    paths = [leaf.path for leaf in leaves] + [leaf.path for leaf in skipped]
    found = members_by_pattern(paths, sparsity)
    fitting = {
        pattern: [number for number in numbers if number < len(leaves)]
        for pattern, numbers in found.items()
    }
    return [(sparsity[pattern], numbers) for pattern, numbers in fitting.items() if numbers]


def members_by_pattern(paths: Sequence[str], patterns: Iterable[str]) -> dict[str, list[int]]:
    """For each pattern, the indices of the paths that it is the first to match."""
    members: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    if not members:
        raise ValueError("sparsity must name at least one pattern, got an empty mapping.")
    for key in members:
        check_pattern("sparsity", key)
    for number, path in enumerate(paths):
        pattern = next((p for p in members if re.search(p, path)), None)
        if pattern is not None:
            members[pattern].append(number)
    for pattern, numbers in members.items():
        if not numbers:
            raise ValueError(
                f"sparsity[{pattern!r}] matches no selected leaf, or only leaves that earlier "
                f"patterns match; the selected leaves are: {', '.join(paths) or 'none'}."
            )
    return members


def geometric_sparsities(initial: float, final: float, num_steps: int) -> list[float]:
    r"""Returns sparsities whose densities fall by a constant factor: $d_j = d_0 (d_n / d_0)^{j/n}$.

    Args:
      initial: the sparsity before the first step.
      final: the sparsity after the last.
      num_steps: the number of steps $n$.

    Returns:
      ``num_steps`` sparsities, the last of them ``final`` exactly.

    Example:
      >>> from curvax.pruning import geometric_sparsities
      >>> [round(sparsity, 3) for sparsity in geometric_sparsities(0.0, 0.75, 2)]
      [0.5, 0.75]
    """
    _check_path(initial, final, num_steps)
    ratio = (1 - final) / (1 - initial)
    steps = range(1, num_steps)
    return [1 - (1 - initial) * ratio ** (step / num_steps) for step in steps] + [final]


def polynomial_sparsities(
    initial: float, final: float, num_steps: int, *, power: float = 3.0
) -> list[float]:
    r"""Returns sparsities of a gradual schedule: $s_j = s_n + (s_0 - s_n) (1 - j/n)^p$.

    Args:
      initial: the sparsity before the first step.
      final: the sparsity after the last.
      num_steps: the number of steps $n$.
      power: $p$; 3 is the cubic schedule, which prunes most in the first steps.

    Returns:
      ``num_steps`` sparsities, the last of them ``final`` exactly.

    Example:
      >>> from curvax.pruning import polynomial_sparsities
      >>> [round(sparsity, 3) for sparsity in polynomial_sparsities(0.0, 0.9, 3)]
      [0.633, 0.867, 0.9]

    References:
      Zhu and Gupta, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017, Section 3.
    """
    _check_path(initial, final, num_steps)
    check_range("power", power, low=0.0, open_low=True)
    steps = range(1, num_steps)
    return [final + (initial - final) * (1 - step / num_steps) ** power for step in steps] + [final]


def _check_path(initial: float, final: float, num_steps: int) -> None:
    check_range("initial", initial, low=0.0, high=1.0, open_high=True)
    check_range("final", final, low=initial, high=1.0, open_high=True)
    check_count("num_steps", num_steps)
