"""Gradual pruning: to several sparsities in turn, with fine-tuning after each."""

from collections.abc import Callable, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, Tree, path_name
from curvax.pruning._one_shot import Batches, prune_one_shot
from curvax.pruning._options import OneShotOptions
from curvax.pruning._result import PruneResult
from curvax.pruning._targets import Sparsity
from curvax.pruning._weights import check_mask


def prune_gradually(
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batches: Batches,
    sparsities: Sequence[Sparsity],
    fine_tune: Callable[[Tree, Tree], Tree],
    *,
    mask: PyTree | None = None,
    **options: Unpack[OneShotOptions],
) -> PruneResult[Tree]:
    r"""Prunes to each of several sparsities in turn, with fine-tuning after each.

    Args:
      loss_fn: as in `prune_one_shot`.
      params: as in `prune_one_shot`.
      batches: as in `prune_one_shot`.
      sparsities: the targets, for example from `polynomial_sparsities`.
      fine_tune: ``fine_tune(params, mask) -> params``, any training loop that keeps pruned weights
        at zero (with `keep_pruned`).
      mask: as in `prune_one_shot`.
      **options: as in `prune_one_shot`.

    Returns:
      The result of the last step, with the fine-tuned parameters.

    Raises:
      ValueError: as in `prune_one_shot`; if there are no sparsities, or ``fine_tune`` returns a
        pruned weight that is not zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> params = {"kernel": jnp.array([[3.0, 1.0, 2.0, 4.0]])}
      >>> result = pruning.prune_gradually(
      ...     None,
      ...     params,
      ...     [],
      ...     [0.25, 0.5],
      ...     lambda params, mask: params,
      ...     method="magnitude",
      ... )
      >>> print(result.params["kernel"])
      [[3. 0. 0. 4.]]
    """
    if not sparsities:
        raise ValueError("sparsities must name at least one target, got none.")
    result = None
    for sparsity in sparsities:
        result = prune_one_shot(loss_fn, params, batches, sparsity, mask=mask, **options)
        mask = result.mask
        params = fine_tune(result.params, mask)
        _check_kept(params, mask)
    assert result is not None
    return result._replace(params=params)


def _check_kept(params: PyTree, mask: PyTree) -> None:
    """Raises if a pruned weight is no longer zero."""
    check_mask(mask, params)
    entries = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), kept in zip(entries, jax.tree.leaves(mask), strict=True):
        if bool(jnp.any(jnp.where(kept, 0, leaf) != 0)):
            raise ValueError(
                f"fine_tune returned pruned weights that are not zero, at {path_name(path)}: wrap "
                "its optimizer in curvax.pruning.keep_pruned(mask, optimizer)."
            )
