"""The gradients and options that an inverse is made of, checked before any work is done."""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_like, is_traced
from curvax._trees import PyTree, named_leaves
from curvax.fisher.inverse._columns import Columns, Preparation

BlockScope = Literal["tree", "leaf"]
WorkingDtype = Literal["float32", "float64"]


def spans(leaves: list[Any], block_scope: BlockScope) -> tuple[tuple[int, int], ...]:
    """The ranges of leaves that are inverted together."""
    # Leaves without entries join the next one.
    filled = [index for index, leaf in enumerate(leaves) if leaf.size]
    stops = [index + 1 for index in filled[:-1]] if block_scope == "leaf" else []
    return tuple(itertools.pairwise([0, *stops, len(leaves)]))


def checked_chunks(chunks: Iterator[PyTree], first: PyTree, dtype: Any) -> Iterator[Columns]:
    """The columns of each chunk of a stream, whose first was taken from it and checked."""
    shapes = jax.tree.map(lambda rows: rows[0], first)
    yield Columns(tuple(jax.tree.leaves(first)), dtype)
    for chunk in chunks:
        leaves = checked_leaves(chunk)
        check_like("a chunk's gradient", jax.tree.map(lambda rows: rows[0], chunk), shapes)
        yield Columns(tuple(leaves), dtype)


def checked_preparation(
    leaves: list[Any], weights: Any, *, centered: bool, real_part: bool
) -> Preparation:
    """How rows are made of the gradients, if that can be."""
    number = len(leaves[0])
    is_complex = any(jnp.iscomplexobj(leaf) for leaf in leaves)
    if real_part and not is_complex:
        raise ValueError("real_part=True needs complex gradients, got real ones.")
    if centered and number < 2:
        raise ValueError("centered=True needs at least two gradients, got one.")
    if weights is not None:
        check_weights(weights, number)
        weights = jnp.asarray(weights)
    return Preparation(weights, centered, real_part)


def check_weights(weights: Any, number: int) -> None:
    if jnp.shape(weights) != (number,):
        raise ValueError(
            f"weights must have shape ({number},), one per gradient, got {jnp.shape(weights)}."
        )
    if is_traced(weights):
        return
    values = np.asarray(weights)
    if np.iscomplexobj(values) or not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("weights must be finite and at least zero.")
    if not values.any():
        raise ValueError("weights must not all be zero.")


def checked_leaves(grads: PyTree, *, allow_complex: bool = True) -> list[Any]:
    """The leaves, with finite numbers and rows for the same gradients."""
    entries = named_leaves(grads)
    rows = {name: jnp.shape(leaf)[:1] for name, leaf in entries}
    number = next(iter(rows.values()), ())
    if not entries or not number or not number[0]:
        raise ValueError(f"grads must hold at least one gradient, got leaves with rows {rows}.")
    allowed = jnp.inexact if allow_complex else jnp.floating
    kinds = "real or complex" if allow_complex else "real"
    for name, leaf in entries:
        if rows[name] != number:
            raise ValueError(
                f"leaves of grads must have the same number of rows, got {number} and {rows[name]} "
                f"at {name}."
            )
        if not jnp.issubdtype(leaf.dtype, allowed):
            raise ValueError(f"grads must be {kinds} floating-point, got {leaf.dtype} at {name}.")
        if not is_traced(leaf) and not _all_finite(leaf):
            raise ValueError(
                f"grads must be finite: NaN or infinity at {name}, in gradients "
                f"{_rows_not_finite(leaf)}."
            )
    if not any(leaf.size for _, leaf in entries):
        raise ValueError("grads must have at least one entry.")
    return [leaf for _, leaf in entries]


def _all_finite(leaf: Any) -> bool:
    # Row by row, so that a memory map is never wholly in memory.
    if isinstance(leaf, np.ndarray):
        return all(bool(np.isfinite(row).all()) for row in leaf)
    # An array that a traced function closes over is known, but what is computed of it is traced.
    with jax.ensure_compile_time_eval():
        return bool(_finite(leaf))


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


def _rows_not_finite(leaf: Any) -> list[int]:
    return [index for index, row in enumerate(leaf) if not np.isfinite(np.asarray(row)).all()]


def working_dtype(leaves: list[Any], dtype: Any | None) -> Any:
    """The real dtype of a computation: the one asked for, or the widest, at least float32."""
    widest = jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
    wanted = widest if dtype is None else jnp.dtype(dtype)
    check_choice("dtype", wanted.name, get_args(WorkingDtype))
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        if dtype is None:
            return jnp.dtype(jnp.float32)
        raise ValueError(f"dtype={dtype} needs jax_enable_x64 (or jax.enable_x64()).")
    return wanted


def entry_dtype(leaves: list[Any], real: Any) -> Any:
    """The dtype of rows: complex, of the precision of ``real``, if a leaf is."""
    is_complex = any(jnp.iscomplexobj(leaf) for leaf in leaves)
    return jnp.dtype(jnp.promote_types(real, jnp.complex64) if is_complex else real)
