"""Columns cut into blocks of one size, many blocks at a time.

A ragged tail is padded with columns of zeros, which do not affect the others.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax.fisher.inverse._columns import Columns


class ColumnBlocks:
    """Batches of $n$ blocks of $B$ columns each, all batches of one size.

    Attributes:
      columns: what is cut.
      size: $B$.
      number: $n$.
      starts: the first column of each batch.
    """

    def __init__(
        self,
        columns: Columns,
        size: int,
        *,
        side: int,
        workspace_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Decides how many blocks make a batch.

        Args:
          columns: what is cut.
          size: $B$.
          side: the size of the square matrices that are made of each block.
          workspace_bytes: about how much memory the rows and matrices of a batch may take.
          mesh: devices over all of which the blocks of a batch are spread.
        """
        self.columns = columns
        self.size = size
        # Blocks are cut from flat columns, which automatic axes allow.
        self._mesh = None if mesh is None else _automatic(mesh)
        self.number = self._blocks_in_batch(side, workspace_bytes)
        self.starts = range(0, columns.num_columns, self.number * self.size)

    def _blocks_in_batch(self, side: int, workspace_bytes: int) -> int:
        """As many blocks as fit the workspace, in batches that the devices divide."""
        itemsize = jnp.dtype(self.columns.dtype).itemsize
        block_bytes = (2 * self.columns.num_rows * self.size + 3 * side**2) * itemsize
        total = -(-self.columns.num_columns // self.size)
        number = min(total, max(1, workspace_bytes // block_bytes))
        number = -(-total // -(-total // number))
        devices = 1 if self._mesh is None else self._mesh.size
        return -(-number // devices) * devices

    def rows(self, start: int, columns: Columns | None = None) -> jax.Array:
        """A batch of rows from column ``start`` on, of shape (n, m, B)."""
        columns = columns or self.columns
        return _as_blocks(columns.take(start, self.number * self.size), self.number)

    def all_rows(self) -> Iterator[jax.Array]:
        """The rows, batch after batch."""
        return (self.rows(start) for start in self.starts)

    def vectors(self, leaves: Sequence[jax.Array]) -> Iterator[jax.Array]:
        """A vector cut as the columns are, a batch of shape (n, B) at a time."""
        vector = Columns([leaf[jnp.newaxis] for leaf in leaves], self.columns.dtype)
        return (self.rows(start, vector)[:, 0] for start in self.starts)

    def leaves(self, pieces: Sequence[jax.Array]) -> list[jax.Array]:
        """Leaves from batches of shape (n, B)."""
        flat = jnp.concatenate([piece.reshape(-1) for piece in pieces])
        flat = flat[: self.columns.num_columns]
        return [leaf[0] for leaf in self.columns.split(flat[jnp.newaxis])]

    def everywhere(self, array: jax.Array) -> jax.Array:
        """The array replicated on all devices of the mesh."""
        if self._mesh is None:
            return array
        return jax.device_put(array, jax.NamedSharding(self._mesh, jax.P()))

    def over_devices(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel on a batch, whose blocks are spread over the devices of the mesh."""
        if self._mesh is None:
            return kernel
        mesh, blocks = self._mesh, jax.P(self._mesh.axis_names)

        def spread(*args: Any) -> Any:
            specs = tuple(blocks if jnp.ndim(arg) else jax.P() for arg in args)
            placed = [
                jax.device_put(arg, jax.NamedSharding(mesh, spec))
                for arg, spec in zip(args, specs, strict=True)
            ]
            mapped = jax.shard_map(
                kernel, mesh=mesh, in_specs=specs, out_specs=blocks, check_vma=False
            )
            return jax.jit(mapped)(*placed)

        return spread


def _automatic(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


@partial(jax.jit, static_argnums=1)
def _as_blocks(flat: jax.Array, number: int) -> jax.Array:
    return flat.reshape(len(flat), number, -1).transpose(1, 0, 2)
