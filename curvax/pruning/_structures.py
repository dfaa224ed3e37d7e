"""The units of pruning: single weights, blocks of them, whole outputs; or N of M kept."""

import math
from typing import NamedTuple

import numpy as np

from curvax._checks import check_count
from curvax._layouts import KernelLayout
from curvax.pruning._leaves import Leaf


class NM(NamedTuple):
    """At most ``n`` of each ``m`` consecutive weights along the fan-in are kept.

    Attributes:
      n: how many are kept.
      m: the length of a group; it must divide the fan-in.
    """

    n: int
    m: int


class WeightBlocks(NamedTuple):
    """Pruning runs of ``size`` consecutive weights along the fan-in, which it must divide."""

    size: int


class OutputUnits(NamedTuple):
    """Pruning all weights of an output unit, a Flax kernel's column, a PyTorch weight's row."""


Structure = NM | WeightBlocks | OutputUnits


def check_structure(structure: Structure | None) -> None:
    """Raises unless the numbers of a structure are valid."""
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
    """For each alive weight the number of its unit, from 0."""
    if structure is None:
        return np.arange(len(leaf.alive))
    numbers = (
        _output_numbers(leaf) if isinstance(structure, OutputUnits) else _runs(leaf, structure)
    )
    return np.broadcast_to(numbers, leaf.shape).reshape(-1)[leaf.alive]


def _output_numbers(leaf: Leaf) -> np.ndarray:
    """A number for each output of each member of a stack, with axes of length one elsewhere."""
    if len(leaf.shape) == 1:
        return np.arange(leaf.shape[0])  # a bias or a scale has an entry for each output
    layout = _known_layout(leaf, OutputUnits())
    axes = layout.stacked + layout.fan_out
    shape = [size if axis in axes else 1 for axis, size in enumerate(leaf.shape)]
    return np.arange(math.prod(shape)).reshape(shape)


def _runs(leaf: Leaf, structure: NM | WeightBlocks) -> np.ndarray:
    """A number for each run of consecutive weights along the fan-in."""
    length = structure.m if isinstance(structure, NM) else structure.size
    axis = _known_layout(leaf, structure).fan_in[-1]
    runs, rest = divmod(leaf.shape[axis], length)
    if rest:
        raise ValueError(
            f"{structure} needs a fan-in that {length} divides, got {leaf.shape[axis]} at "
            f"{leaf.path}; leave the leaf out with select."
        )
    shape = (*leaf.shape[:axis], runs, *leaf.shape[axis + 1 :])
    return np.repeat(np.arange(math.prod(shape)).reshape(shape), length, axis=axis)


def _known_layout(leaf: Leaf, structure: Structure) -> KernelLayout:
    layout = leaf.layout
    if layout is None or layout.unknown or not (layout.fan_in and layout.fan_out):
        found = layout.letters if layout else "not a kernel"
        letters = "IO".rjust(len(leaf.shape), "L")
        raise ValueError(
            f"{structure} needs the axes of fan-in and outputs, and {leaf.path} of shape "
            f"{leaf.shape} was read as {found!r}: name them, with layout={{{leaf.path!r}: "
            f"{letters!r}}} for (stacked axes, fan-in, outputs), or leave the leaf out with "
            "select."
        )
    return layout


def not_among_the_best(scores: np.ndarray, units: np.ndarray, number: int) -> np.ndarray:
    """Whether a weight is outside the ``number`` best of its unit."""
    order = np.lexsort((-scores, units))
    sorted_units = units[order]
    first = np.searchsorted(sorted_units, sorted_units, side="left")
    rank = np.empty(len(scores), int)
    rank[order] = np.arange(len(scores)) - first
    return rank >= number
