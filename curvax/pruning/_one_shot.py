"""Pruning in several steps, with fresh gradients for each."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Unpack

import jax

from curvax._checks import check_count
from curvax._progress import progress_bar
from curvax._trees import PyTree, Tree
from curvax.curvature._batches import as_arguments, num_examples
from curvax.pruning._gradients import (
    GradientOptions,
    collect_gradients,
    gradients_of,
    too_few,
)
from curvax.pruning._options import Options, PruneOptions, Storage
from curvax.pruning._prune import prune_step, width_of
from curvax.pruning._result import PruneResult, result_of
from curvax.pruning._rows import DeviceRows, HostRows, Rows
from curvax.pruning._structures import Structure, selection_of, takes_all
from curvax.pruning._targets import Pool, Sparsity, geometric_sparsities, pools
from curvax.pruning._weights import Weights

Batches = Iterable[Any] | Callable[[Any], Iterable[Any]]

_NUM_GRADS = 64  # where the user does not say and the batches suffice
_FEW = 16


def prune_one_shot(
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batches: Batches,
    sparsity: Sparsity | None,
    *,
    recomputations: int = 16,
    num_grads: int | None = None,
    mask: PyTree | None = None,
    per_example: bool = False,
    micro_batch_size: int | None = None,
    has_aux: bool = False,
    storage: Storage | Path = "device",
    progress: bool = False,
    **options: Unpack[PruneOptions],
) -> PruneResult[Tree]:
    r"""Prunes without fine-tuning, in several steps with new gradients for each.

    Densities fall geometrically (`geometric_sparsities`) from the current ones. In each step
    `collect_gradients` computes gradients at the current weights, and `prune` removes weights.
    Magnitudes need no gradients, so ``method="magnitude"`` takes a single step. Gradients stay on
    the devices, in one buffer for all steps, and computations with them are compiled once.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, in evaluation mode.
      params: the parameters.
      batches: as in `collect_gradients`, iterated again for each step (an iterator continues where
        it stopped); or a function of the current params that returns such an iterable. With batch
        normalization, such a function can put re-estimated running statistics into the batches (see
        `reestimate_statistics`).
      sparsity: as in `prune`.
      recomputations: the number of steps; more steps keep the model of the loss accurate.
      num_grads: the number of gradients per step; by default 64, or as many as the batches give.
      mask: the unpruned weights, as in `prune`.
      per_example: as in `collect_gradients`.
      micro_batch_size: as in `collect_gradients`.
      has_aux: as in `collect_gradients`.
      storage: as in `collect_gradients`.
      progress: whether a progress bar is shown, by tqdm where that is installed.
      **options: further options of `prune`: ``method``, ``update``, ``select``, ``distribution``,
        ``structure``, ``damping``, ``block_size`` and so on.

    Returns:
      The result of the last step; its predicted loss change is the sum over the steps.

    Raises:
      ValueError: as in `prune` and `collect_gradients`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import pruning
      >>> inputs = jax.random.normal(jax.random.key(0), (8, 4, 3))  # eight batches
      >>> batches = [(x, x @ jnp.array([[2.0], [0.1], [1.0]])) for x in inputs]
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
      >>> params = {"kernel": jnp.array([[1.9], [0.2], [1.1]])}
      >>> result = pruning.prune_one_shot(
      ...     loss_fn, params, batches, 0.34, recomputations=1, num_grads=8
      ... )
      >>> print(result.mask["kernel"].ravel())
      [ True False  True]

    References:
      Frantar et al., [M-FAC](https://arxiv.org/abs/2107.03356), 2021, Section 3.
    """
    check_count("recomputations", recomputations)
    if num_grads is not None:
        check_count("num_grads", num_grads)
    checked = Options(**options)
    target = checked.target(sparsity)
    weights, skipped = selection_of(params, mask, checked.select, checked.structure, checked.layout)
    steps = _targets_of_steps(
        weights,
        pools(weights.leaves, target, checked.distribution, skipped),
        recomputations if checked.needs_grads else 1,
        checked.structure,
    )
    how = GradientOptions(per_example, micro_batch_size, has_aux)
    source = _Source(loss_fn, params, batches, num_grads, how, storage, checked)
    predicted, num_failed = 0.0, 0
    total = len(steps) * (num_grads or _NUM_GRADS)
    with progress_bar(total, "pruning", progress and checked.needs_grads) as advance:
        for number, targets in enumerate(steps):
            rows = source.rows(weights, advance) if checked.needs_grads else None
            step = prune_step(weights, rows, targets, checked, number=number)
            weights = step.weights
            predicted += step.predicted or 0.0
            num_failed = max(num_failed, step.num_failed)
    rise = predicted if checked.needs_grads else None
    return result_of(params, mask, weights, skipped, rise, num_failed)


def _targets_of_steps(
    weights: Weights, targets: tuple[Pool, ...], num_steps: int, structure: Structure | None
) -> list[tuple[Pool, ...]]:
    """The targets of each step: the densities of each pool fall from its own on."""
    paths = []
    for pool in targets:
        if not takes_all(structure, pool.sparsity):
            pool.number_to_prune(weights)  # raises if it is below the current sparsity
        initial = min(pool.current_sparsity(weights), pool.sparsity)
        sparsities = geometric_sparsities(initial, pool.sparsity, num_steps)
        paths.append([pool._replace(sparsity=sparsity) for sparsity in sparsities])
    return list(zip(*paths, strict=True))


class _Source:
    """Gradients for each step, in one buffer where they stay on the devices."""

    def __init__(
        self,
        loss_fn: Callable[..., jax.Array],
        params: PyTree,
        batches: Batches,
        num_grads: int | None,
        how: GradientOptions,
        storage: Storage | Path,
        options: Options,
    ) -> None:
        self._loss_fn, self._params, self._batches = loss_fn, params, batches
        self._num_grads, self._how, self._storage = num_grads, how, storage
        self._options = options
        self._device_rows: DeviceRows | None = None

    def rows(self, weights: Weights, advance: Callable[[], None]) -> Rows:
        """The gradients at the weights of now."""
        params = weights.params(self._params)
        batches = self._batches(params) if callable(self._batches) else self._batches
        number = self._num_grads or _NUM_GRADS
        if self._storage != "device":
            if self._num_grads is None:
                batches, number = self._taken(batches)
                self._check_number(number)
            grads = collect_gradients(
                self._loss_fn, params, batches, number, storage=self._storage, **self._how._asdict()
            )
            for _ in range(number):
                advance()
            return HostRows(weights, grads, width_of(weights, params, number, self._options))
        if self._device_rows is None:
            width = width_of(weights, params, number, self._options)
            self._device_rows = DeviceRows(weights, number, width)
        rows = self._device_rows
        rows.begin(weights)
        gradients = gradients_of(self._loss_fn, params, batches, self._how)
        for gradient in itertools.islice(gradients, number):
            rows.insert(gradient)
            advance()
        self._check_number(rows.num_rows)
        rows.check()
        return rows

    def _taken(self, batches: Iterable[Any]) -> tuple[list[Any], int]:
        """The first batches, read no further than needed, and how many gradients they give."""
        taken, number = [], 0
        for batch in batches:
            taken.append(batch)
            examples = num_examples(as_arguments(batch), "") if self._how.per_example else 1
            number += examples or 0
            if number >= _NUM_GRADS:
                break
        return taken, min(number, _NUM_GRADS)

    def _check_number(self, found: int) -> None:
        if found < (self._num_grads or 1):
            raise too_few(found, self._num_grads or 1)
        if self._num_grads is None and found < _FEW:
            warnings.warn(
                f"batches gave only {found} gradients, too few to rank the weights well: pass "
                "more or smaller batches, or per_example=True.",
                stacklevel=4,
            )
