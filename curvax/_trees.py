"""Trees of parameters: how leaves are named, in which dtype they are summed, and parts of a tree.

Names are as people write them, ``layers/0/kernel``. A wrapper around an array, an NNX variable or a
metadata box of Linen, adds nothing to its name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Tree = TypeVar("Tree")  # of a result that has the structure of an argument
DType = np.dtype[Any] | type[Any]
Path = tuple[Any, ...]
Leaves = list[jax.Array]
Select = Callable[[str, Any], bool]  # (path, leaf) -> whether the leaf is chosen

_BOXES = {"value", "raw_value"}  # the attribute in which variables and boxes keep their array


def path_names(path: Path) -> tuple[str, ...]:
    """The name of each key of a path, without the attribute of a box around the leaf."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in _BOXES:
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: Path) -> str:
    """A key path as people write it: ``layers/0/kernel``."""
    return "/".join(path_names(path)) or "(the root)"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names, in the tree's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def dtype_of(leaf: Any, path: str = "") -> Any:
    """The dtype of a leaf, whose path is part of the error where it is no array."""
    try:
        return jnp.result_type(leaf)
    except TypeError:
        found = type(leaf).__name__ + (f" at {path}" if path else "")
        raise ValueError(
            f"params must contain only arrays, got {found}: split an Equinox module with "
            "eqx.partition(model, eqx.is_inexact_array), pass the first part, and combine both in "
            "the loss."
        ) from None


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, a placeholder of one, or a Python number."""
    return leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is real or complex, and so has gradients."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def wide_dtype(leaf: Any) -> Any:
    """Float32 or wider for real and complex leaves; the dtype of others, such as integers."""
    dtype = dtype_of(leaf)
    return jnp.promote_types(dtype, jnp.float32) if is_inexact(leaf) else dtype


def widen(leaf: Any) -> jax.Array:
    """The leaf in float32 or wider, for sums and squares; integers as they are."""
    return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(wide_dtype(leaf)))


def widest_dtype(tree: PyTree) -> Any:
    """The widest of the leaves' wide dtypes, at least float32."""
    dtypes = [wide_dtype(leaf) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    return jnp.result_type(jnp.float32, *dtypes)


@jax.jit
def tree_dot(first: PyTree, second: PyTree) -> jax.Array:
    """The sum of products of entries; nothing is flattened, so nothing sharded is gathered."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), first, second)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


@jax.jit
def tree_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm; squares neither overflow nor vanish where the norm itself does not."""
    dtype = widest_dtype(tree)
    power = 2.0 ** (jnp.finfo(dtype).maxexp // 2)

    def squares(factor: Any) -> jax.Array:
        sums = [jnp.sum(jnp.square(leaf.astype(dtype) * factor)) for leaf in jax.tree.leaves(tree)]
        return jnp.sum(jnp.stack(sums)) if sums else jnp.zeros((), dtype)

    plain = squares(1)
    factor = jnp.where(plain < 1 / power, power, 1 / power).astype(dtype)
    safe = (plain >= 1 / power) & jnp.isfinite(plain)
    # The second pass is rarely needed.
    return jax.lax.cond(safe, lambda: jnp.sqrt(plain), lambda: jnp.sqrt(squares(factor)) / factor)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves"],
    meta_fields=["treedef", "chosen"],
)
@dataclasses.dataclass(frozen=True)
class Differentiable:
    """The leaves of a tree that are differentiated, and the way back to the whole tree.

    Attributes:
      treedef: the whole tree's structure.
      leaves: all of its leaves.
      chosen: the positions of those that are differentiated, all real or complex.
    """

    treedef: Any
    leaves: tuple[jax.Array, ...]
    chosen: tuple[int, ...]

    @classmethod
    def of(cls, params: PyTree, select: Select | None = None) -> "Differentiable":
        """The real and complex leaves of ``params`` that ``select``, if given, chooses."""
        entries, treedef = jax.tree_util.tree_flatten_with_path(params)
        chosen = tuple(
            position
            for position, (path, leaf) in enumerate(entries)
            if is_inexact(leaf) and (select is None or select(path_name(path), leaf))
        )
        return cls(treedef, tuple(jnp.asarray(leaf) for _, leaf in entries), chosen)

    def select(self, leaves: Any) -> Leaves:
        """The entries of ``leaves``, one for each leaf of the tree, that are differentiated."""
        leaves = list(leaves)
        return [leaves[position] for position in self.chosen]

    def params(self, selected: Leaves) -> PyTree:
        """The tree with ``selected`` in place of the differentiated leaves."""
        return self._with(list(self.leaves), selected)

    def tangent(self, selected: Leaves) -> PyTree:
        """The tree with ``selected`` where differentiated and zeros elsewhere."""
        chosen = set(self.chosen)
        zeros = [
            leaf if position in chosen else jnp.zeros_like(leaf)
            for position, leaf in enumerate(self.leaves)
        ]
        return self._with(zeros, selected)

    def part(self, selected: Leaves) -> PyTree:
        """The tree with ``selected`` where differentiated and None elsewhere."""
        return self._with([None] * len(self.leaves), selected)

    def _with(self, leaves: list[Any], selected: Leaves) -> PyTree:
        for position, leaf in zip(self.chosen, selected, strict=True):
            leaves[position] = leaf
        return self.treedef.unflatten(leaves)


def varying_like(tree: PyTree, params: PyTree) -> PyTree:
    """The tree with arrays that vary over the devices of a ``jax.shard_map`` as ``params`` do.

    JAX requires that of tangents, and of the values that loops and conditionals carry.
    """
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(params)))
    lax: Any = jax.lax

    def cast(leaf: Any) -> Any:
        missing = tuple(axes - _varying_axes(leaf))
        if not missing:
            return leaf
        if hasattr(lax, "pcast"):
            return lax.pcast(leaf, missing, to="varying")
        return lax.pvary(leaf, missing)  # of JAX 0.8

    return jax.tree.map(cast, tree) if axes else tree


def _varying_axes(leaf: Any) -> frozenset[str]:
    kind: Any = jax.typeof(leaf)
    kind = getattr(kind, "manual_axis_type", kind)  # JAX 0.10 keeps them there
    axes: frozenset[str] = getattr(kind, "varying", getattr(kind, "vma", frozenset()))
    return axes


def is_hole(node: Any) -> bool:
    """Whether ``node`` is what ``optax.masked`` and ``optax.partition`` put in place of a leaf."""
    return isinstance(node, optax.MaskedNode)


def is_placeholder(params: Any) -> bool:
    """Whether ``params`` is the stand-in with which ``optax.tree.map_params`` calls ``init``.

    It stands for the whole tree. A state must hold it wherever it holds a tree like the params.
    """
    return type(params).__module__.startswith("optax.") and not (
        is_hole(params) or jax.tree.leaves(params)
    )


def has_holes(tree: PyTree) -> bool:
    """Whether a mask has left holes in the tree."""
    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def part_like(tree: PyTree, updates: PyTree, *, name: str, scalars: bool = False) -> PyTree:
    """The part of ``tree``, an argument called ``name``, that belongs to ``updates``.

    Under ``optax.masked`` and ``optax.partition`` the updates have holes, while an extra
    argument arrives whole: its leaves at the holes are left out. Anything else that differs
    is an error, but with ``scalars`` a leaf may be one number for its whole update.
    """
    given = {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    entries, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_hole)
    holes = [path_names(path) for path, node in entries if is_hole(node)]
    leaves = [
        node
        if is_hole(node)
        else _matching(given.pop(path_names(path), None), path, node, name, scalars)
        for path, node in entries
    ]
    for names in given:
        if not any(names[: len(hole)] == hole for hole in holes):
            raise ValueError(
                f"{name} must match the gradients: it has a leaf at {'/'.join(names)}, "
                "where the gradients have none."
            )
    return jax.tree.unflatten(treedef, leaves)


def _matching(leaf: Any, path: Path, update: jax.Array, name: str, scalars: bool) -> Any:
    found = "no leaf" if leaf is None else f"a leaf of shape {jnp.shape(leaf)}"
    if scalars and leaf is not None and jnp.shape(leaf) == ():
        return leaf
    if leaf is None or jnp.shape(leaf) != jnp.shape(update):
        raise ValueError(
            f"{name} must match the gradients: at {path_name(path)} it has {found}, the "
            f"gradient has shape {jnp.shape(update)}."
        )
    return leaf


def count_true(mask: jax.Array) -> jax.Array:
    """How many entries are true, a float32 scalar."""
    # Counted as integers where these suffice: float32 stops counting at 2^24.
    count_dtype = jnp.int32 if mask.size < 2**31 else jnp.float32
    return jnp.sum(mask, dtype=count_dtype).astype(jnp.float32)
