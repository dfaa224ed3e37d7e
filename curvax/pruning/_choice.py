"""Which weights to prune: those of the lowest scores, or whole units of them, in each pool."""

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
    for _, span in weights.members():
        if options.normalize_scores and weights.alive[span].any():
            own[span] /= np.mean(own[span], where=weights.alive[span]) or 1.0
        if options.structure is None and options.min_density:
            _protect(own[span], np.ones(span.stop - span.start), options.min_density)
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
                sizes = [
                    leaf.size // leaf.num_members
                    for leaf in chosen
                    for _ in range(leaf.num_members)
                ]
                flags = _lowest_units(
                    candidates, alive, units, sizes, number or 0, options.min_density
                )
        for span, part in zip(members, _split(flags, members), strict=True):
            gone[span] = part
    return gone[weights.alive]


def _protect(scores: np.ndarray, sizes: np.ndarray, min_density: float) -> None:
    """Gives the best units of a layer, a share of its weights, a score at which they stay."""
    needed = min_density * sizes.sum() - 1e-6
    if needed > 0:
        finite = np.where(np.isfinite(scores), scores, -np.inf)  # pruned ones are infinite here
        best = np.argsort(-finite, kind="stable")
        scores[best[: np.searchsorted(np.cumsum(sizes[best]), needed) + 1]] = np.inf


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
        f"min_density keeps more weights than the sparsity allows: {wanted} are to be pruned, but "
        f"only {left} may be. Lower one of the two."
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


def _lowest_units(
    scores: np.ndarray,
    alive: np.ndarray,
    units: Units,
    sizes: Sequence[int],
    number: int,
    min_density: float,
) -> np.ndarray:
    """Whole units of lowest mean score, skipping those above the ``number`` left."""
    present = alive[units.weights]
    members, numbers = units.weights[present], units.numbers[present]
    total = int(units.numbers.max()) + 1
    counts = np.bincount(numbers, minlength=total)
    sums = np.bincount(numbers, weights=scores[members], minlength=total)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    if min_density:
        _protect_units(means, units, sizes, min_density)
    order = np.argsort(means, kind="stable")
    order = order[np.isfinite(means[order])]
    flags = np.zeros(len(scores), bool)
    if len(np.unique(members)) == len(members):
        flags[members[_that_fit(counts, order, number)[numbers]]] = True
    else:
        groups = np.split(members[np.argsort(numbers, kind="stable")], np.cumsum(counts)[:-1])
        left = number
        for unit in order:  # of coupled units some weights may be gone already
            own = np.unique(groups[unit])
            new = own[~flags[own]]
            if len(new) <= left:
                flags[new] = True
                left -= len(new)
    left = number - int(np.count_nonzero(flags))
    if np.any((counts > 0) & np.isinf(means) & (counts <= left)):
        raise _too_dense(number, number - left)
    return flags


def _protect_units(
    means: np.ndarray, units: Units, sizes: Sequence[int], min_density: float
) -> None:
    """Lets the best units of each leaf stay; a unit lies in one leaf, and all of one are alike."""
    owners = np.empty(len(means), int)
    owners[units.numbers] = np.repeat(np.arange(len(sizes)), sizes)[units.weights]
    for leaf, size in enumerate(sizes):
        own = means[owners == leaf]
        _protect(own, np.full(len(own), size / len(own)), min_density)
        means[owners == leaf] = own


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
