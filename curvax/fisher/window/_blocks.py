"""Blocks of a leaf that never cross the shards of its axes.

Top-k selection works on blocks of a few thousand entries, so that a position in its block fits
16 bits. Flattening a sharded leaf would gather it. So a block is a box: each axis is cut into
the largest power of two, up to 8, that divides it, and the parts are cut further until a block is
small enough. An axis sharded over as many devices as it has cuts keeps its blocks local.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

_LARGEST = 4096
_SHARDS = 8

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
        shards = tuple(math.gcd(size, _SHARDS) for size in shape)
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
