"""Pruning in several steps with fresh gradients, and gradually with fine-tuning."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from curvax._checks import check_count, check_range
from curvax._trees import PyTree, Tree, path_name
from curvax.pruning._gradients import collect_gradients
from curvax.pruning._leaves import Leaf, check_mask, is_kernel, selected_leaves
from curvax.pruning._options import Method, OneShotOptions, PruneOptions, Storage, Update
from curvax.pruning._prune import check_options, explicit_target, prune
from curvax.pruning._result import PruneResult
from curvax.pruning._selection import Sparsity, number_to_prune, pools


def geometric_sparsities(initial: float, final: float, num_steps: int) -> list[float]:
    r"""Sparsities whose densities fall by a constant factor: $d_j = d_0 (d_n / d_0)^{j/n}$.

    Args:
      initial: the sparsity before the first step.
      final: the sparsity after the last.
      num_steps: the number of steps $n$.

    Returns:
      ``num_steps`` sparsities, the last of them ``final`` exactly.

    Example:
      >>> from curvax.pruning import geometric_sparsities
      >>> [round(sparsity, 3) for sparsity in geometric_sparsities(0.0, 0.75, 2)]
      [0.5, 0.75]
    """
    _check_path(initial, final, num_steps)
    ratio = (1 - final) / (1 - initial)
    steps = range(1, num_steps)
    return [1 - (1 - initial) * ratio ** (step / num_steps) for step in steps] + [final]


def polynomial_sparsities(
    initial: float, final: float, num_steps: int, *, power: float = 3.0
) -> list[float]:
    r"""Sparsities of a gradual schedule: $s_j = s_n + (s_0 - s_n) (1 - j/n)^p$.

    Args:
      initial: the sparsity before the first step.
      final: the sparsity after the last.
      num_steps: the number of steps $n$.
      power: $p$; 3 is the cubic schedule, which prunes most in the first steps.

    Returns:
      ``num_steps`` sparsities, the last of them ``final`` exactly.

    Example:
      >>> from curvax.pruning import polynomial_sparsities
      >>> [round(sparsity, 3) for sparsity in polynomial_sparsities(0.0, 0.9, 3)]
      [0.633, 0.867, 0.9]

    References:
      Zhu and Gupta, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017, Section 3.
    """
    _check_path(initial, final, num_steps)
    check_range("power", power, low=0.0, open_low=True)
    steps = range(1, num_steps)
    return [final + (initial - final) * (1 - step / num_steps) ** power for step in steps] + [final]


def prune_one_shot(
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[Any],
    sparsity: Sparsity | None,
    *,
    method: Method = "obs",
    update: Update | None = None,
    recomputations: int = 16,
    num_grads: int = 64,
    mask: PyTree | None = None,
    per_example: bool = False,
    micro_batch_size: int | None = None,
    has_aux: bool = False,
    storage: Storage | Path = "device",
    progress: bool = False,
    **options: Unpack[PruneOptions],
) -> PruneResult[Tree]:
    r"""Prunes without fine-tuning, in several steps with fresh gradients for each.

    Densities fall geometrically (`geometric_sparsities`) from the current ones; for each step
    `collect_gradients` takes gradients at the current weights, and `prune` removes the next ones.
    Magnitudes need no gradients, so ``method="magnitude"`` takes a single step.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, in evaluation mode.
      params: the parameters.
      batches: as `collect_gradients` takes it. It is iterated again for each step; an iterator
        continues where it stopped.
      sparsity: as `prune` takes it.
      method: as `prune` takes it.
      update: as `prune` takes it.
      recomputations: the number of steps; with more, the model of the loss stays accurate.
      num_grads: the number of gradients for each step.
      mask: the weights that are unpruned.
      per_example: as `collect_gradients` takes it, like the options that follow.
      micro_batch_size: see there.
      has_aux: see there.
      storage: see there.
      progress: see there.
      **options: the further options of `prune`.

    Returns:
      The result of the last step; its predicted loss change is the sum over the steps.

    Raises:
      ValueError: as `prune` and `collect_gradients` do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import pruning
      >>> inputs = jax.random.normal(jax.random.key(0), (8, 4, 3))  # eight batches
      >>> batches = [(x, x @ jnp.array([[2.0], [0.1], [1.0]])) for x in inputs]
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
      >>> params = {"kernel": jnp.array([[1.9], [0.2], [1.1]])}
      >>> result = pruning.prune_one_shot(
      ...     loss_fn, params, batches, 0.34, recomputations=1, num_grads=8)
      >>> print(result.mask["kernel"].ravel())
      [ True False  True]

    References:
      Frantar et al., [M-FAC](https://arxiv.org/abs/2107.03356), 2021, Section 3.
    """
    check_count("recomputations", recomputations)
    check_count("num_grads", num_grads)
    check_options(method=method, update=update, **options)
    target = explicit_target(sparsity, options.get("structure"))
    steps = 1 if method == "magnitude" else recomputations
    predicted: float | None = None
    result = None
    for step in _steps(params, mask, target, steps, options):
        grads = None
        if method != "magnitude":
            grads = collect_gradients(
                loss_fn,
                params,
                batches,
                num_grads,
                per_example=per_example,
                micro_batch_size=micro_batch_size,
                has_aux=has_aux,
                mask=mask,
                storage=storage,
                progress=progress,
            )
        result = prune(params, grads, step, method=method, update=update, mask=mask, **options)
        params, mask = result.params, result.mask
        if result.predicted_loss_change is not None:
            predicted = (predicted or 0.0) + result.predicted_loss_change
    assert result is not None
    return result._replace(predicted_loss_change=predicted)


def prune_gradually(
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[Any],
    sparsities: Sequence[Sparsity],
    fine_tune: Callable[[Tree, Tree], Tree],
    *,
    mask: PyTree | None = None,
    **options: Unpack[OneShotOptions],
) -> PruneResult[Tree]:
    r"""Prunes to each of several sparsities in turn, with fine-tuning after each.

    Args:
      loss_fn: as `prune_one_shot` takes it, like ``params``, ``batches``, ``mask`` and the options.
      params: see there.
      batches: see there.
      sparsities: the targets, from `polynomial_sparsities` for example.
      fine_tune: ``fine_tune(params, mask) -> params``, any training loop that keeps pruned weights
        at zero, with `keep_pruned`.
      mask: see there.
      **options: see there.

    Returns:
      The result of the last step, with the fine-tuned parameters.

    Raises:
      ValueError: as `prune_one_shot` does; if there are no sparsities; if ``fine_tune`` returns a
        pruned weight that is not zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> params = {"kernel": jnp.array([[3.0, 1.0, 2.0, 4.0]])}
      >>> result = pruning.prune_gradually(
      ...     None, params, [], [0.25, 0.5], lambda params, mask: params, method="magnitude")
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


def _steps(
    params: PyTree,
    mask: PyTree | None,
    target: Sparsity,
    num_steps: int,
    options: PruneOptions,
) -> list[Sparsity]:
    """The sparsities of each step, from the current ones on."""
    leaves = selected_leaves(params, mask, options.get("select", is_kernel))
    scope = options.get("scope", "global")
    names, paths = [], []
    for pool in pools(leaves, target, scope):
        members = [leaves[number] for number in pool.leaves]
        number_to_prune(members, pool.sparsity)  # raises if it is below the current one
        initial = min(_current_sparsity(members), pool.sparsity)
        names.append(f"^{re.escape(members[0].path)}$")
        paths.append(geometric_sparsities(initial, pool.sparsity, num_steps))
    if scope == "global" and not isinstance(target, Mapping):
        return list(paths[0])
    # A mapping from names to targets: each pool has its own path.
    keys = list(target) if scope == "global" and isinstance(target, Mapping) else names
    return [dict(zip(keys, step, strict=True)) for step in zip(*paths, strict=True)]


def _current_sparsity(leaves: Sequence[Leaf]) -> float:
    """The current sparsity, from which to start."""
    alive = sum(len(leaf.alive) for leaf in leaves)
    return 1 - alive / sum(math.prod(leaf.shape) for leaf in leaves)


def _check_path(initial: float, final: float, num_steps: int) -> None:
    check_range("initial", initial, low=0.0, high=1.0, open_high=True)
    check_range("final", final, low=initial, high=1.0, open_high=True)
    check_count("num_steps", num_steps)


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
