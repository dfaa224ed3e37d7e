"""The static algorithm of M-FAC: the inverse empirical Fisher matrix of given gradients."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from curvax._checks import as_key, check_choice, check_count, check_like, check_range
from curvax._trees import DType, PyTree, Tree
from curvax.fisher.inverse._block_diagonal import BlockInverse
from curvax.fisher.inverse._columns import Columns
from curvax.fisher.inverse._full import FullInverse
from curvax.fisher.inverse._input import (
    BlockScope,
    WorkingDtype,
    checked_chunks,
    checked_leaves,
    checked_preparation,
    entry_dtype,
    spans,
    working_dtype,
)

_Part = FullInverse | BlockInverse


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts"],
    meta_fields=["spans", "treedef", "num_grads"],
)
@dataclasses.dataclass(frozen=True)
class InverseFisher:
    r"""$F^{-1}$, the inverse of $F = \lambda I + \frac1n \sum_i w_i g_i^* g_i^T$, factored.

    Made by `curvax.inverse_fisher`. For gradients on devices it is a pytree of arrays, which can be
    made, used, returned and differentiated inside ``jax.jit``, ``jax.vmap`` and ``jax.shard_map``.
    For gradients on the host, call its methods from the host; their computations are compiled.

    Attributes:
      parts: the inverse of each range of leaves that are inverted together.
      spans: those ranges.
      treedef: the structure of a gradient.
      num_grads: $m$, the number of gradients.
    """

    parts: tuple[_Part, ...]
    spans: tuple[tuple[int, int], ...]
    treedef: Any
    num_grads: int

    @property
    def num_failed(self) -> jax.Array:
        """How many blocks could not be factored in this precision, an int32 scalar.

        Their damping was raised by a few ulps of their diagonals.
        """
        return jnp.sum(jnp.stack([jnp.sum(part.failed, dtype=jnp.int32) for part in self.parts]))

    def solve(self, vector: Tree) -> Tree:
        r"""$F^{-1} v$.

        The vector is split, $v = G^H c + r$ with $c = K^{-1} G v$, and the part in the span of the
        gradients is solved for as in `solve_in_sample_space`: only $r$ is divided by $\lambda$.

        The rounding error of $v$ itself, outside the span of the gradients, is multiplied by
        $1 / \lambda$: a product of the order of $v / F_{ii}$ has an error of about
        $F_{ii} / \lambda$ ulps. That loss is unavoidable here. But if $v$ is a combination of the
        gradients, $v = G^T s$, such as a mean gradient, `solve_in_sample_space` takes $s$ and loses
        no digits.

        Args:
          vector: $v$, a tree like one gradient; an array of shape (d,) if the gradients are one
            array of shape (m, d).

        Returns:
          A tree like ``vector``, in the dtype of the computation.

        Raises:
          ValueError: if ``vector`` does not match the gradients, or is complex while they are real.
        """
        pairs = self._vectors(vector)
        leaves = [leaf for part, vectors in pairs for leaf in part.solve(vectors)]
        return jax.tree.unflatten(jax.tree.structure(vector), leaves)

    def solve_in_sample_space(self, samples: jax.typing.ArrayLike) -> PyTree:
        r"""$F^{-1} G^T s$, the product with a combination of the gradients, computed without
        cancellation.

        By the push-through identity, with $K = n \lambda I + G G^T$,

        $$
        F^{-1} G^T s = n\, G^T K^{-1} s
        $$

        Weights and centring act on the combination as they act on $F$: it is
        $\sum_i w_i (g_i - \bar g) s_i$, with the rows $\sqrt{w_i} (g_i - \bar g)$ of $G$ and
        $\sqrt{w_i} s_i$ in place of $s_i$. Complex gradients are conjugated, $F^{-1} G^H s$, and
        with ``real_part`` the real part of $G^H s$ is taken. In float32, at a damping of $10^{-7}$,
        this is accurate to four digits where `solve` of the sum is accurate to two.

        Args:
          samples: $s$, of shape (m,), or several of them as rows (k, m).

        Returns:
          A tree like one gradient, or with leaves of shape ``(k, *leaf.shape)``.

        Raises:
          ValueError: if ``samples`` has another shape, is complex while the gradients are real, or
            the gradients came as a stream, which is not kept.

        Example:
          >>> import jax.numpy as jnp, curvax
          >>> grads = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
          >>> inverse = curvax.inverse_fisher(grads, damping=0.5)
          >>> print(inverse.solve_in_sample_space(jnp.ones(2)).round(3))
          [0.8   0.667 0.667]

        References:
          Chen and Heyl, [Empowering deep neural quantum states through efficient
          optimization](https://arxiv.org/abs/2302.01941), 2023, for stochastic reconfiguration.
        """
        rows = jnp.atleast_2d(jnp.asarray(samples))
        if rows.shape[1:] != (self.num_grads,) or jnp.ndim(samples) > 2:
            raise ValueError(
                f"samples must have shape ({self.num_grads},) or (k, {self.num_grads}), one number "
                f"per gradient, got {jnp.shape(samples)}."
            )
        if not self.parts[0].takes_complex_samples:
            _check_real("samples", [rows])
        leaves = [leaf for part in self.parts for leaf in part.solve_in_sample_space(rows)]
        if jnp.ndim(samples) < 2:
            leaves = [leaf[0] for leaf in leaves]
        return self.treedef.unflatten(leaves)

    def quadratic_form(self, vector: PyTree) -> jax.Array:
        r"""$v^H F^{-1} v$, the squared length of $v$ in the metric of $F^{-1}$.

        As a sum of squares, the minimum over $c$ of
        $\frac1\lambda \lVert v - G^H c \rVert^2 + n \lVert c \rVert^2$, it is never negative and
        insensitive to errors of $c$.

        Args:
          vector: $v$, as in `solve`.

        Returns:
          A real scalar.

        Raises:
          ValueError: as in `solve`.
        """
        forms = [part.quadratic_form(vectors) for part, vectors in self._vectors(vector)]
        return sum(forms[1:], start=forms[0])

    def logdet(self) -> jax.Array:
        r"""$\log \det F$, of the matrix itself and not of its inverse.

        Returns:
          A real scalar.
        """
        logs = [part.logdet() for part in self.parts]
        return sum(logs[1:], start=logs[0])

    def sample(self, key: jax.Array | int) -> PyTree:
        r"""Draws a sample from the normal distribution $N(0, F^{-1})$, as for a Laplace
        approximation.

        With standard normal $z$ and $y$, $F^{-1} (\sqrt\lambda\, z + G^H y / \sqrt n)$ has the
        covariance $F^{-1} F F^{-1}$. A block that is inverted directly, $n A = C C^H$, gives
        $\sqrt n\, C^{-H} z$.

        Args:
          key: a PRNG key, or an integer seed. For several draws use ``jax.vmap`` over keys.

        Returns:
          A tree like one gradient.
        """
        keys = jax.random.split(as_key(key), len(self.parts))
        pairs = zip(self.parts, keys, strict=True)
        return self.treedef.unflatten(
            leaf for part, part_key in pairs for leaf in part.sample(part_key)
        )

    def diagonal(self) -> PyTree:
        r"""The diagonal of $F^{-1}$.

        It is exact up to rounding, and always positive and at most $1 / \lambda$ (in the dual form
        also at least $1 / F_{ii}$): in the published form it is a difference, which loses digits
        where it is small and could be negative.

        Returns:
          A tree like one gradient, real and positive.
        """
        return self.treedef.unflatten(leaf for part in self.parts for leaf in part.diagonal())

    def element(self, i: int, j: int) -> jax.Array:
        r"""One entry $[F^{-1}]_{ij}$, in $O(m^2)$.

        Args:
          i: the row, counted as ``jax.flatten_util.ravel_pytree`` counts a gradient's entries.
          j: the column.

        Returns:
          A scalar.

        Raises:
          IndexError: if there is no such entry.
        """
        total = sum(part.layout.num_columns for part in self.parts)
        if not (0 <= i < total and 0 <= j < total):
            raise IndexError(f"element({i}, {j}) lies outside the {total} x {total} matrix.")
        start = 0
        for part in self.parts:
            stop = start + part.layout.num_columns
            if start <= min(i, j) and max(i, j) < stop:
                return part.element(i - start, j - start)
            start = stop
        return jnp.zeros((), self.parts[0].layout.dtype)

    def _vectors(self, vector: PyTree) -> list[tuple[_Part, list[jax.Array]]]:
        """Each part with its leaves of a vector."""
        shapes = [shape for part in self.parts for shape in part.layout.shapes]
        example = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        check_like("the vector", vector, self.treedef.unflatten(example), whose="a gradient")
        leaves = jax.tree.leaves(vector)
        dtype = self.parts[0].layout.dtype
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            _check_real("the vector", leaves)
        wide = [jnp.asarray(leaf, dtype) for leaf in leaves]
        pairs = zip(self.parts, self.spans, strict=True)
        return [(part, wide[first:stop]) for part, (first, stop) in pairs]


def _check_real(name: str, leaves: list[Any]) -> None:
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise ValueError(f"{name} must be real, as the inverse Fisher matrix is, got complex.")


def inverse_fisher(
    grads: PyTree | Iterator[PyTree],
    damping: jax.typing.ArrayLike = 1e-5,
    *,
    weights: jax.typing.ArrayLike | None = None,
    centered: bool = False,
    real_part: bool = False,
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

    in $O(d m^2)$ to prepare and $O(d m)$ per product, like the paper's recurrence over the
    gradients, but with matrix products. With a ``block_size`` $B$, $F$ is replaced by its diagonal
    blocks. A block, or the whole matrix, that is no larger than $m$ is inverted directly,
    $m A = m \lambda I + G_b^T G_b = C C^T$, with $\operatorname{diag} A^{-1}$ the column sums of
    $m\,(C^{-1})^2$, which involves no subtraction.

    Complex gradients, such as those of a wave function's logarithm, give the Hermitian
    $F = \lambda I + \frac1m G^H G$, whose entries are those of the quantum geometric tensor.

    Gradients on devices may be traced: the function is pure, and works under ``jax.jit``,
    ``jax.vmap``, ``jax.shard_map`` (on what each device holds) and ``jax.grad``. Conditions on
    values, such as finite gradients, are then not checked.

    Args:
      grads: an array of shape (m, d), or a tree of arrays of shape ``(m, *leaf.shape)``. NumPy
        arrays, including memory maps of files, stay on the host and reach the device a few columns
        at a time. An iterator yields such trees as chunks of rows; each is added to the blocks and
        discarded, so the number of gradients is not limited by memory. It needs a ``block_size``,
        and memory for $d B$ numbers.
      damping: $\lambda$, positive.
      weights: $w$, of shape (m,), at least zero: $F = \lambda I + \sum_i w_i g_i g_i^T / n$ with
        $n = \sum_i w_i$ in place of $m$, for example for importance sampling.
      centered: whether to subtract the weighted mean of the gradients, so that $F$ uses their
        covariance matrix.
      real_part: whether, for complex gradients with respect to real parameters, $F$ is the real
        part of the matrix. The real and imaginary parts of each gradient are then two rows.
      block_size: the number of columns in a block; None for the full matrix.
      block_scope: ``"tree"`` flattens the tree and cuts it into blocks regardless of leaves, as
        published; ``"leaf"`` starts a new block at each leaf, and without a ``block_size`` makes
        each leaf one block.
      mesh: the devices over which to spread the blocks, without communication between them. Without
        a ``block_size`` each leaf keeps its own sharding and no mesh is needed.
      dtype: the dtype of the computation; by default that of ``grads``, float32 or wider.
        ``jnp.float64`` needs ``jax_enable_x64``.
      workspace_bytes: approximate memory to use at a time for the blocks being inverted, or for the
        columns on the device.

    Returns:
      The inverse, with ``.solve(v)``, ``.solve_in_sample_space(s)``, ``.quadratic_form(v)``,
      ``.diagonal()``, ``.element(i, j)``, ``.logdet()`` and ``.sample(key)``.

    Raises:
      ValueError: if ``damping`` is not positive, ``grads`` hold no gradient or contain integers,
        NaN or infinity, leaves differ in their number of rows, ``weights`` do not match, or a
        stream comes without a ``block_size``.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> # F = 0.5 I + G^T G / 2
      >>> grads = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
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
    check_choice("block_scope", block_scope, get_args(BlockScope))
    check_count("workspace_bytes", workspace_bytes)
    if block_size is not None:
        check_count("block_size", block_size)
    if block_size is None and mesh is not None:
        raise ValueError(
            "mesh spreads blocks over devices and needs a block_size; without one each leaf of "
            "grads keeps its own sharding."
        )
    if isinstance(grads, Iterator):
        if centered or real_part or weights is not None:
            raise ValueError(
                "a stream of gradients is read once: weights, centered and real_part need arrays."
            )
        return _of_stream(grads, damping, block_size, block_scope, mesh, dtype, workspace_bytes)
    leaves = checked_leaves(grads)
    preparation = checked_preparation(leaves, weights, centered=centered, real_part=real_part)
    real = working_dtype(leaves, dtype)
    damping = jnp.asarray(damping, real)
    normalizer = jnp.asarray(len(leaves[0]) if weights is None else jnp.sum(weights), real)
    invert = partial(
        _invert,
        damping=damping,
        normalizer=normalizer,
        block_size=block_size,
        workspace_bytes=workspace_bytes,
        mesh=mesh,
    )
    of_leaves = spans(leaves, block_scope)
    entries = real if real_part else entry_dtype(leaves, real)
    parts = tuple(
        invert(Columns(tuple(leaves[first:stop]), entries, preparation))
        for first, stop in of_leaves
    )
    return InverseFisher(parts, of_leaves, jax.tree.structure(grads), len(leaves[0]))


def _invert(
    columns: Columns,
    *,
    damping: jax.Array,
    normalizer: jax.Array,
    block_size: int | None,
    workspace_bytes: int,
    mesh: jax.sharding.Mesh | None,
) -> _Part:
    if block_size is None and columns.num_columns > columns.num_rows:
        return FullInverse.of(columns, damping, normalizer, workspace_bytes=workspace_bytes)
    return BlockInverse.of(
        columns,
        damping,
        normalizer,
        block_size or columns.num_columns,
        workspace_bytes=workspace_bytes,
        mesh=mesh,
    )


def _of_stream(
    chunks: Iterator[PyTree],
    damping: Any,
    block_size: int | None,
    block_scope: BlockScope,
    mesh: jax.sharding.Mesh | None,
    dtype: Any,
    workspace_bytes: int,
) -> InverseFisher:
    if block_size is None or block_scope != "tree":
        raise ValueError(
            "a stream of gradients is reduced to blocks over the tree: it needs a block_size and "
            f"block_scope='tree', got block_size={block_size} and block_scope={block_scope!r}. "
            "For the full matrix, write the gradients to np.memmap arrays and pass those."
        )
    first = next(chunks, None)
    if first is None:
        raise ValueError("the stream of gradients is empty.")
    leaves = checked_leaves(first)
    real = working_dtype(leaves, dtype)
    columns = checked_chunks(chunks, first, entry_dtype(leaves, real))
    part = BlockInverse.of_stream(
        columns,
        jnp.asarray(damping, real),
        block_size,
        workspace_bytes=workspace_bytes,
        mesh=mesh,
    )
    treedef = jax.tree.structure(first)
    return InverseFisher((part,), ((0, len(leaves)),), treedef, int(part.normalizer))
