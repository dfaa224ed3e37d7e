"""Sequences of sparsities: how far each step of a run goes."""

from curvax._checks import check_count, check_range


def geometric_sparsities(initial: float, final: float, num_steps: int) -> list[float]:
    r"""Sparsities whose densities fall by a constant factor: $d_j = d_0 (d_n / d_0)^{j/n}$.

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
    r"""Sparsities of a gradual schedule: $s_j = s_n + (s_0 - s_n) (1 - j/n)^p$.

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
