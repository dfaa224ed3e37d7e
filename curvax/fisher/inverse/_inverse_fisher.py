"""The static algorithm of M-FAC: the inverse empirical Fisher matrix of given gradients."""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_count, check_like, check_range
from curvax._trees import DType, PyTree, Tree, path_name
from curvax.fisher.inverse._block_diagonal import BlockInverse
from curvax.fisher.inverse._columns import Columns
from curvax.fisher.inverse._full import FullInverse

BlockScope = Literal["tree", "leaf"]
WorkingDtype = Literal["float32", "float64"]


class _Group(NamedTuple):
    """Leaves whose columns are inverted together: which, and the inverse."""

    first: int
    stop: int
    inverse: FullInverse | BlockInverse


class InverseFisher:
    r"""$F^{-1}$, the inverse of $F = \lambda I + \frac1m \sum_i g_i g_i^T$, factored.

    Made by `curvax.inverse_fisher`. Its methods are called from the host; what they compute is
    compiled.

    Attributes:
      num_grads: $m$, the number of gradients.
      num_failed: the number of blocks whose factorization failed in this precision, so that their
        damping was raised by a few ulps of their diagonals.
    """

    def __init__(self, example: PyTree, groups: list[_Group]) -> None:
        self._shapes = example
        self.groups = groups
        self.num_grads = groups[0].inverse.columns.num_rows
        if isinstance(groups[0].inverse, BlockInverse):
            self.num_grads = groups[0].inverse.num_rows
        self.num_failed = sum(int(jnp.sum(group.inverse.failed)) for group in groups)

    def solve(self, vector: Tree) -> Tree:
        r"""$F^{-1} v$.

        With fewer gradients than entries, the rounding error of $v$ outside their span is
        multiplied by $1 / \lambda$: a product of the order of $v / F_{ii}$ has an error of about
        $F_{ii} / \lambda$ ulps.

        Args:
          vector: $v$, a tree like one gradient; an array of shape (d,) where the gradients are
            one array of shape (m, d).

        Returns:
          A tree like ``vector``, in the dtype of the computation.

        Raises:
          ValueError: if ``vector`` does not match the gradients.
        """
        check_like("the vector", vector, self._shapes)
        leaves, treedef = jax.tree.flatten(vector)
        solved: list[jax.Array] = []
        for first, stop, inverse in self.groups:
            dtype = inverse.columns.dtype
            solved += inverse.solve([jnp.asarray(leaf, dtype) for leaf in leaves[first:stop]])
        return jax.tree.unflatten(treedef, solved)

    def diagonal(self) -> PyTree:
        r"""The diagonal of $F^{-1}$.

        It is exact up to rounding, and always positive and at most $1 / \lambda$ (in the dual form
        also at least $1 / F_{ii}$): in the published form it is a difference, which loses digits
        where it is small and could be negative.

        Returns:
          A tree like one gradient, positive.
        """
        leaves = [leaf for group in self.groups for leaf in group.inverse.diagonal()]
        return jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)

    def element(self, i: int, j: int) -> jax.Array:
        r"""One entry $[F^{-1}]_{ij}$, at the cost of $O(m^2)$.

        Args:
          i: the row, counted as ``jax.flatten_util.ravel_pytree`` counts a gradient's entries.
          j: the column.

        Returns:
          A scalar.

        Raises:
          IndexError: if there is no such entry.
        """
        total = sum(leaf.size for leaf in jax.tree.leaves(self._shapes))
        if not (0 <= i < total and 0 <= j < total):
            raise IndexError(f"element({i}, {j}) lies outside the {total} x {total} matrix.")
        start = 0
        for group in self.groups:
            columns = group.inverse.columns
            inside = [start <= index < start + columns.num_columns for index in (i, j)]
            if all(inside):
                return group.inverse.element(i - start, j - start)
            if any(inside):
                break
            start += columns.num_columns
        return jnp.zeros((), self.groups[0].inverse.columns.dtype)


def inverse_fisher(
    grads: PyTree | Iterator[PyTree],
    damping: float = 1e-5,
    *,
    block_size: int | None = None,
    block_scope: BlockScope = "tree",
    mesh: jax.sharding.Mesh | None = None,
    dtype: WorkingDtype | DType | None = None,
    workspace_bytes: int = 2**28,
) -> InverseFisher:
    r"""The inverse of the empirical Fisher matrix of given gradients: M-FAC's static algorithm.

    With the gradients $g_1, \dots, g_m$ as rows of $G$ and the damping $\lambda$,

    $$
    F = \lambda I + \frac1m G^T G, \qquad K = m \lambda I + G G^T = C C^T, \qquad W = C^{-1} G
    $$

    $$
    F^{-1} v = \frac1\lambda \left(v - W^T W v\right), \quad
    \operatorname{diag} F^{-1} = \frac1\lambda \left(1 - \operatorname{colsum} W^2\right), \quad
    \left[F^{-1}\right]_{ab} = \frac1\lambda \left(\delta_{ab} - W_a^T W_b\right)
    $$

    in $O(d m^2)$ to prepare and $O(d m)$ a product, as the paper's recurrence over the gradients,
    but as products of matrices. With a ``block_size`` $B$, $F$ is replaced by its blocks along the
    diagonal. A block no larger than $m$, or the whole matrix if it is, is inverted directly,
    $m A = m \lambda I + G_b^T G_b = C C^T$, with $\operatorname{diag} A^{-1}$ the column sums of
    $m\,(C^{-1})^2$, which subtracts nothing.

    Args:
      grads: an array of shape (m, d), or a tree of arrays of shape ``(m, *leaf.shape)``. NumPy
        arrays, including memory maps of files, stay on the host and reach the device a few columns
        at a time. An iterator yields chunks of rows as such trees, each reduced to the blocks and
        discarded, so that the number of gradients is not bounded by memory; it needs a
        ``block_size``, and memory for $d B$ numbers.
      damping: $\lambda$, positive.
      block_size: the number of columns in a block; None for the full matrix.
      block_scope: ``"tree"`` flattens the tree and cuts it into blocks regardless of leaves, as
        published; ``"leaf"`` starts anew at each leaf, and without a ``block_size`` makes one
        block of each.
      mesh: the devices over which the blocks are spread, without communication between them.
        Without a ``block_size`` each leaf keeps its own sharding, and no mesh is needed.
      dtype: the dtype of the computation; by default that of ``grads``, float32 or wider.
        ``jnp.float64`` needs ``jax_enable_x64``.
      workspace_bytes: about how much memory may be used at a time for the blocks that are inverted,
        or for the columns on the device.

    Returns:
      The inverse, with ``.solve(v)``, ``.diagonal()`` and ``.element(i, j)``.

    Raises:
      ValueError: if ``damping`` is not positive, ``grads`` hold no gradient, complex or integer
        numbers, NaN or infinity, leaves differ in their number of rows, or a stream comes
        without a ``block_size``.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> grads = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # F = 0.5 I + G^T G / 2
      >>> inverse = curvax.inverse_fisher(grads, damping=0.5)
      >>> print(inverse.diagonal().round(3))
      [0.4   1.333 1.333]
      >>> print(inverse.solve(jnp.array([1.0, 1.0, 0.0])).round(3))
      [ 0.4    1.333 -0.667]
      >>> print(inverse.element(1, 2).round(3))
      -0.667

    References:
      Frantar et al., [M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information](https://arxiv.org/abs/2107.03356), 2021, Section 3.
    """
    check_range("damping", damping, low=0.0, open_low=True, open_high=True)
    damping = float(damping)
    check_choice("block_scope", block_scope, get_args(BlockScope))
    check_count("workspace_bytes", workspace_bytes)
    if block_size is not None:
        check_count("block_size", block_size)
    if block_size is None and mesh is not None:
        raise ValueError(
            "mesh spreads blocks over devices and needs a block_size; without one each leaf of "
            "grads keeps its own sharding."
        )
    later = None
    if isinstance(grads, Iterator):
        grads, later = _first_chunk(grads, block_size, block_scope)
    leaves = checked_leaves(grads)
    wide = working_dtype(leaves, dtype)
    groups = [
        _Group(
            first,
            stop,
            _invert(
                Columns(leaves[first:stop], wide),
                damping,
                block_size,
                workspace_bytes=workspace_bytes,
                mesh=mesh,
                later=None if later is None else _checked_chunks(later, grads, wide),
            ),
        )
        for first, stop in spans(leaves, block_scope)
    ]
    example = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), grads)
    return InverseFisher(example, groups)


def spans(leaves: list[Any], block_scope: BlockScope) -> list[tuple[int, int]]:
    """The ranges of leaves that are inverted together."""
    # Leaves without entries join the next one.
    filled = [index for index, leaf in enumerate(leaves) if leaf.size]
    stops = [index + 1 for index in filled[:-1]] if block_scope == "leaf" else []
    return list(itertools.pairwise([0, *stops, len(leaves)]))


def _invert(
    columns: Columns,
    damping: float,
    block_size: int | None,
    *,
    workspace_bytes: int,
    mesh: jax.sharding.Mesh | None = None,
    later: Iterator[Columns] | None = None,
) -> FullInverse | BlockInverse:
    if block_size is None and columns.num_columns > columns.num_rows:
        return FullInverse(columns, damping, workspace_bytes=workspace_bytes)
    return BlockInverse(
        columns,
        damping,
        block_size or columns.num_columns,
        workspace_bytes=workspace_bytes,
        mesh=mesh,
        later_chunks=later,
    )


def _first_chunk(
    chunks: Iterator[PyTree], block_size: int | None, block_scope: BlockScope
) -> tuple[PyTree, Iterator[PyTree]]:
    if block_size is None or block_scope != "tree":
        raise ValueError(
            "a stream of gradients is reduced to blocks over the tree: it needs a block_size and "
            f"block_scope='tree', got block_size={block_size} and block_scope={block_scope!r}. "
            "For the full matrix write the gradients to np.memmap arrays and pass those."
        )
    try:
        return next(chunks), chunks
    except StopIteration:
        raise ValueError("the stream of gradients is empty.") from None


def _checked_chunks(chunks: Iterator[PyTree], first: PyTree, dtype: Any) -> Iterator[Columns]:
    shapes = jax.tree.map(lambda rows: rows[0], first)
    for chunk in chunks:
        leaves = checked_leaves(chunk)
        check_like("a chunk's gradient", jax.tree.map(lambda rows: rows[0], chunk), shapes)
        yield Columns(leaves, dtype)


def checked_leaves(grads: PyTree) -> list[Any]:
    """The leaves, with real finite numbers and rows for the same gradients."""
    entries = jax.tree_util.tree_leaves_with_path(grads)
    rows = {path_name(path): jnp.shape(leaf)[:1] for path, leaf in entries}
    number = next(iter(rows.values()), ())
    if not entries or not number or not number[0]:
        raise ValueError(f"grads must hold at least one gradient, got leaves with rows {rows}.")
    for path, leaf in entries:
        name = path_name(path)
        if rows[name] != number:
            raise ValueError(
                f"leaves of grads must have the same number of rows, got {number} and {rows[name]} "
                f"at {name}."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"grads must be real floating-point, got {leaf.dtype} at {name}.")
        if not _all_finite(leaf):
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
    return bool(_finite(leaf))


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


def _rows_not_finite(leaf: Any) -> list[int]:
    return [index for index, row in enumerate(leaf) if not np.isfinite(np.asarray(row)).all()]


def working_dtype(leaves: list[Any], dtype: Any | None) -> Any:
    """The dtype of a computation: the one asked for, or the widest, at least float32."""
    wanted = jnp.result_type(jnp.float32, *leaves) if dtype is None else jnp.dtype(dtype)
    check_choice("dtype", wanted.name, get_args(WorkingDtype))
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        if dtype is None:
            return jnp.dtype(jnp.float32)
        raise ValueError(f"dtype={dtype} needs jax_enable_x64 (or jax.enable_x64()).")
    return wanted
