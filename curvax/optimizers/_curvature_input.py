"""How a diagonal reaches an optimizer: passed as a tree, or computed from a function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax._checks import is_traced
from curvax._trees import PyTree, Tree, has_holes, is_hole, part_like, widen
from curvax.curvature._diagonal import value_grad_and_hessian_diag
from curvax.curvature._probes import Distribution, random_probe, times_probe
from curvax.curvature._products import Mode, linearized_hvp


def curvature_of_function(
    fun: Callable[[PyTree], jax.Array] | None,
    params: PyTree | None,
    key: jax.Array,
    *,
    num_probes: int | jax.Array = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
    due: bool | jax.Array = True,
) -> PyTree:
    """The estimate of the Hessian's diagonal of ``fun`` at ``params``; zeros if not ``due``."""
    if fun is None:
        raise ValueError(
            "no curvature was given. Add obj_fn to the call: "
            "tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)), or pass "
            "hessian_diag= from curvax.value_grad_and_hessian_diag(loss_fn)."
        )
    if params is None:
        raise ValueError("obj_fn needs params: call tx.update(grads, state, params, ...).")

    def estimate() -> PyTree:
        if is_traced(num_probes):
            return _mean_of_traced_number(fun, params, key, num_probes, distribution, mode)
        one_pass = value_grad_and_hessian_diag(
            fun, num_probes=int(num_probes), distribution=distribution, mode=mode
        )
        return one_pass(params, key=key)[2]

    try:
        if due is True:
            return estimate()
        return jax.lax.cond(due, estimate, lambda: jax.tree.map(jnp.zeros_like, params))
    except Exception as error:
        if not has_holes(params):
            raise
        raise ValueError(
            "obj_fn failed on params with holes, which optax.masked and optax.partition create. "
            "Fill them inside obj_fn, lambda p: loss_fn(curvax.merge_masked(params, p), "
            "batch), or pass hessian_diag= computed outside."
        ) from error


def _mean_of_traced_number(
    fun: Callable[[PyTree], jax.Array],
    params: PyTree,
    key: jax.Array,
    num_probes: int | jax.Array,
    distribution: Distribution,
    mode: Mode,
) -> PyTree:
    """The mean over a traced number of probes, as ``inject_hyperparams`` passes it."""
    product = linearized_hvp(fun, params, mode=mode)

    def add(index: jax.Array, total: PyTree) -> PyTree:
        probe = random_probe(jax.random.fold_in(key, index), params, distribution)
        sample = times_probe(probe, product(probe))
        return jax.tree.map(lambda t, s: t + widen(s), total, sample)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
    total = jax.lax.fori_loop(0, num_probes, add, zeros)
    return jax.tree.map(lambda t, p: (t / num_probes).astype(jnp.result_type(p)), total, params)


def given_diag(hessian_diag: PyTree, updates: PyTree) -> PyTree:
    """The part of a given diagonal that belongs to ``updates``.

    Inside ``optax.flatten`` the updates are one vector, and the diagonal is flattened in the same
    order.
    """
    leaves = jax.tree.leaves(hessian_diag)
    given, wanted = (jax.tree_util.all_leaves([tree]) for tree in (hessian_diag, updates))
    if wanted and not given and jnp.shape(updates) == (sum(map(jnp.size, leaves)),):
        return jnp.concatenate([jnp.reshape(leaf, -1) for leaf in leaves])
    return part_like(hessian_diag, updates, name="hessian_diag")


def merge_masked(params: Tree, masked: PyTree) -> Tree:
    """Fills the holes of a masked tree from the full one.

    ``optax.masked`` and ``optax.partition`` replace the parameters that an inner transformation
    must not see by ``optax.MaskedNode``. A loss needs all of them: the holes are filled with
    constants, and curvature is taken with respect to the rest.

    Args:
      params: the full tree.
      masked: the tree with holes.

    Returns:
      The tree with no holes.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> params = {"kernel": jnp.ones(2), "bias": jnp.array(1.0)}
      >>> def loss(p):
      ...     return jnp.sum(p["kernel"] ** 2) * p["bias"]
      >>> tx = optax.masked(curvax.adahessian(0.1), {"kernel": True, "bias": False})
      >>> updates, _ = tx.update(
      ...     params,
      ...     tx.init(params),
      ...     params,
      ...     obj_fn=lambda p: loss(curvax.merge_masked(params, p)),
      ... )
      >>> print(updates["kernel"].round(2))
      [-0.05 -0.05]
    """
    return jax.tree.map(
        lambda part, full: full if is_hole(part) else part, masked, params, is_leaf=is_hole
    )
