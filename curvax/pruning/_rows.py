"""Gradients of the alive weights, side by side in chunks of one width.

The columns of pruned weights are left out, so that blocks hold as many alive weights at every
sparsity, as published; columns of zeros fill the last chunk. So the number of weights changes the
number of chunks, not the compiled functions.
"""

import contextlib
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from curvax._settled import settled
from curvax._trees import PyTree
from curvax.fisher.inverse._column_blocks import on_automatic_mesh
from curvax.fisher.window._dense import replicated
from curvax.pruning._weights import Leaf, Weights

_PARTS = 8  # at least, of what there is to do, so that little is done in vain


class Width(NamedTuple):
    """How columns are cut: chunks of whole blocks, spread over the devices of a mesh.

    Attributes:
      chunk: the number of columns in a chunk.
      number: the number of chunks that hold all weights.
      mesh: the devices over which the columns of a chunk are spread; None for one.
    """

    chunk: int
    number: int
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def of(
        cls,
        num_weights: int,
        num_rows: int,
        block_size: int,
        *,
        mesh: jax.sharding.Mesh | None = None,
        workspace_bytes: int = 2**28,
    ) -> "Width":
        """Chunks of which the rows and the matrices of their blocks take about so many bytes."""
        block_bytes = 12 * block_size * (num_rows + min(block_size, num_rows))
        devices = 1 if mesh is None else mesh.size
        blocks = -(-num_weights // block_size)
        together = min(-(-blocks // _PARTS), max(1, workspace_bytes // block_bytes))
        chunk = -(-together // devices) * devices * block_size
        return cls(chunk, -(-num_weights // chunk), mesh)

    @property
    def share(self) -> int:
        """The number of columns of a chunk on one device."""
        return self.chunk // (1 if self.mesh is None else self.mesh.size)

    def sharding(self, *leading: None) -> jax.sharding.NamedSharding | None:
        """That of an array whose last axis has the columns of a chunk."""
        if self.mesh is None:
            return None
        return jax.NamedSharding(self.mesh, jax.P(*leading, self.mesh.axis_names))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """In which arrays of the mesh are computed with, whatever mesh the user has set."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, vector: np.ndarray, index: int) -> jax.Array:
        """A chunk of a vector of alive weights on the devices."""
        part = vector[index * self.chunk : (index + 1) * self.chunk]
        filled = np.pad(part, (0, self.chunk - len(part)))
        return jax.device_put(filled, self.sharding())


class Rows(Protocol):
    """Gradients of the alive weights."""

    @property
    def num_rows(self) -> int: ...
    @property
    def width(self) -> Width: ...
    def chunk(self, index: int) -> jax.Array:
        """Columns of shape (m, width.chunk)."""


class DeviceRows:
    """Rows on the devices, filled gradient by gradient; one buffer serves all steps of a run.

    Attributes:
      width: how the columns are cut.
      num_rows: the number of gradients that are in.
    """

    def __init__(self, weights: Weights, num_rows: int, width: Width) -> None:
        """Allocates the buffer of shape (chunks, m, columns)."""
        self.width, self.num_rows = width, 0
        self._leaves = weights.leaves
        shape = (width.number, num_rows, width.chunk)
        self._buffer = jnp.zeros(shape, weights.values.dtype, device=width.sharding(None, None))
        self.begin(weights)

    def begin(self, weights: Weights) -> None:
        """Starts over with the weights that are alive now."""
        order = np.full(self.width.number * self.width.chunk, len(weights.alive), np.int32)
        order[: weights.number_alive] = np.flatnonzero(weights.alive)
        self._order = jax.device_put(order, self.width.sharding())
        self._finite: list[jax.Array] = []
        self.num_rows = 0

    def insert(self, gradient: PyTree) -> None:
        """Adds a gradient as the next row."""
        leaves = jax.tree.leaves(gradient)
        chosen = [leaves[leaf.number] for leaf in self._leaves]
        if self.width.mesh is not None:
            chosen = [_on_mesh(leaf, self.width.mesh) for leaf in chosen]
        with self.width.context():
            self._buffer, finite = _insert(
                self._buffer, chosen, self._order, self.num_rows, self._leaves
            )
        self._finite.append(settled(finite))
        self.num_rows += 1

    def check(self) -> None:
        """Raises if a gradient is not finite."""
        finite = np.stack(jax.device_get(self._finite))
        for number, leaf in np.argwhere(~finite)[:1]:
            raise ValueError(
                f"gradient {number} is not finite at {self._leaves[leaf].path}: check the loss and "
                "the batch behind it."
            )

    def chunk(self, index: int) -> jax.Array:
        return _chunk(self._buffer, index, self.num_rows)


class HostRows:
    """Rows in the host's memory or in files, of which columns reach the devices chunk by chunk."""

    def __init__(self, weights: Weights, grads: PyTree, width: Width) -> None:
        """Takes leaves of NumPy, ``(m, *leaf.shape)``."""
        arrays = jax.tree.leaves(grads)
        self.width = width
        self._weights = weights
        self._rows = [arrays[leaf.number].reshape(len(arrays[0]), -1) for leaf in weights.leaves]
        self._alive = np.flatnonzero(weights.alive)
        places = [leaf.flat(np.arange(leaf.size).reshape(leaf.shape)) for leaf in weights.leaves]
        self._places = np.concatenate(places)[self._alive]  # within the leaf, in its own order

    @property
    def num_rows(self) -> int:
        return len(self._rows[0])

    def chunk(self, index: int) -> jax.Array:
        part = slice(index * self.width.chunk, (index + 1) * self.width.chunk)
        chosen, places = self._alive[part], self._places[part]
        filled = np.zeros((self.num_rows, self.width.chunk), self._weights.values.dtype)
        for span, rows in zip(self._weights.spans(), self._rows, strict=True):
            first, stop = np.searchsorted(chosen, (span.start, span.stop))
            filled[:, first:stop] = rows[:, places[first:stop]]
        return jax.device_put(filled, self.width.sharding(None))


def _on_mesh(leaf: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """The leaf where it lies, with automatic axes; one of other devices on all of the mesh.

    To put a leaf with another sharding on the same devices, JAX would take it to the host.
    """
    own = leaf.sharding
    if isinstance(own, jax.NamedSharding) and own.device_set == set(mesh.devices.flat):
        return on_automatic_mesh(leaf)
    return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="leaves")
def _insert(
    buffer: jax.Array,
    chosen: list[jax.Array],
    order: jax.Array,
    slot: jax.Array,
    leaves: tuple[Leaf, ...],
) -> tuple[jax.Array, jax.Array]:
    """The buffer with the chosen leaves' entries, in their order, as a row; which are finite."""
    parts = []
    for leaf, array in zip(leaves, chosen, strict=True):
        sharding = replicated(array)  # an explicitly sharded leaf cannot be flattened as it is
        whole = array if sharding is None else jax.sharding.reshard(array, sharding)
        parts.append(leaf.flat(whole).astype(buffer.dtype))
    finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in parts])
    row = jnp.concatenate(parts).at[order].get(mode="fill", fill_value=0)
    row = row.reshape(len(buffer), 1, -1)
    return jax.lax.dynamic_update_slice_in_dim(buffer, row, slot, axis=1), finite


@functools.partial(jax.jit, static_argnames="num_rows")
def _chunk(buffer: jax.Array, index: jax.Array, num_rows: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(buffer, index, keepdims=False)[:num_rows]
