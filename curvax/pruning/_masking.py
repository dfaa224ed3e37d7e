"""What an optimizer sees of a network without its pruned weights.

A mask is a tree like the params, True for weights that are kept. A scalar stands for a leaf that is
never pruned: it is passed through at no cost.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import Path, PyTree, is_hole, is_inexact, part_like, path_names, shape_of


def is_never_pruned(kept: Any, leaf: Any) -> bool:
    """Whether nothing of a leaf is pruned, which its mask's shape says."""
    return is_hole(leaf) or (shape_of(kept) == () and shape_of(leaf) != ())


def where_kept(mask: PyTree, tree: PyTree) -> PyTree:
    """The tree with zeros at pruned weights."""
    return jax.tree.map(
        lambda k, leaf: leaf if is_never_pruned(k, leaf) else jnp.where(k, leaf, 0),
        mask,
        tree,
        is_leaf=is_hole,
    )


def zeroing_updates(mask: PyTree, updates: PyTree, params: PyTree) -> PyTree:
    """The updates, and for pruned weights those that make them zero."""
    return jax.tree.map(
        lambda k, u, p: u if is_never_pruned(k, u) else jnp.where(k, u, -jnp.asarray(p, u.dtype)),
        mask,
        updates,
        params,
        is_leaf=is_hole,
    )


def state_of_kept(mask: PyTree, state: PyTree) -> PyTree:
    """The state with zeros at pruned weights, in moments and in further copies of the weights.

    They are found by the end of their path and by their shape, which are those of a leaf of the
    mask. A mask that is one array has no path, and a shape alone says too little.
    """
    masks = {
        path_names(path): kept
        for path, kept in jax.tree_util.tree_leaves_with_path(mask)
        if path and shape_of(kept)
    }

    def kept_of(path: Path, leaf: Any) -> Any:
        names = path_names(path)
        for start in range(len(names)):
            kept = masks.get(names[start:])
            if kept is not None and shape_of(kept) == shape_of(leaf) and is_inexact(leaf):
                return jnp.where(kept, leaf, 0)
        return leaf

    return jax.tree_util.tree_map_with_path(kept_of, state)


def masked_arguments(extra_args: dict[str, Any], mask: PyTree, updates: PyTree) -> dict[str, Any]:
    """Extra arguments with the curvature of the network without its pruned weights."""
    masked = dict(extra_args)
    if masked.get("hessian_diag") is not None:
        diag = part_like(masked["hessian_diag"], updates, name="hessian_diag")
        masked["hessian_diag"] = where_kept(mask, diag)
    for name in ("obj_fn", "value_fn"):
        if masked.get(name) is not None:
            masked[name] = _of_kept(masked[name], mask)
    return masked


def _of_kept(fun: Any, mask: PyTree) -> Any:
    @functools.wraps(fun)  # Optax's line searches read the names of its arguments
    def of_kept(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return fun(where_kept(mask, params), *args, **kwargs)

    return of_kept
