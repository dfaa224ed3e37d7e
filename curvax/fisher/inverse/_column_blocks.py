"""Columns cut into blocks of one size, many blocks at a time.

A ragged tail is padded with columns of zeros, which do not affect the others.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax.fisher.inverse._columns import Columns, Layout


@dataclasses.dataclass(frozen=True)
class ColumnBlocks:
    """Batches of $n$ blocks of $B$ columns each, all batches of one size.

    Attributes:
      layout: of the columns that are cut.
      size: $B$.
      number: $n$.
      mesh: devices over all of which the blocks of a batch are spread; None for one device.
    """

    layout: Layout
    size: int
    number: int
    mesh: jax.sharding.Mesh | None

    @classmethod
    def of(
        cls,
        columns: Columns,
        size: int,
        *,
        side: int,
        workspace_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "ColumnBlocks":
        """Decides how many blocks make a batch.

        Args:
          columns: what is cut.
          size: $B$.
          side: the size of the square matrices that are made of each block.
          workspace_bytes: about how much memory the rows and matrices of a batch may take.
          mesh: as above.
        """
        block_bytes = (2 * columns.num_rows * size + 3 * side**2) * columns.dtype.itemsize
        total = -(-columns.num_columns // size)
        number = min(total, max(1, workspace_bytes // block_bytes))
        number = -(-total // -(-total // number))
        devices = 1 if mesh is None else mesh.size
        number = -(-number // devices) * devices
        # Blocks are cut from flat columns, which automatic axes allow.
        return cls(columns.layout, size, number, None if mesh is None else automatic_mesh(mesh))

    @property
    def starts(self) -> range:
        """The first column of each batch."""
        return range(0, self.layout.num_columns, self.number * self.size)

    @property
    def num_padded(self) -> int:
        """The columns of zeros behind the last."""
        return len(self.starts) * self.number * self.size - self.layout.num_columns

    def rows(self, columns: Columns, start: int) -> jax.Array:
        """A batch of rows from column ``start`` on, of shape (n, m, B)."""
        return _as_blocks(columns.take(start, self.number * self.size), self.number)

    def all_rows(self, columns: Columns) -> Iterator[jax.Array]:
        """The rows, batch after batch."""
        return (self.rows(columns, start) for start in self.starts)

    def vectors(self, leaves: Sequence[jax.Array]) -> Iterator[jax.Array]:
        """A vector cut as the columns are, a batch of shape (n, B) at a time."""
        vector = Columns(tuple(leaf[jnp.newaxis] for leaf in leaves), self.layout.dtype)
        return (rows[:, 0] for rows in self.all_rows(vector))

    def leaves(self, pieces: Sequence[jax.Array]) -> list[jax.Array]:
        """Leaves from batches of shape (n, ..., B)."""
        flat = [jnp.moveaxis(piece, 0, -2) for piece in pieces]
        flat = [piece.reshape(*piece.shape[:-2], -1) for piece in flat]
        return self.layout.split(jnp.concatenate(flat, axis=-1)[..., : self.layout.num_columns])

    def over_devices(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled kernel on a batch, whose blocks are spread over the devices of the mesh.

        Arguments with axes have the blocks first, as results have; scalars belong to all blocks.
        """
        if self.mesh is None:
            return kernel
        mesh = self.mesh

        def spread(*args: Any) -> Any:
            placed = jax.tree.map(
                lambda array: jax.device_put(array, jax.NamedSharding(mesh, _spec(array, mesh))),
                args,
            )
            return _spread(kernel, mesh, placed)

        return spread


@partial(jax.jit, static_argnums=(0, 1))
def _spread(kernel: Callable[..., Any], mesh: jax.sharding.Mesh, args: Any) -> Any:
    # Compiled once for a kernel, a mesh and shapes: a closure would be compiled at each call.
    specs = jax.tree.map(lambda array: _spec(array, mesh), args)
    blocks = jax.P(mesh.axis_names)
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=blocks, check_vma=False)
    return mapped(*args)


def _spec(array: Any, mesh: jax.sharding.Mesh) -> jax.P:
    return jax.P(mesh.axis_names) if jnp.ndim(array) else jax.P()


def automatic_mesh(mesh: Any) -> jax.sharding.Mesh:
    """The mesh with automatic axes, along which flat columns may be cut anywhere."""
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def on_automatic_mesh(array: Any) -> Any:
    """The array where it lies, along whose axes it may be cut anywhere."""
    own = getattr(array, "sharding", None)
    if not isinstance(own, jax.NamedSharding):
        return array
    return jax.device_put(array, jax.NamedSharding(automatic_mesh(own.mesh), own.spec))


def context_of(*arrays: Any) -> contextlib.AbstractContextManager[Any]:
    """In which `on_automatic_mesh` arrays are computed with, whatever mesh the user has set."""
    shardings = (getattr(array, "sharding", None) for array in arrays)
    meshes = [own.mesh for own in shardings if isinstance(own, jax.NamedSharding)]
    return jax.set_mesh(automatic_mesh(meshes[0])) if meshes else contextlib.nullcontext()


@partial(jax.jit, static_argnums=1)
def _as_blocks(flat: jax.Array, number: int) -> jax.Array:
    return flat.reshape(len(flat), number, -1).transpose(1, 0, 2)
