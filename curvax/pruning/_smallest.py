"""Marks exactly the k smallest of many numbers, for a k known only at run time.

Nothing is sorted: the cut-off is found bit by bit, and each bit takes one pass that counts the
numbers below a bound. Shapes are fixed, the arrays are read where they lie, and on a mesh only
counts are summed over devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._trees import varying_like

LARGEST = np.int32(2**31 - 1)
_BITS = 31


class Pools(NamedTuple):
    """Which arrays are compared with each other.

    Attributes:
      of: for each array the number of its pool.
      totals: for each pool how many numbers its arrays hold, each less than $2^{31}$.
    """

    of: tuple[int, ...]
    totals: tuple[int, ...]

    def sums(self, counts: Sequence[jax.Array]) -> jax.Array:
        """For each pool the sum of its arrays' counts."""
        sums: list[Any] = [jnp.int32(0)] * len(self.totals)
        # Not a scatter: XLA for CPUs loses counts when it batches one into a single pool in a loop.
        for pool, count in zip(self.of, counts, strict=True):
            sums[pool] += count
        return jnp.stack(sums)


def smallest(keys: Sequence[jax.Array], pools: Pools, numbers: jax.Array) -> list[jax.Array]:
    """Whether a key is one of the ``numbers[pool]`` smallest of its pool; of equals the first is.

    It takes up to 31 passes over the keys, and as many again where some of several equal keys are
    to be marked.

    Args:
      keys: arrays of int32, none negative.
      pools: which of them are compared.
      numbers: how many keys of each pool are marked.

    Returns:
      Arrays of bool like ``keys``.
    """
    bounds, below = _bounds(keys, pools, numbers)
    places = [
        jnp.where(key == bounds[pool], place, LARGEST)
        for key, pool, place in zip(keys, pools.of, _places(keys, pools), strict=True)
    ]
    place_bounds, _ = _bounds(places, pools, numbers - below)
    return [
        (key < bounds[pool]) | (place < place_bounds[pool])
        for key, pool, place in zip(keys, pools.of, places, strict=True)
    ]


def keep_best(keys: jax.Array, axis: int, n: int, m: int) -> jax.Array:
    """The keys, with the n largest of each m along ``axis`` out of the reach of pruning.

    Of equal keys the later ones are out of reach, as the first are pruned first.
    """
    runs = keys.shape[axis] // m
    groups = keys.reshape(*keys.shape[:axis], runs, m, *keys.shape[axis + 1 :])
    places = jnp.arange(m).reshape(m, *[1] * (keys.ndim - axis - 1))
    ranks: Any = 0
    for place in range(m):  # comparisons fuse into one pass, where sorts of short runs are slow
        other = jax.lax.index_in_dim(groups, place, axis + 1)
        ranks += (other < groups) | ((other == groups) & (place < places))
    return jnp.where(ranks >= m - n, LARGEST, groups).reshape(keys.shape)


def ascending(scores: jax.Array) -> jax.Array:
    """Keys that order non-negative float32 numbers, from 1: 0 is less, `LARGEST` more than all."""
    known = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    return jax.lax.bitcast_convert_type(known, jnp.int32) + 1


def share(fraction: Any, totals: Any) -> jax.Array:
    r"""$\lfloor f N \rfloor$ in whole numbers, for float32 $f$ in [0, 1] and $N < 2^{31}$.

    The fraction counts as the next multiple of $2^{-24}$ above it, since float32 rounds 0.9 to
    something less: 0.9 of 10 are 9.
    """
    fraction = jnp.asarray(fraction, jnp.float32)
    units = jnp.minimum(jnp.floor(fraction * 2**24) + (fraction > 0), 2**24).astype(jnp.uint32)
    totals = jnp.asarray(totals, jnp.uint32)
    # The product has up to 55 bits: in two parts of each factor it fits into 32.
    high, low = units >> 12, units & 4095
    total_high, total_low = totals >> 12, totals & 4095
    middle = high * total_low + low * total_high + (low * total_low >> 12)
    return (high * total_high + (middle >> 12)).astype(jnp.int32)


def _bounds(
    keys: Sequence[jax.Array], pools: Pools, numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each pool a bound with at most ``numbers`` keys below it, and how many these are.

    Its bits are set from the highest; what is still missing at the end is equal to the bound.
    """

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        bit, _, below = carry
        return (bit > 0) & jnp.any(below < numbers)

    def next_bit(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        bit, bounds, below = carry
        higher = bounds | bit
        counts = [
            jnp.sum(key < higher[pool], dtype=jnp.int32)
            for key, pool in zip(keys, pools.of, strict=True)
        ]
        number = pools.sums(counts)
        fits = number <= numbers
        return bit >> 1, jnp.where(fits, higher, bounds), jnp.where(fits, number, below)

    zeros = jnp.zeros(len(pools.totals), jnp.int32)
    start = varying_like((jnp.int32(1 << (_BITS - 1)), zeros, zeros), [*keys, numbers])
    _, bounds, below = jax.lax.while_loop(unfinished, next_bit, start)
    return bounds, below


def _places(keys: Sequence[jax.Array], pools: Pools) -> list[Any]:
    """For each entry its place among those of its pool, row by row and array by array."""
    starts = [0] * len(pools.totals)
    places = []
    for key, pool in zip(keys, pools.of, strict=True):
        place: Any = np.int32(starts[pool])
        for axis, size in enumerate(key.shape):
            stride = np.prod(key.shape[axis + 1 :], dtype=np.int32)
            shape = [size if other == axis else 1 for other in range(key.ndim)]
            place = place + jnp.arange(size, dtype=jnp.int32).reshape(shape) * stride
        starts[pool] += key.size
        places.append(place)
    return places
