"""What is removed as a whole: single weights, blocks of them, whole outputs; or N of M kept."""

from typing import NamedTuple

import numpy as np

from curvax._checks import check_count
from curvax.pruning._leaves import Leaf

# The axis of a Flax kernel along which inputs are summed: (in, out), (*spatial, in, out).
FAN_IN = -2


class NM(NamedTuple):
    """Of each ``m`` consecutive weights along the fan-in at most ``n`` are kept.

    Attributes:
      n: how many are kept.
      m: the length of a group; it must divide the fan-in.
    """

    n: int
    m: int


class WeightBlocks(NamedTuple):
    """``size`` consecutive weights along the fan-in go together; it must divide the fan-in."""

    size: int


class OutputUnits(NamedTuple):
    """All weights of an output, a slice along a kernel's last axis, go together."""


Structure = NM | WeightBlocks | OutputUnits


def check_structure(structure: Structure | None) -> None:
    """Raises unless the numbers of a structure make sense."""
    if structure is None:
        return
    if not isinstance(structure, NM | WeightBlocks | OutputUnits):
        raise ValueError(
            "structure must be None, NM(n, m), WeightBlocks(size) or OutputUnits(), got "
            f"{structure!r}."
        )
    if isinstance(structure, NM):
        check_count("n of NM(n, m)", structure.n)
        check_count("m of NM(n, m)", structure.m)
        if structure.n > structure.m:
            raise ValueError(f"NM(n, m) keeps n of m weights and needs n <= m, got {structure}.")
    if isinstance(structure, WeightBlocks):
        check_count("size of WeightBlocks(size)", structure.size)


def unit_numbers(leaf: Leaf, structure: Structure | None) -> np.ndarray:
    """For each alive weight the number of the unit that it belongs to, from 0 on."""
    if structure is None:
        return np.arange(len(leaf.alive))
    if isinstance(structure, OutputUnits):
        if not leaf.shape:
            raise ValueError(f"{structure} needs an axis of outputs, got a scalar at {leaf.path}.")
        return leaf.alive % leaf.shape[-1]
    length = structure.m if isinstance(structure, NM) else structure.size
    if len(leaf.shape) < 2 or (len(leaf.shape) == 3 and "conv" not in leaf.path.lower()):
        raise ValueError(
            f"{structure} needs the fan-in's axis, which {leaf.path} of shape {leaf.shape} does "
            "not tell: kernels of dense layers (fan-in, outputs) and convolutions do; leave the "
            "leaf out with predicate."
        )
    fan_in = leaf.shape[FAN_IN]
    if fan_in % length:
        raise ValueError(
            f"{structure} needs a fan-in that {length} divides, got {fan_in} at {leaf.path}; leave "
            "the leaf out with predicate."
        )
    numbers = np.arange(np.prod(leaf.shape) // length).reshape(_along_fan_in(leaf.shape, length))
    return np.repeat(numbers, length, axis=FAN_IN).reshape(-1)[leaf.alive]


def _along_fan_in(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (*shape[:FAN_IN], shape[FAN_IN] // length, shape[-1])


def not_among_the_best(scores: np.ndarray, units: np.ndarray, number: int) -> np.ndarray:
    """Whether a weight is outside the ``number`` best of its unit."""
    order = np.lexsort((-scores, units))
    sorted_units = units[order]
    first = np.searchsorted(sorted_units, sorted_units, side="left")
    rank = np.empty(len(scores), int)
    rank[order] = np.arange(len(scores)) - first
    return rank >= number
