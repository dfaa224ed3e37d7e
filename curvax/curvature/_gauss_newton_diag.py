"""The diagonal of the Gauss-Newton matrix beside value and gradient, in one pass."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, overload

import jax
import jax.numpy as jnp

from curvax._checks import check_choice, check_count, check_keywords
from curvax._trees import PyTree
from curvax.curvature._batch_loss import BatchLoss
from curvax.curvature._diagonal import mean_over_probes
from curvax.curvature._jacobian import Linearization, Network, linearize_network
from curvax.curvature._losses import Loss, output_loss
from curvax.curvature._modes import JacobianMode
from curvax.curvature._one_pass import OnePass
from curvax.curvature._probes import Distribution, times_probe

Aux = TypeVar("Aux")


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

    The diagonal is Hutchinson's estimate with probes $z$ on the parameters,

    $$
    D = z \odot G z, \qquad E[D] = \operatorname{diag} G.
    $$

    It is signed: although $G$ is positive semi-definite, about half the entries of one $z \odot Gz$
    are negative. Fed to AdaHessian as ``hessian_diag``, the mean of $D^2$ estimates
    $G_{ii}^2 + \sum_{j \ne i} G_{ij}^2$, the squared norm of a row of $G$, as it does for the
    Hessian. The network is linearized once: one forward pass, one tangent pass, two backward
    passes.

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
      ValueError: if an option is out of range, the loss is unknown or targets do not match.

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
        batch_loss = BatchLoss.of(output_loss(loss), point.outputs, targets)
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

    The probe $w$ is drawn on the outputs and pulled back, with $B B^T = H_\ell$:

    $$
    D = (J^T B w)^2, \qquad E[D] = \operatorname{diag} G
    $$

    Each entry is a square, so it is never negative; the estimate of the Gauss-Newton diagonal is
    unbiased. It costs one backward pass more than the gradient and no tangents, so it is the
    cheapest curvature here and works with any kernel that has a gradient. Fed to AdaHessian as
    ``hessian_diag``, the mean of $D^2$ estimates about $3 G_{ii}^2$ with one probe (exactly that
    with normal probes, less with Rademacher ones) and $(1 + 2/S)\, G_{ii}^2$ with $S$: the diagonal
    itself up to a factor, without the rest of the row that `curvax.value_grad_and_ggn_diag` adds.

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
      ValueError: if an option is out of range, the loss is unknown or targets do not match.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> one_pass = curvax.value_grad_and_ggn_diag_from_outputs(
      ...     network, "squared_error"
      ... )
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
        batch_loss = BatchLoss.of(output_loss(loss), point.outputs, targets)
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
        batch_loss = BatchLoss.of(output_loss(loss), point.outputs, targets)
        return _value_and_grad(point, batch_loss, has_aux)

    return value_and_grad


def _square(leaf: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(leaf):
        return jnp.square(leaf)
    return jax.lax.complex(jnp.square(jnp.real(leaf)), jnp.square(jnp.imag(leaf)))
