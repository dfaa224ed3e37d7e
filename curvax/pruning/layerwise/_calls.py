"""How a Flax layer (Linen or NNX) reads its inputs: as rows of features for its kernel."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._layouts import KernelLayout
from curvax.pruning.layerwise._gram import PADDINGS, conv_patches

Shape = tuple[int, ...]
_SUBCLASS = "subclass"


def kind_of(layer: Any, kinds: Mapping[Any, str], methods: Sequence[str]) -> str | None:
    """Which of Flax's layers this is; a kind without a reader if its class has own ``methods``."""
    base = next((base for base in kinds if isinstance(layer, base)), None)
    if base is None:
        return None
    if any(getattr(type(layer), name) is not getattr(base, name) for name in methods):
        return _SUBCLASS
    return kinds[base]


class Reader(NamedTuple):
    """The way from a layer's inputs to rows of features; equal ones read alike.

    Attributes:
      layout: what the axes of the layer's kernel are.
      axes: the axes of the inputs that a dense layer sums over, in the order of the kernel's;
        counted from the end where they are negative.
      window: the sizes of a convolution's window; none for a dense layer.
      options: the strides, padding and dilation of a convolution.
    """

    layout: KernelLayout
    axes: tuple[int, ...] = (-1,)
    window: Shape = ()
    options: tuple[tuple[str, Any], ...] = ()

    def rows(self, inputs: jax.Array) -> jax.Array:
        """The inputs as rows, of shape (n, features)."""
        if self.window:
            inputs = conv_patches(inputs, self.window, **dict(self.options))
            return inputs.reshape(-1, math.prod(inputs.shape[-len(self.window) - 1 :]))
        last = range(-len(self.axes), 0)
        inputs = jnp.moveaxis(inputs, self.axes, tuple(last))
        return inputs.reshape(-1, math.prod(inputs.shape[-len(self.axes) :]))


def reader_of(kind: str, layer: Any, kernel_shape: Shape, rank: int) -> Reader | str:
    """How a layer reads its inputs, or why that is not known.

    Args:
      kind: as `kind_of` says, ``"dense"``, ``"general"``, ``"conv"`` or ``"einsum"``.
      layer: a layer of Linen or NNX of that kind.
      kernel_shape: the shape of its kernel among the parameters.
      rank: the number of axes of its inputs.

    Returns:
      The reader, or a reason.
    """
    if kind == _SUBCLASS:
        return "its class overrides methods of the Flax layer"
    if kind == "einsum":
        found = _einsum(layer.einsum_str, rank)
    elif kind == "conv":
        found = _conv(layer)
    elif kind == "general":
        found = _general(layer, rank)
    else:
        found = Reader(KernelLayout(fan_in=(0,), fan_out=(1,)))
    if isinstance(found, str):
        return found
    if len(found.layout.letters) != len(kernel_shape):
        return f"its kernel of shape {kernel_shape} is stacked, for example by nn.scan or vmap"
    return found


def _general(layer: Any, rank: int) -> Reader | str:
    if getattr(layer, "batch_dims", ()) or getattr(layer, "batch_axis", ()):
        return "its kernel has batch axes, each with its own inputs"
    outputs = getattr(layer, "features", None) or layer.out_features
    axes = sorted(axis % rank for axis in _as_tuple(layer.axis))
    split = len(axes)
    last = split + len(_as_tuple(outputs))
    layout = KernelLayout(fan_in=tuple(range(split)), fan_out=tuple(range(split, last)))
    return Reader(layout, tuple(axis - rank for axis in axes))


def _conv(layer: Any) -> Reader | str:
    if layer.feature_group_count != 1:
        return "its convolution has groups, each with its own inputs"
    if any(size != 1 for size in _as_tuple(layer.input_dilation or 1)):
        return "its convolution dilates the inputs"
    if layer.mask is not None:
        return "its convolution has its own mask"
    if isinstance(layer.padding, str) and layer.padding not in PADDINGS:
        return f"its padding {layer.padding!r} is not supported"
    window = _as_tuple(layer.kernel_size)
    last = len(window)
    layout = KernelLayout(spatial=tuple(range(last)), fan_in=(last,), fan_out=(last + 1,))
    options = {
        "strides": _as_tuple(layer.strides or 1, last),
        "padding": _hashable(layer.padding),
        "dilation": _as_tuple(layer.kernel_dilation or 1, last),
    }
    return Reader(layout, window=window, options=tuple(options.items()))


def _einsum(equation: str | None, rank: int) -> Reader | str:
    """Of a contraction of inputs with a kernel, ``"...d,dhk->...hk"``."""
    if equation is None:
        return "its equation is given only in the call"
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    summed = [label for label in kernel if label not in outputs]
    if "." in kernel or any(label in inputs and label in outputs for label in kernel):
        return f"its equation {equation!r} has batch axes in the kernel"
    rest = [label for label in inputs if label not in (*outputs, *summed)]
    if rest or not summed or len(summed) == len(kernel):
        return f"its equation {equation!r} is not a matrix product of rows with the kernel"
    before, _, after = inputs.partition("...")
    places = [
        before.index(x) - rank if x in before else after.index(x) - len(after) for x in summed
    ]
    layout = KernelLayout(
        fan_in=tuple(kernel.index(label) for label in summed),
        fan_out=tuple(axis for axis, label in enumerate(kernel) if label in outputs),
    )
    return Reader(layout, tuple(places))


def _as_tuple(value: int | Sequence[int], length: int = 1) -> Shape:
    return (value,) * length if isinstance(value, int) else tuple(value)


def _hashable(padding: Any) -> Any:
    if isinstance(padding, str | int):
        return padding
    return tuple(pad if isinstance(pad, int) else tuple(pad) for pad in padding)
