"""The roles of a leaf's axes (fan-in, fan-out, spatial, stacked), from its path and shape.

Layouts are written in the letters of ``jax.lax.conv_dimension_numbers``: ``HWIO`` is a convolution
kernel of Flax, ``OIHW`` one of Equinox or PyTorch. ``L`` is a stacked axis (layers of ``nn.scan``,
members, experts), ``?`` an axis that path and shape do not determine. Names count more than the
rank, and the module's name more than the sizes of axes; what remains unclear is left to the user's
``layout``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from curvax._checks import check_choice, check_pattern

Axes = tuple[int, ...]
Shape = tuple[int, ...]

_FIELDS = {"I": "fan_in", "O": "fan_out", "L": "stacked", "?": "unknown"} | dict.fromkeys(
    "DHW", "spatial"
)
_LETTERS = "I, O, D, H, W, L and ?"
LayoutName = Literal["auto", "flax", "out_first", "haiku"]


class KernelLayout(NamedTuple):
    """The role of each axis of a kernel; each axis is in exactly one tuple.

    Attributes:
      fan_in: input axes, over which an output unit sums.
      fan_out: output axes.
      spatial: axes of a convolution's window.
      stacked: axes of independent members: layers of ``nn.scan``, ensembles, experts.
      unknown: axes whose role path and shape do not determine. They are never averaged over, and
        structured pruning rejects the leaf.

    Example:
      >>> import curvax
      >>> curvax.KernelLayout.from_letters("LHWIO")
      KernelLayout(fan_in=(3,), fan_out=(4,), spatial=(1, 2), stacked=(0,), unknown=())
    """

    fan_in: Axes = ()
    fan_out: Axes = ()
    spatial: Axes = ()
    stacked: Axes = ()
    unknown: Axes = ()

    @classmethod
    def from_letters(cls, letters: str) -> "KernelLayout":
        """Builds a layout from one letter per axis.

        Args:
          letters: ``I`` fan-in, ``O`` fan-out, ``D``, ``H``, ``W`` spatial, ``L`` stacked, ``?``
            unknown; for example ``"HWIO"``.

        Returns:
          The layout.

        Raises:
          ValueError: if ``letters`` contains any other letter.
        """
        axes: dict[str, Axes] = {}
        for axis, letter in enumerate(letters):
            if letter not in _FIELDS:
                raise ValueError(f"a layout consists of the letters {_LETTERS}, got {letters!r}.")
            axes[_FIELDS[letter]] = (*axes.get(_FIELDS[letter], ()), axis)
        return cls(**axes)

    @property
    def letters(self) -> str:
        """The layout as one letter per axis."""
        letters = dict.fromkeys(self.fan_in, "I") | dict.fromkeys(self.fan_out, "O")
        letters |= dict.fromkeys(self.stacked, "L") | dict.fromkeys(self.unknown, "?")
        letters |= dict(zip(self.spatial, _window(len(self.spatial)), strict=True))
        return "".join(letters[axis] for axis in sorted(letters))


Rule = Callable[[str, Shape], KernelLayout | str | None]
Layout = LayoutName | Mapping[str, KernelLayout | str | None] | Rule


def check_layout(layout: Layout) -> None:
    """Raises unless ``layout`` is a preset, a mapping of patterns or a callable."""
    if isinstance(layout, Mapping):
        for pattern, value in layout.items():
            check_pattern("layout", pattern)
            if isinstance(value, str) and value not in get_args(LayoutName):
                KernelLayout.from_letters(value.removesuffix("..."))
    elif not callable(layout):
        others = ("a mapping of patterns", "a function of path and shape")
        check_choice("layout", layout, (*get_args(LayoutName), *others))


def kernel_layout(path: str, shape: Shape, layout: Layout = "auto") -> KernelLayout | None:
    """The layout of a leaf, or None where it is not a kernel: a bias, a scale, an embedding."""
    found: Any = layout
    if isinstance(layout, Mapping):
        matches = (value for pattern, value in layout.items() if re.search(pattern, path))
        found = next(matches, "auto")
    elif callable(layout):
        found = layout(path, shape)
    shown = found
    if isinstance(found, str):
        found = KernelLayout.from_letters(_resolved(found, path, shape))
    if found is None or found == KernelLayout():
        return None
    if not _fits(found, len(shape)):
        raise ValueError(
            f"layout gives {shown!r} for {path}, which has shape {shape}: name each of its "
            f"{len(shape)} axes once ('HWIO', or 'L...' if only the first is stacked), use None "
            "for a leaf that is not a kernel, or narrow the pattern."
        )
    return found


def is_no_kernel(path: str, rank: int) -> bool:
    """Whether the names in a path say bias, scale, norm or embedding, whatever the sizes."""
    name, modules = _names(path)
    if _is_called_kernel(name):
        return False
    if not _is_called_weight(name):
        return bool(_words(name) & (_NO_KERNEL | _NORM | _EMBEDDING)) and "lora" not in _words(name)
    module = _words(modules[0]) if modules else set()
    norm = module & _NORM and not module & {*_CONV, "weight", "spectral"}
    # A patch embedding is a convolution; Haiku's tables are not called w.
    table = module & _EMBEDDING and "weight" in name and rank < 4
    return bool(norm or table)


# Words of the names, whole ones: "convnext" is not "conv".
_CONV = {"conv", "convs", "convolution", "deconv", "dwconv", "upconv", "downconv"}
_DENSE = {"dense", "linear", "fc"}
_STACK = {"expert", "experts", "moe", "ensemble"}
_NOT_CONV = {
    *{"attention", "attn", "att", "mha", "mhsa", "multihead", "einsum", "general", "lora"},
    *{"mlp", "ffn", "wi", "wo", "pos", "position", "positional", "rel", "relative", *_DENSE},
}
_PROJECTIONS = {"query", "key", "value", "qkv", "kv", "q", "k", "v", "wq", "wk", "wv"}
_OUTPUTS = {"out", "output", "proj", "projection"}  # of heads, or a convolution of odd width
_PATCHES = {"patch", "patches", "embed", "embedding", "embeddings"}
_NORM = {"norm", "ln", "bn", "gn", "layernorm", "batchnorm", "groupnorm", "rmsnorm"}
_EMBEDDING = {"embed", "embedding", "embeddings", "emb", "wte", "wpe", "pos", "position"}
_NO_KERNEL = {
    *{"b", "bias", "biases", "scale", "offset", "gamma", "beta", "g", "slope", "mean", "var"},
    *{"positional", "rel", "relative", "table", "token", "cls"},
}
_TRANSPARENT = {"value", "raw_value"}  # the array of a box that became a dictionary
_WRAPPERS = {"layer", "layer_instance", "~"}  # of WeightNorm and SpectralNorm, and Haiku's own
_GATES = {"hh", "ih", "hidden_to_hidden", "input_to_hidden"}  # convolutions of a ConvLSTM
_LARGEST_WINDOW = 11  # of a convolution not named as one
_TRANSFORM = "(?:Scan|Vmap|Checkpoint|Remat|Jit)(?=[A-Z])"  # prefixes of Linen's automatic names
_LINEN_ATTENTION = r"(?:MultiHeadDotProduct|MultiHead|Self)Attention_\d+$"


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _names(path: str) -> tuple[str, list[str]]:
    """The leaf's own name, and the names of the modules around it, innermost first.

    List indices and wrappers add nothing, and the convolutions of a ConvLSTM take the cell's name.
    """
    parts = [part for part in re.split(r"[/.]", path) if not part.isdigit()] or [path]
    if len(parts) > 1 and parts[-1] in _TRANSPARENT:
        parts.pop()
    *modules, name = parts
    modules = [module for module in reversed(modules) if module not in _WRAPPERS]
    if len(modules) > 1 and modules[0] in _GATES and _words(modules[1]) & _CONV:
        modules.pop(0)
    return name, modules


def _is_called_kernel(name: str) -> bool:
    return "kernel" in _words(name) and not _words(name) & _NO_KERNEL


def _is_called_weight(name: str) -> bool:
    return re.fullmatch(r"(\w+_)?weight(_ih|_hh|_v)?(_l\d+)?|w(_[a-z])?", name) is not None


def _resolved(letters: str, path: str, shape: Shape) -> str:
    """The letters of a preset; a trailing ``...`` stands for a guess."""
    if letters in get_args(LayoutName):
        return _guess(letters, path, shape)
    if not letters.endswith("..."):
        return letters
    lead = letters.removesuffix("...")
    rest = _guess("auto", path, shape[len(lead) :], all_known=True)
    return lead + rest if rest else ""


def _guess(preset: str, path: str, shape: Shape, all_known: bool = False) -> str:
    """The letters of a leaf, none if it is not a kernel; ``all_known`` if no axis is stacked."""
    if len(shape) < 2 or is_no_kernel(path, len(shape)):
        return ""
    name, modules = _names(path)
    stacked = 0 if all_known else _stacked_by_transforms(modules, len(shape))
    lead, rest = "L" * stacked, shape[stacked:]
    out_first = preset == "out_first"
    if not (_is_called_kernel(name) or _is_called_weight(name)):
        modules = [name, *modules]
        if preset == "auto" and "lora" not in _words(name):
            return lead + _nameless(_words(" ".join(modules[:2])), rest)
    elif preset == "auto" and "weight" in name:
        out_first = not _is_in_first(rest)
    module = _words(modules[0]) if modules else set()
    letters = _by_name(module, modules, len(rest), out_first)
    if letters is None:
        letters = _by_shape(module, modules, rest, out_first)
        if "W" in letters and (stacked or all_known):
            letters = _conv(len(rest) - 2, out_first)
    # Haiku keeps transposed convolutions (*spatial, out, in).
    if "transpose" in module and (preset == "haiku" or (preset == "auto" and name == "w")):
        letters = letters.translate(str.maketrans("IO", "OI"))
    # Parameters that nn.scan broadcasts have no stacked axis; with equal sizes one cannot tell.
    if letters == "WIO" and stacked == 1 and shape[0] == shape[1]:
        lead = "?"
    return lead + letters


def _stacked_by_transforms(modules: list[str], rank: int) -> int:
    """How many stacked axes the names of transforms imply: ``VmapConv_0``, ``__layer_stack``."""
    automatic = [name for name in modules if re.search(r"_\d+$", name)]
    prefixes = [re.match(f"(?:{_TRANSFORM})*", name) for name in automatic]
    linen = sum(len(re.findall("Scan|Vmap", match[0])) for match in prefixes if match)
    haiku = sum("layer_stack" in name for name in modules)
    return min(linen + haiku, rank - 2)


def _by_name(module: set[str], modules: list[str], rank: int, out_first: bool) -> str | None:
    """Letters where the names suffice; None where the sizes are needed too."""
    matrix = _conv(0, out_first)
    if rank == 2:
        return matrix
    inner, outer = (*modules[:2], "", "")[:2]
    if re.search("conv_?local", inner.lower()):
        return "L" * (rank - 2) + matrix  # each position has its own weights
    dims = re.search(r"conv_?([123])_?d(?:lstm)?(?![a-z])", inner.lower())
    if dims and int(dims[1]) <= rank - 2:
        return "L" * (rank - 2 - int(dims[1])) + _conv(int(dims[1]), out_first)
    stack = _is_stack(modules)
    if module & _CONV and not (rank == 3 and stack):
        return _conv(1, out_first) if rank == 3 else None
    if re.search(_LINEN_ATTENTION, outer) and inner in {"query", "key", "value", "out"}:
        heads = "IIO" if inner == "out" else "IOO"  # (in, heads, head_dim) and back
        return "L" * (rank - 3) + heads
    if module & _DENSE and "general" not in module:
        return "L" * (rank - 2) + matrix
    if rank == 3:
        return "L" + matrix if stack and not module & {*_CONV, "einsum"} else "???"
    return None


def _by_shape(module: set[str], modules: list[str], shape: Shape, out_first: bool) -> str:
    """Letters of a kernel of four or more axes, ``?`` where another reading is as likely."""
    rank, called = len(shape), bool(module & _CONV)
    near, stack = _words(" ".join(modules[:2])), _is_stack(modules)
    first, second = window = shape[-2:] if out_first else shape[-4:-2]
    patches = bool(near & _PATCHES)
    heads = module & _PROJECTIONS or (module & _OUTPUTS and first % 2 == 0 and not patches)
    if not called and (near & _NOT_CONV or heads or stack):
        return "?" * rank
    square = first == second and (called or patches or first <= _LARGEST_WINDOW)
    if square and not (rank == 4 and stack):
        return _square(shape, out_first)
    if not called:
        return "?" * rank
    if out_first:
        return "?" * (rank - 1) + "W"
    # An axis of one entry may be averaged, whatever it means.
    flat = rank == 4 and 1 in window and not stack
    return _conv(2, False) if flat else "?" * (rank - 3) + "WIO"


def _is_stack(modules: list[str]) -> bool:
    """Whether a module's name says one of several: experts, members of an ensemble."""
    return any(_words(module) & _STACK for module in modules)


def _square(shape: Shape, out_first: bool) -> str:
    """A square window; with more than four axes, a stack of them or a window of more axes."""
    rank = len(shape)
    if rank == 4:
        return _conv(2, out_first)
    if not out_first:
        return "?" * (rank - 4) + "HWIO"
    stack = rank == 5 and shape[2] > _LARGEST_WINDOW
    return "LOIHW" if stack else "?" * (rank - 2) + "HW"


def _is_in_first(shape: Shape) -> bool:
    """Whether a ``weight`` has the sizes of (h, w, in, out), not of (out, in, h, w)."""
    if len(shape) != 4 or shape[2] == shape[3] or shape[0] != shape[1]:
        return False
    odd = shape[0] in range(3, _LARGEST_WINDOW + 1, 2)
    return odd and (1 not in shape[2:] or max(shape[2:]) > _LARGEST_WINDOW)


def _nameless(words: set[str], shape: Shape) -> str:
    """A leaf with an unknown name: a convolution only if its sizes confirm it."""
    fits = [pair[0] == pair[1] <= _LARGEST_WINDOW for pair in (shape[:2], shape[-2:])]
    if len(shape) != 4 or not words & _CONV or fits[0] == fits[1]:
        return "?" * len(shape)
    return _conv(2, out_first=fits[1])


def _conv(spatial: int, out_first: bool) -> str:
    window = _window(spatial)
    return "OI" + window if out_first else window + "IO"


def _window(spatial: int) -> str:
    return "DHW"[3 - spatial :] if spatial <= 3 else "DHW".rjust(spatial, "D")


def _fits(found: Any, rank: int) -> bool:
    if not isinstance(found, KernelLayout) or not all(isinstance(axes, tuple) for axes in found):
        return False
    axes = [axis for axes in found for axis in axes]
    return len(axes) == rank and set(axes) == set(range(rank))
