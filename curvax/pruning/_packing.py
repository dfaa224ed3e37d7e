"""Alive weights of all leaves side by side, padded with zeros to one of a few sizes.

Each pruning step leaves fewer weights, and every new shape needs a compilation. Columns of zeros
change nothing, so sizes are rounded up, and steps share compiled functions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_SMALL = 2**16


class Packing(NamedTuple):
    """How leaves are put side by side; they stay separate if ``width`` is None.

    Attributes:
      sizes: the number of alive weights of each leaf.
      width: the number of columns, including those of zeros at the end.
    """

    sizes: tuple[int, ...]
    width: int | None

    @classmethod
    def of(cls, sizes: Sequence[int], *, packed: bool) -> "Packing":
        return cls(tuple(sizes), rounded_up(sum(sizes)) if packed else None)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """Leaves of shape (..., size) as one of shape (..., width)."""
        if self.width is None:
            return list(leaves)
        dtype = jnp.result_type(*leaves)  # float16 and bfloat16 make float32
        joined = np.concatenate([np.asarray(leaf, dtype) for leaf in leaves], axis=-1)
        margin = [(0, 0)] * (joined.ndim - 1) + [(0, self.width - joined.shape[-1])]
        filled = np.pad(joined, margin)
        on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return [filled if on_host else jnp.asarray(filled)]

    def unpack(self, packed: Sequence[Any]) -> list[np.ndarray]:
        """The leaves again, on the host."""
        if self.width is None:
            return [np.asarray(leaf) for leaf in packed]
        ends = np.cumsum(self.sizes)
        return np.split(np.asarray(packed[0])[..., : ends[-1]], ends[:-1], axis=-1)


def rounded_up(number: int) -> int:
    """The next power of two; for large numbers, of eight steps between two powers."""
    power = 1 << max(number - 1, 1).bit_length()
    if power <= _SMALL:
        return power
    step = power // 16
    return -(-number // step) * step
