r"""Gauss-Newton and Fisher products, from one linearization of the network.

A loss $L(\theta) = \ell(f(\theta))$ that is convex in the outputs $f$ has the
Hessian $H = J^T H_\ell J + \sum_k \partial_k \ell\, \nabla^2 f_k$; the first term is
the generalized Gauss-Newton matrix $G$, which is positive semi-definite. One
linearization of the network gives the outputs, $J t$ and, transposed, $J^T u$, so
the gradient $J^T \nabla \ell$ and the product $J^T H_\ell J t$ share forward pass
and stored values.
"""

from collections.abc import Callable
from typing import Any

import jax

from curvax._checks import check_keywords, check_like
from curvax._trees import Tree
from curvax.curvature._batch_loss import BatchLoss
from curvax.curvature._jacobian import Linearization, Network, linearize_network
from curvax.curvature._losses import Loss, output_loss
from curvax.curvature._modes import JacobianMode


def ggn_vp(
    network: Network,
    loss: Loss,
    params: Tree,
    tangent: Tree,
    inputs: Any,
    targets: Any = None,
    *,
    has_aux: bool = False,
    mode: JacobianMode = "forward_over_reverse",
    **kwargs: Any,
) -> Tree:
    r"""Multiplies the generalized Gauss-Newton matrix by a vector.

    $$
    G t = J^T H_\ell J t
    $$

    with $J$ the Jacobian of the network's outputs with respect to the parameters and $H_\ell$ the
    Hessian of the loss with respect to the outputs. The loss of a batch is the mean over examples;
    all axes of the outputs but the last are example axes.

    Args:
      network: ``network(params, inputs, **kwargs)`` that returns an array of outputs of
        shape ``(*examples, C)``, or ``(outputs, aux)`` with ``has_aux``.
      loss: ``"softmax_cross_entropy"`` (targets are integer labels or probabilities),
        ``"squared_error"`` ($\frac12 \|f_n - y_n\|^2$), a `curvax.OutputLoss` such as these two
        under their names in `curvax`, or any function ``(outputs, target) -> scalar`` of one
        example that is convex in the outputs.
      params: a tree of arrays.
      tangent: a tree like ``params``, the vector.
      inputs: the input of ``network``; it is not differentiated.
      targets: an array with the outputs' example axes first, or `curvax.WeightedTargets` of one;
        the two named losses do not need targets for products.
      has_aux: whether ``network`` returns auxiliary data, which is dropped.
      mode: ``"forward_over_reverse"`` computes $J t$ in forward mode; ``"reverse_over_reverse"`` by
        two vector-Jacobian products, for a network with a kernel that has no forward-mode rule.
      **kwargs: keyword arguments of ``network``.

    Returns:
      A tree with the shapes and dtypes of ``params``.

    Raises:
      ValueError: if the loss is unknown, the tangent or targets do not match, or an operation of
        the network does not support ``mode``.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> inputs = jnp.array([[1.0, 2.0]])
      >>> curvax.ggn_vp(
      ...     network, "squared_error", jnp.zeros((2, 1)), jnp.ones((2, 1)), inputs
      ... )
      Array([[3.],
             [6.]], dtype=float32)

    References:
      Schraudolph, [Fast curvature matrix-vector products for second-order gradient
      descent](https://doi.org/10.1162/08997660260028683), 2002.
    """
    check_keywords("ggn_vp", network, ("targets", "has_aux", "mode"))
    point = linearize_network(network, params, inputs, kwargs, has_aux=has_aux, mode=mode)
    return _outer_product_vp(point, loss, params, tangent, targets, BatchLoss.hessian_vp)


def fisher_vp(
    network: Network,
    loss: Loss,
    params: Tree,
    tangent: Tree,
    inputs: Any,
    targets: Any = None,
    *,
    empirical: bool = False,
    has_aux: bool = False,
    mode: JacobianMode = "forward_over_reverse",
    **kwargs: Any,
) -> Tree:
    r"""Multiplies the Fisher matrix, or the empirical one, by a vector.

    The Fisher matrix takes the expectation over labels drawn from the model, the empirical one uses
    the labels of the data:

    $$
    F = \frac1N \sum_n E_{y \sim p(\cdot \mid f_n)} [g_n(y)\, g_n(y)^T], \qquad
    \hat F = \frac1N \sum_n g_n(y_n)\, g_n(y_n)^T
    $$

    with $g_n = J_n^T \nabla \ell(f_n, y)$. For the negative log-likelihood of an
    exponential family in its natural parameters, softmax cross-entropy and the squared error among
    them, $F$ is the Gauss-Newton matrix and is computed as such.

    Args:
      network: as in `curvax.ggn_vp`.
      loss: as in `curvax.ggn_vp`. Without ``empirical`` it must be such a likelihood: one of
        the two named losses, or a `curvax.OutputLoss` with ``is_likelihood``.
      params: a tree of arrays.
      tangent: a tree like ``params``, the vector.
      inputs: the input of ``network``; it is not differentiated.
      targets: an array with the outputs' example axes first; required if ``empirical``.
      empirical: whether to use the labels of the data.
      has_aux: whether ``network`` returns auxiliary data, which is dropped.
      mode: as in `curvax.ggn_vp`.
      **kwargs: keyword arguments of ``network``.

    Returns:
      A tree with the shapes and dtypes of ``params``.

    Raises:
      ValueError: if the loss is not such a likelihood, or targets are missing or do not match.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> params, inputs, labels = jnp.zeros((2, 3)), jnp.eye(2), jnp.array([0, 2])
      >>> product = curvax.fisher_vp(
      ...     network,
      ...     "softmax_cross_entropy",
      ...     params,
      ...     params + 1,
      ...     inputs,
      ...     labels,
      ...     empirical=True,
      ... )
      >>> product.shape
      (2, 3)

    References:
      Martens, [New insights and perspectives on the natural gradient
      method](https://arxiv.org/abs/1412.1193), 2014, Sections 8 and 9. Kunstner et al.,
      [Limitations of the empirical Fisher approximation](https://arxiv.org/abs/1905.12558),
      2019.
    """
    loss = output_loss(loss)
    if empirical and targets is None:
        raise ValueError("the empirical Fisher matrix needs targets, got None.")
    if not empirical and not loss.is_likelihood:
        raise ValueError(
            "the Fisher matrix needs the negative log-likelihood of an exponential family in "
            "its natural parameters: pass a loss made by convex_loss(..., is_likelihood=True), "
            "set empirical=True, or use ggn_vp."
        )
    product = BatchLoss.empirical_vp if empirical else BatchLoss.hessian_vp
    check_keywords("fisher_vp", network, ("targets", "empirical", "has_aux", "mode"))
    point = linearize_network(network, params, inputs, kwargs, has_aux=has_aux, mode=mode)
    return _outer_product_vp(point, loss, params, tangent, targets, product)


def _outer_product_vp(
    point: Linearization,
    loss: Loss,
    params: Tree,
    tangent: Tree,
    targets: Any,
    output_product: Callable[[BatchLoss, jax.Array, jax.Array], jax.Array],
) -> Tree:
    """``Jᵀ M J t`` with ``M`` the given product in the space of outputs."""
    check_like("tangent", tangent, params)
    batch_loss = BatchLoss.of(output_loss(loss), point.outputs, targets)
    outputs_tangent = point.jacobian_vp(point.tangents(tangent))
    product = output_product(batch_loss, point.outputs, outputs_tangent)
    return point.tree.tangent(point.vector_jacobian(product.astype(point.outputs.dtype)))
