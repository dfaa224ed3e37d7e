"""Collects the gradients that make up an empirical Fisher matrix."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_count, scalar_loss, warn_of_batch_stats
from curvax._progress import progress_bar
from curvax._settled import settled
from curvax._trees import Differentiable, PyTree, Tree, is_inexact, path_name, wide_dtype, widen
from curvax.curvature._batches import as_arguments, num_examples, over_examples, parts
from curvax.curvature._compiled import compiled_once
from curvax.fisher.window._dense import insert_row, stacked_zeros
from curvax.pruning._gradient_files import GradientFiles
from curvax.pruning._options import Storage
from curvax.pruning._weights import check_mask


def collect_gradients(
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[Any],
    num_grads: int,
    *,
    per_example: bool = False,
    micro_batch_size: int | None = None,
    has_aux: bool = False,
    mask: PyTree | None = None,
    storage: Storage | Path = "device",
    progress: bool = False,
) -> Tree:
    r"""Collects the gradients of a loss on ``num_grads`` batches or examples.

    The gradient is compiled once and called from the host, because the gradients of convolutions
    run several times slower inside a scan on XLA's CPU backend. ``loss_fn`` should be the loss in
    evaluation mode: without dropout, and with the running statistics of batch normalization.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch. As under ``jax.jit``,
        it sees the values that it closed over at its first call: pass what changes, such as batch
        statistics that are still updated, in ``batches``.
      params: the parameters. Integer and bool leaves get zeros.
      batches: an iterable of the further arguments of ``loss_fn``: for each batch a tuple or list
        of them, or a single one that is neither. Arrays in them have the examples along the first
        axis; scalars belong to all examples.
      num_grads: the number of gradients $m$.
      per_example: whether to take one gradient per example rather than per batch. Means over
        batches, as published, are less noisy and cheaper; gradients of examples give a Fisher
        matrix on the Hessian's scale.
      micro_batch_size: the number of examples differentiated together, to bound memory. The mean
        over a batch is summed over parts of that size; ``per_example`` differentiates that many
        under ``vmap``, one at a time by default. A ``vmap`` takes 0.6 to 0.8 of the time,
        convolutions on a CPU included, but the memory of that many gradients.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.
      mask: a tree of bool like ``params``; gradients are zero where it is False.
      storage: ``"device"`` keeps the rows on the parameters' devices with their shardings,
        ``"host"`` in the host's memory; a folder, as a ``pathlib.Path``, in memory-mapped files,
        one per leaf, whose space is reserved first. To resume an interrupted call, repeat it with
        all of the same batches: those whose gradients are already written are skipped. An earlier
        finished collection in the folder is replaced once all new gradients are written; rows still
        mapped from it are unchanged.
      progress: whether a progress bar is shown, by tqdm where that is installed.

    Returns:
      A tree like ``params`` with leaves of shape ``(m, *leaf.shape)``, float32 or wider; mapped
      from files, they are read-only.

    Raises:
      ValueError: if the batches end early, the first axes of a batch to be split disagree, a
        gradient is not finite, ``mask`` does not match, the loss is not a real scalar, or the
        folder holds an unfinished collection of other gradients.
      OSError: if the disk has no space for the gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> def loss_fn(weights, inputs, targets):
      ...     return jnp.mean((inputs @ weights - targets) ** 2)
      >>> batches = [(jnp.eye(2), jnp.ones(2)), (jnp.ones((2, 2)), jnp.zeros(2))]
      >>> pruning.collect_gradients(loss_fn, jnp.zeros(2), batches, 2)
      Array([[-1., -1.],
             [ 0.,  0.]], dtype=float32)
    """
    check_count("num_grads", num_grads)
    check_mask(mask, params)
    if mask is not None:
        mask = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))
    rows = _storage(params, num_grads, storage, mask, per_example)
    how = GradientOptions(per_example, micro_batch_size, has_aux)
    gradients = gradients_of(loss_fn, params, batches, how, skipped=rows.written)
    with progress_bar(num_grads - rows.written, "gradients", progress) as advance:
        for gradient in itertools.islice(gradients, num_grads - rows.written):
            masked = _masked(gradient, mask)
            _check_finite(masked, rows.written)
            rows.insert(masked)
            advance()
    if rows.written == num_grads:
        return rows.finish()
    raise too_few(rows.written, num_grads)


def too_few(found: int, wanted: int) -> ValueError:
    """The error where batches end early."""
    return ValueError(
        f"batches gave {found} gradients, but num_grads={wanted}: pass more data, lower "
        "num_grads, or pass an iterable that restarts (a list, not an iterator)."
    )


class GradientOptions(NamedTuple):
    """How gradients are taken, as `collect_gradients` documents it."""

    per_example: bool = False
    micro_batch_size: int | None = None
    has_aux: bool = False


def gradients_of(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    options: GradientOptions,
    *,
    skipped: int = 0,
) -> Iterator[PyTree]:
    """The gradients of batches, or of their examples, without the first ones."""
    per_example, size, has_aux = options
    if size is not None:
        check_count("micro_batch_size", size)
    warn_of_batch_stats(params)
    build = _gradients_of_examples if per_example else _gradient_of_mean
    gradient = compiled_once(build, loss_fn, has_aux=has_aux)
    return (_examples if per_example else _means)(gradient, params, batches, size, skipped)


def _means(
    gradient: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    size: int | None,
    skipped: int,
) -> Iterator[PyTree]:
    """The gradient of each further batch's loss, from parts of it where ``size`` is given."""
    for batch in itertools.islice(batches, skipped, None):
        arguments = as_arguments(batch)
        if size is None:
            yield gradient(params, arguments)
            continue
        sums, number = None, 0
        for part, count in parts(arguments, size):
            scaled = jax.tree.map(lambda g, n=count: n * widen(g), gradient(params, part))
            sums = settled(scaled if sums is None else jax.tree.map(jnp.add, sums, scaled))
            number += count
        yield jax.tree.map(lambda g, n=number: g / n, sums)


def _examples(
    gradients: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    size: int | None,
    skipped: int,
) -> Iterator[PyTree]:
    """The gradient of the loss on each further example, a batch of one."""
    for batch in batches:
        for part, count in parts(as_arguments(batch), size or 1):
            if skipped < count:
                rows = gradients(params, part)
                for index in range(skipped, count):
                    yield jax.tree.map(lambda x, i=index: x[i], rows)
            skipped = max(0, skipped - count)


def _gradient_of_mean(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., PyTree]:
    return jax.jit(_gradient(loss_fn, has_aux))


def _gradients_of_examples(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., PyTree]:
    """The gradients of the examples of a part, under ``vmap`` if it has several."""
    gradient = _gradient(loss_fn, has_aux)

    @jax.jit
    def of_part(params: PyTree, part: Any) -> PyTree:
        if num_examples(part, "") == 1:
            return jax.tree.map(lambda row: row[jnp.newaxis], gradient(params, part))
        return over_examples(lambda example: gradient(params, example), part)

    return of_part


def _gradient(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., PyTree]:
    """The gradient of a loss on a batch, with zeros for integer and bool leaves."""
    loss = scalar_loss(loss_fn, has_aux)

    def gradient(params: PyTree, arguments: tuple[Any, ...]) -> PyTree:
        tree = Differentiable.of(params)
        of_leaves = jax.grad(lambda leaves: loss(tree.params(leaves), *arguments)[0])
        return tree.tangent(of_leaves(tree.select(tree.leaves)))

    return gradient


@jax.jit
def _masked(gradient: PyTree, mask: PyTree | None) -> PyTree:
    if mask is None:
        return gradient
    return jax.tree.map(lambda g, kept: jnp.where(kept, g, 0), gradient, mask)


@jax.jit
def _finite(gradient: PyTree) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]


def _check_finite(gradient: PyTree, number: int) -> None:
    finite = jax.device_get(_finite(gradient))
    if not all(finite):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradient)]
        bad = ", ".join(path for path, good in zip(paths, finite, strict=True) if not good)
        raise ValueError(
            f"gradient {number} is not finite at {bad}: check the loss and the batch behind it."
        )


class _Rows(Protocol):
    """Where gradients are kept as they come."""

    @property
    def written(self) -> int: ...
    def insert(self, gradient: PyTree) -> None: ...
    def finish(self) -> PyTree: ...


def _storage(
    params: PyTree,
    num_grads: int,
    storage: Storage | Path,
    mask: PyTree | None,
    per_example: bool,
) -> _Rows:
    if storage == "device":
        return _RowsOnDevice(params, num_grads)
    if storage == "host":
        return _RowsOnHost(params, num_grads)
    if isinstance(storage, Path):
        return GradientFiles(storage, params, num_grads, mask, per_example)
    raise ValueError(
        f"storage must be 'device', 'host' or a pathlib.Path of a folder, got {storage!r}."
    )


class _RowsOnDevice:
    def __init__(self, params: PyTree, num_grads: int) -> None:
        self.written = 0
        self._rows = jax.tree.map(lambda leaf: _rows_of_zeros(leaf, num_grads), params)

    def insert(self, gradient: PyTree) -> None:
        self._rows = _insert_on_device(self._rows, gradient, self.written)
        self.written += 1

    def finish(self) -> PyTree:
        return self._rows


def _rows_of_zeros(leaf: Any, number: int) -> jax.Array:
    dtype = jax.dtypes.canonicalize_dtype(wide_dtype(leaf))
    if jnp.size(leaf) and is_inexact(leaf):
        return stacked_zeros(leaf, number, dtype)
    return jnp.zeros((number, *jnp.shape(leaf)), dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert_on_device(rows: PyTree, gradient: PyTree, slot: jax.Array) -> PyTree:
    wide = jax.tree.map(lambda g, kept: g.astype(kept.dtype), gradient, rows)
    return insert_row(rows, wide, slot)


class _RowsOnHost:
    def __init__(self, params: PyTree, num_grads: int) -> None:
        self.written = 0
        self._rows = jax.tree.map(
            lambda leaf: np.empty((num_grads, *jnp.shape(leaf)), wide_dtype(leaf)), params
        )

    def insert(self, gradient: PyTree) -> None:
        for rows, leaf in zip(jax.tree.leaves(self._rows), jax.tree.leaves(gradient), strict=True):
            rows[self.written] = leaf
        self.written += 1

    def finish(self) -> PyTree:
        return self._rows
