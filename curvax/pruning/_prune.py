"""One pruning step: scores, the choice of weights, the update of the others."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from curvax._checks import check_like
from curvax._layouts import Layout
from curvax._trees import PyTree, Select, Tree, named_leaves, shape_of
from curvax.fisher.inverse._column_blocks import automatic_mesh
from curvax.fisher.inverse._input import checked_leaves
from curvax.pruning._choice import weights_to_prune
from curvax.pruning._fisher import ScaledRows, fisher_model
from curvax.pruning._options import Method, Options, Update
from curvax.pruning._result import PruneResult, result_of
from curvax.pruning._rows import DeviceRows, HostRows, Rows, Width
from curvax.pruning._scores import model_free_scores, scores_of
from curvax.pruning._structures import Structure, selection_of
from curvax.pruning._targets import Distribution, Pool, Sparsity, pools
from curvax.pruning._weights import Weights, is_kernel


def prune(
    params: Tree,
    grads: PyTree | None,
    sparsity: Sparsity | None,
    *,
    method: Method = "obs",
    update: Update | None = None,
    mask: PyTree | None = None,
    select: Select = is_kernel,
    distribution: Distribution = "global",
    min_density: float = 0.0,
    normalize_scores: bool = False,
    structure: Structure | None = None,
    layout: Layout = "auto",
    damping: float = 0.1,
    relative_damping: bool = True,
    block_size: int | None = 128,
    fisher_diag: PyTree | None = None,
    mesh: jax.sharding.Mesh | None = None,
    key: jax.Array | int | None = None,
) -> PruneResult[Tree]:
    r"""Prunes parameters in one step, by Optimal Brain Surgeon or a simpler rule.

    With the empirical Fisher matrix $F = \lambda I + \frac1m \sum_i g_i g_i^T$ of the unpruned
    weights as the model of the loss, the weights with the lowest scores are pruned:

    | method | score | update of the kept weights by default |
    |---|---|---|
    | ``"obs"`` | $w_i^2 / (2 [F^{-1}]_{ii})$ | ``"joint"`` |
    | ``"greedy"`` | the same, one at a time in a block, $w$ and $F^{-1}$ updated | ``"joint"`` |
    | ``"fisher"`` | $w_i^2 F_{ii} / 2$ | ``"none"`` |
    | ``"saliency"`` | $\lvert w_i \bar g_i \rvert$ with the mean gradient | ``"none"`` |
    | ``"magnitude"`` | $w_i^2 / 2$ | ``"none"`` |
    | ``"random"`` | uniform | ``"none"`` |

    and the kept weights change by

    | update | change, with $Q$ the weights to prune and $S$ the kept ones |
    |---|---|
    | ``"joint"`` | $F_{SS}^{-1} F_{SQ} w_Q = -F^{-1}_{SQ} (F^{-1}_{QQ})^{-1} w_Q$ |
    | ``"independent"`` | $-F^{-1} t$, $t_q = w_q / [F^{-1}]_{qq}$: as published |
    | ``"none"`` | nothing |

    $F$ is block-diagonal, with blocks of ``block_size`` consecutive unpruned weights; the weights
    of an output unit are consecutive. A unit of several weights (``structure``) has the mean of its
    weights' scores. Scores are gathered on the host, where the weights are chosen.

    Args:
      params: the parameters, a tree of arrays.
      grads: gradients of the loss, a tree of ``(m, *leaf.shape)`` like `collect_gradients`
        returns; None for a method and an update that need none.
      sparsity: the final fraction of zeros among the weights of the selected leaves, in [0, 1),
        including those already pruned by ``mask``; a mapping from path patterns (``re.search``) to
        sparsities, where leaves that match none are not pruned, though an update may change them;
        or for N:M, None or $1 - n/m$, to prune every group to N of M, whatever the resulting
        sparsity.
      method: the scores, see above.
      update: the update of the kept weights, see above.
      mask: the unpruned weights, a tree of bool like ``params``, where a scalar stands for a whole
        leaf; None for all. Use `mask_of_zeros` for a network pruned earlier.
      select: ``(path, leaf) -> bool``, the leaves that are pruned; kernels by default.
      distribution: how the sparsity is distributed. ``"global"`` compares the scores of all leaves,
        ``"uniform"`` prunes each leaf to it, ``"erk"`` makes densities proportional to
        $\sum_k n_k / \prod_k n_k$ of a kernel's sizes $n_k$.
      min_density: the minimum fraction of each layer's weights to keep, rounded up. A layer is a
        leaf, or a member of a stacked leaf.
      normalize_scores: whether to divide scores by their mean in each layer before layers are
        compared.
      structure: None for single weights, `NM`, `WeightBlocks` or `OutputUnits`. Leaves that do not
        fit it are skipped, and listed in the result.
      layout: the roles of a leaf's axes, as in `curvax.adahessian`.
      damping: $\lambda$, in units of the mean of the diagonal of $G^T G / m$.
      relative_damping: whether ``damping`` is in these units; if False, it is $\lambda$ itself, as
        published.
      block_size: the size of the blocks of $F$; None for the full matrix.
      fisher_diag: for ``method="fisher"``, the diagonal $F_{ii}$ itself in place of gradients, a
        tree like ``params`` or the part of it that is pruned: the second moments of an optimizer,
        ``optax.tree.get(state, "nu")``.
      mesh: the devices over which to spread the blocks; those of sharded params by default.
      key: for ``method="random"``, a PRNG key or an integer seed.

    Returns:
      The pruned parameters, their mask, sparsities and the predicted loss change.

    Raises:
      ValueError: if an option is out of range, ``select`` chooses nothing or nothing that fits the
        structure, two leaves are the same array, ``mask`` or ``grads`` do not match ``params``,
        gradients are missing, anything is not finite, or ``sparsity`` is below the current one,
        above what the structure allows or so high that nothing would be left.

    Warns:
      UserWarning: if a layer loses all of its weights, if many weights are zero and no mask is
        given, or if blocks of $F$ could not be factored.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> params = {"kernel": jnp.array([[1.0, 1.1]])}
      >>> # The weights are coupled.
      >>> grads = {"kernel": jnp.array([[[2.0, 2.0]], [[0.0, 1.0]]])}
      >>> result = pruning.prune(params, grads, 0.5, damping=1e-3)
      >>> print(result.mask["kernel"], result.params["kernel"].round(2))
      [[False  True]] [[0.  1.9]]

    References:
      Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1992.
      Frantar et al., [M-FAC](https://arxiv.org/abs/2107.03356), 2021, Section 3.
    """
    options = Options(
        method=method,
        update=update,
        select=select,
        distribution=distribution,
        min_density=min_density,
        normalize_scores=normalize_scores,
        structure=structure,
        layout=layout,
        damping=damping,
        relative_damping=relative_damping,
        block_size=block_size,
        mesh=mesh,
        key=key,
    )
    if fisher_diag is not None and (method != "fisher" or grads is not None):
        raise ValueError(
            "fisher_diag replaces grads and needs method='fisher', got "
            f"method={method!r} and grads={'None' if grads is None else 'given'}: pass one of them."
        )
    target = options.target(sparsity)
    weights, skipped = selection_of(params, mask, select, structure, layout)
    rows = None
    if grads is not None:
        rows = rows_of(weights, grads, params, options)
    elif options.needs_grads and (fisher_diag is None or options.update_of_kept != "none"):
        raise ValueError(f"method={method!r} with update={update!r} needs grads, got None.")
    given = None if fisher_diag is None else _given_diagonal(weights, fisher_diag)
    targets = pools(weights.leaves, target, distribution, skipped)
    step = prune_step(weights, rows, targets, options, given=given)
    return result_of(params, mask, step.weights, skipped, step.predicted, step.num_failed)


class Step(NamedTuple):
    """What a pruning step leaves.

    Attributes:
      weights: with fewer alive ones.
      predicted: the rise of the loss by the model; None without gradients.
      num_failed: how many matrices were too ill conditioned for their dtype.
    """

    weights: Weights
    predicted: float | None
    num_failed: int


def prune_step(
    weights: Weights,
    rows: Rows | None,
    targets: tuple[Pool, ...],
    options: Options,
    *,
    number: int = 0,
    given: np.ndarray | None = None,
) -> Step:
    """Prunes weights to their targets.

    Args:
      weights: the weights.
      rows: gradients of the alive ones; None for methods that need none.
      targets: how many to prune.
      options: as in `prune`.
      number: of the step in a run, for random scores.
      given: the diagonal of a Fisher matrix, in place of that of the gradients.
    """
    values = weights.values[weights.alive]
    if rows is None:
        scores = (
            np.square(values, dtype=np.float64) * given / 2
            if given is not None
            else model_free_scores(weights, options, number)
        )
        gone = weights_to_prune(weights, scores, targets, options)
        return Step(weights.pruned(gone, np.zeros_like(values)), None, 0)
    with rows.width.context():
        return _step_with_rows(weights, rows, targets, options, number)


def _step_with_rows(
    weights: Weights, rows: Rows, targets: tuple[Pool, ...], options: Options, number: int
) -> Step:
    values = weights.values[weights.alive]
    scaled = ScaledRows.of(
        rows, options.damping, relative=options.relative_damping, num_weights=len(values)
    )
    model = fisher_model(scaled, options.block_size)
    diagonal = functools.cache(model.diagonal)
    if options.method in ("magnitude", "random"):
        scores = model_free_scores(weights, options, number)
    else:
        scores = scores_of(values, scaled, diagonal, options)
    gone = weights_to_prune(weights, scores, targets, options)
    changes, num_failed = np.zeros_like(values), 0
    if options.update_of_kept == "joint" and gone.any():
        changes, num_failed = model.joint(np.where(gone, values, 0), ~gone)
    elif options.update_of_kept == "independent" and gone.any():
        solution = model.solve(np.where(gone, values / diagonal().vector, 0))
        changes, num_failed = -solution.vector, solution.num_failed
    if diagonal.cache_info().currsize:
        num_failed = max(num_failed, diagonal().num_failed)
    changes = np.where(gone, -values, changes)
    products = scaled.products(changes)
    predicted = float(products.mean() + (products**2).mean() / 2)
    return Step(weights.pruned(gone, changes), predicted, num_failed)


def rows_of(weights: Weights, grads: PyTree, params: PyTree, options: Options) -> Rows:
    """The alive columns of given gradients, ``(m, *leaf.shape)`` like the params."""
    arrays = jax.tree.leaves(grads)
    if not arrays or not all(np.shape(rows)[:1] > (0,) for rows in arrays):
        raise ValueError(
            "grads must hold at least one gradient along the first axis of each leaf, got shapes "
            f"{[np.shape(rows) for rows in arrays]}."
        )
    shapes = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), grads)
    check_like("a gradient", shapes, params)
    chosen = {leaf.path: arrays[leaf.number] for leaf in weights.leaves}
    checked_leaves(chosen, allow_complex=False)
    width = width_of(weights, params, len(arrays[0]), options)
    if any(isinstance(rows, np.ndarray) for rows in chosen.values()):
        return HostRows(weights, jax.tree.map(np.asarray, grads), width)
    rows = DeviceRows(weights, len(arrays[0]), width)
    for index in range(len(arrays[0])):
        rows.insert(jax.tree.map(lambda leaf, i=index: leaf[i], grads))
    return rows


def width_of(weights: Weights, params: PyTree, num_rows: int, options: Options) -> Width:
    """How the columns are cut; over the devices of sharded params where no mesh is given."""
    mesh = _mesh_of(params) if options.mesh is None else automatic_mesh(options.mesh)
    # Without blocks a chunk holds as many columns as there are gradients, or more.
    size = min(options.block_size or num_rows, len(weights.alive))
    return Width.of(len(weights.alive), num_rows, size, mesh=mesh)


def _mesh_of(params: PyTree) -> jax.sharding.Mesh | None:
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1:
            return automatic_mesh(sharding.mesh)
    return None


def _given_diagonal(weights: Weights, fisher_diag: PyTree) -> np.ndarray:
    entries = dict(named_leaves(fisher_diag))
    for leaf in weights.leaves:
        if leaf.path not in entries or shape_of(entries[leaf.path]) != leaf.shape:
            raise ValueError(
                f"fisher_diag must have a leaf of shape {leaf.shape} at {leaf.path}, like params; "
                f"its leaves are: {', '.join(entries) or 'none'}."
            )
    whole = np.concatenate([leaf.flat(np.asarray(entries[leaf.path])) for leaf in weights.leaves])
    if not (np.isfinite(whole).all() and (whole >= 0).all()):
        raise ValueError("fisher_diag must be finite and at least zero.")
    return whole[weights.alive].astype(weights.values.dtype)
