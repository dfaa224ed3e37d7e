r"""How the kept weights change when others are pruned: Optimal Brain Surgeon's update.

With the weights $Q$ to prune and $F^{-1}$ over all alive ones:

* joint: $-F^{-1}_{\cdot Q} \left(F^{-1}_{QQ}\right)^{-1} w_Q$, the minimum of
  $\frac12 \delta^T F \delta$ over all changes that set $Q$ to zero;
* independent, as published: $-F^{-1} t$ with $t_q = w_q / [F^{-1}]_{qq}$, the sum of the changes
  that would be right for each weight alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from curvax._trees import wide_dtype
from curvax.fisher import InverseFisher
from curvax.fisher.inverse._compensation import compensation
from curvax.pruning._leaves import Leaf
from curvax.pruning._packing import Packing
from curvax.pruning._scores import FisherOptions


def independent_update(
    leaves: Sequence[Leaf],
    pruned: Sequence[np.ndarray],
    inverse: InverseFisher,
    diagonal: Sequence[Any],
    packing: Packing,
) -> list[np.ndarray]:
    """The sum of the changes for each pruned weight by itself."""
    rates = [
        np.where(flags, leaf.weights / np.asarray(entries), 0)
        for leaf, flags, entries in zip(leaves, pruned, diagonal, strict=True)
    ]
    return [-change for change in packing.unpack(inverse.solve(packing.pack(rates)))]


def joint_update(
    leaves: Sequence[Leaf],
    pruned: Sequence[np.ndarray],
    columns: Sequence[Any],
    options: FisherOptions,
) -> list[np.ndarray]:
    """The best change of the kept weights for all pruned ones together."""
    packing = options.packing(leaves)
    removed = [np.where(flags, leaf.weights, 0) for leaf, flags in zip(leaves, pruned, strict=True)]
    changes = compensation(
        packing.pack(columns),
        packing.pack(removed),
        packing.pack([~flags for flags in pruned]),
        options.damping,
        block_size=options.block_size,
        block_scope=options.block_scope,
        mesh=options.mesh,
    )
    return packing.unpack(changes)


def predicted_loss_change(columns: Sequence[Any], changes: Sequence[np.ndarray]) -> float:
    r"""$\bar g^T \delta + \frac{1}{2m} \sum_i (g_i^T \delta)^2$, the loss's model."""
    products = np.zeros(len(columns[0]))
    for rows, change in zip(columns, changes, strict=True):
        dtype = np.dtype(wide_dtype(rows))
        products += np.asarray(rows).astype(dtype, copy=False) @ change.astype(dtype)
    return float(products.mean() + (products**2).mean() / 2)
