"""How products are computed, and what to do if an operation does not support it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from curvax._checks import is_traced
from curvax.curvature._compiled import Static

Mode = Literal["forward_over_reverse", "reverse_over_reverse", "finite_differences"]
JacobianMode = Literal["forward_over_reverse", "reverse_over_reverse"]

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


def through_graph(fun: Callable[..., Any], *args: Any) -> Any:
    """``fun(*args)``, raising early where its graph would fail to compile.

    Under ``jax.jit`` JAX refuses the forward mode of a custom_vjp function only on compiling;
    outside it, as soon as the operation is called.
    """
    if not any(map(is_traced, jax.tree.leaves(args))):
        return fun(*args)
    rest: list[Static] = []

    def arrays(*args: Any) -> list[Any]:
        found, static = Static.split(fun(*args))
        rest.append(static)
        return found

    graph = jax.make_jaxpr(arrays)(*args)
    check_graph(graph.jaxpr)
    # A graph has lost where JAX's own operations allow for a NaN on the way. This is what
    # `jax.extend.core.jaxpr_as_fun` does, which takes a quarter of `import curvax` to import.
    with jax.debug_nans(False):
        outputs = jax.core.eval_jaxpr(graph.jaxpr, graph.consts, *jax.tree.leaves(args))
    return rest[-1].merge(outputs)


def check_graph(graph: Any) -> None:
    """Raises if a graph takes the forward mode of a function that does not support it."""
    for equation in graph.eqns:
        if equation.primitive.name == "custom_lin":
            raise TypeError("forward-mode differentiation of a custom_vjp function")
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_graph):
            if _is_graph(inner):
                check_graph(getattr(inner, "jaxpr", inner))


def _is_graph(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


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
    no_derivative = "use curvax.value_grad_and_ggn_diag_from_outputs, which needs none"
    advice = f"pass {last}" if finite_differences else no_derivative
    return (
        "the backward pass of an operation of the loss or network, such as a kernel, has no "
        f'derivative of its own, which mode="{mode}" needs: {advice}.'
    )
