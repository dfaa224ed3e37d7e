"""Keeps pruned weights at zero in any chain of Optax transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax._checks import is_traced
from curvax._trees import PyTree, has_holes, is_hole, is_placeholder, part_like
from curvax.pruning._masking import (
    masked_arguments,
    state_of_kept,
    where_kept,
    zeroing_updates,
)
from curvax.pruning._weights import check_mask


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
      mask: a tree of bool like the params, True for the weights that are kept, with a scalar for
        leaves that are not pruned. It may be replaced by ``optax.tree.set(state, mask=mask)``
        without recompilation.
      inner_state: the state of the wrapped transformation, if there is one.
    """

    mask: optax.Params
    inner_state: optax.OptState


def keep_pruned(
    mask: PyTree, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps pruned weights at zero during ordinary fine-tuning.

    With ``inner`` it wraps an optimizer, which sees gradients, ``hessian_diag`` and ``obj_fn`` with
    zeros at the pruned weights, so that its moments, window and curvature depend only on kept
    weights. The update of a pruned weight $w$ is $-w$, so the weight is zero afterwards, whatever
    was added in between (exactly, if updates have the parameters' dtype). The optimizer's own
    entries for it are zero too, including further copies of the weights as in
    ``optax.contrib.schedule_free``. Without ``inner`` the transformation only makes pruned weights
    zero: put it at the end of a chain, not before an optimizer, which would scale $-w$ like a
    gradient.

    Args:
      mask: a tree of bool like the params, True for the weights that are kept. Leaves whose mask is
        a scalar True, as in the masks that pruning returns, are passed through at no cost.
      inner: the optimizer to wrap.

    Returns:
      An Optax transformation; ``update`` needs ``params``.

    Raises:
      ValueError: at ``init``, if ``mask`` does not match the params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import pruning
      >>> params, mask = jnp.array([1.0, 0.0]), jnp.array([True, False])
      >>> tx = pruning.keep_pruned(mask, optax.adam(0.1))
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates), optax.tree.get(state, "mu"))
      [0.9 0. ] [0.1 0. ]
    """
    wrapped = optax.with_extra_args_support(optax.identity() if inner is None else inner)

    def init(params: optax.Params) -> KeepPrunedState:
        own_mask = _mask_like(mask, params)
        if not is_placeholder(params):
            check_mask(own_mask, params)
            own_mask = jax.tree.map(_own, own_mask, params, is_leaf=is_hole)
        return KeepPrunedState(own_mask, wrapped.init(params))

    def update(
        updates: optax.Updates,
        state: KeepPrunedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepPrunedState]:
        if params is None:
            raise ValueError("keep_pruned needs params: call update(updates, state, params).")
        kept = state.mask
        if inner is not None:
            extra_args = masked_arguments(extra_args, kept, updates)
        updates, inner_state = wrapped.update(
            where_kept(kept, updates), state.inner_state, params, **extra_args
        )
        updates = zeroing_updates(kept, updates, params)
        return updates, KeepPrunedState(kept, state_of_kept(kept, inner_state))

    return optax.GradientTransformationExtraArgs(init, update)


def _own(kept: Any, leaf: Any) -> Any:
    """A copy, since donating the state must not delete the caller's mask; True as a scalar."""
    if is_hole(leaf):
        return leaf
    if jnp.ndim(kept) == 0 and (is_traced(kept) or not np.asarray(kept)):
        return jnp.broadcast_to(jnp.array(kept), jnp.shape(leaf))
    return jnp.array(kept)


def _mask_like(mask: PyTree, params: PyTree) -> PyTree:
    """The mask with the holes that ``optax.masked`` makes in the params."""
    if is_placeholder(params):
        return params
    if has_holes(params):
        return part_like(mask, params, name="mask", scalars=True)
    check_mask(mask, params)
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))
