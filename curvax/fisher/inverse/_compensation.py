r"""How kept entries compensate for removed ones: a ridge regression in each block.

Removing the entries $Q$ of $w$ changes $\frac12 \delta^T F \delta$ least if the kept ones, $S$,
move by

$$
\delta_S = F_{SS}^{-1} F_{SQ} w_Q
         = \left(m \lambda I + G_S^T G_S\right)^{-1} G_S^T t
         = G_S^T \left(m \lambda I + G_S G_S^T\right)^{-1} t, \qquad t = G_Q w_Q
$$

which equals the published $-F^{-1}_{SQ} (F^{-1}_{QQ})^{-1} w_Q$, and subtracts nothing. Of the two
forms only one is well conditioned: the first where a block keeps no more entries than there are
gradients, the second where it keeps more. The other one has eigenvalues $m \lambda$ that amplify
rounding by the condition of $F$.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher.inverse._block_diagonal import (
    apply_inverse,
    combine,
    dots,
    factor_dual,
    factor_primal,
)
from curvax.fisher.inverse._column_blocks import ColumnBlocks
from curvax.fisher.inverse._columns import Columns
from curvax.fisher.inverse._full import FullInverse
from curvax.fisher.inverse._input import BlockScope, spans, working_dtype


def compensation(
    grads: list[Any],
    removed: list[np.ndarray],
    kept: list[np.ndarray],
    damping: float,
    *,
    block_size: int | None,
    block_scope: BlockScope,
    mesh: jax.sharding.Mesh | None,
    workspace_bytes: int = 2**28,
) -> list[jax.Array]:
    r"""The change of the kept entries that best compensates for the removal of the others.

    Args:
      grads: leaves of shape ``(m, *shape)``.
      removed: $w$ where it is removed, zeros elsewhere.
      kept: bools.
      damping: as in `inverse_fisher`, with the options that follow.
      block_size: see there.
      block_scope: see there.
      mesh: see there.
      workspace_bytes: see there.

    Returns:
      $\delta$ on the kept entries, zeros elsewhere.
    """
    dtype = working_dtype(grads, None)
    changes: list[jax.Array] = []
    for first, stop in spans(grads, block_scope):
        columns = Columns(tuple(grads[first:stop]), dtype)
        vector = [jnp.asarray(leaf, dtype) for leaf in removed[first:stop]]
        mask = [jnp.asarray(leaf, dtype) for leaf in kept[first:stop]]
        number_kept = sum(int(np.count_nonzero(leaf)) for leaf in kept[first:stop])
        if block_size is None and number_kept > columns.num_rows:
            options = jnp.asarray(damping, dtype), jnp.asarray(columns.num_rows, dtype)
            inverse = FullInverse.of(columns, *options, workspace_bytes=workspace_bytes, kept=mask)
            changes += inverse.compensate(vector)
        else:
            size = min(block_size or columns.num_columns, columns.num_columns)
            changes += _in_blocks(columns, vector, mask, damping, size, mesh, workspace_bytes)
    return changes


def _in_blocks(
    columns: Columns,
    removed: list[jax.Array],
    kept: list[jax.Array],
    damping: float,
    size: int,
    mesh: jax.sharding.Mesh | None,
    workspace_bytes: int,
) -> list[jax.Array]:
    num_rows = columns.num_rows
    primal = size <= num_rows
    side = min(size, num_rows)
    blocks = ColumnBlocks.of(columns, size, side=side, workspace_bytes=workspace_bytes, mesh=mesh)
    kernel = blocks.over_devices(_primal if primal else _dual)
    pieces = []
    for rows, vector, mask in zip(
        blocks.all_rows(columns), blocks.vectors(removed), blocks.vectors(kept), strict=True
    ):
        piece = kernel(rows, vector, mask, num_rows * damping)
        if not primal:
            piece = _sparse_blocks_in_primal_form(
                blocks, piece, rows, vector, mask, num_rows * damping
            )
        pieces.append(piece)
    return blocks.leaves(pieces)


def _sparse_blocks_in_primal_form(
    blocks: ColumnBlocks,
    changes: jax.Array,
    rows: jax.Array,
    vector: jax.Array,
    mask: jax.Array,
    shift: float,
) -> jax.Array:
    """The changes, recomputed in blocks that keep no more entries than there are gradients."""
    width = rows.shape[1]
    kept = np.asarray(mask) > 0
    counts = kept.sum(axis=1)
    sparse = np.flatnonzero((counts > 0) & (counts <= width))
    if not len(sparse):
        return changes
    # The number of blocks is padded to a power of two, so that few shapes are compiled.
    margin = (1 << (len(sparse) - 1).bit_length()) - len(sparse)
    sparse = np.pad(sparse, (0, margin), constant_values=sparse[0])
    outside = kept.shape[1]
    places = np.full((len(sparse), width), outside)
    for place, block in zip(places, sparse, strict=True):
        place[: counts[block]] = np.flatnonzero(kept[block])
    chosen = (blocks.everywhere(array[sparse]) for array in (rows, vector))
    return _scattered_ridge(changes, *chosen, sparse, places, shift)


@jax.jit
def _scattered_ridge(
    changes: jax.Array,
    rows: jax.Array,
    vector: jax.Array,
    sparse: jax.Array,
    places: jax.Array,
    shift: Any,
) -> jax.Array:
    """``places``: the kept columns of each of the ``sparse`` blocks, padded past the last."""
    kept = jnp.take_along_axis(rows, places[:, jnp.newaxis], axis=2, mode="fill", fill_value=0)
    changed = _ridge(kept, dots(rows, vector), shift)
    numbers = jnp.arange(len(sparse))[:, jnp.newaxis]
    spread = jnp.zeros((len(sparse), rows.shape[2]), rows.dtype)
    spread = spread.at[numbers, places].set(changed, mode="drop")
    return changes.at[sparse].set(spread)


def _ridge(kept: jax.Array, target: jax.Array, shift: Any) -> jax.Array:
    return apply_inverse(factor_primal(kept, shift), combine(kept, target))


@jax.jit
def _primal(rows: jax.Array, vector: jax.Array, mask: jax.Array, shift: Any) -> jax.Array:
    return _ridge(rows * mask[:, jnp.newaxis], dots(rows, vector), shift)


@jax.jit
def _dual(rows: jax.Array, vector: jax.Array, mask: jax.Array, shift: Any) -> jax.Array:
    kept = rows * mask[:, jnp.newaxis]
    weights = apply_inverse(factor_dual(kept, shift), dots(rows, vector))
    return combine(kept, weights)
