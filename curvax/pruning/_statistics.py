"""Running statistics of batch normalization, estimated anew for weights that have changed."""

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
    r"""The statistics of batch normalization for the weights of now: means over batches.

    Pruning changes what a layer gets, and running statistics of the dense network then ruin the
    pruned one. A step of training replaces statistics $s$ by $\mu s + (1 - \mu) b$ with those of
    the batch, $b$; with the usual $\mu = 0.99$ a hundred batches would leave a third of the old
    ones. Here $\mu$ and $b$ are read off from two calls, with $s = 0$ and $s = 1$, and the result
    is the mean of $b$ over the batches, whatever $\mu$ is.

    Args:
      update_statistics: ``(params, statistics, *arguments) -> statistics``, a forward pass in
        training mode, compiled once. As under ``jax.jit``, what it closes over is as in its first
        call.
      params: the weights.
      statistics: the present ones, a tree; Linen's ``variables["batch_stats"]``, or NNX's state of
        ``nnx.BatchStat``.
      batches: the arguments, as `collect_gradients` takes them; a few thousand examples suffice.

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
      >>> print(pruning.reestimate_statistics(update_statistics, 2.0, 9.0, batches).round(4))
      8.0
    """
    of_batch = compiled_once(_statistics_of_batch, update_statistics)
    mean = None
    for number, batch in enumerate(batches, 1):
        own = of_batch(params, statistics, as_arguments(batch))
        mean = settled(own if mean is None else _moved(mean, own, number))
    if mean is None:
        raise ValueError("batches must hold at least one batch to estimate statistics from.")
    return jax.tree.map(
        lambda old, new: jnp.asarray(new, jnp.result_type(old)) if is_inexact(old) else old,
        statistics,
        mean,
    )


@jax.jit
def _moved(mean: PyTree, own: PyTree, number: jax.Array) -> PyTree:
    """The mean of one more; of equal values it is that value, without rounding."""
    return jax.tree.map(
        lambda old, new: old + (new - old) / number if is_inexact(old) else old, mean, own
    )


def _statistics_of_batch(update_statistics: Callable[..., PyTree]) -> Callable[..., PyTree]:
    @jax.jit
    def of_batch(params: PyTree, statistics: PyTree, arguments: tuple[Any, ...]) -> PyTree:
        def updated(fill: PyTree) -> PyTree:
            filled = jax.tree.map(
                # Wide, since momentum in bfloat16 would be rounded.
                lambda leaf, value: value.astype(wide_dtype(leaf)) if is_inexact(leaf) else leaf,
                statistics,
                fill,
            )
            return update_statistics(params, filled, *arguments)

        def own(old: jax.Array, low: jax.Array, scale: jax.Array, high: jax.Array) -> jax.Array:
            if not is_inexact(old):
                return old
            decay = (high - low) / scale
            return jnp.where(decay < 1, low / jnp.where(decay < 1, 1 - decay, 1), old)

        low = updated(jax.tree.map(jnp.zeros_like, statistics))
        # Of the result's size, so that the difference has as many digits as the decay.
        scale = jax.tree.map(lambda x: 1 + 100 * jnp.abs(x) if is_inexact(x) else x, low)
        return jax.tree.map(own, statistics, low, scale, updated(scale))

    return of_batch
