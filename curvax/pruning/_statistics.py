"""Re-estimates running statistics of batch normalization for changed weights."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from curvax._settled import settled
from curvax._trees import PyTree, Tree, is_inexact, wide_dtype
from curvax.curvature._batches import as_arguments
from curvax.curvature._compiled import compiled_once


def reestimate_statistics(
    update_statistics: Callable[..., Any], params: PyTree, statistics: Tree, batches: Iterable[Any]
) -> Tree:
    r"""Re-estimates batch-normalization statistics for the current weights: means over batches.

    Pruning changes the inputs of a layer, so running statistics of the dense network ruin the
    pruned one. A step of training replaces statistics $s$ by $\mu s + (1 - \mu) b$ with those of
    the batch, $b$; with the usual $\mu = 0.99$ a hundred batches would leave a third of the old
    ones. Here $\mu$ and $b$ are inferred from calls with different $s$, and the result is the mean
    of $b$ over the batches, whatever $\mu$ is. Statistics that are not such means, for example the
    vector of spectral normalization, are carried from batch to batch as in training.

    Args:
      update_statistics: ``(params, statistics, *arguments) -> statistics``, a forward pass in
        training mode, compiled once. As under ``jax.jit``, it sees the values that it closed over
        at its first call.
      params: the weights.
      statistics: the current statistics, a tree; Linen's ``variables["batch_stats"]``, or NNX's
        state of ``nnx.BatchStat``.
      batches: the arguments, as in `collect_gradients`; a few thousand examples suffice.

    Returns:
      A tree like ``statistics``. Integers, and what the pass does not change, are returned as they
      are.

    Raises:
      ValueError: if there are no batches.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> def update_statistics(scale, mean, x):  # a forward pass in training mode
      ...     return 0.9 * mean + 0.1 * jnp.mean(scale * x)
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
      >>> print(
      ...     pruning.reestimate_statistics(
      ...         update_statistics, 2.0, 9.0, batches
      ...     ).round(4)
      ... )
      8.0
    """
    of_batch = compiled_once(_statistics_of_batch, update_statistics)
    mean, latest, are_means = None, statistics, None
    for number, batch in enumerate(batches, 1):
        arguments = as_arguments(batch)
        if are_means is None:
            are_means = _which_are_means(of_batch, params, statistics, arguments)
        own, _ = of_batch(params, latest, are_means, arguments)
        mean, latest = settled(
            _moved(own if mean is None else mean, own, latest, are_means, number)
        )
    if mean is None:
        raise ValueError("batches must hold at least one batch.")
    return jax.tree.map(
        lambda old, new: jnp.asarray(new, jnp.result_type(old)) if is_inexact(old) else old,
        statistics,
        mean,
    )


OfBatch = Callable[..., tuple[PyTree, PyTree]]


def _which_are_means(
    of_batch: OfBatch, params: PyTree, statistics: PyTree, arguments: tuple[Any, ...]
) -> PyTree:
    """For each leaf whether it is a running mean."""
    number, treedef = len(jax.tree.leaves(statistics)), jax.tree.structure(statistics)

    def found(tried: list[bool]) -> list[bool]:
        tree = jax.tree.unflatten(treedef, tried)
        _, affine = of_batch(params, statistics, tree, arguments)
        return [bool(leaf) for leaf in jax.tree.leaves(affine)]

    together = found([True] * number)
    if not all(together):
        # What a spectral normalization keeps changes the statistics of others: each by itself then.
        for index in [index for index, right in enumerate(together) if not right]:
            together[index] = found([other == index for other in range(number)])[index]
    return jax.tree.unflatten(treedef, together)


@jax.jit
def _moved(
    mean: PyTree, own: PyTree, latest: PyTree, are_means: PyTree, number: jax.Array
) -> tuple[PyTree, PyTree]:
    """The result with one more batch, and the statistics for the next one."""

    def result(old: jax.Array, new: jax.Array, is_mean: jax.Array) -> jax.Array:
        # The mean of equal values is that value, without rounding.
        return jnp.where(is_mean, old + (new - old) / number, new) if is_inexact(old) else old

    def following(old: jax.Array, new: jax.Array, is_mean: jax.Array) -> jax.Array:
        return jnp.where(is_mean, old, new.astype(old.dtype)) if is_inexact(old) else old

    return (
        jax.tree.map(result, mean, own, are_means),
        jax.tree.map(following, latest, own, are_means),
    )


def _statistics_of_batch(update_statistics: Callable[..., PyTree]) -> OfBatch:
    @jax.jit
    def of_batch(
        params: PyTree, statistics: PyTree, are_means: PyTree, arguments: tuple[Any, ...]
    ) -> tuple[PyTree, PyTree]:
        """The batch's own statistics, and whether those taken for means are."""

        def updated(fill: PyTree) -> PyTree:
            filled = jax.tree.map(chosen, statistics, fill, are_means)
            return update_statistics(params, filled, *arguments)

        def chosen(leaf: jax.Array, value: jax.Array, is_mean: jax.Array) -> jax.Array:
            # Wide, since momentum in bfloat16 would be rounded.
            wide = wide_dtype(leaf)
            return jnp.where(is_mean, value, leaf).astype(wide) if is_inexact(leaf) else leaf

        def own(
            old: jax.Array, low: jax.Array, scale: jax.Array, high: jax.Array, is_mean: jax.Array
        ) -> jax.Array:
            if not is_inexact(old):
                return old
            decay = (high - low) / scale
            of_mean = jnp.where(decay < 1, low / jnp.where(decay < 1, 1 - decay, 1), old)
            return jnp.where(is_mean, of_mean, low)

        def is_affine(low: jax.Array, middle: jax.Array, high: jax.Array) -> jax.Array:
            if not is_inexact(low):
                return jnp.array(True)
            gap = jnp.abs(low + high - 2 * middle)
            return jnp.all(~(gap > 1e-3 * (jnp.abs(low) + jnp.abs(high))))

        # A pass in training mode does not see running means: XLA makes one of the three.
        low = updated(jax.tree.map(jnp.zeros_like, statistics))
        # Of the result's size, so that the difference has as many digits as the decay.
        scale = jax.tree.map(lambda x: 1 + 100 * jnp.abs(x) if is_inexact(x) else x, low)
        half = jax.tree.map(lambda x: x / 2 if is_inexact(x) else x, scale)
        high = updated(scale)
        affine = jax.tree.map(is_affine, low, updated(half), high)
        return jax.tree.map(own, statistics, low, scale, high, are_means), affine

    return of_batch
