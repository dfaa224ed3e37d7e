r"""The inverse of $F = \lambda I + \frac1n \sum_r g_r g_r^T$ from rows that come in parts.

If there are fewer rows than parameters, all rows are kept and inverted in sample space. Otherwise,
and with a block size, they are added to $F$, or to its diagonal blocks, and discarded.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import Leaves
from curvax.fisher.inverse import InverseFisher, inverse_fisher

PassOverRows = Callable[[], Iterator[Leaves]]


class Options(NamedTuple):
    r"""How the inverse is made.

    Attributes:
      damping: $\lambda$; None for the mean of the diagonal without damping.
      block_size: of the blocks; None for the full matrix.
      memory_bytes: about how much the inverse may take while it is made.
      mesh: devices over which blocks are spread.
    """

    damping: float | None
    block_size: int | None
    memory_bytes: int
    mesh: jax.sharding.Mesh | None


class Size(NamedTuple):
    """What decides how the inverse is made.

    Attributes:
      examples: $n$.
      rows: how many rows there are in all, at least $n$.
      columns: $d$.
      itemsize: bytes of a number.
    """

    examples: int
    rows: int
    columns: int
    itemsize: int

    def block_bytes(self, block_size: int) -> int:
        """Of sums of products, their factors, and one more while these are made."""
        return 3 * self.columns * min(block_size, self.columns) * self.itemsize

    @property
    def stored_bytes(self) -> int:
        """Of rows twice, while they are joined, and of their products and factor."""
        return (2 * self.rows * self.columns + 3 * self.rows**2) * self.itemsize


def inverse_of_rows(
    rows: PassOverRows, few_rows: PassOverRows, size: Size, options: Options
) -> tuple[InverseFisher, float]:
    """The inverse, and the damping.

    Args:
      rows: a pass over all rows.
      few_rows: a cheaper one, whose sum of squares has the same expectation.
      size: how many there are.
      options: how the inverse is made.
    """
    check_memory(size, options)
    # Rows of several directions belong to one example, and F is a mean over examples.
    scale = (size.rows / size.examples) ** 0.5
    if options.block_size is None and size.rows < size.columns:
        stored = _joined(list(rows()))
        damping = _damping(lambda: iter([stored]), size, options)
        inverse = inverse_fisher(
            _scaled(stored, scale), damping, workspace_bytes=options.memory_bytes
        )
        return inverse, damping
    damping = _damping(few_rows, size, options)
    inverse = inverse_fisher(
        (_scaled(chunk, scale) for chunk in rows()),
        damping,
        block_size=min(options.block_size or size.columns, size.columns),
        mesh=options.mesh,
        workspace_bytes=options.memory_bytes,
    )
    return inverse, damping


def check_memory(size: Size, options: Options) -> None:
    """Raises if the inverse would take more memory than it may."""
    allowed, block_size = options.memory_bytes, options.block_size
    if block_size is None:
        stored = size.rows < size.columns
        needed = size.stored_bytes if stored else size.block_bytes(size.columns)
        what = f"the full inverse over {size.columns:,} parameters and {size.rows:,} rows"
    else:
        needed, what = size.block_bytes(block_size), f"blocks of {block_size:,} parameters"
    if needed <= allowed:
        return
    fits = allowed // size.block_bytes(1)
    advice = f"pass block_size={fits} or less, " if fits else ""
    raise ValueError(
        f"{what} would take about {needed:,} bytes, more than memory_bytes={allowed:,}: {advice}"
        "raise memory_bytes, or choose fewer parameters with select."
    )


def _damping(rows: PassOverRows, size: Size, options: Options) -> float:
    """The damping that is given, or the mean of the diagonal of $F$ without it."""
    if options.damping is not None:
        return options.damping
    total = sum(float(_sum_of_squares(chunk)) for chunk in rows())
    if not total > 0:
        raise ValueError(
            "all gradients of the training examples are zero, so the matrix is too: train on these "
            "examples, check that the loss depends on the parameters, or pass damping."
        )
    return total / size.examples / size.columns


def _joined(chunks: list[Leaves]) -> Leaves:
    return [jnp.concatenate(leaves) for leaves in zip(*chunks, strict=True)]


@jax.jit
def _scaled(rows: Leaves, factor: jax.Array) -> Leaves:
    return [leaf * jnp.asarray(factor, leaf.dtype) for leaf in rows]


@jax.jit
def _sum_of_squares(rows: Leaves) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in rows]))
