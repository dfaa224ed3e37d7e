"""A network at one point: its outputs, and products with its Jacobian from both sides."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from curvax._checks import check_choice
from curvax._trees import Differentiable, Leaves, PyTree
from curvax.curvature._modes import JacobianMode, check_graph, explained
from curvax.curvature._products import cast_like

Network = Callable[..., Any]


def linearized(
    fun: Callable[[Any], tuple[jax.Array, Any]], point: Any, mode: JacobianMode
) -> tuple[jax.Array, Any, Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    r"""Outputs and aux of ``fun``, and its Jacobian from both sides, $t \mapsto J t$ and $J^T u$.

    In reverse mode $J t$ is the transpose of $u \mapsto J^T u$: its own vector-Jacobian product.
    """
    check_choice("mode", mode, get_args(JacobianMode))
    with explained(mode, finite_differences=False):
        if mode == "forward_over_reverse":
            outputs, pushforward, aux = jax.linearize(fun, point, has_aux=True)
            check_graph(jax.make_jaxpr(pushforward)(point).jaxpr)
            transposed = jax.linear_transpose(pushforward, point)
            return outputs, aux, pushforward, lambda cotangent: transposed(cotangent)[0]
        outputs, pullback, aux = jax.vjp(fun, point, has_aux=True)
    zeros = jnp.zeros_like(outputs)

    def vector_jacobian(cotangent: jax.Array) -> Any:
        return pullback(cotangent)[0]

    def jacobian_vector(tangent: Any) -> jax.Array:
        with explained(mode, finite_differences=False):
            return jax.vjp(vector_jacobian, zeros)[1](tangent)[0]

    return outputs, aux, jacobian_vector, vector_jacobian


class Linearization(NamedTuple):
    """A network at one point: its outputs, and its Jacobian from both sides."""

    tree: Differentiable
    outputs: jax.Array
    aux: Any
    jacobian_vp: Callable[[Leaves], jax.Array]
    vector_jacobian: Callable[[jax.Array], Leaves]

    def tangents(self, tangent: PyTree) -> Leaves:
        leaves = self.tree.select(jax.tree.leaves(tangent))
        return cast_like(leaves, self.tree.select(self.tree.leaves))


def linearize_network(
    network: Network,
    params: PyTree,
    inputs: Any,
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
    mode: JacobianMode,
) -> Linearization:
    """A network linearized in the real and complex leaves of ``params``."""
    tree = Differentiable.of(params)
    leaves = tree.select(tree.leaves)

    def outputs_and_aux(point: Leaves) -> tuple[jax.Array, Any]:
        result = network(tree.params(point), inputs, **kwargs)
        outputs, aux = result if has_aux else (result, None)
        if isinstance(outputs, tuple | list | dict):
            raise ValueError(
                f"the network must return one array of outputs, got a "
                f"{type(outputs).__name__}; if it returns (outputs, aux), pass has_aux=True."
            )
        return outputs, aux

    outputs, aux, jacobian_vp, vector_jacobian = linearized(outputs_and_aux, leaves, mode)
    return Linearization(tree, outputs, aux, jacobian_vp, vector_jacobian)
