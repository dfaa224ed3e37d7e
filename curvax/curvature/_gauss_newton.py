r"""Gauss-Newton and Fisher products and diagonals, from one linearization of the network.

A loss $L(\theta) = \ell(f(\theta))$ that is convex in the outputs $f$ has the
Hessian $H = J^T H_\ell J + \sum_k \partial_k \ell\, \nabla^2 f_k$; the first term is
the generalized Gauss-Newton matrix $G$, which is positive semi-definite. One
linearization of the network gives the outputs, $J t$ and, transposed, $J^T u$, so
the gradient $J^T \nabla \ell$ and the product $J^T H_\ell J t$ share forward pass
and stored values.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, overload

import jax
import jax.numpy as jnp

from curvax._checks import check_choice, check_count, check_keywords, check_like
from curvax._trees import PyTree, Tree
from curvax.curvature._batch_loss import BatchLoss
from curvax.curvature._diagonal import mean_over_probes
from curvax.curvature._jacobian import Linearization, Network, linearize_network
from curvax.curvature._losses import LOSSES, LossName, OutputLoss, convex_loss
from curvax.curvature._modes import JacobianMode
from curvax.curvature._one_pass import OnePass
from curvax.curvature._probes import Distribution, times_probe

Aux = TypeVar("Aux")
Loss = LossName | OutputLoss | Callable[[jax.Array, Any], jax.Array]


def _output_loss(loss: Loss) -> OutputLoss:
    if isinstance(loss, str):
        check_choice("loss", loss, get_args(LossName))
        return LOSSES[loss]
    if isinstance(loss, OutputLoss):
        return loss
    return convex_loss(loss)


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
    r"""The product of the generalized Gauss-Newton matrix with a vector.

    $$
    G t = J^T H_\ell J t
    $$

    with $J$ the Jacobian of the network's outputs in the parameters and
    $H_\ell$ the Hessian of the loss in the outputs. The loss of a batch is the mean
    over examples, which are all axes of the outputs but the last.

    Args:
      network: ``network(params, inputs, **kwargs)`` that returns an array of outputs of
        shape ``(*examples, C)``, or ``(outputs, aux)`` with ``has_aux``.
      loss: ``"softmax_cross_entropy"`` (targets are integer labels or probabilities),
        ``"squared_error"`` ($\frac12 \|f_n - y_n\|^2$), a `curvax.OutputLoss` such as these two
        under their names in `curvax`, or any function ``(outputs, target) -> scalar`` of one
        example that is convex in the outputs.
      params: a tree of arrays.
      tangent: a tree like ``params``, the vector.
      inputs: what ``network`` takes; it gets no tangent.
      targets: an array with the outputs' example axes first, or `curvax.WeightedTargets` of
        one; the two named losses do not need it for products.
      has_aux: whether ``network`` returns auxiliary data, which is dropped.
      mode: ``"forward_over_reverse"`` takes $J t$ by forward mode; ``"reverse_over_reverse"`` by
        two vector-Jacobian products, for a network with a kernel that has no forward-mode rule.
      **kwargs: keyword arguments of ``network``.

    Returns:
      A tree with the shapes and dtypes of ``params``.

    Raises:
      ValueError: on an unknown loss, a tangent or targets that do not match, or a ``mode`` that
        an operation of the network does not allow.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> inputs = jnp.array([[1.0, 2.0]])
      >>> curvax.ggn_vp(network, "squared_error", jnp.zeros((2, 1)), jnp.ones((2, 1)), inputs)
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
    r"""The product of the Fisher matrix, or of the empirical one, with a vector.

    The Fisher matrix takes the expectation over the model's own labels, the empirical one
    the labels of the data:

    $$
    F = \frac1N \sum_n E_{y \sim p(\cdot \mid f_n)} [g_n(y)\, g_n(y)^T], \qquad
    \hat F = \frac1N \sum_n g_n(y_n)\, g_n(y_n)^T
    $$

    with $g_n = J_n^T \nabla \ell(f_n, y)$. For the negative log-likelihood of an
    exponential family in its natural parameters, softmax cross-entropy and the squared error
    among them, $F$ is the Gauss-Newton matrix, which is how it is computed.

    Args:
      network: as in `curvax.ggn_vp`.
      loss: as in `curvax.ggn_vp`. Without ``empirical`` it must be such a likelihood: one of
        the two named losses, or a `curvax.OutputLoss` with ``is_likelihood``.
      params: a tree of arrays.
      tangent: a tree like ``params``, the vector.
      inputs: what ``network`` takes; it gets no tangent.
      targets: an array with the outputs' example axes first; required if ``empirical``.
      empirical: whether to use the labels of the data.
      has_aux: whether ``network`` returns auxiliary data, which is dropped.
      mode: as in `curvax.ggn_vp`.
      **kwargs: keyword arguments of ``network``.

    Returns:
      A tree with the shapes and dtypes of ``params``.

    Raises:
      ValueError: if the loss is not such a likelihood, targets are missing, or something does not
        match.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> params, inputs, labels = jnp.zeros((2, 3)), jnp.eye(2), jnp.array([0, 2])
      >>> product = curvax.fisher_vp(
      ...     network, "softmax_cross_entropy", params, params + 1, inputs, labels, empirical=True
      ... )
      >>> product.shape
      (2, 3)

    References:
      Martens, [New insights and perspectives on the natural gradient
      method](https://arxiv.org/abs/1412.1193), 2014, Sections 8 and 9. Kunstner et al.,
      [Limitations of the empirical Fisher approximation](https://arxiv.org/abs/1905.12558),
      2019.
    """
    loss = _output_loss(loss)
    if empirical and targets is None:
        raise ValueError("the empirical Fisher matrix needs targets, got None.")
    if not empirical and not loss.is_likelihood:
        raise ValueError(
            "the Fisher matrix needs the negative log-likelihood of an exponential family in "
            "its natural parameters: pass a loss made by convex_loss(..., is_likelihood=True), "
            "or ask for empirical=True or for ggn_vp."
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
    batch_loss = BatchLoss.of(_output_loss(loss), point.outputs, targets)
    outputs_tangent = point.jacobian_vp(point.tangents(tangent))
    product = output_product(batch_loss, point.outputs, outputs_tangent)
    return point.tree.tangent(point.vector_jacobian(product.astype(point.outputs.dtype)))


@overload
def value_grad_and_ggn_diag(
    network: Network,
    loss: Loss,
    *,
    has_aux: Literal[False] = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: JacobianMode = "forward_over_reverse",
) -> OnePass[jax.Array]: ...


@overload
def value_grad_and_ggn_diag(
    network: Callable[..., tuple[jax.Array, Aux]],
    loss: Loss,
    *,
    has_aux: Literal[True],
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: JacobianMode = "forward_over_reverse",
) -> OnePass[tuple[jax.Array, Aux]]: ...


def value_grad_and_ggn_diag(
    network: Network,
    loss: Loss,
    *,
    has_aux: bool = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: JacobianMode = "forward_over_reverse",
) -> OnePass[Any]:
    r"""Makes a function that returns a loss, its gradient and the Gauss-Newton diagonal.

    The diagonal is Hutchinson's estimate from products with probes on the parameters,

    $$
    D = z \odot G z, \qquad E[D] = \operatorname{diag} G.
    $$

    It is signed: although $G$ is positive semi-definite, about half the entries of one $z \odot Gz$
    are negative. Fed to AdaHessian as ``hessian_diag``, the mean of $D^2$ estimates
    $G_{ii}^2 + \sum_{j \ne i} G_{ij}^2$, the squared norm of a row of $G$, as it does for the
    Hessian. The network is linearized once: one forward pass, one of tangents, two backward.

    Args:
      network: as in `curvax.ggn_vp`.
      loss: as in `curvax.ggn_vp`.
      has_aux: whether ``network`` returns ``(outputs, aux)``.
      num_probes: the number of probes, vectorized and averaged.
      distribution: ``"rademacher"`` or ``"normal"``.
      mode: as in `curvax.ggn_vp`.

    Returns:
      A function ``(params, inputs, targets, *, key, **kwargs) -> (value, grads, diag)``;
      ``diag`` has the shapes and dtypes of ``params``. With ``has_aux``, ``value`` is the
      pair ``(value, aux)``.

    Raises:
      ValueError: on an option out of range, an unknown loss or targets that do not match.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> one_pass = curvax.value_grad_and_ggn_diag(network, "squared_error")
      >>> value, grads, diag = one_pass(
      ...     jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)), key=jax.random.key(0)
      ... )
      >>> float(value), diag[:, 0]
      (0.5, Array([0.5, 0.5], dtype=float32))
    """
    check_count("num_probes", num_probes)
    check_choice("mode", mode, get_args(JacobianMode))
    check_keywords("value_grad_and_ggn_diag", network, ("targets", "key"))

    def value_grad_and_diag(
        params: PyTree, inputs: Any, targets: Any, *, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        point = linearize_network(network, params, inputs, kwargs, has_aux=has_aux, mode=mode)
        batch_loss = BatchLoss.of(_output_loss(loss), point.outputs, targets)
        value, grads = _value_and_grad(point, batch_loss, has_aux)

        def estimate(probe: PyTree) -> tuple[Any, PyTree, PyTree]:
            outputs_tangent = point.jacobian_vp(point.tangents(probe))
            cotangent = batch_loss.hessian_vp(point.outputs, outputs_tangent)
            product = point.vector_jacobian(cotangent.astype(point.outputs.dtype))
            return value, grads, times_probe(probe, point.tree.tangent(product))

        return mean_over_probes(estimate, key, params, num_probes, distribution)

    return OnePass(network, value_grad_and_diag, _value_and_grad_of(network, loss, has_aux))


@overload
def value_grad_and_ggn_diag_from_outputs(
    network: Network,
    loss: Loss,
    *,
    has_aux: Literal[False] = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> OnePass[jax.Array]: ...


@overload
def value_grad_and_ggn_diag_from_outputs(
    network: Callable[..., tuple[jax.Array, Aux]],
    loss: Loss,
    *,
    has_aux: Literal[True],
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> OnePass[tuple[jax.Array, Aux]]: ...


def value_grad_and_ggn_diag_from_outputs(
    network: Network,
    loss: Loss,
    *,
    has_aux: bool = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> OnePass[Any]:
    r"""Makes a function that returns a loss, its gradient and a non-negative diagonal.

    The probe is drawn on the outputs and pulled back, with $B B^T = H_\ell$:

    $$
    D = (J^T B w)^2, \qquad E[D] = \operatorname{diag} G
    $$

    Each entry is a square, so it is never negative, and unbiased for the Gauss-Newton
    diagonal. It costs one backward pass more than the gradient and no tangents, so it is the
    cheapest curvature here, and any kernel with a gradient allows it. Fed to AdaHessian as
    ``hessian_diag``, the mean of $D^2$ estimates about $3 G_{ii}^2$ with one probe (exactly
    that with normal probes, less with Rademacher ones) and $(1 + 2/S)\, G_{ii}^2$ with $S$:
    the diagonal itself up to a factor, without the rest of the row that
    `curvax.value_grad_and_ggn_diag` adds.

    Args:
      network: as in `curvax.ggn_vp`.
      loss: as in `curvax.ggn_vp`.
      has_aux: whether ``network`` returns ``(outputs, aux)``.
      num_probes: the number of probes, vectorized and averaged after the square.
      distribution: ``"rademacher"`` or ``"normal"``.

    Returns:
      A function ``(params, inputs, targets, *, key, **kwargs) -> (value, grads, diag)``;
      ``diag`` has the shapes and dtypes of ``params``. With ``has_aux``, ``value`` is the
      pair ``(value, aux)``.

    Raises:
      ValueError: on an option out of range, an unknown loss or targets that do not match.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> one_pass = curvax.value_grad_and_ggn_diag_from_outputs(network, "squared_error")
      >>> value, grads, diag = one_pass(
      ...     jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)), key=jax.random.key(0)
      ... )
      >>> float(value), diag[:, 0]
      (0.5, Array([0.49999997, 0.49999997], dtype=float32))

    References:
      Martens, Sutskever and Swersky, [Estimating the Hessian by back-propagating
      curvature](https://arxiv.org/abs/1206.6464), 2012, for the general form; the
      Gauss-Newton case is that of Liu et al., [Sophia](https://arxiv.org/abs/2305.14342),
      2023, Algorithm 2, with the factor $B$ in place of sampled labels.
    """
    check_count("num_probes", num_probes)
    check_keywords("value_grad_and_ggn_diag_from_outputs", network, ("targets", "key"))

    def value_grad_and_diag(
        params: PyTree, inputs: Any, targets: Any, *, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        point = linearize_network(
            network, params, inputs, kwargs, has_aux=has_aux, mode="reverse_over_reverse"
        )
        batch_loss = BatchLoss.of(_output_loss(loss), point.outputs, targets)
        value, grads = _value_and_grad(point, batch_loss, has_aux)

        def estimate(noise: jax.Array) -> tuple[Any, PyTree, PyTree]:
            cotangent = batch_loss.hessian_factor_vp(point.outputs, noise)
            pulled = point.vector_jacobian(cotangent.astype(point.outputs.dtype))
            return value, grads, point.tree.tangent([_square(leaf) for leaf in pulled])

        return mean_over_probes(estimate, key, point.outputs, num_probes, distribution)

    return OnePass(network, value_grad_and_diag, _value_and_grad_of(network, loss, has_aux))


def _value_and_grad(
    point: Linearization, batch_loss: BatchLoss, has_aux: bool
) -> tuple[Any, PyTree]:
    value, cotangent = batch_loss.value_and_grad(point.outputs)
    grads = point.tree.tangent(point.vector_jacobian(cotangent.astype(point.outputs.dtype)))
    return ((value, point.aux) if has_aux else value), grads


def _value_and_grad_of(
    network: Network, loss: Loss, has_aux: bool
) -> Callable[..., tuple[Any, PyTree]]:
    """The part of a one-pass function without the curvature."""

    def value_and_grad(
        params: PyTree, inputs: Any, targets: Any, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        point = linearize_network(
            network, params, inputs, kwargs, has_aux=has_aux, mode="reverse_over_reverse"
        )
        batch_loss = BatchLoss.of(_output_loss(loss), point.outputs, targets)
        return _value_and_grad(point, batch_loss, has_aux)

    return value_and_grad


def _square(leaf: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(leaf):
        return jnp.square(leaf)
    return jax.lax.complex(jnp.square(jnp.real(leaf)), jnp.square(jnp.imag(leaf)))
