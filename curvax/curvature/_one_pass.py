"""Functions that return value, gradient and curvature together, and how they are typed.

``Value`` is what the loss returns, with ``has_aux`` the pair of loss and aux; the trees are those
of the call. Python has no type for "a loss's own parameters and ``key``": the further arguments
are left unchecked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import jax

from curvax._trees import PyTree, Tree

P = ParamSpec("P")
Value = TypeVar("Value")
Result = TypeVar("Result", covariant=True)


@dataclasses.dataclass(frozen=True)
class OnePass(Generic[Value]):
    """A one-pass function, called as ``(params, *args, key, **kwargs) -> (value, grads, diag)``.

    Attributes:
      fun: the loss or network it was made from.
      with_diag: what a call runs.
      without_diag: what ``value_and_grad`` runs.
    """

    fun: Callable[..., Value]
    with_diag: Callable[..., tuple[Value, PyTree, PyTree]]
    without_diag: Callable[..., tuple[Value, PyTree]]

    def __call__(
        self, params: Tree, *args: Any, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Value, Tree, Tree]:
        return self.with_diag(params, *args, key=key, **kwargs)

    def value_and_grad(self, params: Tree, *args: Any, **kwargs: Any) -> tuple[Value, Tree]:
        """``(value, grads)`` alone, the same without curvature."""
        return self.without_diag(params, *args, **kwargs)


class OnePassFromState(Protocol[Result]):
    """A one-pass function with key and refresh from the optimizer's state."""

    @overload
    def __call__(
        self,
        params: Tree,
        *args: Any,
        state: Any,
        refresh: Literal[True] | None = None,
        **kwargs: Any,
    ) -> tuple[Result, Tree, Tree]: ...

    @overload
    def __call__(
        self, params: Tree, *args: Any, state: Any, refresh: bool | None, **kwargs: Any
    ) -> tuple[Result, Tree, Tree | None]: ...
