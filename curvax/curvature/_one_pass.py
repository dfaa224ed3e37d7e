"""Functions that return value, gradient and curvature together, and how they are typed.

``Value`` is what the loss returns, with ``has_aux`` the pair of loss and aux. Python has no type
for "the loss's own parameters and ``key``": calls leave the loss's arguments unchecked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import jax

from curvax._trees import Tree

P = ParamSpec("P")
Value = TypeVar("Value")
_Value = TypeVar("_Value", covariant=True)


@dataclasses.dataclass(frozen=True)
class OnePass(Generic[Tree, P, Value]):
    """A one-pass function, called as ``(params, *args, key, **kwargs) -> (value, grads, diag)``.

    Attributes:
      fun: the loss, or the network, that it was made of.
      value_grad_and_diag: what a call runs.
      value_and_grad: ``(params, *args, **kwargs) -> (value, grads)``, the same without curvature.
    """

    fun: Callable[..., Any]
    value_grad_and_diag: Callable[..., tuple[Value, Tree, Tree]]
    value_and_grad: Callable[Concatenate[Tree, P], tuple[Value, Tree]]

    def __call__(
        self, params: Tree, *args: Any, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Value, Tree, Tree]:
        return self.value_grad_and_diag(params, *args, key=key, **kwargs)


class OnePassFromState(Protocol[Tree, _Value]):
    """A one-pass function with key and refresh from the optimizer's state."""

    @overload
    def __call__(
        self,
        params: Tree,
        *args: Any,
        state: Any,
        refresh: Literal[True] | None = None,
        **kwargs: Any,
    ) -> tuple[_Value, Tree, Tree]: ...

    @overload
    def __call__(
        self, params: Tree, *args: Any, state: Any, refresh: bool | None, **kwargs: Any
    ) -> tuple[_Value, Tree, Tree | None]: ...
