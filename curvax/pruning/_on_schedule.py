"""Prunes during training, inside the compiled step, as a transformation around an optimizer."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax._checks import as_key, check_choice, check_count, check_like, check_range
from curvax._layouts import Layout, check_layout
from curvax._trees import (
    PyTree,
    Select,
    is_placeholder,
    named_leaves,
    varying_like,
)
from curvax.pruning._masking import (
    masked_arguments,
    state_of_kept,
    where_kept,
    zeroing_updates,
)
from curvax.pruning._plan import (
    Method,
    Plan,
    Rule,
    Sparsity,
    check_nm,
    check_share,
    check_sparsity,
    chosen_names,
    make_plan,
    value_at,
)
from curvax.pruning._smallest import LARGEST, Pools, ascending, keep_best, share, smallest
from curvax.pruning._structures import NM
from curvax.pruning._targets import Distribution
from curvax.pruning._weights import is_kernel

_OF_MOMENTS = ("fisher", "hessian")


class PruneOnScheduleState(NamedTuple):
    """State of `prune_on_schedule`.

    Attributes:
      step: scalar int32, the number of steps taken; not `count`, which is the optimizer's.
      mask_key: the key of the method "random", None for others.
      mask: a tree like the params, with bool arrays for leaves that are pruned, True for the
        weights that are kept, and a scalar True for leaves that never are.
      inner_state: the state of the wrapped optimizer.
    """

    step: jax.Array
    mask_key: jax.Array | None
    mask: optax.Params
    inner_state: optax.OptState


def prune_on_schedule(
    sparsity: Sparsity | Mapping[str, Sparsity],
    inner: optax.GradientTransformation,
    *,
    update_interval: int = 100,
    method: Method = "magnitude",
    select: Select = is_kernel,
    distribution: Distribution = "global",
    min_density: float | None = None,
    structure: NM | None = None,
    layout: Layout = "auto",
    regrow: Sparsity | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes during training on a schedule, entirely inside the compiled step.

    At each step $t$ divisible by ``update_interval``, a new mask is computed from the params before
    the step, their gradients, and the optimizer's moments after the previous step. The weights with
    the lowest scores are pruned until $\lfloor s_t N \rfloor$ of $N$ are; ties go to the first in
    the tree's order. The mask applies from that step on. Pruned weights stay pruned unless
    ``regrow`` is given, so a falling $s_t$ has no effect. If gradients of the selected leaves are
    not finite, the mask is unchanged until the next interval.

    The optimizer sees gradients, ``hessian_diag`` and ``obj_fn`` with zeros at the pruned weights,
    as with `keep_pruned`. The update of a pruned weight $w$ is $-w$, so the weight is zero
    afterwards; without ``regrow`` so are the optimizer's entries for it, such as the copy of the
    weights in ``optax.contrib.schedule_free``. Read the mask with
    ``optax.tree.get(state, "mask")``. A wrapper outside that keeps a copy of the weights, such as
    ``optax.lookahead``, brings pruned ones back: apply the mask to the weights that you evaluate.

    A new mask takes up to 31 passes over the scores (62 where many are equal) and temporary memory
    of about 12 bytes a weight; nothing is sorted, and on a mesh devices only exchange counts.
    All other steps only apply the mask. Leaves that are not selected cost nothing.

    Args:
      sparsity: the fraction of weights to prune in the selected leaves, in [0, 1), or an Optax
        schedule of it; or a mapping from path patterns (``re.search``) to these. The leaves of each
        pattern form a group; leaves that match none are not pruned.
      inner: the optimizer to wrap.
      update_interval: the number of steps between new masks.
      method: the score. "magnitude" is $|w|$; "saliency" $|w g|$ with the gradient of the step;
        "fisher" $w^2 \nu$ with the mean squared gradients ``nu`` in the state of Adam or RMSProp;
        "hessian" $w^2 \sqrt{\nu}$, Optimal Brain Damage with the mean squared curvature in that of
        AdaHessian; "random" a random number. While the moments are all zero, as at the first step,
        the mask is unchanged.
      select: a function of path and leaf that chooses the leaves to prune.
      distribution: "global" compares the weights of all leaves; "uniform" gives each leaf the
        sparsity; "erk" (Erdős-Rényi-Kernel) gives it the density
        $\epsilon (n_{in} + n_{out} + h + w) / (n_{in} n_{out} h w)$, at most 1, with the
        $\epsilon$ at which all leaves together have the sparsity.
      min_density: the minimum fraction of each leaf's weights to keep, rounded up.
      structure: ``NM(n, m)``: the n weights of highest score in each m consecutive ones along the
        fan-in are never pruned, so that a schedule ending at $1 - n/m$ ends with N:M sparsity.
        Leaves that do not fit the structure are not pruned; a warning at ``init`` lists them.
      layout: the roles of the leaves' axes, for "erk" and ``structure``.
      regrow: a fraction, or a schedule of it, as in RigL: each new mask also drops this fraction of
        the kept weights, those with the lowest scores, and brings back as many pruned ones, those
        with the largest $|g|$. These start from zero, or keep their value if they were dropped by
        this mask. A fraction of 0 changes nothing.
      key: a PRNG key or a seed for the method "random".

    Returns:
      An Optax transformation; ``update`` needs ``params``. Under ``optax.inject_hyperparams`` name
      the callable ``select`` in ``static_args``.

    Raises:
      ValueError: if an argument is out of range, or a final sparsity exceeds what ``structure`` or
        ``min_density`` allow; at ``init``, if no leaf is selected or none fits ``structure``, or
        the optimizer has no second moments.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import pruning
      >>> sparsity = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=4)
      >>> tx = pruning.prune_on_schedule(sparsity, optax.adam(0.1), update_interval=2)
      >>> params = {
      ...     "kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]]),
      ...     "bias": jnp.ones(2),
      ... }
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(state, "mask"))
      {'bias': Array(True, dtype=bool), 'kernel': Array([[False, False],
             [False,  True]], dtype=bool)}

    References:
      Zhu et al, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017

      Evci et al, [Rigging the Lottery](https://arxiv.org/abs/1911.11134), 2020

      Lee et al, [JaxPruner](https://arxiv.org/abs/2304.14082), 2023
    """
    check_count("update_interval", update_interval)
    check_choice("method", method, get_args(Method))
    check_choice("distribution", distribution, get_args(Distribution))
    check_layout(layout)
    check_nm(structure, distribution, regrow)
    if min_density is not None:
        check_range("min_density", min_density, low=0.0, high=1.0, open_high=True)
    check_sparsity(sparsity, structure, min_density)
    if regrow is not None:
        check_share("regrow", regrow)
    rule = Rule(sparsity, method, select, distribution, min_density, structure, layout, regrow)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PruneOnScheduleState:
        # A copy: donating the state must not delete the caller's key.
        own_key = jnp.array(as_key(key)) if method == "random" else None
        inner_state = wrapped.init(params)
        mask = params if is_placeholder(params) else _full_mask(rule, params, inner_state)
        return PruneOnScheduleState(jnp.zeros([], jnp.int32), own_key, mask, inner_state)

    def update(
        updates: optax.Updates,
        state: PruneOnScheduleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PruneOnScheduleState]:
        if params is None:
            raise ValueError("prune_on_schedule needs params: call update(updates, state, params).")
        check_like("updates", updates, params)
        due = state.step % update_interval == 0
        mask = _mask_if(due, rule, state, updates, params)
        extra_args = masked_arguments(extra_args, mask, updates)
        updates, inner_state = wrapped.update(
            where_kept(mask, updates), state.inner_state, params, **extra_args
        )
        updates = zeroing_updates(mask, updates, params)
        if regrow is None:
            inner_state = state_of_kept(mask, inner_state)
        step = optax.safe_increment(state.step)
        return updates, PruneOnScheduleState(step, state.mask_key, mask, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _full_mask(rule: Rule, params: PyTree, inner_state: PyTree) -> PyTree:
    """The mask before anything is pruned; raises if the params do not fit the rule."""
    chosen = chosen_names(rule, params)
    masks = [
        jnp.ones_like(leaf, dtype=bool) if name in chosen else jnp.array(True)
        for name, leaf in named_leaves(params)
    ]
    mask = jax.tree.unflatten(jax.tree.structure(params), masks)
    plan = make_plan(rule, params, mask)
    if rule.method in _OF_MOMENTS:
        _moments(rule.method, plan, inner_state)
    return varying_like(mask, params)


def _mask_if(
    due: jax.Array, rule: Rule, state: PruneOnScheduleState, grads: PyTree, params: PyTree
) -> PyTree:
    """The mask of this step: a new one if it is due, and the gradients are finite."""
    plan = make_plan(rule, params, state.mask)
    if not plan.positions:
        return state.mask
    masks, treedef = jax.tree.flatten(state.mask)
    new = jax.lax.cond(
        due,
        lambda: _new_masks(rule, plan, state, plan.of(grads), plan.of(params)),
        lambda: plan.of(state.mask),
    )
    for position, leaf in zip(plan.positions, new, strict=True):
        masks[position] = leaf
    return jax.tree.unflatten(treedef, masks)


def _new_masks(
    rule: Rule,
    plan: Plan,
    state: PruneOnScheduleState,
    grads: list[jax.Array],
    weights: list[jax.Array],
) -> list[jax.Array]:
    masks = plan.of(state.mask)
    moments = None
    usable = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(g)) for g in grads])
    if rule.method in _OF_MOMENTS:
        moments = _moments(rule.method, plan, state.inner_state)
        usable &= functools.reduce(jnp.logical_or, [jnp.any(nu > 0) for nu in moments])
    scores = _scores(rule.method, weights, grads, moments, state)
    keys = [jnp.where(m, ascending(s), 0) for m, s in zip(masks, scores, strict=True)]
    pools, numbers = plan.targets.pools, plan.targets.numbers(state.step)
    most: Any = np.array(pools.totals, np.int32)
    if rule.structure is not None and plan.axes is not None:
        n, m = rule.structure.n, rule.structure.m
        keys = [keep_best(k, axis, n, m) for k, axis in zip(keys, plan.axes, strict=True)]
        most = most // m * (m - n)
    elif rule.min_density is not None:  # n of m are more
        sizes = jnp.array([key.size for key in keys], jnp.int32)
        least = sizes - share(1 - value_at(rule.min_density, state.step), sizes)
        keys = _protected(keys, least)
        most = most - pools.sums(list(least))
    numbers = jnp.minimum(numbers, most)
    if rule.regrow is not None:
        new = _regrown(rule.regrow, pools, numbers, most, keys, grads, state)
    else:
        new = [m & ~p for m, p in zip(masks, smallest(keys, pools, numbers), strict=True)]
    return [jnp.where(usable, *pair) for pair in zip(new, masks, strict=True)]


def _protected(keys: list[jax.Array], numbers: jax.Array) -> list[jax.Array]:
    """The keys, with the best of each leaf out of the reach of pruning."""
    leaves = Pools(tuple(range(len(keys))), tuple(key.size for key in keys))
    descending = [LARGEST - key for key in keys]
    best = smallest(descending, leaves, numbers)
    return [jnp.where(b & (k > 0), LARGEST, k) for b, k in zip(best, keys, strict=True)]


def _regrown(
    fraction: Sparsity,
    pools: Pools,
    numbers: jax.Array,
    most: Any,
    keys: list[jax.Array],
    grads: list[jax.Array],
    state: PruneOnScheduleState,
) -> list[jax.Array]:
    """Masks with ``numbers`` pruned, a share of which have just changed places with kept ones."""
    wanted = jnp.array(pools.totals, jnp.int32) - numbers
    dropped = share(value_at(fraction, state.step), wanted)
    pruned = smallest(keys, pools, jnp.minimum(numbers + dropped, most))
    kept = [(key > 0) & ~p for key, p in zip(keys, pruned, strict=True)]
    missing = wanted - pools.sums([jnp.sum(k, dtype=jnp.int32) for k in kept])
    descending = [
        jnp.where(k, LARGEST, LARGEST - ascending(_float32_abs(g)))
        for k, g in zip(kept, grads, strict=True)
    ]
    grown = smallest(descending, pools, missing)
    return [k | g for k, g in zip(kept, grown, strict=True)]


def _scores(
    method: Method,
    weights: list[jax.Array],
    grads: list[jax.Array],
    moments: list[jax.Array] | None,
    state: PruneOnScheduleState,
) -> list[jax.Array]:
    """What each weight is worth, in float32; a root where the square would underflow."""
    if method == "random":
        key = jax.random.fold_in(as_key(state.mask_key), state.step)
        return optax.tree.random_like(key, weights, jax.random.uniform, jnp.float32)
    factors: list[Any] = [1.0] * len(weights)
    if method == "saliency":
        factors = grads
    elif moments is not None:
        power = {"fisher": 1 / 2, "hessian": 1 / 4}[method]
        factors = [jnp.asarray(nu, jnp.float32) ** power for nu in moments]
    return [_float32_abs(w) * _float32_abs(f) for w, f in zip(weights, factors, strict=True)]


def _float32_abs(leaf: Any) -> jax.Array:
    # Masks have no gradients, and a loop of unknown length has none.
    return jnp.abs(jnp.asarray(jax.lax.stop_gradient(leaf), jnp.float32))


def _moments(method: Method, plan: Plan, inner_state: PyTree) -> list[jax.Array]:
    """The optimizer's second moments of the pruned leaves."""
    entries = optax.tree.get_all_with_path(inner_state, "nu")
    found = {name: leaf for _, nu in entries for name, leaf in named_leaves(nu)}
    for leaf in plan.leaves:
        if leaf.path not in found or found[leaf.path].shape != leaf.shape:
            raise ValueError(
                f"method={method!r} needs second moments in the state of inner, a tree nu like the "
                f"params as in optax.adam or curvax.adahessian, but found none for {leaf.path}: "
                "wrap such an optimizer, or use method='saliency'."
            )
    return [found[leaf.path] for leaf in plan.leaves]
