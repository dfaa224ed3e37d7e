r"""A loss along a path between parameters, and over a plane through them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_count, check_like, scalar_loss, warn_of_batch_stats
from curvax._settled import settled
from curvax._trees import Differentiable, Leaves, PyTree, Select, widen
from curvax.curvature._batch_mean import BatchWeight, weighted_batches
from curvax.curvature._compiled import compiled_once


class LossCurve(NamedTuple):
    """A loss along a path.

    Attributes:
      positions: of shape (num_points,), from 0 at the first parameters to the number of segments
        at the last.
      losses: the mean loss at each, of shape (num_points,), float64 of NumPy.
    """

    positions: np.ndarray
    losses: np.ndarray

    @property
    def barrier(self) -> float:
        r"""The height of the path above the line between its ends.

        $\max_t\, L(\theta_t) - (1 - t) L(\theta_0) - t L(\theta_1)$, with $t$ the fraction of the
        path; zero if the loss is nowhere above that line.
        """
        part = self.positions / self.positions[-1]
        line = (1 - part) * self.losses[0] + part * self.losses[-1]
        return float(np.max(self.losses - line))


class LossSurface(NamedTuple):
    """A loss over a plane.

    Attributes:
      right: the coordinates along the first direction, of shape (m,).
      up: those along the second, of shape (n,).
      losses: of shape (n, m), float64 of NumPy, as matplotlib's ``contour(right, up, losses)``
        takes them.
    """

    right: np.ndarray
    up: np.ndarray
    losses: np.ndarray


def loss_along(
    loss_fn: Callable[..., Any],
    path: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    num_points: int = 21,
    select: Select | None = None,
    batch_weight: BatchWeight | None = None,
    has_aux: bool = False,
) -> LossCurve:
    r"""The mean loss over a data set along the straight lines between parameters.

    Networks that share part of their training are often connected by a line of low loss; networks
    from different initializations usually are not, unless their units are permuted.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch.
      path: two or more trees of the same structure; consecutive ones are joined by a line.
      batches: as in `hessian_operator`; read once.
      num_points: the total number of points, evenly spaced, both ends included.
      select: ``(path, leaf) -> bool``, the leaves that move; the others stay at the first
        parameters. Select one layer at a time for the barrier of each.
      batch_weight: as in `hessian_operator`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      The losses, and their barrier.

    Raises:
      ValueError: if there are fewer than two parameters or points, trees differ, there are no
        batches, or ``select`` chooses nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> def loss_fn(weight, inputs):  # minima at 1 and -1
      ...     return jnp.mean((weight**2 - inputs) ** 2)
      >>> curve = spectrum.loss_along(
      ...     loss_fn, [jnp.array(-1.0), jnp.array(1.0)], [jnp.ones(4)], num_points=5
      ... )
      >>> print(curve.losses, curve.barrier)
      [0.     0.5625 1.     0.5625 0.    ] 1.0

    References:
      Frankle et al., [Linear mode connectivity and the lottery ticket
      hypothesis](https://arxiv.org/abs/1912.05671), 2020. The barrier is that of Entezari et al.,
      [The role of permutation invariance](https://arxiv.org/abs/2110.06296), 2022, Definition 1.
    """
    path = list(path)
    if len(path) < 2:
        raise ValueError(f"path needs at least two trees of parameters, got {len(path)}.")
    check_count("num_points", num_points, least=2)
    positions = np.linspace(0, len(path) - 1, num_points)
    # Hat functions: a point is the mean of the two trees beside it.
    coefficients = np.maximum(0, 1 - np.abs(positions[:, np.newaxis] - np.arange(len(path))))
    losses = _losses(loss_fn, path, coefficients, batches, select, batch_weight, has_aux)
    return LossCurve(positions, losses)


def loss_over_plane(
    loss_fn: Callable[..., Any],
    params: PyTree,
    right: PyTree,
    up: PyTree,
    batches: Iterable[Any],
    *,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    num_points: int = 21,
    batch_weight: BatchWeight | None = None,
    has_aux: bool = False,
) -> LossSurface:
    r"""The mean loss over a data set at $\theta + x\, a + y\, b$ for a grid of $x$ and $y$.

    Args:
      loss_fn: as in `loss_along`.
      params: $\theta$.
      right: $a$, a tree like ``params``: an eigenvector, or the difference to another network.
      up: $b$, a tree like ``params``.
      batches: as in `hessian_operator`; read once.
      extent: the lowest and highest $x$, then $y$, in units of the directions.
      num_points: the number of points along each direction.
      batch_weight: as in `hessian_operator`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      The losses.

    Raises:
      ValueError: if the trees differ, there are no batches, or fewer than two points.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> def loss_fn(params, inputs):
      ...     return jnp.mean(inputs) * (params[0] ** 2 + 10 * params[1] ** 2)
      >>> right, up = jnp.eye(2)
      >>> spectrum.loss_over_plane(
      ...     loss_fn, jnp.zeros(2), right, up, [jnp.ones(3)], num_points=3
      ... ).losses
      array([[11., 10., 11.],
             [ 1.,  0.,  1.],
             [11., 10., 11.]])
    """
    check_count("num_points", num_points, least=2)
    across = np.linspace(*extent[:2], num_points)
    upwards = np.linspace(*extent[2:], num_points)
    grid = [(1.0, x, y) for y in upwards for x in across]
    trees = [params, right, up]
    losses = _losses(loss_fn, trees, np.array(grid), batches, None, batch_weight, has_aux)
    return LossSurface(across, upwards, losses.reshape(num_points, num_points))


def _losses(
    loss_fn: Callable[..., Any],
    trees: Sequence[PyTree],
    coefficients: np.ndarray,
    batches: Iterable[Any],
    select: Select | None,
    batch_weight: BatchWeight | None,
    has_aux: bool,
) -> np.ndarray:
    """The mean loss at the combinations of trees that the rows of coefficients say."""
    warn_of_batch_stats(trees[0])
    for position, tree in enumerate(trees[1:], 1):
        check_like(f"tree {position} of the path or plane", tree, trees[0])
    part = Differentiable.of(jax.tree.map(widen, trees[0]), select)
    if not part.chosen:
        raise ValueError("select must choose at least one real leaf of the parameters, got none.")
    leaves = [part.select(map(widen, jax.tree.leaves(tree))) for tree in trees]
    loss_at = compiled_once(_loss_at, loss_fn, has_aux=has_aux)
    totals, weights = np.zeros(len(coefficients)), 0.0
    for weight, arguments in weighted_batches(batches, batch_weight):
        rows = [settled(loss_at(part, leaves, row, arguments)) for row in coefficients]
        totals += weight * np.array(jax.device_get(rows), np.float64)
        weights += weight
    if not weights > 0:
        raise ValueError("batches are empty: a loss needs at least one example.")
    return totals / weights


def _loss_at(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., jax.Array]:
    loss = scalar_loss(loss_fn, has_aux)

    @jax.jit
    def loss_at(
        part: Differentiable, trees: list[Leaves], row: jax.Array, arguments: tuple[Any, ...]
    ) -> jax.Array:
        def combined(*leaves: jax.Array) -> jax.Array:
            weighted = [c.astype(leaf.dtype) * leaf for c, leaf in zip(row, leaves, strict=True)]
            return functools.reduce(jnp.add, weighted)

        value: jax.Array = loss(part.params(jax.tree.map(combined, *trees)), *arguments)[0]
        return value

    return loss_at
