"""Which leaves are pruned, and which of their weights are still unpruned."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_like
from curvax._layouts import KernelLayout, Layout, is_no_kernel, kernel_layout
from curvax._trees import PyTree, Select, path_name, widen


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is a kernel, as published: not a bias, a norm's scale or an embedding.

    Names count, not the rank: a bias with an axis for each output and a position embedding are not
    kernels either.

    Args:
      path: the leaf's path, ``layers/0/kernel``.
      leaf: an array.

    Returns:
      True for real leaves of two or more axes not named as a bias, scale, norm or embedding.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.pruning import is_kernel
      >>> is_kernel("dense/kernel", jnp.zeros((3, 2))), is_kernel("dense/bias", jnp.zeros(2))
      (True, False)
    """
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return real and jnp.ndim(leaf) >= 2 and not is_no_kernel(path, jnp.ndim(leaf))


class Leaf(NamedTuple):
    """A leaf that is pruned, as NumPy arrays.

    Attributes:
      number: its number among the leaves of the params.
      path: its path.
      shape: its shape.
      alive: the flat positions of the unpruned weights.
      weights: their values.
      layout: what its axes are, None if it is not a kernel.
    """

    number: int
    path: str
    shape: tuple[int, ...]
    alive: np.ndarray
    weights: np.ndarray
    layout: KernelLayout | None


def selected_leaves(
    params: PyTree, mask: PyTree | None, select: Select, layout: Layout = "auto"
) -> list[Leaf]:
    """The leaves that ``select`` chooses, with the weights that ``mask`` keeps."""
    check_mask(mask, params)
    entries = jax.tree_util.tree_leaves_with_path(params)
    masks = [None] * len(entries) if mask is None else jax.tree.leaves(mask)
    leaves = []
    for index, ((path, leaf), kept) in enumerate(zip(entries, masks, strict=True)):
        name = path_name(path)
        if not leaf.size or not select(name, leaf):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"only real weights can be pruned, got {leaf.dtype} at {name}.")
        weights = _wide(leaf).reshape(-1)
        alive = np.arange(leaf.size) if kept is None else np.flatnonzero(np.asarray(kept))
        axes = kernel_layout(name, leaf.shape, layout)
        leaves.append(Leaf(index, name, leaf.shape, alive, weights[alive], axes))
    if leaves and not any(len(leaf.alive) for leaf in leaves):
        raise ValueError("mask leaves no unpruned weight in the selected leaves.")
    if not leaves:
        names = ", ".join(path_name(path) for path, _ in entries) or "none"
        raise ValueError(f"select chooses no leaf of params; their paths are: {names}.")
    return leaves


def check_mask(mask: PyTree | None, params: PyTree) -> None:
    """Raises unless ``mask`` is None or a tree of bool like ``params``."""
    if mask is None:
        return
    check_like("mask", mask, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.bool_):
            raise ValueError(
                f"mask must be of bool, True for weights that are kept, got {dtype} at "
                f"{path_name(path)}."
            )


def alive_columns(grads: PyTree, params: PyTree, leaves: Sequence[Leaf]) -> list[Any]:
    """The alive columns of each selected leaf's gradients ``(m, *shape)``, of shape (m, n)."""
    entries = jax.tree.leaves(grads)
    if not all(jnp.shape(rows)[:1] > (0,) for rows in entries):
        raise ValueError(
            "grads must hold at least one gradient along the first axis of each leaf, got shapes "
            f"{[jnp.shape(rows) for rows in entries]}."
        )
    shapes = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), grads)
    check_like("a gradient", shapes, params)
    return [_columns(entries[leaf.number], leaf) for leaf in leaves]


def _columns(rows: Any, leaf: Leaf) -> Any:
    sharded = isinstance(rows, jax.Array) and len(rows.sharding.device_set) > 1
    if len(leaf.alive) == math.prod(leaf.shape) and not sharded:
        return rows.reshape(len(rows), -1)
    # On the host: on a device each number of alive weights would be compiled separately.
    chosen = np.asarray(rows).reshape(len(rows), -1)[:, leaf.alive]
    return chosen if isinstance(rows, np.ndarray) else jnp.asarray(chosen)


def _wide(leaf: Any) -> np.ndarray:
    """The leaf on the host, float32 or wider."""
    return np.asarray(widen(leaf))
