"""The rows of a batch, and the gradient's coefficients in them, from either form of a batch.

The gradient of the mean over examples is $G^T s / n$.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._checks import check_arrays, check_like
from curvax._trees import (
    Leaves,
    PyTree,
    has_holes,
    is_inexact,
    named_leaves,
    shape_of,
    varying_like,
)
from curvax.curvature._batch_loss import BatchLoss, WeightedTargets
from curvax.curvature._batches import as_arguments, num_examples
from curvax.curvature._losses import Loss, output_loss, squared_error
from curvax.curvature._output_rows import Matrix, OutputRows, of_cotangents, of_loss
from curvax.fisher.inverse._input import check_weights
from curvax.fisher.samples import (
    Coordinates,
    JacobianRows,
    MicroBatchedRows,
    Rows,
    has_mesh,
    in_micro_batches,
    share_of,
    stored_rows,
)
from curvax.optimizers._memory import local_memory

_GRAMS = 4  # matrices of the size of the batch that a solution holds at a time

OutputsFn = Callable[..., jax.Array]


class BatchRows(NamedTuple):
    """A batch as rows.

    Attributes:
      rows: $G$, weighted and centred, in real coordinates.
      samples: $s$, weighted, of shape (m,).
      normalizer: $n$, the sum of weights.
      coordinates: those of an update.
    """

    rows: Rows
    samples: jax.Array
    normalizer: jax.Array
    coordinates: Coordinates


class OutputOptions(NamedTuple):
    """How outputs become rows.

    Attributes:
      loss: that of an example's outputs.
      matrix: which matrix the rows make up.
      centered: whether the mean row is subtracted.
      micro_batch_size: the number of examples whose rows are in memory together; None for all.
    """

    loss: Loss
    matrix: Matrix
    centered: bool
    micro_batch_size: int | None


def of_gradients(
    grads: PyTree, params: PyTree | None, cotangents: Any, weights: Any, *, centered: bool
) -> BatchRows:
    """The batch of per-example gradients."""
    number = _check_gradients(grads, params)
    if params is None:
        params = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), grads)
    coordinates = Coordinates.of(params)
    weights = _checked_weights(weights, number, coordinates.dtype)
    samples = jnp.ones(number) if cotangents is None else jnp.asarray(cotangents)
    if samples.shape != (number,):
        raise ValueError(
            f"cotangents must have shape ({number},), one number for each gradient, got "
            f"{samples.shape}."
        )
    is_complex = any(map(jnp.iscomplexobj, jax.tree.leaves(grads)))
    samples = _as_outputs(samples, is_complex, "the gradients", coordinates.dtype)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    leaves = [part for pair in pairs for part in _row_coordinates(*pair, is_complex=is_complex)]
    _check_memory(coordinates, *samples.shape, in_memory=number)
    rows = stored_rows(leaves, weights, centered=centered, dtype=coordinates.dtype)
    return _batch_rows(rows, samples, weights, coordinates, centered=centered)


def of_outputs(
    outputs_fn: OutputsFn,
    params: PyTree | None,
    batch: Any,
    targets: Any,
    cotangents: Any,
    weights: Any,
    options: OutputOptions,
) -> BatchRows:
    """The batch of a function that returns the outputs of each example."""
    if params is None or batch is None:
        raise ValueError(
            "outputs_fn needs params and batch: tx.update(grads, state, params, "
            "outputs_fn=outputs_fn, batch=(inputs,))."
        )
    check_arrays(params)
    coordinates, arguments = Coordinates.of(params), as_arguments(batch)
    if not coordinates.split(params):
        raise ValueError("params hold no real or complex leaf, so outputs have no gradients.")
    found = _check_outputs(outputs_fn, params, arguments)
    number = found.shape[0]
    is_complex = jnp.iscomplexobj(found)

    def outputs_of(point: Leaves, examples: Any) -> jax.Array:
        outputs = outputs_fn(coordinates.merge(point), *examples)
        return _as_outputs(outputs, is_complex, "the outputs", None)

    if isinstance(targets, WeightedTargets):
        targets, weights = targets
    weights = _checked_weights(weights, number, coordinates.dtype)
    # Inside a shard_map, rows are those of each device's own examples: no gradient is summed.
    point = varying_like(coordinates.split(params), arguments)
    if cotangents is None:
        outputs = in_micro_batches(outputs_of, point, arguments, options.micro_batch_size)
        chosen = _rows_of_loss(outputs.astype(coordinates.dtype), targets, weights, found, options)
    else:
        given = jnp.asarray(cotangents)
        if given.shape != found.shape:
            raise ValueError(
                f"cotangents must have the shape of the outputs, {found.shape}, got {given.shape}."
            )
        given = _as_outputs(given, is_complex, "the outputs", coordinates.dtype)
        chosen = of_cotangents(given, options.matrix)
    size = options.micro_batch_size
    _check_memory(
        coordinates, *chosen.directions.shape[:2], in_memory=min(2 * (size or number), number)
    )
    jacobian = JacobianRows(
        outputs_of,
        point,
        arguments,
        chosen.directions,
        weights,
        options.centered,
        coordinates.dtype,
    )
    # On a mesh rows are computed again, not sent.
    is_stored = size is None and not has_mesh()
    rows = jacobian.stored() if is_stored else MicroBatchedRows(jacobian, size or share_of(number))
    return _batch_rows(rows, chosen.samples, weights, coordinates, centered=options.centered)


def _batch_rows(
    rows: Rows,
    samples: jax.Array,
    weights: jax.Array | None,
    coordinates: Coordinates,
    *,
    centered: bool,
) -> BatchRows:
    """The batch with coefficients (n, r)."""
    if centered:
        # Their mean has no effect, but K^-1 multiplies it by 1 / (n damping), and then it must
        # cancel in G^T x.
        samples -= jnp.average(samples, axis=0, weights=weights)
    if weights is None:
        normalizer = jnp.asarray(len(samples), coordinates.dtype)
        return BatchRows(rows, samples.reshape(-1), normalizer, coordinates)
    samples = jnp.sqrt(weights)[:, jnp.newaxis] * samples
    return BatchRows(rows, samples.reshape(-1), jnp.sum(weights), coordinates)


def _rows_of_loss(
    outputs: jax.Array, targets: Any, weights: Any, found: Any, options: OutputOptions
) -> OutputRows:
    """Rows for the options' loss, from real outputs of shape (n, k)."""
    loss = output_loss(options.loss)
    if loss.value is squared_error.value:
        if targets is None:
            return of_cotangents(outputs, options.matrix)
        values = jnp.asarray(targets)
        if values.shape != found.shape:
            raise ValueError(
                f"targets must have the shape of the outputs, {found.shape}, got {values.shape}."
            )
        is_complex = jnp.iscomplexobj(found)
        values = _as_outputs(values, is_complex, "the outputs", outputs.dtype)
        return of_cotangents(outputs - values, options.matrix)
    if targets is None or len(found.shape) != 2 or jnp.iscomplexobj(found):
        raise ValueError(
            "a loss other than the squared error needs targets and real outputs of shape (n, k), "
            f"got outputs of shape {found.shape} and dtype {found.dtype}"
            f"{' and no targets' if targets is None else ''}."
        )
    if weights is not None:
        targets = WeightedTargets(targets, weights)
    return of_loss(BatchLoss.of(loss, outputs, targets), outputs, options.matrix)


def _check_outputs(outputs_fn: OutputsFn, params: PyTree, arguments: Any) -> Any:
    """The shape and dtype of the outputs, if these are of each example."""
    number = num_examples(arguments, "close over arrays without an axis of examples")
    try:
        outputs = jax.eval_shape(outputs_fn, params, *arguments)
    except Exception as error:
        if not has_holes(params):
            raise
        raise ValueError(
            "outputs_fn failed on params with holes, which optax.masked and optax.partition "
            "create. Fill them inside: "
            "lambda p, *batch: outputs_fn(curvax.merge_masked(params, p), *batch)."
        ) from error
    shape = getattr(outputs, "shape", None)
    if not number or not shape or shape[0] != number or not is_inexact(outputs):
        found = type(outputs).__name__ if shape is None else f"{outputs.dtype} of shape {shape}"
        raise ValueError(
            "outputs_fn must return the outputs of each example, real or complex and of shape "
            f"(n,) or (n, k), for a batch with n={number} examples along its first axis, got "
            f"{found}: return residuals, logits or log-amplitudes, not their mean."
        )
    return outputs


def _check_gradients(grads: PyTree, params: PyTree | None) -> int:
    """The number of examples, if the gradients are those of each."""
    entries = named_leaves(grads)
    sizes = {name: jnp.shape(leaf)[:1] for name, leaf in entries}
    number = next(iter(sizes.values()), ())
    advice = (
        "without outputs_fn, the updates are the gradients of each example, with leaves "
        "(n, *leaf.shape): jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, examples)"
    )
    if not number or not number[0] or set(sizes.values()) != {number}:
        raise ValueError(f"{advice}; got leaves with first axes {sizes}.")
    if params is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), grads)
        try:
            check_like("the gradient of an example", shapes, params)
        except ValueError as error:
            raise ValueError(f"{error} Note that {advice}.") from None
    return number[0]


def _check_memory(
    coordinates: Coordinates, number: int, per_example: int, *, in_memory: int
) -> None:
    """Raises if the rows of a batch and its Gram matrix are larger than the devices' memory."""
    itemsize = jnp.dtype(coordinates.dtype).itemsize
    sizes = [(1 + jnp.iscomplexobj(leaf), *shape_of(leaf)) for leaf in coordinates.leaves]
    width = sum(map(math.prod, sizes))
    gram = _GRAMS * (number * per_example) ** 2 * itemsize
    rows = in_memory * per_example * width * itemsize
    available = local_memory()
    if gram + rows > available:
        raise ValueError(
            f"a batch of {number} examples, each with {per_example} rows of {width} parameters, "
            f"takes {rows:,} bytes for rows and {gram:,} for their Gram matrix, more than the "
            f"{available:,.0f} bytes of the devices: set micro_batch_size, which is the number of "
            "examples whose rows are in memory together, or take fewer examples."
        )


def _checked_weights(weights: Any, number: int, dtype: Any) -> jax.Array | None:
    if weights is None:
        return None
    check_weights(weights, number)
    return jnp.asarray(weights, dtype)


def _as_outputs(values: Any, is_complex: bool, owner: str, dtype: Any) -> jax.Array:
    """Real values of shape (n, k), with real and then imaginary parts for complex outputs."""
    values = jnp.reshape(values, (len(values), -1))
    if jnp.iscomplexobj(values) and not is_complex:
        raise ValueError(
            f"{owner} are real, so targets and cotangents must be real, got {values.dtype}: pass "
            "their real part."
        )
    if is_complex:
        values = jnp.concatenate([jnp.real(values), jnp.imag(values)], axis=1)
    return values if dtype is None else values.astype(dtype)


def _row_coordinates(grads: jax.Array, like: Any, *, is_complex: bool) -> Leaves:
    r"""Rows (n, 1, ...) of a leaf, or (n, 2, ...): real and imaginary part of $g^T (x + i y)$."""
    if not is_inexact(like):
        return []
    if not is_complex:
        return [grads[:, jnp.newaxis]]
    real, imaginary = jnp.real(grads), jnp.imag(grads)
    first = jnp.stack([real, imaginary], axis=1)
    if not jnp.iscomplexobj(like):
        return [first]
    return [first, jnp.stack([-imaginary, real], axis=1)]
