"""Blocks of a leaf that never cross the shards of its axes.

Top-k selection works on blocks of at most 4096 entries, so that a position in its block fits
16 bits. Flattening a sharded leaf would gather it. So a block is a box: axes are halved exactly,
again and again, and an axis sharded over no more devices than it has cuts keeps its blocks local.
The cuts depend on nothing but the shape: a state can be moved from one mesh to another.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

_LARGEST = 4096
_SMALLEST = 512  # at a density of 1 % a block keeps five entries
_SMALLEST_OF_VECTOR = 64  # vectors take little memory, and are sharded as matrices are
_MOST_CUTS = 256  # of an axis, where the sizes above do not ask for more
_FEWEST_CUTS = 8  # where they divide the axis
_SHORT = 64  # such axes hold heads, experts or layers; a device may hold only one
_SHORT_WEIGHT = 16

Spec = list[str | tuple[str, ...] | None]


class Blocks(NamedTuple):
    """How a leaf of ``shape`` is cut.

    Attributes:
      shape: the leaf's.
      shards: for each axis, the number of equal parts, each cut further on its own.
      sides: for each axis, the side of a block; the last of a part may be padded.
    """

    shape: tuple[int, ...]
    shards: tuple[int, ...]
    sides: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Self:
        shards = _exact_cuts(shape)
        sides = [size // parts for size, parts in zip(shape, shards, strict=True)]
        while math.prod(sides) > _LARGEST:
            longest = max(range(len(sides)), key=sides.__getitem__)
            sides[longest] = -(-sides[longest] // 2)
        return cls(shape, shards, tuple(sides))

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of blocks along each axis."""
        cuts = zip(self.shards, self._padded, self.sides, strict=True)
        return tuple(shards * (part // side) for shards, part, side in cuts)

    @property
    def size(self) -> int:
        """The entries of a block."""
        return math.prod(self.sides)

    @property
    def _parts(self) -> tuple[int, ...]:
        return tuple(size // s for size, s in zip(self.shape, self.shards, strict=True))

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(-(-p // b) * b for p, b in zip(self._parts, self.sides, strict=True))

    def check_devices(self, name: str, sharding: Any) -> None:
        """Raises if a block of the leaf called ``name`` would lie on several devices."""
        if not isinstance(sharding, jax.NamedSharding):
            return
        for axis, (names, cuts) in enumerate(zip(sharding.spec, self.grid, strict=False)):
            devices = math.prod(sharding.mesh.shape[n] for n in _mesh_axes(names))
            if cuts % devices:
                raise ValueError(
                    f"M-FAC's sparse rows keep each block of a leaf on one device. Axis {axis} of "
                    f"{name}, of shape {self.shape}, is cut into {cuts} parts, which cannot be "
                    f"divided evenly among {devices} devices ({names!r}). Shard another axis, or "
                    "this one over fewer devices, replicate the leaf if it is small, or use dense "
                    "rows (density=None)."
                )

    def split(self, leaf: jax.Array) -> jax.Array:
        """The leaf as blocks, of shape ``(*grid, size)``; padding is zeros."""
        spec, rank = _spec(leaf), len(self.shape)
        inner: Spec = [None] * rank
        if self._padded != self._parts:
            leaf = _reshape(leaf, _interleave(self.shards, self._parts), _interleave(spec, inner))
            margin = [p - q for p, q in zip(self._padded, self._parts, strict=True)]
            leaf = jnp.pad(leaf, [(0, n) for n in _interleave([0] * rank, margin)])
        leaf = _reshape(leaf, _interleave(self.grid, self.sides), _interleave(spec, inner))
        axes = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
        return _reshape(leaf.transpose(axes), (*self.grid, self.size), [*spec, None])

    def join(self, blocks: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        spec, rank = _spec(blocks)[:-1], len(self.shape)
        inner: Spec = [None] * rank
        leaf = _reshape(blocks, (*self.grid, *self.sides), [*spec, *inner])
        leaf = leaf.transpose(_interleave(list(range(rank)), list(range(rank, 2 * rank))))
        if self._padded != self._parts:
            leaf = _reshape(leaf, _interleave(self.shards, self._padded), _interleave(spec, inner))
            ends = _interleave(self.shards, self._parts)
            leaf = jax.lax.slice(leaf, [0] * (2 * rank), ends)
        return _reshape(leaf, self.shape, spec)


def _mesh_axes(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _exact_cuts(shape: tuple[int, ...]) -> tuple[int, ...]:
    """For each axis, a power of two that divides it: long axes get most, short ones their share."""
    cuts = [1] * len(shape)
    smallest = _SMALLEST if len(shape) > 1 else _SMALLEST_OF_VECTOR

    def can_be_halved(axis: int) -> bool:
        return cuts[axis] < _MOST_CUTS and shape[axis] % (2 * cuts[axis]) == 0

    def weighted_side(axis: int) -> tuple[int, int]:
        weight = _SHORT_WEIGHT if shape[axis] <= _SHORT else 1
        return weight * shape[axis] // cuts[axis], shape[axis]

    while math.prod(shape) >= 2 * smallest * math.prod(cuts):
        axes = list(filter(can_be_halved, range(len(shape))))
        if not axes:
            break
        cuts[max(axes, key=weighted_side)] *= 2
    pairs = zip(shape, cuts, strict=True)
    return tuple(max(parts, math.gcd(size, _FEWEST_CUTS)) for size, parts in pairs)


def _interleave(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    return [item for pair in zip(first, second, strict=True) for item in pair]


def _spec(array: jax.Array) -> Spec:
    sharding = jax.typeof(array).sharding
    return [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]


def _reshape(array: jax.Array, shape: Sequence[int], spec: Spec) -> jax.Array:
    sharding = jax.typeof(array).sharding
    if sharding.mesh.empty or sharding.mesh.are_all_axes_auto:
        return array.reshape(shape)
    # Explicit axes: a reshape that splits or merges a sharded axis must say where it goes.
    return jax.lax.reshape(array, shape, out_sharding=sharding.update(spec=jax.P(*spec)))
