"""Which entries of a kernel share one curvature value.

AdaHessian averages its noisy diagonal over entries that should curve alike. Which ones those
are depends on the layout: Flax keeps convolution kernels as (spatial axes, in, out), where
PyTorch has (out, in, spatial axes), and dense kernels as (in, out). A rule looks at a leaf's
path and shape and returns the axes to average over, or a `Block` of consecutive entries of
one axis. No rule crosses from one axis into another, so a sharded kernel is never gathered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._checks import check_choice
from curvax._trees import path_name


class Block(NamedTuple):
    """Runs of ``length`` consecutive entries along ``axis``; the last one may be shorter.

    Attributes:
      length: the number of entries that share a value.
      axis: the axis along which they are consecutive; 0 is the fan-in of a Flax dense
        kernel.
    """

    length: int
    axis: int = 0


Axes = tuple[int, ...]
Rule = Callable[[str, tuple[int, ...]], Axes | Block]

# Attention projections have kernels (in, heads, head_dim), whose rank is a convolution's.
_PROJECTIONS = {"query", "key", "value", "qkv"}


def _is_conv(path: str, shape: tuple[int, ...]) -> bool:
    names = path.lower().split("/")
    if len(shape) < 3:
        return False
    if any("conv" in name for name in names):
        return True
    attention = any("attention" in name or "attn" in name for name in names)
    return len(shape) > 3 and not attention and _PROJECTIONS.isdisjoint(names)


def conv_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """The spatial axes of a convolution kernel, all but the last two; nothing elsewhere.

    A leaf of rank 4 or more counts as a convolution's unless its path names attention; one
    of rank 3 only if its path says ``conv``.
    """
    return tuple(range(len(shape) - 2)) if _is_conv(path, shape) else ()


def _fan_in_axis(path: str) -> int:
    """The axis that feeds one output unit: axis 0 of a kernel, one token's vector in a table."""
    return 1 if "embed" in path.lower().split("/")[-1] else 0


def row_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """The whole fan-in of an output unit for matrices, spatial axes for convolutions."""
    return (_fan_in_axis(path),) if len(shape) == 2 else conv_axes(path, shape)


def block_axes(path: str, shape: tuple[int, ...]) -> Axes | Block:
    """Blocks of 32 along the fan-in of matrices; nothing elsewhere."""
    return Block(32, _fan_in_axis(path)) if len(shape) == 2 else ()


def no_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """Nothing is averaged."""
    del path, shape
    return ()


PRESETS: dict[str, Rule] = {
    "conv": conv_axes,
    "row": row_axes,
    "block": block_axes,
    "none": no_axes,
    "paper": conv_axes,
}


def check_averaging(averaging: str | Rule) -> None:
    """Raises unless ``averaging`` is a preset's name or a callable."""
    if not callable(averaging):
        check_choice("averaging", averaging, (*PRESETS, "a function of path and shape"))


def average_curvature(averaging: str | Rule, diag: Any) -> Any:
    r"""Averages a signed diagonal as ``averaging`` says; the result is only used squared.

    $$
    D = A(|z \odot Hz|)
    $$

    The published code takes the absolute value first, as here; ``"paper"`` is Eq. 10, which
    averages the signed values, so that signs cancel inside a block.

    Args:
      averaging: the name of a preset or a function ``(path, shape) -> axes or Block``.
      diag: a tree of real arrays.

    Returns:
      A tree like ``diag`` in which entries that share a value are equal.
    """
    rule = averaging if callable(averaging) else PRESETS[averaging]
    signed = averaging == "paper"

    def leaf(path: tuple[Any, ...], values: jax.Array) -> jax.Array:
        name = path_name(path)
        share = _checked(rule(name, values.shape), name, values.shape)
        values = values if signed else jnp.abs(values)
        if isinstance(share, Block):
            return _block_mean(values, share)
        if not share or values.size == 0:
            return values
        return jnp.broadcast_to(jnp.mean(values, axis=share, keepdims=True), values.shape)

    return jax.tree_util.tree_map_with_path(leaf, diag)


def _checked(share: Any, name: str, shape: tuple[int, ...]) -> Axes | Block:
    axes = (share.axis,) if isinstance(share, Block) else share
    valid = isinstance(axes, tuple) and all(
        isinstance(axis, int) and -len(shape) <= axis < len(shape) for axis in axes
    )
    if not valid or len({axis % len(shape) for axis in axes}) < len(axes):
        raise ValueError(
            f"averaging must name distinct axes of {name}, which has shape {shape}; got "
            f"{share!r}. Return a tuple of axes, () for none, or curvax.Block(length, axis)."
        )
    if isinstance(share, Block) and share.length < 1:
        raise ValueError(f"averaging: a block's length must be at least 1, got {share!r}.")
    return share


def _block_mean(values: jax.Array, block: Block) -> jax.Array:
    """The mean over runs along one axis, with a ragged tail as its own run."""
    axis = block.axis % values.ndim
    size = values.shape[axis]
    sharding = jax.typeof(values).sharding
    spec = (*sharding.spec, *(None,) * (values.ndim - len(sharding.spec)))
    if spec[axis] is not None and sharding.shard_shape(values.shape)[axis] % block.length:
        # Runs that cross devices: on explicit meshes the axis is gathered by hand.
        whole_axis = jax.P(*spec[:axis], None, *spec[axis + 1 :])
        means = _block_mean(jax.sharding.reshard(values, whole_axis), block)
        return jax.sharding.reshard(means, jax.P(*spec))
    runs = -(-size // block.length)
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, runs * block.length - size)
    split = (*values.shape[:axis], runs, block.length, *values.shape[axis + 1 :])
    sums = jnp.sum(jnp.pad(values, padding).reshape(split), axis=axis + 1, keepdims=True)
    lengths = jnp.minimum(block.length, size - block.length * jnp.arange(runs))
    means = sums / lengths.reshape(runs, *(1,) * (values.ndim - axis)).astype(values.dtype)
    whole = (*values.shape[:axis], runs * block.length, *values.shape[axis + 1 :])
    spread = jnp.broadcast_to(means, split).reshape(whole)
    return jax.lax.slice_in_dim(spread, 0, size, axis=axis)
