"""Which entries of a kernel share one curvature value.

AdaHessian averages its noisy diagonal over entries that should curve alike. Which ones depends on
the layout of a leaf (`curvax._layouts`): the spatial axes of a convolution, the fan-in of a matrix,
never a stacked axis. A rule returns the axes to average over, or a `Block` of consecutive entries
of one axis. No rule crosses axes, so a sharded kernel is gathered only where a run crosses devices.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from curvax._checks import check_arrays, check_choice
from curvax._layouts import Axes, KernelLayout, Layout, check_layout, kernel_layout
from curvax._trees import PyTree, named_leaves, path_name, shape_of


class Block(NamedTuple):
    """Runs of ``length`` consecutive entries along ``axis``; the last one may be shorter.

    Attributes:
      length: the number of entries that share a value.
      axis: the axis along which they lie; 0 is the fan-in of a Flax dense kernel.
    """

    length: int
    axis: int = 0


Averaging = Literal["conv", "row", "block", "none", "paper"]
Rule = Callable[[str, tuple[int, ...]], Axes | Block]


def _conv_axes(layout: KernelLayout) -> Axes:
    """The spatial axes of a convolution kernel; nothing elsewhere."""
    return layout.spatial


def _row_axes(layout: KernelLayout) -> Axes:
    """The whole fan-in of an output unit for matrices, spatial axes for convolutions."""
    return layout.fan_in if _is_matrix(layout) else layout.spatial


def _block_axes(layout: KernelLayout) -> Axes | Block:
    """Blocks of 32 along the fan-in of matrices; nothing elsewhere."""
    return Block(32, layout.fan_in[0]) if _is_matrix(layout) else ()


def _no_axes(layout: KernelLayout) -> Axes:
    """Nothing is averaged."""
    del layout
    return ()


def _is_matrix(layout: KernelLayout) -> bool:
    """Whether each member of a stack is a matrix."""
    plain = not layout.spatial and not layout.unknown
    return plain and len(layout.fan_in) == len(layout.fan_out) == 1


PRESETS: dict[Averaging, Callable[[KernelLayout], Axes | Block]] = {
    "conv": _conv_axes,
    "row": _row_axes,
    "block": _block_axes,
    "none": _no_axes,
    "paper": _conv_axes,
}


def check_averaging(averaging: Averaging | Rule, layout: Layout = "auto") -> None:
    """Raises unless ``averaging`` is a preset or a callable, and ``layout`` a layout."""
    if not callable(averaging):
        check_choice("averaging", averaging, (*get_args(Averaging), "a function of path and shape"))
    check_layout(layout)


def check_leaves(averaging: Averaging | Rule, layout: Layout, params: PyTree) -> None:
    """Raises where a rule or a layout does not fit a leaf of ``params``."""
    for name, leaf in named_leaves(params):
        _share(averaging, name, shape_of(leaf), layout)


def average_curvature(averaging: Averaging | Rule, diag: Any, layout: Layout = "auto") -> Any:
    r"""Averages a signed diagonal by the rule ``averaging``; the result is only used squared.

    $$
    D = A(|z \odot Hz|)
    $$

    The published code takes the absolute value first, as here; ``"paper"`` is Eq. 10, which
    averages the signed values, so that signs cancel inside a block.

    Args:
      averaging: the name of a preset or a function ``(path, shape) -> axes or Block``.
      diag: a tree of real arrays.
      layout: how a preset reads the axes of leaves.

    Returns:
      A tree like ``diag`` in which entries that share a value are equal.
    """
    signed = averaging == "paper"

    def leaf(path: tuple[Any, ...], values: jax.Array) -> jax.Array:
        share = _share(averaging, path_name(path), values.shape, layout)
        values = values if signed else jnp.abs(values)
        if isinstance(share, Block):
            return _block_mean(values, share)
        if not share or values.size == 0:
            return values
        return jnp.broadcast_to(jnp.mean(values, axis=share, keepdims=True), values.shape)

    return jax.tree_util.tree_map_with_path(leaf, diag)


def averaging_table(
    params: PyTree, averaging: Averaging | Rule = "conv", *, layout: Layout = "auto"
) -> str:
    """Tabulates what AdaHessian averages in each leaf, to check before a run.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``.
      averaging: as in `curvax.adahessian`.
      layout: as in `curvax.adahessian`.

    Returns:
      A table to print: path, shape, the layout in the letters of
      `KernelLayout.from_letters` (``-`` for a leaf that is not a kernel), and the axes averaged
      over.

    Raises:
      ValueError: if ``averaging`` or ``layout`` is invalid, or does not fit a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import curvax
      >>> params = {
      ...     "Conv_0": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
      ...     "mix": {"kernel": jnp.ones((6, 4, 8))},
      ... }
      >>> print(curvax.averaging_table(params))
      path          shape         layout  averaged
      Conv_0/bias   (8,)          -       -
      Conv_0/kernel (3, 3, 4, 8)  HWIO    (0, 1)
      mix/kernel    (6, 4, 8)     ???     -
      >>> print(curvax.averaging_table(params, "row", layout={"mix/kernel": "LIO"}))
      path          shape         layout  averaged
      Conv_0/bias   (8,)          -       -
      Conv_0/kernel (3, 3, 4, 8)  HWIO    (0, 1)
      mix/kernel    (6, 4, 8)     LIO     (1,)
    """
    check_averaging(averaging, layout)
    check_arrays(params)
    rows = [("path", "shape", "layout", "averaged")]
    for name, leaf in named_leaves(params):
        shape = shape_of(leaf)
        found = kernel_layout(name, shape, layout)
        share = _share(averaging, name, shape, layout)
        rows.append((name, str(shape), found.letters if found else "-", str(share or "-")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _share(
    averaging: Averaging | Rule, name: str, shape: tuple[int, ...], layout: Layout
) -> Axes | Block:
    """The axes of a leaf to average over, checked."""
    if callable(averaging):
        return _checked(averaging(name, shape), name, shape)
    found = kernel_layout(name, shape, layout)
    return PRESETS[averaging](found) if found else ()


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
        raise ValueError(f"a curvax.Block must have a length of at least 1, got {share!r}.")
    return share


def _block_mean(values: jax.Array, block: Block) -> jax.Array:
    """The mean over runs along one axis, with a ragged tail as its own run."""
    axis = block.axis % values.ndim
    size = values.shape[axis]
    sharding = jax.typeof(values).sharding
    spec = (*sharding.spec, *(None,) * (values.ndim - len(sharding.spec)))
    if spec[axis] is not None and sharding.shard_shape(values.shape)[axis] % block.length:
        # Runs that cross devices: on explicit meshes the axis is gathered explicitly.
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
