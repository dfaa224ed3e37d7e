"""Products of rows with other rows and with a vector, leaf by leaf."""

import jax
import jax.numpy as jnp

from curvax._trees import Leaves
from curvax.fisher.inverse._gram import gram, row_products
from curvax.fisher.samples._mesh import has_mesh
from curvax.fisher.window._dense import leaf_dots, pairwise_sum

_SMALL = 4096  # entries of a leaf: a product of (m, m) for each would cost more than it computes


def products_with_themselves(rows: Leaves) -> jax.Array:
    """$G G^T$, of shape (m, m), of rows on one device."""
    parts = _merged(rows)
    return sum(map(gram, parts[1:]), start=gram(parts[0]))


def products_with(rows: Leaves, others: Leaves) -> jax.Array:
    """$G_a G_b^T$, of shape (m_a, m_b)."""
    pairs = zip(_merged(rows), _merged(others), strict=True)
    blocks = [row_products(one, other, _rows_sharding(one)) for one, other in pairs]
    return pairwise_sum(jnp.stack(blocks, axis=-1))


def products_with_vector(rows: Leaves, vector: Leaves) -> jax.Array:
    """$G v$, of shape (m,)."""
    sums = [leaf_dots(*pair) for pair in zip(rows, vector, strict=True) if pair[0].size]
    return pairwise_sum(jnp.stack(sums, axis=1))


def _rows_sharding(rows: jax.Array) -> jax.sharding.NamedSharding | None:
    """On an explicit mesh, the sharding of (m_a, m_b) with the first axis as that of the rows."""
    sharding = jax.typeof(rows).sharding
    if sharding.mesh.empty or sharding.mesh.are_all_axes_auto:
        return None
    return sharding.update(spec=jax.P(sharding.spec[0], None))


def _merged(rows: Leaves) -> Leaves:
    """The leaves that have entries, with small ones side by side unless a mesh may split them."""
    filled = [leaf for leaf in rows if leaf.size]
    if has_mesh():
        return filled
    small = [leaf.reshape(len(leaf), -1) for leaf in filled if leaf.size < _SMALL * len(leaf)]
    large = [leaf for leaf in filled if leaf.size >= _SMALL * len(leaf)]
    return [*large, jnp.concatenate(small, axis=1)] if small else large
