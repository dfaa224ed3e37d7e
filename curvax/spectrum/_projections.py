r"""Losses and slopes of single examples along directions in parameter space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_count, scalar_loss, warn_of_batch_stats
from curvax._settled import settled
from curvax._trees import Differentiable, Leaves, PyTree, widen
from curvax.curvature._batches import as_arguments, over_examples, parts
from curvax.curvature._compiled import compiled_once


class ExampleProjections(NamedTuple):
    """Losses of single examples, and their slopes along directions.

    Attributes:
      losses: of shape (N,), float64 of NumPy.
      slopes: the inner products of each example's gradient with each direction, of shape (N, k).
    """

    losses: np.ndarray
    slopes: np.ndarray


def example_projections(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: Any,
    directions: PyTree,
    *,
    micro_batch_size: int = 256,
    has_aux: bool = False,
) -> ExampleProjections:
    r"""Computes the loss of each example, and its slope $\nabla \ell_n^T v_j$ along each direction.

    One forward-mode pass per direction gives the slopes of a whole micro-batch; no gradient of an
    example is stored. Examples with large slopes of opposite signs along the top eigenvectors of
    the Hessian are those whose losses a step on the mean loss trades against each other.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch, in evaluation mode;
        it is called on batches of one example.
      params: the parameters.
      batch: the further arguments of ``loss_fn``, N examples along the first axes.
      directions: a tree like ``params`` with leaves ``(k, *leaf.shape)``, as
        `Eigenpairs.vectors` are. Entries for integer leaves of ``params`` are ignored.
      micro_batch_size: the number of examples evaluated together.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      The losses and slopes, in the order of the examples.

    Raises:
      ValueError: if directions do not match the parameters, or the first axes of the batch
        disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> def loss_fn(params, inputs, targets):
      ...     return jnp.mean((inputs @ params - targets) ** 2) / 2
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, -1.0])
      >>> found = spectrum.example_projections(
      ...     loss_fn, jnp.zeros(2), batch, jnp.eye(2)
      ... )
      >>> print(found.losses, found.slopes.tolist())
      [0.5 0.5] [[-1.0, 0.0], [0.0, 2.0]]

    References:
      Rosenfeld and Risteski, [Outliers with opposing signals have an outsized effect on neural
      network optimization](https://arxiv.org/abs/2311.04163), 2024.
    """
    check_count("micro_batch_size", micro_batch_size)
    warn_of_batch_stats(params)
    part = Differentiable.of(jax.tree.map(widen, params))
    vectors = _directions(part, directions)
    compiled = compiled_once(_losses_and_slopes, loss_fn, has_aux=has_aux)
    losses, slopes = [], []
    for arguments, _ in parts(as_arguments(batch), micro_batch_size):
        # From the host: in a loop, XLA's CPU backend is slow on convolutions.
        found = [settled(compiled(part, vector, arguments)) for vector in vectors]
        losses.append(found[0][0])
        slopes.append(jnp.stack([slope for _, slope in found], axis=1))
    return ExampleProjections(
        *(np.concatenate(jax.device_get(pieces)).astype(np.float64) for pieces in (losses, slopes))
    )


def _directions(part: Differentiable, directions: PyTree) -> list[Leaves]:
    """The leaves of each direction that belong to differentiated leaves of the parameters."""
    given = jax.tree.leaves(directions)
    wanted = part.select(part.leaves)
    if len(given) == len(part.leaves):
        given = part.select(given)
    shapes = [jnp.shape(leaf) for leaf in given]
    number = shapes[0][0] if shapes and shapes[0] else 0
    if not number or shapes != [(number, *leaf.shape) for leaf in wanted]:
        raise ValueError(
            "directions must have leaves of shape (k, *leaf.shape), one for each of params, got "
            f"{shapes} where params have {[leaf.shape for leaf in wanted]}."
        )
    stacked = [jnp.asarray(v, leaf.dtype) for v, leaf in zip(given, wanted, strict=True)]
    return [[leaf[i] for leaf in stacked] for i in range(number)]


def _losses_and_slopes(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., Any]:
    loss = scalar_loss(loss_fn, has_aux)

    @jax.jit
    def losses_and_slopes(
        part: Differentiable, vector: Leaves, arguments: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array]:
        def losses(leaves: Leaves) -> jax.Array:
            params = part.params(leaves)
            return over_examples(lambda example: loss(params, *example)[0], arguments)

        return jax.jvp(losses, (part.select(part.leaves),), (vector,))

    return losses_and_slopes
