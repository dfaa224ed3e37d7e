"""The weights that are pruned: the chosen leaves side by side, as one vector on the host.

Within a leaf the weights of one output unit follow each other, whatever the leaf's own order: they
add up in the same sums, so they are the ones that compensate for each other, and blocks of a Fisher
matrix are cut from consecutive weights.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_like, is_traced
from curvax._layouts import KernelLayout, Layout, is_no_kernel, kernel_layout
from curvax._trees import (
    PyTree,
    Select,
    Tree,
    dtype_of,
    named_leaves,
    path_name,
    shape_of,
    widen,
)

_MANY_ZEROS = 0.2  # of weights: an earlier pruning left them


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is a kernel, as published: not a bias, a norm's scale or an embedding.

    The name decides before the rank: a bias with several axes and a position embedding are not
    kernels either.

    Args:
      path: the leaf's path, ``layers/0/kernel``.
      leaf: an array.

    Returns:
      True for real leaves of two or more axes not named as a bias, scale, norm or embedding.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.pruning import is_kernel
      >>> (
      ...     is_kernel("dense/kernel", jnp.zeros((3, 2))),
      ...     is_kernel("dense/bias", jnp.zeros(2)),
      ... )
      (True, False)
    """
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return real and jnp.ndim(leaf) >= 2 and not is_no_kernel(path, jnp.ndim(leaf))


class Leaf(NamedTuple):
    """A leaf of the params that is pruned.

    Attributes:
      number: its number among the leaves of the params.
      path: its path.
      shape: its shape.
      layout: what its axes are, None if it is not a kernel.
      order: its axes in the order in which its weights are laid out here.
    """

    number: int
    path: str
    shape: tuple[int, ...]
    layout: KernelLayout | None
    order: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_members(self) -> int:
        """How many layers are stacked in it, which lie one after the other here."""
        if self.layout is None or self.layout.unknown:
            return 1
        return math.prod(self.shape[axis] for axis in self.layout.stacked)

    def flat(self, array: Any) -> Any:
        """The entries of an array (..., *shape), as a vector or rows of them."""
        lead = array.ndim - len(self.shape)
        axes = (*range(lead), *(lead + axis for axis in self.order))
        return array.transpose(axes).reshape(*array.shape[:lead], self.size)

    def restored(self, flat: np.ndarray) -> np.ndarray:
        """The array of the leaf's shape from its vector."""
        shape = [self.shape[axis] for axis in self.order]
        return flat.reshape(shape).transpose(np.argsort(self.order))


class Skipped(NamedTuple):
    """A selected leaf that is not pruned and stays unchanged.

    Attributes:
      path: its path in the params.
      reason: why, as a clause.
    """

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of the chosen leaves.

    Attributes:
      leaves: the chosen leaves.
      values: all weights, leaf after leaf, float32 or wider; pruned ones have their old values.
      alive: which of them are unpruned.
    """

    leaves: tuple[Leaf, ...]
    values: np.ndarray
    alive: np.ndarray

    @classmethod
    def of(cls, params: PyTree, mask: PyTree | None, leaves: tuple[Leaf, ...]) -> "Weights":
        """The weights of the leaves, of which ``mask`` keeps some."""
        check_mask(mask, params)
        arrays = jax.tree.leaves(params)
        check_not_tied(leaves, params)
        values = np.concatenate(
            [leaf.flat(np.asarray(widen(arrays[leaf.number]))) for leaf in leaves]
        )
        alive = np.ones(len(values), bool)
        if mask is not None:
            masks = jax.tree.leaves(mask)
            alive = np.concatenate(
                [leaf.flat(_whole(masks[leaf.number], leaf.shape)) for leaf in leaves]
            )
        weights = cls(leaves, values, alive)
        weights._check(has_mask=mask is not None)
        return weights

    @property
    def number_alive(self) -> int:
        return int(np.count_nonzero(self.alive))

    def spans(self) -> list[slice]:
        """Where each leaf lies."""
        ends = np.cumsum([leaf.size for leaf in self.leaves]).tolist()
        return [slice(end - leaf.size, end) for leaf, end in zip(self.leaves, ends, strict=True)]

    def members(self) -> list[tuple[str, slice]]:
        """The name and the place of each layer: of a leaf, or of each member of a stack."""
        found = []
        for leaf, span in zip(self.leaves, self.spans(), strict=True):
            size = leaf.size // leaf.num_members
            for member, start in enumerate(range(span.start, span.stop, size)):
                name = f"{leaf.path}[{member}]" if leaf.num_members > 1 else leaf.path
                found.append((name, slice(start, start + size)))
        return found

    def pruned(self, gone: np.ndarray, changes: np.ndarray) -> "Weights":
        """The weights without some of the alive ones, and with the others changed."""
        values, alive = self.values.copy(), self.alive.copy()
        values[self.alive] += changes
        alive[self.alive] = ~gone
        return dataclasses.replace(self, values=values, alive=alive)

    def params(self, params: Tree) -> Tree:
        """The params with these weights, zeros where they are pruned."""
        leaves, treedef = jax.tree.flatten(params)
        values = np.where(self.alive, self.values, 0)
        for leaf, span in zip(self.leaves, self.spans(), strict=True):
            old = leaves[leaf.number]
            check_fits(leaf.path, values[span], old.dtype)
            leaves[leaf.number] = _placed(leaf.restored(values[span]).astype(old.dtype), old)
        return jax.tree.unflatten(treedef, leaves)

    def mask(self, params: Tree, mask: PyTree | None) -> Tree:
        """The mask like the params; of other leaves that of ``mask``, or a scalar."""
        leaves, treedef = jax.tree.flatten(params)
        others = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
        masks = [_mask_of(*pair) for pair in zip(others, leaves, strict=True)]
        for leaf, span in zip(self.leaves, self.spans(), strict=True):
            masks[leaf.number] = _placed(leaf.restored(self.alive[span]), leaves[leaf.number])
        return jax.tree.unflatten(treedef, masks)

    def _check(self, *, has_mask: bool) -> None:
        if not self.alive.any():
            raise ValueError("mask leaves no unpruned weights in the selected leaves.")
        finite = np.isfinite(self.values)
        if not finite.all():
            bad = [
                leaf.path
                for leaf, span in zip(self.leaves, self.spans(), strict=True)
                if not finite[span].all()
            ]
            raise ValueError(f"params must be finite: NaN or infinity at {', '.join(bad)}.")
        zeros = float(np.mean(self.values == 0))
        if not has_mask and zeros >= _MANY_ZEROS:
            warnings.warn(
                f"{zeros:.0%} of the selected weights are already zero, and without a mask they "
                "count as unpruned: if they were pruned earlier, pass "
                "mask=curvax.pruning.mask_of_zeros(params).",
                stacklevel=5,
            )


def chosen_leaves(params: PyTree, select: Select, layout: Layout) -> tuple[Leaf, ...]:
    """The leaves that ``select`` chooses."""
    leaves = []
    for number, (path, leaf) in enumerate(named_leaves(params)):
        array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, dtype_of(leaf, path))
        if not array.size or not select(path, array):
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"only real weights can be pruned, got {array.dtype} at {path}.")
        axes = kernel_layout(path, array.shape, layout)
        leaves.append(Leaf(number, path, array.shape, axes, _order(axes, array.ndim)))
    if not leaves:
        names = ", ".join(path for path, _ in named_leaves(params)) or "none"
        raise ValueError(f"select chooses no leaf of params; their paths are: {names}.")
    return tuple(leaves)


def check_on_host(params: PyTree) -> None:
    """Raises unless this process can read all arrays, which it cannot under ``jit``."""
    leaves = jax.tree.leaves(params)
    if any(map(is_traced, leaves)):
        raise ValueError(
            "pruning runs on the host and compiles its own computations: call it outside "
            "jax.jit, vmap and grad; inside a compiled step, use prune_on_schedule."
        )
    if not all(map(_is_readable, leaves)):
        raise ValueError(
            "pruning reads all weights, but some are on devices of other processes: gather them "
            "first with jax.experimental.multihost_utils.process_allgather(params, tiled=True), "
            "or prune inside the compiled step with prune_on_schedule."
        )


def _is_readable(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def check_fits(path: str, values: Any, dtype: Any) -> None:
    """Raises if a finite weight is larger than all numbers of a dtype."""
    largest = float(abs(values).max())
    if float(jnp.finfo(dtype).max) < largest < math.inf:
        raise ValueError(
            f"the update takes a weight of {path} to {largest:.3g}, which overflows {dtype}: "
            "raise damping, pass update='none', or pass params in float32."
        )


def check_mask(mask: PyTree | None, params: PyTree) -> None:
    """Raises unless ``mask`` is None or a tree of bool like ``params``.

    A leaf of the mask may be a scalar, for all weights of its leaf.
    """
    if mask is None:
        return
    leaves, masks = jax.tree.leaves(params), jax.tree.leaves(mask)
    whole = mask
    if len(leaves) == len(masks):
        filled = [
            leaf if shape_of(kept) == () else kept for leaf, kept in zip(leaves, masks, strict=True)
        ]
        whole = jax.tree.unflatten(jax.tree.structure(mask), filled)
    check_like("mask", whole, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.bool_):
            raise ValueError(
                f"mask must be of bool, True for weights that are kept, got {dtype} at "
                f"{path_name(path)}."
            )


def mask_of_zeros(params: Tree, select: Select = is_kernel) -> Tree:
    """Makes the mask of a network pruned earlier, from its zeros.

    Args:
      params: the parameters.
      select: ``(path, leaf) -> bool``, the leaves in which zeros are pruned weights; kernels by
        default.

    Returns:
      A tree of bool like ``params``, False at the zeros of the selected leaves; a scalar True for
      the other leaves.

    Raises:
      ValueError: if ``select`` chooses no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> params = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.zeros(2)}
      >>> pruning.mask_of_zeros(params)
      {'bias': Array(True, dtype=bool), 'kernel': Array([[ True, False]], dtype=bool)}
    """
    masks, treedef = jax.tree.flatten(jax.tree.map(lambda _: jnp.ones((), bool), params))
    arrays = jax.tree.leaves(params)
    for leaf in chosen_leaves(params, select, "auto"):
        masks[leaf.number] = arrays[leaf.number] != 0
    return jax.tree.unflatten(treedef, masks)


def num_kept(params: PyTree, mask: PyTree) -> int:
    """How many weights a mask keeps, of which a scalar stands for a whole leaf."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    return sum(int(np.count_nonzero(_whole(kept, shape_of(leaf)))) for leaf, kept in pairs)


def _order(layout: KernelLayout | None, rank: int) -> tuple[int, ...]:
    if layout is None or layout.unknown:
        return tuple(range(rank))
    return layout.stacked + layout.fan_out + layout.spatial + layout.fan_in


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """The array on the devices of another, with its sharding."""
    return jax.device_put(array, getattr(like, "sharding", None))


def _mask_of(kept: Any, leaf: Any) -> jax.Array:
    """The mask of a leaf that is not pruned here; a scalar is left for what is kept as a whole."""
    if shape_of(kept) == () and not kept:
        return _placed(np.zeros(shape_of(leaf), bool), leaf)
    return jnp.asarray(kept)


def _whole(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.asarray(mask), shape)


def check_not_tied(leaves: Sequence[Leaf], params: PyTree) -> None:
    """Raises if a leaf to prune is another leaf too: pruned alone it would no longer be tied."""
    chosen = {leaf.path for leaf in leaves}
    owners: dict[int, list[str]] = {}
    for path, array in named_leaves(params):
        owners.setdefault(id(array), []).append(path)
    for paths in owners.values():
        if len(paths) > 1 and chosen.intersection(paths):
            raise ValueError(
                f"{' and '.join(paths)} are the same array, and pruning them separately would "
                "untie them: keep the array in params once, or exclude it with select."
            )
