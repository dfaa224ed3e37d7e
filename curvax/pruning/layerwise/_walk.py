"""A walk over the layers of a Flax model: each is pruned with the inputs that pruned ones give."""

import collections
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_choice, check_range, warn_of_batch_stats
from curvax._extras import from_extra
from curvax._progress import progress_bar
from curvax._trees import PyTree, Select, Tree, named_leaves
from curvax.fisher.inverse._column_blocks import context_of
from curvax.pruning._structures import NM, check_structure
from curvax.pruning._targets import erk_sparsities, members_by_pattern
from curvax.pruning._weights import (
    Leaf,
    Skipped,
    check_mask,
    check_not_tied,
    check_on_host,
    chosen_leaves,
    is_kernel,
)
from curvax.pruning.layerwise._gram import InputGram
from curvax.pruning.layerwise._layer import LayerResult, check_layer, pruned_layer
from curvax.pruning.layerwise._linen import LinenModel
from curvax.pruning.layerwise._model import Arguments, Call, Calls, Model, Sums
from curvax.pruning.layerwise._nnx import NNXModel
from curvax.pruning.layerwise._options import (
    LayerDistribution,
    LayerMethod,
    LayerOptions,
    LayerUpdate,
    Order,
)
from curvax.pruning.layerwise._result import LayersResult, PrunedLayer

LayerSparsities = float | Mapping[str, float | None] | None

_LARGEST_MISMATCH = 0.02  # a kernel cast to bfloat16 is off by 0.004


def prune_layers(
    model: Any,
    params: Tree | None,
    batches: Iterable[Any],
    sparsity: LayerSparsities,
    *,
    variables: Mapping[str, Any] | None = None,
    call: str | Callable[..., Any] | None = None,
    method: LayerMethod = "obs",
    update: LayerUpdate | None = None,
    distribution: LayerDistribution | None = None,
    structure: NM | None = None,
    mask: PyTree | None = None,
    select: Select = is_kernel,
    damping: float = 1e-2,
    block_size: int = 128,
    order: Order = "natural",
    progress: bool = False,
) -> LayersResult[Tree]:
    r"""Prunes a Flax model layer by layer, in call order.

    `prune_layer` prunes each layer with the inputs that the model gives it on ``batches`` after
    the layers before it are pruned. A layer that is called several times uses all of its inputs.
    Consecutive layers with the same input array, such as query, key and value, share one pass.

    Kernels of ``Dense``, ``DenseGeneral`` (those inside attention too), ``Conv`` and ``Einsum`` of
    Linen, and of ``Linear``, ``LinearGeneral``, ``Conv`` and ``Einsum`` of NNX are pruned. Inputs
    cannot be captured inside ``nn.scan`` or ``nn.vmap``, for a custom module that holds its own
    kernel, or in NNX inside any transform. Such layers are unchanged, and listed in ``unseen`` and
    in a warning.

    For each layer the model up to that layer is compiled and runs over the batches; only the sums
    $X^T X$ are kept. A model of $L$ layers runs about $L / 2$ times over the batches, which are
    iterated again for each layer.

    Args:
      model: a Linen module, or an NNX module, in evaluation mode; it is not changed.
      params: the parameters: for Linen ``variables["params"]``; for NNX None for the model's own,
        or ``nnx.state(model, nnx.Param)``. `LayersResult.params` has the same structure:
        ``nnx.update(model, result.params)``.
      batches: an iterable of the arguments of the call: for each batch a tuple or list of them, or
        a single one; pass all inputs at once as ``[inputs]``. An iterator is read into a list
        first.
      sparsity: as in `prune_layer`, for each layer; or a mapping from path patterns (``re.search``)
        to sparsities, of which the first match applies; kernels that match none are not pruned.
      variables: Linen's other collections, such as ``batch_stats``.
      call: how to call the model: the name of a method, or a function of the module and the
        arguments, ``lambda module, x: module(x, train=False)``; by default ``module(*arguments)``.
      method: as in `prune_layer`.
      update: as in `prune_layer`.
      distribution: "erk" (Erdős-Rényi-Kernel) prunes small layers less and large ones more, as in
        `prune`, and preserves a network far better at high sparsity; "uniform" gives each layer the
        sparsity. The default is "erk", or "uniform" with a ``structure``, which fixes each layer's
        density.
      structure: as in `prune_layer`.
      mask: a tree of bool like ``params``, False for weights to prune in any case. Pruned layers
        compensate for them; elsewhere they just become zero.
      select: ``(path, leaf) -> bool``, the leaves that are pruned; kernels by default.
      damping: as in `prune_layer`.
      block_size: as in `prune_layer`.
      order: as in `prune_layer`.
      progress: whether a progress bar is shown, by tqdm where that is installed.

    Returns:
      The pruned parameters, their mask, the layers with their errors, and the unseen kernels.

    Raises:
      ValueError: if an option is out of range, nothing can be pruned, a pattern matches nothing,
        or inputs of a layer are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from curvax import pruning
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> inputs = jax.random.normal(jax.random.key(0), (64, 4))
      >>> params = model.init(jax.random.key(1), inputs)["params"]
      >>> result = pruning.prune_layers(
      ...     model, params, [inputs[:32], inputs[32:]], 0.5
      ... )
      >>> [(layer.path, layer.sparsity) for layer in result.layers]
      [('layers_0/kernel', 0.5625), ('layers_2/kernel', 0.3125)]

    References:
      Frantar and Alistarh, [SparseGPT](https://arxiv.org/abs/2301.00774), 2023.
    """
    options = LayerOptions(method, update, structure, damping, block_size, order)
    options.check()
    if distribution is None:
        distribution = "erk" if structure is None else "uniform"
    check_choice("distribution", distribution, get_args(LayerDistribution))
    check_structure(structure, distribution)
    walked, tree = _model_and_params(model, params, variables, call)
    check_on_host(tree)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    patterns = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    wanted = _wanted(tree, select, patterns)
    leaves = _Leaves(tree, mask)
    shapes = {leaf.path: leaf.shape for leaf in sorted(itertools.chain(*wanted.values()))}
    calls = walked.calls(tree, _first(batches), shapes)
    unfit = _unfit(calls.seen, leaves, structure)
    fitting = [call for call in calls.seen if call.path not in unfit]
    reasons = _reasons(shapes, calls._replace(seen=fitting, reasons={**calls.reasons, **unfit}))
    targets = _targets(wanted, patterns, {call.path for call in fitting}, distribution)
    groups = _groups(fitting)
    leaves.cut(leaves.params.keys() - {call.path for call in fitting})
    for first in (call for group in groups for call in group):
        check_layer(
            first.path,
            leaves.params[first.path],
            targets[first.path],
            options,
            first.reader.layout,
            leaves.given(first.path),
        )
    layers: list[PrunedLayer] = []
    with progress_bar(len(groups), "layers", progress) as advance:
        for group in groups:
            paths = [call.path for call in group]
            grams = _grams(walked, leaves.params_tree(), batches, paths, reasons)
            leaves.cut(set(paths) - grams.keys())
            for path, reader, _ in (call for call in group if call.path in grams):
                kernel, kept, gram = leaves.params[path], leaves.given(path), grams[path]
                with context_of(kernel, gram.matrix):
                    result = pruned_layer(kernel, gram, targets[path], options, reader.layout, kept)
                leaves.put(path, result)
                layers.append(_pruned(path, result, len(gram.matrix)))
            advance()
    if not layers:
        raise _nothing_pruned(reasons)
    unseen = tuple(Skipped(path, reason) for path, reason in reasons.items())
    _warn(layers, unseen)
    return LayersResult(leaves.params_tree(), leaves.mask_tree(), tuple(layers), unseen)


class _Leaves:
    """The parameters and their mask, by path, while layers are pruned."""

    def __init__(self, params: PyTree, mask: PyTree | None) -> None:
        self._treedef = jax.tree.structure(params)
        self.params: dict[str, Any] = dict(named_leaves(params))
        check_mask(mask, params)
        self._given = {} if mask is None else dict(named_leaves(mask))
        self._mask: dict[str, jax.Array] = {
            path: jnp.asarray(self._given.get(path, True)) for path in self.params
        }

    def given(self, path: str) -> Any | None:
        kept = self._given.get(path)
        return None if kept is None else jnp.broadcast_to(kept, self.params[path].shape)

    def cut(self, paths: Iterable[str]) -> None:
        """Applies the given mask to leaves whose kept weights cannot make up for it."""
        for path in paths:
            kept = self._given.get(path)
            if kept is not None and not bool(jnp.all(kept)):
                self.params[path] = jnp.where(kept, self.params[path], 0)

    def put(self, path: str, result: LayerResult) -> None:
        self.params[path], self._mask[path] = result.kernel, result.mask

    def params_tree(self) -> PyTree:
        return jax.tree.unflatten(self._treedef, self.params.values())

    def mask_tree(self) -> PyTree:
        return jax.tree.unflatten(self._treedef, self._mask.values())


def _model_and_params(
    model: Any, params: PyTree | None, variables: Mapping[str, Any] | None, call: Any
) -> tuple[Model, PyTree]:
    with from_extra("flax"):
        import flax.linen as nn
        from flax import nnx

    if isinstance(model, nn.Module):
        if params is None:
            raise ValueError('a Linen module needs params: pass variables["params"].')
        warn_of_batch_stats(params)
        return LinenModel(model, variables or {}, call), params
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model must be a Flax module, Linen or NNX, got {type(model)!r}: for others, pass "
            "each layer's kernel and inputs to prune_layer."
        )
    if variables is not None:
        raise ValueError("variables are only for Linen; an NNX module holds its own: omit them.")
    walked = NNXModel(model, call)
    return walked, walked.params() if params is None else params


def _first(batches: Iterable[Any]) -> Arguments:
    for batch in batches:
        return _arguments(batch)
    raise ValueError("batches are empty: pass at least one, the arguments of the model's call.")


def _arguments(batch: Any) -> Arguments:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _wanted(params: PyTree, select: Select, patterns: Mapping[str, Any]) -> dict[str, list[Leaf]]:
    """The leaves that are to be pruned, by the pattern that is the first to match."""
    for pattern, value in patterns.items():
        if value is not None:
            name = f"sparsity[{pattern!r}]" if pattern else "sparsity"
            check_range(name, value, low=0.0, high=1.0, open_high=True)
    leaves = chosen_leaves(params, select, "auto")
    check_not_tied(leaves, params)
    found = members_by_pattern([leaf.path for leaf in leaves], patterns)
    return {pattern: [leaves[number] for number in numbers] for pattern, numbers in found.items()}


def _targets(
    wanted: dict[str, list[Leaf]],
    patterns: Mapping[str, float | None],
    paths: set[str],
    distribution: LayerDistribution,
) -> dict[str, float | None]:
    """The sparsity of each of the layers that can be pruned, by path."""
    targets: dict[str, float | None] = {}
    for pattern, leaves in wanted.items():
        own, value = [leaf for leaf in leaves if leaf.path in paths], patterns[pattern]
        values: list[Any] = [value] * len(own)
        if distribution == "erk" and value is not None and own:
            values = erk_sparsities(own, value)
        targets.update(zip([leaf.path for leaf in own], values, strict=True))
    return targets


def _unfit(calls: list[Call], leaves: _Leaves, structure: NM | None) -> dict[str, str]:
    """Why the groups of N:M do not fill layers, by path."""
    if structure is None:
        return {}
    sizes = {c.path: leaves.params[c.path].shape[c.reader.layout.fan_in[-1]] for c in calls}
    return {
        path: f"its fan-in of {size} is not divisible by {structure.m}"
        for path, size in sizes.items()
        if size % structure.m
    }


def _groups(calls: list[Call]) -> list[list[Call]]:
    """The first call of each layer; those one after the other on the same inputs together."""
    counts = collections.Counter(call.path for call in calls)
    groups: list[list[Call]] = []
    done: set[str] = set()
    for call in calls:
        if call.path in done:
            continue
        done.add(call.path)
        last = groups[-1][-1] if groups else None
        alike = last is not None and last.inputs is call.inputs
        if alike and last is not None and counts[last.path] == counts[call.path] == 1:
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def _reasons(targets: Iterable[str], calls: Calls) -> dict[str, str]:
    """Why layers are not seen, by path."""
    seen = {call.path for call in calls.seen}
    unknown = "no Flax layer that has it as its kernel is called"
    reasons = {path: calls.reasons.get(path, unknown) for path in targets if path not in seen}
    if not seen:
        raise _nothing_pruned(reasons)
    return reasons


def _nothing_pruned(reasons: dict[str, str]) -> ValueError:
    listed = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
    return ValueError(
        f"the inputs of none of the selected layers can be captured ({listed}): pass the "
        "kernels and their inputs to prune_layer, or select other layers."
    )


def _grams(
    model: Model, params: PyTree, batches: Iterable[Any], paths: list[str], reasons: dict[str, str]
) -> dict[str, InputGram]:
    """The Gram matrices of layers that are called together; an entry of ``reasons`` for others."""
    totals: dict[str, Sums] = {}
    rows: collections.Counter[str] = collections.Counter()
    for batch in batches:
        sums = model.sums(params, _arguments(batch), tuple(paths))
        totals = _added(totals, sums) if totals else sums
        rows.update({path: int(own.num_rows) for path, own in sums.items()})
    grams = {}
    for path, total in totals.items():
        if not bool(jnp.isfinite(jnp.trace(total.gram))):
            raise ValueError(
                f"the inputs of {path} must be finite, got NaN or infinity: check the batches and "
                "what overflows before that layer."
            )
        if float(total.mismatch) > _LARGEST_MISMATCH:
            reasons[path] = "it computes with a kernel derived from the parameter"
        elif float(jnp.trace(total.gram)) == 0:
            reasons[path] = "its inputs are all zero"
        else:
            grams[path] = InputGram(total.gram / rows[path], rows[path])
    return grams


@jax.jit
def _added(first: dict[str, Sums], second: dict[str, Sums]) -> dict[str, Sums]:
    return {path: sums.plus(second[path]) for path, sums in first.items()}


def _pruned(path: str, result: LayerResult, features: int) -> PrunedLayer:
    kept = int(np.count_nonzero(result.mask))
    return PrunedLayer(path, result.mask.size, kept, result.error, result.num_rows, features)


def _warn(layers: list[PrunedLayer], unseen: tuple[Skipped, ...]) -> None:
    """One warning for layers that are empty, for those not pruned, and for those of few inputs."""
    if empty := ", ".join(layer.path for layer in layers if not layer.kept):
        warnings.warn(
            f"mask keeps no weights in {empty}, which disconnects the network: make it with "
            "min_density.",
            stacklevel=3,
        )
    if unseen:
        listed = "; ".join(f"{layer.path}: {layer.reason}" for layer in unseen)
        warnings.warn(
            f"{len(unseen)} selected kernels were not pruned ({listed}): pass them and their "
            "inputs to prune_layer, or exclude them with select.",
            stacklevel=3,
        )
    few = [layer for layer in layers if layer.num_rows < layer.num_features]
    if few:
        listed = ", ".join(f"{x.path}: {x.num_rows} for {x.num_features}" for x in few)
        warnings.warn(
            f"layers have fewer input rows than features ({listed}), which leave the fit of the "
            "kept weights underdetermined: pass more batches.",
            stacklevel=3,
        )
