"""Operators of a loss over a data set: Hessian, Gauss-Newton matrix, empirical Fisher matrix."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, get_args

from curvax._checks import check_choice, scalar_loss
from curvax._trees import Differentiable, Leaves, PyTree, Select
from curvax.curvature._batch_mean import BatchWeight, CompiledProduct, over_batches
from curvax.curvature._compiled import compiled_once
from curvax.curvature._gauss_newton import fisher_vp, ggn_vp
from curvax.curvature._jacobian import Network
from curvax.curvature._losses import Loss
from curvax.curvature._modes import JacobianMode, Mode
from curvax.curvature._operator import Operator
from curvax.curvature._products import hvp


def hessian_operator(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: BatchWeight | None = None,
    linearize: bool | None = None,
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    check_deterministic: bool = True,
) -> Operator:
    r"""The Hessian of a loss over one batch or a whole data set.

    $A = \sum_b w_b \nabla^2 L_b(\theta) / \sum_b w_b$, with $w_b$ the number of examples in batch
    $b$: an uneven last batch counts by its size. The product with one batch is compiled once and
    called from the host for each batch. So data can be streamed, and the gradients of convolutions
    stay out of loops, where XLA's CPU backend is slow. As under ``jax.jit``, ``loss_fn`` sees the
    values that it closed over at its first call: pass what changes in ``params`` or ``batches``.
    Parameters narrower than float32 are widened. Integer and bool leaves are held constant, and
    vectors have None in their places.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch, in evaluation mode.
      params: the parameters.
      batches: an iterable of the further arguments of ``loss_fn``: a tuple or list of them, or a
        single one that is neither. Batches in lists, tuples and iterators are kept, and their
        arrays are part of the operator's pytree; any other iterable is read once per product.
      select: ``(path, leaf) -> bool``, the leaves that the operator is restricted to; vectors are
        then dictionaries of paths.
      batch_weight: ``batch_weight(*arguments)`` is $w_b$; by default the sum of the weights of
        `curvax.WeightedTargets`, else the length of the first axis, on which all arrays must
        agree, or one where there are only scalars.
      linearize: whether to compute the linearization of each batch once and keep it. It saves about
        a third of a product's time and takes about the memory of one batch's product times the
        number of batches. None means True for a single kept batch, unless ``mode`` is
        ``"finite_differences"``, which has nothing to keep.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.
      mode: how to compute products; see `curvax.value_grad_and_hvp`.
      check_deterministic: whether to compare two products with the same vector and warn if they
        differ, as with augmentation or a new dropout key at each pass.

    Returns:
      The operator.

    Raises:
      ValueError: if there are no batches, the first axes of a batch disagree, the loss is not a
        real scalar or has an operation that does not support ``mode``, or ``select`` chooses
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
    check_choice("mode", mode, get_args(Mode))
    if mode == "finite_differences":
        if linearize:
            raise ValueError('linearize=True does not work with mode="finite_differences".')
        linearize = False
    return over_batches(
        compiled_once(_hessian_product, loss_fn, has_aux=has_aux, mode=mode),
        loss_fn,
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


def ggn_operator(
    network: Network,
    loss: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: BatchWeight | None = None,
    linearize: bool | None = None,
    has_aux: bool = False,
    mode: JacobianMode = "forward_over_reverse",
    check_deterministic: bool = True,
) -> Operator:
    r"""The generalized Gauss-Newton matrix $J^T H_\ell J$ over one batch or a whole data set.

    Args:
      network: ``network(params, inputs) -> outputs``, as in `curvax.ggn_vp`.
      loss: as in `curvax.ggn_vp`, for example ``"softmax_cross_entropy"``.
      params: the parameters.
      batches: an iterable of tuples ``(inputs, targets)``, as in `hessian_operator`.
      select: as in `hessian_operator`.
      batch_weight: as in `hessian_operator`.
      linearize: as in `hessian_operator`.
      has_aux: whether ``network`` returns ``(outputs, aux)``; the aux is dropped.
      mode: as in `curvax.ggn_vp`.
      check_deterministic: as in `hessian_operator`.

    Returns:
      The operator.

    Raises:
      ValueError: as in `hessian_operator` and `curvax.ggn_vp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0]])
      >>> operator = spectrum.ggn_operator(
      ...     lambda params, x: x @ params,
      ...     "squared_error",
      ...     jnp.zeros((2, 1)),
      ...     [(inputs, targets)],
      ... )
      >>> print(operator(jnp.ones((2, 1))).ravel())
      [3. 6.]
    """
    options = {"kind": "ggn", "has_aux": has_aux, "mode": mode}
    return over_batches(
        compiled_once(_output_product, network, loss, **options),
        (network, loss),
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


def empirical_fisher_operator(
    network: Network,
    loss: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: BatchWeight | None = None,
    linearize: bool | None = None,
    has_aux: bool = False,
    mode: JacobianMode = "forward_over_reverse",
    check_deterministic: bool = True,
) -> Operator:
    r"""The empirical Fisher matrix $\frac1N \sum_n g_n g_n^T$ of the gradients of all examples.

    Args:
      network: as in `ggn_operator`.
      loss: as in `ggn_operator`.
      params: as in `ggn_operator`.
      batches: as in `ggn_operator`.
      select: as in `hessian_operator`.
      batch_weight: as in `hessian_operator`.
      linearize: as in `hessian_operator`.
      has_aux: whether ``network`` returns ``(outputs, aux)``; the aux is dropped.
      mode: as in `curvax.ggn_vp`.
      check_deterministic: as in `hessian_operator`.

    Returns:
      The operator.

    Raises:
      ValueError: as in `hessian_operator` and `curvax.fisher_vp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> batch = jnp.eye(2), jnp.array([[1.0], [2.0]])
      >>> operator = spectrum.empirical_fisher_operator(
      ...     lambda params, x: x @ params,
      ...     "squared_error",
      ...     jnp.zeros((2, 1)),
      ...     [batch],
      ... )
      >>> print(operator(jnp.ones((2, 1))).ravel())  # gradients (-1, 0) and (0, -2)
      [0.5 2. ]
    """
    options = {"kind": "empirical_fisher", "has_aux": has_aux, "mode": mode}
    return over_batches(
        compiled_once(_output_product, network, loss, **options),
        (network, loss),
        params,
        batches,
        select=select,
        batch_weight=batch_weight,
        linearize=linearize,
        check_deterministic=check_deterministic,
    )


def _hessian_product(loss_fn: Callable[..., Any], *, has_aux: bool, mode: Mode) -> CompiledProduct:
    loss = scalar_loss(loss_fn, has_aux)

    def product(part: Differentiable, vector: Leaves, *arguments: Any) -> Leaves:
        def of_part(leaves: Leaves, *arguments: Any) -> Any:
            return loss(part.params(leaves), *arguments)[0]

        return hvp(of_part, part.select(part.leaves), vector, *arguments, mode=mode)

    return CompiledProduct.of(product)


def _output_product(
    network: Network, loss: Loss, *, kind: str, has_aux: bool, mode: JacobianMode
) -> CompiledProduct:
    take: Any = ggn_vp if kind == "ggn" else functools.partial(fisher_vp, empirical=True)

    def product(part: Differentiable, vector: Leaves, *arguments: Any) -> Leaves:
        def of_part(leaves: Leaves, inputs: Any) -> Any:
            return network(part.params(leaves), inputs)

        leaves = part.select(part.leaves)
        return take(of_part, loss, leaves, vector, *arguments, has_aux=has_aux, mode=mode)

    return CompiledProduct.of(product)
