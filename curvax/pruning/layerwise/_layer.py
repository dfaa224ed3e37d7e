"""Pruning of a layer that preserves its outputs: SparseGPT, OBC, Wanda, magnitudes."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_range
from curvax._layouts import KernelLayout, kernel_layout
from curvax._trees import wide_dtype
from curvax.fisher.inverse._column_blocks import context_of, on_automatic_mesh
from curvax.pruning._structures import NM
from curvax.pruning._weights import check_fits, check_on_host
from curvax.pruning.layerwise._gram import InputGram, Inputs, input_gram
from curvax.pruning.layerwise._matrix import pruned_matrix, relative_error
from curvax.pruning.layerwise._options import LayerMethod, LayerOptions, LayerUpdate, Order


class LayerResult(NamedTuple):
    r"""A pruned layer.

    Attributes:
      kernel: the kernel, of the shape and dtype of the given one; pruned weights are exactly zero.
      mask: of bool, True for what is kept.
      error: $\|X (W - \hat W)\|^2 / \|X W\|^2$ on the given inputs.
      damping: the $\lambda$ that was added to the diagonal of $X^T X / n$.
      num_rows: the number of inputs $n$.
      num_dead: the number of features that are zero in all inputs; their weights are pruned first.
    """

    kernel: jax.Array
    mask: jax.Array
    error: float
    damping: float
    num_rows: int
    num_dead: int

    @property
    def sparsity(self) -> float:
        """The share of weights that are pruned."""
        return 1 - int(np.count_nonzero(self.mask)) / self.mask.size


def prune_layer(
    kernel: jax.Array,
    inputs: Inputs,
    sparsity: float | None,
    *,
    method: LayerMethod = "obs",
    update: LayerUpdate | None = None,
    structure: NM | None = None,
    mask: jax.Array | None = None,
    damping: float = 1e-2,
    block_size: int = 128,
    order: Order = "natural",
    layout: KernelLayout | str = "auto",
) -> LayerResult:
    r"""Prunes the kernel of a layer so that its outputs change little on the given inputs.

    Optimal Brain Surgeon on $\|X (W - \hat W)\|^2$, whose Hessian is the same for all output
    units, $H = X^T X / n + \lambda I$; let $H^{-1} = U^T U$ with $U$ upper triangular:

    | method | pruned are the lowest | update by default |
    |---|---|---|
    | ``"obs"`` | $w^2 / U_{jj}^2$, feature after feature (SparseGPT) | ``"joint"`` |
    | ``"greedy"`` | $w^2 / [H^{-1}]_{jj}$, one at a time for each unit (OBC) | ``"joint"`` |
    | ``"wanda"`` | $\lvert w \rvert \lVert x_j \rVert$ of each unit | ``"none"`` |
    | ``"magnitude"`` | $\lvert w \rvert$ of the layer | ``"none"`` |

    and the kept weights change by

    | update | |
    |---|---|
    | ``"sweep"`` | later features compensate for each feature's error, as published |
    | ``"joint"`` | the least squares solution for the pruned weights, by conjugate gradients |
    | ``"none"`` | nothing |

    Without a structure, ``"obs"`` prunes the same share of each block of ``block_size`` features,
    over all output units, and ``"greedy"`` compares all units of the layer. Input features that
    are zero in all inputs ($H_{jj} = 0$) are pruned first. ``"greedy"`` takes time
    $O(\text{features}^3 \cdot \text{outputs})$: use it for layers of a few hundred features. The
    computations are compiled, but the function runs on the host and does not work under ``jit``.

    With ``"obs"`` the sweep chooses the weights as published, and moves only later features; the
    joint update then solves for all kept weights. In small trained networks this left a tenth to
    nine tenths of the sweep's error, at the cost of some tens of products of $H$ with the kernel.

    Args:
      kernel: the weights, in any layout: ``(in, out)``, ``(in, heads, head_dim)``, ``HWIO``.
      inputs: what the layer sees: an array ``(..., *fan_in)``, an iterable of such arrays, summed
        into $H$ one at a time, or an `InputGram`. For a convolution ``fan_in`` is
        ``(*window, in)``: `conv_patches`.
      sparsity: the final fraction of zeros, in [0, 1), rounded down to whole weights, including
        those already pruned by ``mask``. With N:M, None or $1 - n/m$. Without N:M, None prunes only
        what ``mask`` says and updates the kept weights.
      method: which weights are pruned, see above.
      update: how the kept weights change, see above.
      structure: None for single weights; ``NM(n, m)`` keeps at most n of each m consecutive weights
        along the fan-in.
      mask: a bool for each weight, False for those to prune in any case; the update compensates for
        them too.
      damping: $\lambda$ as a fraction of the mean of the diagonal of $X^T X / n$. If the
        factorization fails, it is raised until it succeeds, with a warning.
      block_size: the number of features per block of ``"obs"``.
      order: the order of the features (with N:M, of their groups) in a sweep: ``"natural"``, or by
        decreasing ``"diagonal"`` of $H$.
      layout: the roles of the axes of ``kernel``, in the letters (``"IOO"``) of `KernelLayout`;
        ``"auto"`` knows ``(in, out)`` and ``HWIO`` with a square window.

    Returns:
      The kernel, its mask, the relative error of the outputs, and statistics of the inputs.

    Raises:
      ValueError: if an option is out of range, shapes do not match, an entry is not finite, or
        ``sparsity`` is below that of ``mask`` or differs from that of N:M.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> kernel = jnp.array([[1.0], [1.1]])
      >>> inputs = jnp.array([[1.0, 1.0], [2.0, 2.1], [0.0, 0.1]])  # alike
      >>> result = pruning.prune_layer(kernel, inputs, 0.5)
      >>> print(result.kernel.round(2).ravel(), round(result.error, 4))
      [0.   2.05] 0.0005

    References:
      Frantar and Alistarh, [SparseGPT](https://arxiv.org/abs/2301.00774), 2023.
      Frantar, Singh and Alistarh, [Optimal Brain Compression](https://arxiv.org/abs/2208.11580),
      2022.
      Sun et al., [Wanda](https://arxiv.org/abs/2306.11695), 2023.
    """
    options = LayerOptions(method, update, structure, damping, block_size, order)
    options.check()
    check_on_host((kernel, mask))
    kernel, axes = jnp.asarray(kernel), layer_layout(jnp.shape(kernel), layout)
    check_layer("kernel", kernel, sparsity, options, axes, mask)
    if mask is not None and not np.any(mask):
        raise ValueError("mask keeps no weight of kernel: nothing is left to prune or fit.")
    sizes = tuple(kernel.shape[axis] for axis in axes.spatial + axes.fan_in)
    gram = inputs if isinstance(inputs, InputGram) else input_gram(inputs, sizes)
    if len(gram.matrix) > gram.num_rows:
        warnings.warn(
            f"inputs have only {gram.num_rows} rows for {len(gram.matrix)} features, which leave "
            "the fit of the kept weights underdetermined: pass more inputs.",
            stacklevel=2,
        )
    with context_of(kernel, gram.matrix):
        return pruned_layer(kernel, gram, sparsity, options, axes, mask)


def layer_layout(shape: tuple[int, ...], layout: KernelLayout | str) -> KernelLayout:
    """The layout of a kernel, each of whose axes is known."""
    if layout == "auto":
        found = kernel_layout("kernel", shape)
    else:
        found = KernelLayout.from_letters(layout) if isinstance(layout, str) else layout
    if found is None or found.unknown or not (found.fan_in and found.fan_out):
        raise ValueError(
            f"layout={layout!r} does not determine the axes of a kernel of shape {shape}: name "
            "them, 'IO' for (in, out), 'IOO' for (in, heads, head_dim), 'HWIO' for a convolution."
        )
    if found.stacked:
        raise ValueError(
            f"layout {found.letters!r} has stacked axes, whose members have their own inputs: "
            "prune them one by one."
        )
    if len(found.letters) != len(shape):
        raise ValueError(
            f"layout {found.letters!r} names {len(found.letters)} axes, the kernel of shape "
            f"{shape} has {len(shape)}: give a letter for each axis."
        )
    return found


def check_layer(
    path: str,
    kernel: Any,
    sparsity: float | None,
    options: LayerOptions,
    axes: KernelLayout,
    mask: Any | None,
) -> None:
    """Raises unless a kernel can be pruned as asked, before its inputs are read."""
    if not jnp.issubdtype(kernel.dtype, jnp.floating) or not kernel.size:
        raise ValueError(f"{path} must hold real weights, got {kernel.dtype} {kernel.shape}.")
    if not bool(jnp.all(jnp.isfinite(kernel))):
        raise ValueError(f"{path} must be finite, got NaN or infinity among its weights.")
    if mask is not None and (mask.shape != kernel.shape or mask.dtype != bool):
        raise ValueError(
            f"mask must be bool with {path}'s shape {kernel.shape}, True for weights that are "
            f"kept, got {mask.dtype} {mask.shape}."
        )
    if sparsity is not None:
        check_range("sparsity", sparsity, low=0.0, high=1.0, open_high=True)
        if _target(sparsity, kernel.size) == kernel.size:
            raise ValueError(
                f"sparsity={sparsity} would leave none of the {kernel.size} weights of {path}: "
                "lower it."
            )
    if options.structure is not None:
        _check_n_of_m(path, kernel.shape[axes.fan_in[-1]], sparsity, options.structure)
    elif sparsity is None and mask is None:
        raise ValueError(
            "sparsity=None needs a mask, to update its kept weights, or structure=NM(n, m)."
        )
    elif sparsity is not None and mask is not None:
        present = 1 - int(np.count_nonzero(mask)) / mask.size
        if _target(sparsity, mask.size) < round(present * mask.size):
            raise ValueError(
                f"sparsity={sparsity:.6g} of {path} is below the {present:.6g} of its mask, but "
                "pruned weights stay pruned: raise it, or use sparsity=None to fit what mask keeps."
            )


def _check_n_of_m(path: str, fan_in: int, sparsity: float | None, structure: NM) -> None:
    share = 1 - structure.n / structure.m
    if sparsity is not None and abs(sparsity - share) > 1e-9:
        raise ValueError(
            f"{structure} prunes {share:.6g} of a layer, got sparsity={sparsity}: pass None, or "
            "omit the structure."
        )
    if fan_in % structure.m:
        raise ValueError(
            f"{structure} needs a fan-in divisible by {structure.m}, got {fan_in} at {path}: "
            "exclude that layer, or choose another m."
        )


def _target(sparsity: float, size: int) -> int:
    # The margin undoes the rounding of a product such as 0.29 * 100.
    return math.floor(sparsity * size + 1e-6)


def pruned_layer(
    kernel: jax.Array,
    gram: InputGram,
    sparsity: float | None,
    options: LayerOptions,
    axes: KernelLayout,
    mask: Any | None,
) -> LayerResult:
    """`prune_layer` of checked arguments, in `context_of` the kernel and the Gram matrix."""
    dtype = jnp.promote_types(wide_dtype(kernel), gram.matrix.dtype)
    permutation = axes.spatial + axes.fan_in + axes.fan_out
    num_features = math.prod(kernel.shape[axis] for axis in axes.spatial + axes.fan_in)
    if gram.matrix.shape != (num_features, num_features):
        raise ValueError(
            f"inputs have {len(gram.matrix)} features, but the kernel of shape {kernel.shape} "
            f"takes {num_features}: pass the inputs of this layer."
        )

    def as_matrix(array: Any) -> Any:
        array = on_automatic_mesh(array)
        return array.transpose(permutation).reshape(num_features, -1)

    def as_kernel(matrix: jax.Array) -> jax.Array:
        shape = [kernel.shape[axis] for axis in permutation]
        array = matrix.reshape(shape).transpose(np.argsort(permutation))
        return jax.device_put(array, getattr(kernel, "sharding", None))

    weights = as_matrix(kernel).astype(dtype)
    matrix = on_automatic_mesh(gram.matrix).astype(dtype)
    dead = np.asarray(jnp.diagonal(matrix) == 0)
    if not bool(jnp.all(jnp.isfinite(matrix))):
        raise ValueError("inputs must be finite, got NaN or infinity in their Gram matrix.")
    if bool(jnp.any(jnp.diagonal(matrix) < 0)):
        raise ValueError("inputs are not a Gram matrix: its diagonal has negative entries.")
    if dead.all():
        raise ValueError("inputs are all zero, so no weight of this layer matters.")
    pruned = np.zeros(weights.shape, bool) if mask is None else ~np.asarray(as_matrix(mask))
    target = None
    if options.structure is not None or sparsity is not None:
        target = _target(sparsity or 0.0, kernel.size)
        room = kernel.size if options.structure else target - np.count_nonzero(pruned)
        idle = np.flatnonzero(~pruned & dead[:, np.newaxis])
        pruned.flat[idle[: max(0, room)]] = True
    new, chosen, damping = pruned_matrix(weights, matrix, pruned, target, options)
    check_fits("kernel", new, kernel.dtype)
    rounded = new.astype(kernel.dtype)
    return LayerResult(
        as_kernel(rounded),
        as_kernel(~jnp.asarray(chosen)),
        float(relative_error(weights, rounded.astype(dtype), matrix)),
        float(damping),
        gram.num_rows,
        int(dead.sum()),
    )
