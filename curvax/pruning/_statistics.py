"""Running statistics of batch normalization, estimated anew for weights that have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, Tree, is_inexact
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
    total, number = None, 0
    for batch in batches:
        own = of_batch(params, statistics, as_arguments(batch))
        total = own if total is None else jax.tree.map(jnp.add, total, own)
        number += 1
    if total is None:
        raise ValueError("batches must hold at least one batch to estimate statistics from.")
    return jax.tree.map(
        lambda old, new: (
            jnp.asarray(new / number, jnp.result_type(old)) if is_inexact(old) else old
        ),
        statistics,
        total,
    )


def _statistics_of_batch(update_statistics: Callable[..., PyTree]) -> Callable[..., PyTree]:
    @jax.jit
    def of_batch(params: PyTree, statistics: PyTree, arguments: tuple[Any, ...]) -> PyTree:
        def updated(value: float) -> PyTree:
            filled = jax.tree.map(
                lambda leaf: jnp.full_like(leaf, value) if is_inexact(leaf) else leaf, statistics
            )
            return update_statistics(params, filled, *arguments)

        def own(old: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            decay = high - low
            return jnp.where(decay < 1, low / jnp.where(decay < 1, 1 - decay, 1), old)

        return jax.tree.map(own, statistics, updated(0.0), updated(1.0))

    return of_batch
