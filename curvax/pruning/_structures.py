"""The units of pruning, and the leaves that fit them: N:M, blocks of weights, whole outputs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curvax._checks import check_count
from curvax._layouts import KernelLayout, Layout
from curvax._trees import PyTree, Select, named_leaves
from curvax.pruning._weights import Leaf, Skipped, Weights, check_on_host, chosen_leaves

_READS = ":in"


class NM(NamedTuple):
    """At most ``n`` of each ``m`` consecutive weights along an axis are kept.

    Attributes:
      n: how many are kept.
      m: the length of a group; leaves whose axis is not divisible by it are not pruned.
      axis: the axis of the groups, for leaves of any rank; None for the last fan-in axis.
    """

    n: int
    m: int
    axis: int | None = None


class WeightBlocks(NamedTuple):
    """Pruning blocks of consecutive weights.

    Attributes:
      size: the number of weights along the fan-in, or the numbers along fan-in and fan-out; leaves
        whose axes are not divisible by them are not pruned.
    """

    size: int | tuple[int, int]


class OutputUnits(NamedTuple):
    """Pruning all weights of an output unit: a column of a Flax kernel, a row of a PyTorch weight.

    Attributes:
      coupled: groups of leaves that lose a unit together; no other leaf is then pruned. A group is
        a tuple of paths of the leaves that have the unit as an output (kernels, biases, scales)
        and, marked ``"path:in"``, of the kernels that read it. If a kernel reads a multiple of the
        units, as after flattening, the unit is the fastest-varying input index.
    """

    coupled: tuple[tuple[str, ...], ...] = ()

    def paths(self) -> set[str]:
        """The leaves in groups."""
        return {name.removesuffix(_READS) for group in self.coupled for name in group}


Structure = NM | WeightBlocks | OutputUnits


def check_structure(structure: Structure | None, distribution: str | None = None) -> None:
    """Raises unless a structure's numbers are valid and compatible with the distribution."""
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
        if not isinstance(structure.axis, int | None):
            raise ValueError(f"axis of NM(n, m, axis) must be an integer or None, got {structure}.")
        if distribution == "erk":
            raise ValueError(
                "distribution='erk' gives leaves different densities, but NM(n, m) fixes one for "
                "all: choose another distribution, or drop the structure."
            )
    if isinstance(structure, OutputUnits):
        for group in structure.coupled:
            if not isinstance(group, tuple | list):
                raise ValueError(
                    "OutputUnits(coupled=...) takes groups of paths, (('a/kernel', 'a/bias'),), "
                    f"got {structure.coupled}."
                )
    if isinstance(structure, WeightBlocks):
        if len(_sides(structure)) not in (1, 2):
            raise ValueError(f"WeightBlocks(size) takes one size or two, got {structure}.")
        for size in _sides(structure):
            check_count("size of WeightBlocks(size)", size)


def takes_all(structure: Structure | None, sparsity: float) -> bool:
    """Whether a sparsity is the most that N:M allows, so that every group comes down to N."""
    if not isinstance(structure, NM):
        return False
    most = 1 - structure.n / structure.m
    if sparsity > most + 1e-9:
        raise ValueError(f"{structure} allows a sparsity of at most {most:.6g}, got {sparsity}.")
    return sparsity > most - 1e-9


def why_unfit(leaf: Leaf, structure: Structure | None) -> str | None:
    """Why a leaf cannot be pruned in the structure's units; None if it can."""
    if isinstance(structure, NM) and structure.axis is not None:
        if not -len(leaf.shape) <= structure.axis < len(leaf.shape):
            return f"it has no axis {structure.axis}"
        return _indivisible(leaf, (structure.axis,), (structure.m,))
    if structure is None or (isinstance(structure, OutputUnits) and len(leaf.shape) == 1):
        return None
    layout = leaf.layout
    if layout is None or layout.unknown or not (layout.fan_in and layout.fan_out):
        found = layout.letters if layout else "not a kernel"
        letters = "IO".rjust(len(leaf.shape), "L")
        return (
            f"its fan-in and output axes are unknown (read as {found!r}): name them with "
            f"layout={{{leaf.path!r}: {letters!r}}} for (stacked axes, fan-in, outputs)"
            f"{', or the axis with NM(n, m, axis)' if isinstance(structure, NM) else ''}"
        )
    if isinstance(structure, NM):
        return _indivisible(leaf, layout.fan_in[-1:], (structure.m,))
    if isinstance(structure, WeightBlocks):
        return _indivisible(leaf, _block_axes(layout), _sides(structure))
    return None


def selection_of(
    params: PyTree,
    mask: PyTree | None,
    select: Select,
    structure: Structure | None,
    layout: Layout,
) -> tuple[Weights, tuple[Skipped, ...]]:
    """The weights to prune, and the selected leaves that do not fit the structure."""
    check_on_host(params)
    if isinstance(structure, OutputUnits) and structure.coupled:
        paths = structure.paths()
        if missing := paths - {path for path, _ in named_leaves(params)}:
            raise ValueError(
                f"OutputUnits(coupled=...) names leaves that params do not have: {sorted(missing)}."
            )
        chosen = chosen_leaves(params, lambda path, _: path in paths, layout)
    else:
        chosen = chosen_leaves(params, select, layout)
    reasons = [why_unfit(leaf, structure) for leaf in chosen]
    skipped = tuple(
        Skipped(leaf.path, reason)
        for leaf, reason in zip(chosen, reasons, strict=True)
        if reason is not None
    )
    fitting = tuple(leaf for leaf, reason in zip(chosen, reasons, strict=True) if reason is None)
    if skipped and isinstance(structure, OutputUnits) and structure.coupled:
        listed = "; ".join(f"{leaf.path}: {leaf.reason}" for leaf in skipped)
        raise ValueError(f"leaves of OutputUnits(coupled=...) have no units: {listed}.")
    if not fitting:
        listed = "; ".join(f"{leaf.path}: {leaf.reason}" for leaf in skipped)
        raise ValueError(f"no selected leaf fits {structure}: {listed}.")
    return Weights.of(params, mask, fitting), skipped


class Units(NamedTuple):
    """Which weights belong to which units; with coupled leaves a weight may belong to several.

    Attributes:
      weights: the position of a weight among those of the chosen leaves.
      numbers: the number of its unit, from 0.
    """

    weights: np.ndarray
    numbers: np.ndarray


def units_of(leaves: Sequence[Leaf], structure: Structure) -> Units:
    """The units of leaves."""
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)]).tolist()
    if isinstance(structure, OutputUnits) and structure.coupled:
        return _coupled_units(leaves, starts, structure)
    numbers, total = [], 0
    for leaf in leaves:
        own = _numbers(leaf, structure)
        numbers.append(total + own)
        total += int(own.max(initial=-1)) + 1
    return Units(np.arange(starts[-1]), np.concatenate(numbers))


def _coupled_units(leaves: Sequence[Leaf], starts: list[int], structure: OutputUnits) -> Units:
    by_path = {leaf.path: (leaf, start) for leaf, start in zip(leaves, starts, strict=False)}
    if missing := structure.paths() - by_path.keys():
        raise ValueError(
            "leaves of OutputUnits(coupled=...) lose units together and need the same sparsity: "
            f"use distribution='global' without patterns; compared separately: {sorted(missing)}."
        )
    weights, numbers, total = [], [], 0
    for group in structure.coupled:
        made = [by_path[name][0] for name in group if not name.endswith(_READS)]
        counts = {_num_outputs(leaf) for leaf in made}
        if len(counts) != 1:
            found = {leaf.path: _num_outputs(leaf) for leaf in made}
            raise ValueError(
                f"the leaves of a group of OutputUnits(coupled=...) must have the same number of "
                f"outputs, got {found}; mark leaves that read the units as 'path{_READS}'."
            )
        (count,) = counts
        for name in group:
            leaf, start = by_path[name.removesuffix(_READS)]
            axes = _fan_in(leaf) if name.endswith(_READS) else _fan_out(leaf)
            places = _along(leaf, axes)
            if (places.max() + 1) % count:
                raise ValueError(
                    f"{name} reads {places.max() + 1} inputs, which is not a multiple of the "
                    f"{count} units of {made[0].path}."
                )
            weights.append(start + np.arange(leaf.size))
            numbers.append(total + places % count)
        total += count
    return Units(np.concatenate(weights), np.concatenate(numbers))


def _numbers(leaf: Leaf, structure: Structure) -> np.ndarray:
    """For each weight of a leaf the number of its unit."""
    if isinstance(structure, OutputUnits):
        layout = leaf.layout
        return _along(leaf, (*(layout.stacked if layout else ()), *_fan_out(leaf)))
    if isinstance(structure, NM):
        axis = structure.axis if structure.axis is not None else _fan_in(leaf)[-1]
        lengths = {axis % len(leaf.shape): structure.m}
    else:
        assert leaf.layout is not None
        pairs = zip(_block_axes(leaf.layout), _sides(structure), strict=False)
        lengths = dict(pairs)
    places = np.indices(leaf.shape, sparse=True)
    numbers: np.ndarray = np.zeros((), int)
    for axis, size in enumerate(leaf.shape):
        length = lengths.get(axis, 1)
        numbers = numbers * (size // length) + places[axis] // length
    return np.asarray(leaf.flat(np.broadcast_to(numbers, leaf.shape)))


def _along(leaf: Leaf, axes: tuple[int, ...]) -> np.ndarray:
    """For each weight its place along some axes."""
    places = np.indices(leaf.shape, sparse=True)
    numbers: np.ndarray = np.zeros((), int)
    for axis in axes:
        numbers = numbers * leaf.shape[axis] + places[axis]
    return np.asarray(leaf.flat(np.broadcast_to(numbers, leaf.shape)))


def _fan_in(leaf: Leaf) -> tuple[int, ...]:
    return leaf.layout.fan_in if leaf.layout else ()


def _fan_out(leaf: Leaf) -> tuple[int, ...]:
    """A bias or a scale has an entry for each output."""
    return leaf.layout.fan_out if leaf.layout else tuple(range(len(leaf.shape)))


def _num_outputs(leaf: Leaf) -> int:
    return math.prod(leaf.shape[axis] for axis in _fan_out(leaf))


def _sides(structure: WeightBlocks) -> tuple[int, ...]:
    return structure.size if isinstance(structure.size, tuple) else (structure.size,)


def _block_axes(layout: KernelLayout) -> tuple[int, int]:
    return layout.fan_in[-1], layout.fan_out[-1]


def _indivisible(leaf: Leaf, axes: Sequence[int], lengths: Sequence[int]) -> str | None:
    for axis, length in zip(axes, lengths, strict=False):
        if leaf.shape[axis] % length:
            return f"axis {axis} has {leaf.shape[axis]} entries, not divisible by {length}"
    return None
