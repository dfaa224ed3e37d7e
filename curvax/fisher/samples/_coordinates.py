"""The real and complex leaves of a tree as real arrays, and the way back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import Leaves, PyTree, is_inexact


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Real coordinates of a tree: a real leaf is one array, a complex one two, integers none.

    Attributes:
      treedef: the structure of the tree.
      leaves: its leaves, or their shapes and dtypes.
      dtype: the dtype of what is computed with the coordinates, float32 or wider.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    dtype: Any

    @classmethod
    def of(cls, params: PyTree) -> "Coordinates":
        """The coordinates of params, computed with in the widest of their dtypes."""
        leaves, treedef = jax.tree.flatten(params)
        dtypes = [jnp.finfo(jnp.result_type(leaf)).dtype for leaf in leaves if is_inexact(leaf)]
        return cls(treedef, tuple(leaves), jnp.result_type(jnp.float32, *dtypes))

    def split(self, tree: PyTree) -> Leaves:
        """The coordinates of a tree like params, in the leaves' own precision."""
        parts: Leaves = []
        for leaf in jax.tree.leaves(tree):
            if jnp.iscomplexobj(leaf):
                parts += [jnp.real(leaf), jnp.imag(leaf)]
            elif is_inexact(leaf):
                parts.append(jnp.asarray(leaf))
        return parts

    def merge(self, parts: Leaves) -> PyTree:
        """The tree of given coordinates; integer leaves are those of params."""
        return self._merged(parts, self.leaves)

    def tangent(self, parts: Leaves) -> PyTree:
        """The tree of given coordinates, with zeros for integer leaves."""
        return self._merged(parts, [jnp.zeros_like(leaf) for leaf in self.leaves])

    def _merged(self, parts: Leaves, others: Any) -> PyTree:
        rest = iter(parts)

        def leaf(like: Any, other: Any) -> Any:
            if jnp.iscomplexobj(like):
                return jax.lax.complex(next(rest), next(rest))
            return next(rest) if is_inexact(like) else other

        pairs = zip(self.leaves, others, strict=True)
        return self.treedef.unflatten([leaf(like, other) for like, other in pairs])
