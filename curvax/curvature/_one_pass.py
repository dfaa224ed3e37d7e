"""A function that returns value, gradient and curvature together, or the first two alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax._trees import PyTree


@dataclasses.dataclass(frozen=True)
class OnePass:
    """A one-pass function, called as ``(params, *args, key, **kwargs) -> (value, grads, diag)``.

    Attributes:
      fun: the loss or network it was made from.
      value_grad_and_diag: what a call runs.
      value_and_grad: ``(params, *args, **kwargs) -> (value, grads)``, the same without curvature.
    """

    fun: Callable[..., Any]
    value_grad_and_diag: Callable[..., tuple[Any, PyTree, PyTree]]
    value_and_grad: Callable[..., tuple[Any, PyTree]]

    def __call__(
        self, params: PyTree, *args: Any, key: jax.Array | int, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        return self.value_grad_and_diag(params, *args, key=key, **kwargs)
