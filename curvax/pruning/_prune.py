"""One pruning step: scores, the choice of weights, the update of the others."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_count, check_range
from curvax._layouts import Layout, check_layout
from curvax._trees import PyTree, Select, Tree
from curvax.fisher.inverse._input import checked_leaves
from curvax.pruning._greedy import greedy_scores
from curvax.pruning._leaves import Leaf, alive_columns, is_kernel, selected_leaves
from curvax.pruning._options import BlockScope, Method, Scope, Update
from curvax.pruning._result import PruneResult, layer_sparsities
from curvax.pruning._scores import (
    FisherOptions,
    fisher_scores,
    magnitude_scores,
    obs_scores,
)
from curvax.pruning._selection import Sparsity, check_sparsity, weights_to_prune
from curvax.pruning._structures import NM, Structure, check_structure
from curvax.pruning._updates import independent_update, joint_update, predicted_loss_change


def prune(
    params: Tree,
    grads: PyTree | None,
    sparsity: Sparsity | None,
    *,
    method: Method = "obs",
    update: Update | None = None,
    mask: PyTree | None = None,
    select: Select = is_kernel,
    scope: Scope = "global",
    structure: Structure | None = None,
    layout: Layout = "auto",
    damping: float = 1e-5,
    block_size: int | None = None,
    block_scope: BlockScope = "tree",
    mesh: jax.sharding.Mesh | None = None,
) -> PruneResult[Tree]:
    r"""Prunes parameters in one step, by Optimal Brain Surgeon or a simpler rule.

    With the empirical Fisher matrix $F = \lambda I + \frac1m \sum_i g_i g_i^T$ of the unpruned
    weights as the model of the loss, the weights with the lowest scores are pruned:

    | method | score | update of the kept weights by default |
    |---|---|---|
    | ``"obs"`` | $w_i^2 / (2 [F^{-1}]_{ii})$ | ``"joint"`` |
    | ``"greedy"`` | the same, one at a time in a block, $w$ and $F^{-1}$ updated | ``"joint"`` |
    | ``"fisher"`` | $w_i^2 F_{ii} / 2$ | ``"none"`` |
    | ``"magnitude"`` | $w_i^2 / 2$ | ``"none"`` |

    and the kept weights change by

    | update | change, with $Q$ the weights to prune and $S$ the kept ones |
    |---|---|
    | ``"joint"`` | $F_{SS}^{-1} F_{SQ} w_Q = -F^{-1}_{SQ} (F^{-1}_{QQ})^{-1} w_Q$ |
    | ``"independent"`` | $-F^{-1} t$, $t_q = w_q / [F^{-1}]_{qq}$: as published |
    | ``"none"`` | nothing |

    A unit of several weights (``structure``) has the mean of its weights' scores. The choice is
    made on the host, where scores are gathered.

    Args:
      params: the parameters, a tree of arrays.
      grads: gradients of the loss, a tree of ``(m, *leaf.shape)`` like `collect_gradients`
        returns; None for ``method="magnitude"``.
      sparsity: the share of zeros among the weights of the selected leaves afterwards, in [0, 1),
        including those already pruned by ``mask``; a mapping of patterns (``re.search`` on paths)
        to sparsities, where leaves that match none are not pruned, though an update may change
        them; or None, like $1 - n/m$ for N:M, to bring every group down to N of M, whatever the
        resulting sparsity.
      method: the scores, see above.
      update: the update of the kept weights, see above.
      mask: the unpruned weights, a tree of bool like ``params``; None for all.
      select: ``(path, leaf) -> bool``, the leaves that are pruned; kernels by default.
      scope: ``"global"`` compares the scores of all leaves, ``"layer"`` prunes each to its
        sparsity.
      structure: None for single weights, `NM`, `WeightBlocks` or `OutputUnits`.
      layout: how ``structure`` reads the axes of a leaf, as `curvax.adahessian` takes it.
      damping: $\lambda$.
      block_size: the size of the blocks of $F$; None for the full matrix. Where gradients are far
        fewer than weights, 128 prunes much better at high sparsity.
      block_scope: whether blocks run over the ``"tree"`` of unpruned weights or start anew at each
        ``"leaf"``.
      mesh: devices over which the blocks are spread.

    Returns:
      The pruned parameters, their mask, sparsities and the predicted loss change.

    Raises:
      ValueError: if an option is out of range, ``select`` chooses nothing, ``mask`` or
        ``grads`` do not match ``params``, gradients are missing or not finite, or ``sparsity`` is
        below the current one.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> params = {"kernel": jnp.array([[1.0, 1.1]])}
      >>> grads = {"kernel": jnp.array([[[2.0, 2.0]], [[0.0, 1.0]]])}  # the weights are coupled
      >>> result = pruning.prune(params, grads, 0.5, damping=1e-3)
      >>> print(result.mask["kernel"], result.params["kernel"].round(2))
      [[False  True]] [[0.  1.9]]

    References:
      Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1992.
      Frantar et al., [M-FAC](https://arxiv.org/abs/2107.03356), 2021, Section 3.
    """
    check_options(
        method=method,
        update=update,
        scope=scope,
        structure=structure,
        layout=layout,
        damping=damping,
        block_size=block_size,
        block_scope=block_scope,
    )
    target = explicit_target(sparsity, structure)
    leaves = selected_leaves(params, mask, select, layout)
    columns = None
    if grads is not None:
        columns = alive_columns(grads, params, leaves)
        rows_of_leaves = {leaf.path: rows for leaf, rows in zip(leaves, columns, strict=True)}
        checked_leaves(rows_of_leaves, allow_complex=False)
    if columns is None and (method != "magnitude" or update not in (None, "none")):
        raise ValueError(f"method={method!r} with update={update!r} needs grads, got None.")
    options = FisherOptions(damping, block_size, block_scope, mesh)
    update = update or ("joint" if method in ("obs", "greedy") else "none")
    pruned, changes = _pruned_and_changes(
        leaves, columns, method, update, target, scope, structure, options
    )
    predicted = None if columns is None else predicted_loss_change(columns, changes)
    new_params, new_mask = _assembled(params, mask, leaves, pruned, changes)
    layers = layer_sparsities(new_mask, [leaf.number for leaf in leaves])
    return PruneResult(new_params, new_mask, layers, predicted)


def _pruned_and_changes(
    leaves: list[Leaf],
    columns: list[Any] | None,
    method: Method,
    update: Update,
    sparsity: Sparsity,
    scope: Scope,
    structure: Structure | None,
    options: FisherOptions,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which alive weights to prune, and by how much each changes."""
    packing = options.packing(leaves)
    inverse = diagonal = None
    if columns is not None and (method == "obs" or update == "independent"):
        inverse = options.invert(packing.pack(columns))
        diagonal = packing.unpack(inverse.diagonal())
    if method == "magnitude":
        scores = magnitude_scores(leaves)
    elif method == "fisher":
        scores = fisher_scores(leaves, columns or [], options.damping)
    elif method == "obs":
        scores = obs_scores(leaves, diagonal or [])
    else:
        scores = greedy_scores(leaves, columns or [], options)
    pruned = weights_to_prune(leaves, scores, sparsity, scope, structure)
    if update == "none" or not any(flags.any() for flags in pruned):
        changes = [np.zeros_like(leaf.weights) for leaf in leaves]
    elif update == "joint":
        changes = joint_update(leaves, pruned, columns or [], options)
    else:
        assert inverse is not None
        changes = independent_update(leaves, pruned, inverse, diagonal or [], packing)
    triples = zip(leaves, pruned, changes, strict=True)
    return pruned, [np.where(flags, -leaf.weights, change) for leaf, flags, change in triples]


def check_options(
    *,
    method: Method = "obs",
    update: Update | None = None,
    scope: Scope = "global",
    structure: Structure | None = None,
    layout: Layout = "auto",
    damping: float = 1e-5,
    block_size: int | None = None,
    block_scope: BlockScope = "tree",
    select: Select | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Raises unless each option of `prune` is valid by itself."""
    del select, mesh
    check_choice("method", method, get_args(Method))
    if update is not None:
        check_choice("update", update, get_args(Update))
    check_choice("scope", scope, get_args(Scope))
    check_structure(structure)
    check_layout(layout)
    check_range("damping", damping, low=0.0, open_low=True, open_high=True)
    check_choice("block_scope", block_scope, get_args(BlockScope))
    if block_size is not None:
        check_count("block_size", block_size)
    if method == "greedy" and (block_size is None or structure is not None):
        raise ValueError(
            "method='greedy' removes single weights within blocks: it needs a block_size and no "
            f"structure, got block_size={block_size} and structure={structure!r}."
        )


def explicit_target(sparsity: Sparsity | None, structure: Structure | None) -> Sparsity:
    """The checked sparsity; for None, the most that N:M allows."""
    check_structure(structure)
    if sparsity is None:
        if not isinstance(structure, NM):
            raise ValueError("sparsity=None needs structure=NM(n, m), whose sparsity is 1 - n/m.")
        return 1 - structure.n / structure.m
    check_sparsity(sparsity)
    return sparsity


def _assembled(
    params: Tree,
    mask: PyTree | None,
    leaves: list[Leaf],
    pruned: list[np.ndarray],
    changes: list[np.ndarray],
) -> tuple[Tree, Tree]:
    """Parameters and mask with the changes applied; leaves that are not pruned are unchanged."""
    values, treedef = jax.tree.flatten(params)
    masks = (
        [jnp.ones(jnp.shape(value), bool) for value in values]
        if mask is None
        else [jnp.asarray(kept) for kept in jax.tree.leaves(mask)]
    )
    for leaf, flags, change in zip(leaves, pruned, changes, strict=True):
        kept = np.zeros(math.prod(leaf.shape), bool)
        kept[leaf.alive] = ~flags
        flat = np.zeros(kept.shape, leaf.weights.dtype)
        flat[leaf.alive] = np.where(flags, 0, leaf.weights + change)
        old = values[leaf.number]
        values[leaf.number] = _like(flat, old)
        masks[leaf.number] = _like(kept, old, dtype=bool)
    return jax.tree.unflatten(treedef, values), jax.tree.unflatten(treedef, masks)


def _like(flat: np.ndarray, leaf: Any, dtype: Any | None = None) -> jax.Array:
    """The values with a leaf's shape, dtype and sharding."""
    array = flat.reshape(leaf.shape).astype(dtype or leaf.dtype)
    return jax.device_put(array, getattr(leaf, "sharding", None))
