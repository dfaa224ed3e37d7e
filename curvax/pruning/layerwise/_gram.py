"""The Gram matrix of a layer's inputs, summed as they stream; patches for convolutions."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_size
from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.window._dense import replicated

Results = TypeVar("Results")
Shape = tuple[int, ...]
Padding = str | int | Sequence[int | tuple[int, int]]
Inputs = Any  # an array, an iterable of arrays, or an InputGram

PADDINGS = ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


class InputGram(NamedTuple):
    r"""The Gram matrix of a layer's inputs, $X^T X / n$.

    Attributes:
      matrix: the mean of $x x^T$ over the inputs, of shape (features, features).
      num_rows: the number $n$ of inputs: examples, tokens, or positions of a convolution.
    """

    matrix: jax.Array
    num_rows: int


def input_gram(inputs: Inputs, fan_in: int | Shape | None = None) -> InputGram:
    r"""Computes $X^T X / n$ over the inputs of a layer, in float32 or wider.

    One array is held at a time, so a generator may yield more activations than fit in memory.

    Args:
      inputs: an array of shape ``(..., *fan_in)`` or ``(..., features)``, or an iterable of them;
        leading axes, such as batch and positions, are rows.
      fan_in: the sizes of the kernel axes that are summed over; None for the last axis only.

    Returns:
      The Gram matrix and the number of rows.

    Raises:
      ValueError: if a shape does not match, an entry is not finite, or there are no rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> gram = pruning.input_gram(jnp.eye(2) * i for i in (1.0, 3.0))
      >>> print(gram.matrix, gram.num_rows)
      [[2.5 0. ] [0.  2.5]] 4
    """
    total, num_rows = None, 0
    fan_in = (fan_in,) if isinstance(fan_in, int) else fan_in
    for number, array in enumerate(_arrays(inputs)):
        array = jnp.asarray(array)
        size = _num_features(array, fan_in)
        fan_in = (size,) if fan_in is None else fan_in
        total = _gram_of_array(array, size) if total is None else _added(total, array, size)
        num_rows += array.size // size
        if not bool(jnp.isfinite(jnp.trace(total))):
            raise ValueError(
                f"inputs must be finite, got NaN or infinity in array {number}: skip that batch, "
                "or check what overflows before the layer."
            )
    if total is None or not num_rows:
        raise ValueError(
            "inputs have no rows: pass an array (..., features) or an iterable of such arrays; a "
            "generator can be read only once."
        )
    return InputGram(total / num_rows, num_rows)


def _arrays(inputs: Inputs) -> Iterable[Any]:
    if hasattr(inputs, "shape"):
        return (inputs,)
    if isinstance(inputs, Iterable):
        return inputs
    raise ValueError(
        f"inputs must be an array, an iterable of arrays or an InputGram, got {type(inputs)!r}."
    )


def _num_features(array: jax.Array, fan_in: Shape | None) -> int:
    """The number of features of inputs of shape ``(..., *fan_in)`` or ``(..., features)``."""
    shape = array.shape
    wanted = shape[-1:] if fan_in is None else fan_in
    size = math.prod(wanted)
    if not shape or (shape[-len(wanted) :] != wanted and shape[-1] != size):
        patches = (
            "; a convolution's inputs are its patches: pruning.conv_patches(images, window, ...)"
            if fan_in is not None and len(fan_in) > 2
            else ""
        )
        raise ValueError(
            f"inputs must end in the kernel's fan-in axes, (..., {str(wanted)[1:-1]}) or "
            f"(..., {size}), got shape {shape}{patches}."
        )
    if not size:
        raise ValueError(f"inputs must have at least one feature, got shape {shape}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"inputs must be real, got {array.dtype}.")
    return size


@jax.jit
def gram_of(rows: jax.Array) -> jax.Array:
    """$X^T X$ of rows of shape (n, features), in float32 or wider, of integers too."""
    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return jnp.matmul(wide.T, wide, precision=HIGHEST)


@functools.partial(jax.jit, static_argnums=1)
def _gram_of_array(array: jax.Array, size: int) -> jax.Array:
    return on_automatic_axes(lambda x: gram_of(x.reshape(-1, size)), array)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _added(total: jax.Array, array: jax.Array, size: int) -> jax.Array:
    return total + _gram_of_array(array, size)


def on_automatic_axes(function: Callable[..., Results], *arrays: jax.Array) -> Results:
    """The results of a function that cuts and sums explicitly sharded arrays along any axes."""
    shardings = filter(None, map(replicated, arrays))
    if (whole := next(shardings, None)) is None:
        return function(*arrays)
    with jax.sharding.use_abstract_mesh(whole.mesh.abstract_mesh):
        return jax.sharding.auto_axes(function, out_sharding=whole)(*arrays)


def conv_patches(
    images: jax.Array,
    window: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Extracts the patches that a convolution sees, on which it acts as a dense layer.

    Args:
      images: of shape ``(..., *spatial, channels)``, channels last as in Flax.
      window: the sizes of the kernel's window.
      strides: the strides of the window.
      padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"`` as in Flax, or
        the numbers of zeros before and after each axis.
      dilation: the dilation of the kernel.

    Returns:
      An array of shape ``(..., *positions, *window, channels)``: the inputs for a kernel of layout
      ``HWIO``.

    Raises:
      ValueError: if the padding is unknown, or images have too few axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> patches = pruning.conv_patches(jnp.ones((8, 6, 6, 3)), (3, 3), strides=2)
      >>> patches.shape
      (8, 3, 3, 3, 3, 3)
    """
    rank = len(tuple(window))
    for size in window:
        check_size("each size of window", size)
    if jnp.ndim(images) < rank + 1:
        raise ValueError(
            f"images must have {rank} spatial axes and channels last for a window "
            f"{tuple(window)}, got shape {jnp.shape(images)}."
        )
    steps, dilations = _each(strides, rank), _each(dilation, rank)
    lead = images.ndim - rank - 1
    images = _padded(images, window, steps, dilations, padding, lead)
    sizes = images.shape[lead:-1]
    spans = [(width - 1) * by + 1 for width, by in zip(window, dilations, strict=True)]
    counts = [(n - span) // by + 1 for n, span, by in zip(sizes, spans, steps, strict=True)]
    # Slices rather than conv_general_dilated_patches: exact, and grouped convolutions are slow.
    patches = [
        _slice(images, offset, counts, steps, dilations, lead) for offset in np.ndindex(*window)
    ]
    stacked = jnp.stack(patches, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *window, stacked.shape[-1])


def _each(value: int | Sequence[int], rank: int) -> Shape:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _slice(
    images: jax.Array, offset: Shape, counts: Sequence[int], steps: Shape, by: Shape, lead: int
) -> jax.Array:
    """The pixel at one offset of the window, for all positions."""
    spatial = [
        slice(at * d, at * d + (count - 1) * step + 1, step)
        for at, d, count, step in zip(offset, by, counts, steps, strict=True)
    ]
    return images[(slice(None),) * lead + tuple(spatial)]


def _padded(
    images: jax.Array,
    window: Sequence[int],
    steps: Shape,
    dilations: Shape,
    padding: Padding,
    lead: int,
) -> jax.Array:
    spans = [(width - 1) * by + 1 for width, by in zip(window, dilations, strict=True)]
    mode = "constant"
    if isinstance(padding, str) and padding in ("CIRCULAR", "REFLECT"):
        pads = [((span - 1) // 2, span // 2) for span in spans]
        mode = "wrap" if padding == "CIRCULAR" else "reflect"
    elif padding == "CAUSAL":
        pads = [(spans[0] - 1, 0)]
    elif isinstance(padding, str) and padding in ("SAME", "VALID"):
        sizes = images.shape[lead:-1]
        pads = [(int(a), int(b)) for a, b in jax.lax.padtype_to_pads(sizes, spans, steps, padding)]
    elif isinstance(padding, str):
        names = ", ".join(map(repr, PADDINGS))
        raise ValueError(f"padding must be one of {names} or numbers, got {padding!r}.")
    else:
        each = [padding] * len(spans) if isinstance(padding, int) else padding
        pads = [(pad, pad) if isinstance(pad, int) else (pad[0], pad[1]) for pad in each]
    if len(pads) != len(spans):
        raise ValueError(
            f"padding must name each of the window's {len(spans)} axes once, got {padding!r}."
        )
    return jnp.pad(images, [(0, 0)] * lead + pads + [(0, 0)], mode=mode)
