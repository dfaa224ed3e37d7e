"""The search for a learning rate, the same number of trials for every contestant."""

import math

RATIO = 4.0


def next_rate(losses: dict[float, float], start: float) -> float:
    """The rate to try next.

    First the start and its neighbours, a factor of 4 below and above. Then, while the best rate is
    the smallest or the largest, one beyond it; else the middle, on a logarithmic scale, of the best
    and a neighbour: on the wider side, or on the better one if both are equally wide.

    Args:
      losses: the losses of the rates tried, infinite or NaN where a run diverged.
      start: the rate to begin with.
    """
    for rate in (start, start / RATIO, start * RATIO):
        if rounded(rate) not in losses:
            return rounded(rate)
    rates = sorted(losses)
    place = rates.index(best_rate(losses))
    if place == 0:
        return rounded(rates[0] / RATIO)
    if place == len(rates) - 1:
        return rounded(rates[-1] * RATIO)
    low, best, high = rates[place - 1 : place + 2]
    below, above = math.log(best / low), math.log(high / best)
    is_below_better = _order(losses[low]) < _order(losses[high])
    if math.isclose(below, above, rel_tol=0.01):
        neighbour = low if is_below_better else high
    else:
        neighbour = low if below > above else high
    return rounded(math.sqrt(best * neighbour))


def best_rate(losses: dict[float, float]) -> float:
    """The rate with the lowest loss; the smallest one if all diverged."""
    return min(sorted(losses), key=lambda rate: _order(losses[rate]))


def rounded(rate: float) -> float:
    """Four digits, so that a table shows what was run."""
    return float(f"{rate:.4g}")


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
