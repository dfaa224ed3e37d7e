"""Operators of a loss over a data set: Hessian, Gauss-Newton matrix, empirical Fisher matrix."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from curvax._checks import checked_loss
from curvax._trees import PyTree
from curvax.curvature import fisher_vp, ggn_vp, hvp
from curvax.spectrum._batches import CompiledProduct, Select, over_batches
from curvax.spectrum._operator import Operator


def hessian_operator(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    linearize: bool | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The Hessian of a loss over one batch or a whole data set.

    $A = \sum_b w_b \nabla^2 L_b(\theta) / \sum_b w_b$, with $w_b$ the number of examples in batch
    $b$: an uneven last batch counts by its size. The product with one batch is compiled and called
    from the host for each, so that data may be streamed, and the gradients of convolutions
    stay out of loops, where XLA's CPU backend is slow. As under ``jax.jit``, other values that
    ``loss_fn`` closes over are those of its first call: what changes belongs into ``params`` or
    ``batches``. Parameters narrower than float32 are widened.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch, in evaluation mode.
      params: the parameters.
      batches: an iterable of the further arguments of ``loss_fn``: a tuple of them, or a single one
        that is no tuple. It is gone through at each product; an iterator, which could not be, is
        read into a list.
      select: ``(path, leaf) -> bool``, the leaves that the operator is restricted to; vectors are
        then dictionaries of paths.
      batch_weight: ``batch_weight(*arguments)`` is $w_b$; by default the length of the first axis
        of the first array, one where there is none.
      linearize: whether what a product needs from the network is computed once for each batch and
        kept, which saves about a third of a product's time for about the memory that the product
        of a batch takes, times the number of batches. None for yes where ``batches`` is a list of
        a single one.
      check_deterministic: whether to compare two products of the same vector and warn if they
        differ: batches that are augmented, or bring a new key for dropout, at each pass.

    Returns:
      The operator.

    Raises:
      ValueError: if there are no batches, the loss is not a real scalar, or ``select`` selects
        nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> def loss_fn(params, inputs, targets):
      ...     return jnp.mean((inputs @ params - targets) ** 2) / 2
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
      >>> batches = [(inputs[:2], jnp.zeros(2)), (inputs[2:], jnp.zeros(1))]  # uneven
      >>> operator = spectrum.hessian_operator(loss_fn, jnp.zeros(2), batches)
      >>> print(3 * operator(jnp.ones(2)))
      [1. 8.]
    """
    return over_batches(
        _hessian_product(loss_fn),
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


def ggn_operator(
    network: Callable[..., jax.Array],
    loss: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    linearize: bool | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The generalized Gauss-Newton matrix $J^T H_\ell J$ over one batch or a whole data set.

    Args:
      network: ``network(params, inputs) -> outputs``, as `curvax.ggn_vp` takes it.
      loss: as `curvax.ggn_vp` takes it, ``"softmax_cross_entropy"`` for example.
      params: the parameters.
      batches: an iterable of tuples ``(inputs, targets)``, as `hessian_operator` takes it.
      select: as `hessian_operator` takes it.
      batch_weight: see there.
      linearize: see there.
      check_deterministic: see there.

    Returns:
      The operator.

    Raises:
      ValueError: as `hessian_operator` and `curvax.ggn_vp` do.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0]])
      >>> operator = spectrum.ggn_operator(
      ...     lambda params, x: x @ params, "squared_error", jnp.zeros((2, 1)), [(inputs, targets)])
      >>> print(operator(jnp.ones((2, 1))).ravel())
      [3. 6.]
    """
    return over_batches(
        _output_product(network, loss, "ggn"),
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


def empirical_fisher_operator(
    network: Callable[..., jax.Array],
    loss: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    linearize: bool | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The empirical Fisher matrix $\frac1N \sum_n g_n g_n^T$ of the gradients of all examples.

    Args:
      network: as `ggn_operator` takes it.
      loss: see there.
      params: see there.
      batches: see there.
      select: see there.
      batch_weight: see there.
      linearize: see there.
      check_deterministic: see there.

    Returns:
      The operator.

    Raises:
      ValueError: as `hessian_operator` and `curvax.fisher_vp` do.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> batch = jnp.eye(2), jnp.array([[1.0], [2.0]])
      >>> operator = spectrum.empirical_fisher_operator(
      ...     lambda params, x: x @ params, "squared_error", jnp.zeros((2, 1)), [batch])
      >>> print(operator(jnp.ones((2, 1))).ravel())  # gradients (-1, 0) and (0, -2)
      [0.5 2. ]
    """
    return over_batches(
        _output_product(network, loss, "empirical_fisher"),
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


# A loss or network is compiled once, however many operators are made of it.


@functools.lru_cache(maxsize=8)
def _hessian_product(loss_fn: Callable[..., Any]) -> CompiledProduct:
    loss = checked_loss(loss_fn, has_aux=False)

    def product(merge: Any, part: list[Any], vector: list[Any], *arguments: Any) -> list[Any]:
        def of_part(part: list[Any], *arguments: Any) -> jax.Array:
            return loss(merge(part), *arguments)[0]

        return hvp(of_part, part, vector, *arguments)

    return CompiledProduct(product)


@functools.lru_cache(maxsize=8)
def _output_product(network: Callable[..., Any], loss: Any, kind: str) -> CompiledProduct:
    take = ggn_vp if kind == "ggn" else functools.partial(fisher_vp, empirical=True)

    def product(merge: Any, part: list[Any], vector: list[Any], *arguments: Any) -> list[Any]:
        return take(lambda part, x: network(merge(part), x), loss, part, vector, *arguments)

    return CompiledProduct(product)
