"""How products are taken, and what to do where an operation does not allow it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from curvax._checks import check_choice

Mode = Literal["forward_over_reverse", "reverse_over_reverse", "finite_differences"]
JacobianMode = Literal["forward_over_reverse", "reverse_over_reverse"]

MODES: tuple[Mode, ...] = (
    "forward_over_reverse",
    "reverse_over_reverse",
    "finite_differences",
)
# What JAX says of an operation without the rule that a derivative of its gradient needs.
_NO_RULE = re.compile(
    "forward-mode (auto)?diff|Differentiation rule for|do not support JVP|Transpose rule"
)


@contextlib.contextmanager
def explained(mode: str, *, finite_differences: bool = True) -> Iterator[None]:
    """Says which ``mode`` to pass instead where JAX finds no rule for this one."""
    try:
        yield
    except (TypeError, NotImplementedError, ValueError) as error:
        if isinstance(error, NoRuleError) or not _NO_RULE.search(str(error)):
            raise
        raise NoRuleError(_advice(mode, finite_differences)) from error


class NoRuleError(ValueError):
    """An operation of the loss has no rule for the derivatives that a mode takes."""


def _advice(mode: str, finite_differences: bool) -> str:
    last = 'mode="finite_differences"'
    if mode == "forward_over_reverse":
        then = f", or {last} if its backward pass has no derivative either" * finite_differences
        return (
            "an operation of the loss or network, such as a jax.custom_vjp kernel, has no "
            f'forward-mode rule, which mode="{mode}" needs: pass mode="reverse_over_reverse"{then}.'
        )
    advice = f": pass {last}" if finite_differences else ""
    return (
        "the backward pass of an operation of the loss or network, such as a kernel, has no "
        f'derivative of its own, which mode="{mode}" needs{advice}.'
    )


def linearized(
    fun: Callable[[Any], tuple[jax.Array, Any]], point: Any, mode: JacobianMode
) -> tuple[jax.Array, Any, Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    r"""Outputs and aux of ``fun``, and its Jacobian from both sides, $t \mapsto J t$ and $J^T u$.

    In reverse mode $J t$ is the transpose of $u \mapsto J^T u$: its own vector-Jacobian product.
    """
    check_choice("mode", mode, MODES[:2])
    with explained(mode, finite_differences=False):
        if mode == "forward_over_reverse":
            outputs, pushforward, aux = jax.linearize(fun, point, has_aux=True)
            transposed = jax.linear_transpose(pushforward, point)
            return outputs, aux, pushforward, lambda cotangent: transposed(cotangent)[0]
        outputs, pullback, aux = jax.vjp(fun, point, has_aux=True)
    zeros = jax.numpy.zeros_like(outputs)

    def vector_jacobian(cotangent: jax.Array) -> Any:
        return pullback(cotangent)[0]

    def jacobian_vector(tangent: Any) -> jax.Array:
        with explained(mode, finite_differences=False):
            return jax.vjp(vector_jacobian, zeros)[1](tangent)[0]

    return outputs, aux, jacobian_vector, vector_jacobian
