"""Densities of leaves by their shapes: the Erdős-Rényi-Kernel distribution."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax._layouts import KernelLayout


def erk_ratio(layout: KernelLayout | None, shape: tuple[int, ...]) -> float:
    """Inputs plus outputs plus the window's sides, over their product; for a member of a stack.

    References:
      Evci et al., [Rigging the Lottery](https://arxiv.org/abs/1911.11134), 2020, Section 3.
    """
    if layout is None:
        return sum(shape) / math.prod(shape)
    axes = [
        *((axis,) for axis in (*layout.spatial, *layout.unknown)),
        layout.fan_in,
        layout.fan_out,
    ]
    sides = [math.prod(shape[axis] for axis in group) for group in axes if group]
    return sum(sides) / math.prod(sides)


def erk_densities(
    ratios: Sequence[float], sizes: Sequence[int], density: jax.typing.ArrayLike
) -> jax.Array:
    r"""$\min(1, \epsilon r_l)$ with the $\epsilon$ at which $\sum_l n_l d_l$ has its share.

    Where the k leaves of largest ratio are dense, $\epsilon_k$ follows from the others; the
    smallest k that leaves no other density above 1 is the right one.
    """
    ratio, size = np.array(ratios), np.array(sizes, float)
    order = np.argsort(-ratio, kind="stable")
    dense = np.cumsum(size[order]) - size[order]
    rest = np.cumsum((ratio * size)[order][::-1])[::-1]
    factors = (density * size.sum() - dense) / rest
    xp = np if isinstance(factors, np.ndarray) else jnp  # float64, unless the density is traced
    fits = xp.append(factors[:-1] * ratio[order][:-1] <= 1, True)
    return xp.clip(factors[xp.argmax(fits)] * ratio, 0, 1)
