"""Which weights to prune: those of the lowest scores, or whole units of them, in each pool."""

import math
from collections.abc import Sequence

import numpy as np

from curvax.pruning._options import Options
from curvax.pruning._structures import NM, Units, takes_all, units_of
from curvax.pruning._targets import Pool
from curvax.pruning._weights import Weights


def weights_to_prune(
    weights: Weights, scores: np.ndarray, pools: Sequence[Pool], options: Options
) -> np.ndarray:
    """For each alive weight whether to prune it."""
    own = np.full(len(weights.alive), np.inf)
    own[weights.alive] = scores
    spans = weights.spans()
    for span in spans:
        if options.normalize_scores and weights.alive[span].any():
            own[span] /= np.mean(own[span], where=weights.alive[span]) or 1.0
        _protect(own[span], options.min_density)
    gone = np.zeros(len(own), bool)
    for pool in pools:
        members = [spans[member] for member in pool.members]
        candidates = np.concatenate([own[span] for span in members])
        if options.structure is None:
            flags = _lowest(candidates, pool.number_to_prune(weights))
        else:
            chosen = [weights.leaves[member] for member in pool.members]
            alive = np.concatenate([weights.alive[span] for span in members])
            units = units_of(chosen, options.structure)
            if takes_all(options.structure, pool.sparsity):
                number = None
            else:
                number = pool.number_to_prune(weights)
            if isinstance(options.structure, NM):
                flags = _in_groups(candidates, alive, units, options.structure.n, number)
            else:
                flags = _lowest_units(candidates, alive, units, number or 0)
        for span, part in zip(members, _split(flags, members), strict=True):
            gone[span] = part
    return gone[weights.alive]


def _protect(scores: np.ndarray, min_density: float) -> None:
    """Gives the best weights of a leaf a score at which they stay."""
    number = math.ceil(min_density * len(scores) - 1e-6)
    if number:
        finite = np.where(np.isfinite(scores), scores, -np.inf)  # pruned ones are infinite here
        scores[np.argpartition(-finite, number - 1)[:number]] = np.inf


def _split(flags: np.ndarray, spans: Sequence[slice]) -> list[np.ndarray]:
    return np.split(flags, np.cumsum([span.stop - span.start for span in spans])[:-1])


def _lowest(scores: np.ndarray, number: int) -> np.ndarray:
    """The ``number`` lowest scores; of equal ones, the first."""
    order = np.argsort(scores, kind="stable")[:number]
    if number and not np.isfinite(scores[order[-1]]):
        raise _too_dense(number, int(np.count_nonzero(np.isfinite(scores))))
    flags = np.zeros(len(scores), bool)
    flags[order] = True
    return flags


def _too_dense(wanted: int, left: int) -> ValueError:
    return ValueError(
        f"min_density keeps more than the sparsity allows: of {wanted} weights to prune it leaves "
        f"{left}. Lower one of them."
    )


def _in_groups(
    scores: np.ndarray, alive: np.ndarray, units: Units, kept: int, number: int | None
) -> np.ndarray:
    """Weights outside the best of their group: the ``number`` lowest, or all."""
    candidates = alive & _outside_best(np.where(alive, scores, -np.inf), units, kept)
    total = int(np.count_nonzero(candidates))
    wanted = total if number is None else min(number, total)
    left = int(np.count_nonzero(candidates & np.isfinite(scores)))
    if left < wanted:
        raise _too_dense(wanted, left)
    if number is None:
        return candidates
    flags = np.zeros(len(scores), bool)
    order = np.argsort(np.where(candidates, scores, np.inf), kind="stable")
    flags[order[:wanted]] = True
    return flags


def _outside_best(scores: np.ndarray, units: Units, number: int) -> np.ndarray:
    """Whether a weight is outside the ``number`` best of its unit."""
    order = np.lexsort((-scores, units.numbers))
    sorted_units = units.numbers[order]
    first = np.searchsorted(sorted_units, sorted_units, side="left")
    rank = np.empty(len(scores), int)
    rank[order] = np.arange(len(scores)) - first
    return rank >= number


def _lowest_units(scores: np.ndarray, alive: np.ndarray, units: Units, number: int) -> np.ndarray:
    """Whole units of lowest mean score, skipping those above the ``number`` left."""
    present = alive[units.weights]
    members, numbers = units.weights[present], units.numbers[present]
    sizes = np.bincount(numbers)
    means = np.bincount(numbers, weights=scores[members]) / np.maximum(sizes, 1)
    order = np.argsort(np.where(sizes > 0, means, np.inf), kind="stable")
    order = order[(sizes[order] > 0) & np.isfinite(means[order])]
    flags = np.zeros(len(scores), bool)
    if len(np.unique(members)) == len(members):
        flags[members[_that_fit(sizes, order, number)[numbers]]] = True
        return flags
    for unit in order:  # of coupled units some weights may be gone already
        own = np.unique(members[numbers == unit])
        new = own[~flags[own]]
        if len(new) <= number:
            flags[new] = True
            number -= len(new)
    return flags


def _that_fit(sizes: np.ndarray, order: np.ndarray, number: int) -> np.ndarray:
    """Whether a unit is taken, of units that share no weights."""
    taken = np.zeros(len(sizes), bool)
    while len(order):
        fitting = order[: np.searchsorted(np.cumsum(sizes[order]), number, side="right")]
        taken[fitting] = True
        number -= int(sizes[fitting].sum())
        rest = order[len(fitting) :]
        order = rest[sizes[rest] <= number]
    return taken
