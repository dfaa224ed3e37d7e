r"""Gradients of single examples, and the rows of the Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import scalar_loss
from curvax._trees import Differentiable, Leaves, widen
from curvax.curvature._batch_loss import BatchLoss
from curvax.curvature._batches import over_examples
from curvax.curvature._jacobian import Network
from curvax.curvature._losses import Loss, output_loss
from curvax.influence._examples import Part

# (params, which of their leaves take part; arguments) -> leaves of shape (n, *leaf.shape)
Gradients = Callable[[Differentiable, tuple[Any, ...]], Leaves]


def network_loss(network: Network, loss: Loss) -> Callable[..., jax.Array]:
    """The mean loss of a network over a batch."""
    of_outputs = output_loss(loss)

    def mean_loss(params: Any, inputs: Any, targets: Any) -> jax.Array:
        outputs = network(params, inputs)
        return BatchLoss.of(of_outputs, outputs, targets).value(outputs)

    return mean_loss


def example_gradients(loss_fn: Callable[..., Any], *, has_aux: bool) -> Gradients:
    """The gradients of the loss on each example of a part, a batch of one."""
    return _of_examples(scalar_loss(loss_fn, has_aux))


def network_gradients(network: Network, loss: Loss) -> Gradients:
    """The same for the loss of a network's outputs."""
    return _of_examples(scalar_loss(network_loss(network, loss), has_aux=False))


def _of_examples(loss: Callable[..., Any]) -> Gradients:
    @jax.jit
    def gradients(part: Differentiable, arguments: tuple[Any, ...]) -> Leaves:
        def of_one(example: tuple[Any, ...]) -> Leaves:
            of_leaves = jax.grad(lambda leaves: loss(part.params(leaves), *example)[0])
            return [widen(leaf) for leaf in of_leaves(part.select(part.leaves))]

        return over_examples(of_one, arguments)

    return gradients


def gauss_newton_rows(
    network: Network, loss: Loss, *, num_directions: int | None
) -> Callable[..., Leaves]:
    r"""Rows $b^T J_i$ of a part: one for each column of $B_i$, or for random combinations of them.

    With independent signs $z$, $\mathbb E[B z z^T B^T] = B B^T$, the output Hessian.
    """
    of_outputs = output_loss(loss)

    @jax.jit
    def rows(
        part: Differentiable, arguments: tuple[Any, ...], numbers: jax.Array, key: jax.Array
    ) -> Leaves:
        def of_one(example: tuple[Any, ...]) -> Leaves:
            (inputs, targets), number = example
            outputs, pull = jax.vjp(
                lambda leaves: network(part.params(leaves), inputs), part.select(part.leaves)
            )
            batch = BatchLoss.of(of_outputs, outputs, targets)
            # A key of its own for each example: rows do not depend on how examples are split.
            directions = _directions(
                outputs.shape, num_directions, jax.random.fold_in(key, number[0])
            )
            factors = jax.vmap(lambda noise: batch.hessian_factor_vp(outputs, noise))(directions)
            pulled = jax.vmap(lambda row: pull(row)[0])(factors.astype(outputs.dtype))
            return [widen(leaf) for leaf in pulled]

        found = over_examples(of_one, (arguments, numbers))
        return [leaf.reshape(-1, *leaf.shape[2:]) for leaf in found]

    return rows


def _directions(shape: tuple[int, ...], number: int | None, key: jax.Array) -> jax.Array:
    """The unit vectors of outputs, or random signs of the length that keeps the expectation."""
    if number is None:
        size = int(np.prod(shape))
        return jnp.eye(size).reshape(size, *shape)
    return jax.random.rademacher(key, (number, *shape), jnp.float32) / jnp.sqrt(number)


def checked_finite(rows: Leaves, part: Part, kind: str) -> Leaves:
    """The rows of a part, if all are finite."""
    finite = np.asarray(_finite(rows)).reshape(part.size, -1).all(axis=1)
    if not finite.all():
        bad = (part.start + np.flatnonzero(~finite))[:5].tolist()
        raise ValueError(
            f"the gradients of {kind} examples {bad} are not finite, counted from 0 over all "
            "batches: check these examples and the loss, or leave them out."
        )
    return rows


@jax.jit
def _finite(rows: Leaves) -> jax.Array:
    each = [jnp.all(jnp.isfinite(leaf), axis=range(1, leaf.ndim)) for leaf in rows]
    return jnp.all(jnp.stack(each), axis=0)


def check_depends_on_examples(rows: Leaves, part: Part) -> None:
    """Raises if different examples have one and the same gradient, as where a loss ignores them."""
    differ = any(np.any(np.asarray(x[1:] != x[:1])) for x in _arrays(part.arguments))
    if part.size > 1 and differ and bool(_all_equal(rows)):
        raise ValueError(
            f"the gradients of the first {part.size} training examples are all the same, although "
            "the examples differ: the loss must be that of the examples it is given, not a mean "
            "over data that it closes over."
        )


def _arrays(arguments: tuple[Any, ...]) -> list[Any]:
    numeric = [leaf for leaf in jax.tree.leaves(arguments) if jnp.ndim(leaf)]
    return [
        np.asarray(leaf) for leaf in numeric if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]


@jax.jit
def _all_equal(rows: Leaves) -> jax.Array:
    equal = [jnp.all(leaf == leaf[:1]) for leaf in rows]
    zero = [jnp.all(leaf == 0) for leaf in rows]
    return jnp.all(jnp.stack(equal)) & ~jnp.all(jnp.stack(zero))
