"""Pruning of a matrix of weights, given the Gram matrix of its inputs."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.pruning.layerwise._choice import block_counts, chosen_by_scores
from curvax.pruning.layerwise._exact import least_squares, removed_greedily
from curvax.pruning.layerwise._obs import swept, upper_factor
from curvax.pruning.layerwise._options import LayerMethod, LayerOptions, LayerUpdate

_UPDATES: dict[LayerMethod, LayerUpdate] = {
    "obs": "joint",
    "greedy": "joint",
    "wanda": "none",
    "magnitude": "none",
}


def pruned_matrix(
    weights: jax.Array,
    gram: jax.Array,
    pruned: np.ndarray,
    target: int | None,
    options: LayerOptions,
) -> tuple[jax.Array, jax.Array, float]:
    r"""Prunes and updates a matrix of weights.

    Args:
      weights: of shape (features, outputs).
      gram: $X^T X / n$.
      pruned: the weights that are pruned in any case, among them those of dead features.
      target: how many are pruned in the end; without meaning for N:M, None to prune no others.
      options: method, update and so on.

    Returns:
      The new weights, which of them are pruned, and the damping $\lambda$.
    """
    places = _order(gram, options)
    unit = 2.0 ** round(math.log2(float(_scale(gram))))  # so that no square leaves the dtype
    weights, gram, pruned = weights[places], gram[places][:, places] / unit, pruned[places]
    update = options.update or _UPDATES[options.method]
    damping = options.damping * float(_scale(gram))
    factor = None
    if update == "sweep" or options.method == "obs":
        factor, damping = _factored(gram, damping)
    damped = _damped(gram, damping)
    chosen, first = _chosen(weights, gram, damped, factor, pruned, target, options)
    if update == "joint":
        new = least_squares(weights, damped, chosen, weights if first is None else first)
    elif update == "none":
        new = jnp.where(chosen, 0, weights)
    elif first is not None:
        new = first
    else:
        assert factor is not None
        new = swept(weights, factor, chosen, block_size=options.block_size)[0]
    back = np.argsort(places)
    return new[back], chosen[back], damping * unit


def _chosen(
    weights: jax.Array,
    gram: jax.Array,
    damped: jax.Array,
    factor: jax.Array | None,
    pruned: np.ndarray,
    target: int | None,
    options: LayerOptions,
) -> tuple[jax.Array, jax.Array | None]:
    """Which weights are pruned, and the weights of a sweep if one has chosen them."""
    if target is None:
        return jnp.asarray(pruned), None
    if options.method == "obs":
        assert factor is not None
        size = min(options.block_size, len(weights))
        counts = None if options.n_of_m else block_counts(pruned, target, size)
        first, chosen = swept(
            weights,
            factor,
            jnp.asarray(pruned),
            counts=counts,
            n_of_m=options.n_of_m,
            block_size=options.block_size,
        )
        return chosen, first
    if options.method == "greedy":
        return jnp.asarray(removed_greedily(weights, damped, pruned, target, options.n_of_m)), None
    scores = np.abs(np.asarray(weights))
    if options.method == "wanda":
        scores = scores * np.sqrt(np.asarray(jnp.diagonal(gram)))[:, np.newaxis]
    per_output = options.method == "wanda"
    flags = chosen_by_scores(scores, pruned, target, options.n_of_m, per_output=per_output)
    return jnp.asarray(flags), None


def _order(gram: jax.Array, options: LayerOptions) -> np.ndarray:
    """The order in which a sweep takes the features; groups of N:M stay together."""
    size = len(gram)
    if options.order == "natural":
        return np.arange(size)
    length = options.n_of_m[1] if options.n_of_m else 1
    means = np.asarray(jnp.diagonal(gram)).reshape(-1, length).mean(axis=1)
    groups = np.argsort(-means, kind="stable")
    return np.arange(size).reshape(-1, length)[groups].reshape(-1)


def _scale(gram: jax.Array) -> jax.Array:
    """The mean of the diagonal over the features that are not dead."""
    diagonal = jnp.diagonal(gram)
    return jnp.sum(diagonal) / jnp.sum(diagonal > 0)


def _damped(gram: jax.Array, damping: float) -> jax.Array:
    r"""$H = X^T X / n + \lambda I$, with a positive diagonal at dead features."""
    diagonal = jnp.diagonal(gram)
    return gram + jnp.diag(jnp.where(diagonal > 0, damping, _scale(gram)).astype(gram.dtype))


def _factored(gram: jax.Array, damping: float) -> tuple[jax.Array, float]:
    """The factor, with the least of some dampings, from the given one on, that makes it finite."""
    least = float(jnp.finfo(gram.dtype).eps * _scale(gram))
    enough = float(jnp.max(jnp.sum(jnp.abs(gram), axis=1)))  # for any symmetric matrix
    used = damping
    while True:
        factor = upper_factor(_damped(gram, used))
        if bool(jnp.all(jnp.isfinite(jnp.diagonal(factor)))):
            break
        if not used <= 10 * enough:
            raise ValueError("the Gram matrix of the inputs cannot be factored: it is not one.")
        used = max(10 * used, least)
    if used != damping:
        warnings.warn(
            f"the Gram matrix of the inputs is singular in {gram.dtype}: its damping was raised to "
            f"{used / float(_scale(gram)):.1e} of the mean of its diagonal; pass more inputs or a "
            "larger damping.",
            stacklevel=4,
        )
    return factor, used


@jax.jit
def relative_error(weights: jax.Array, new: jax.Array, gram: jax.Array) -> jax.Array:
    r"""$\|X (W - \hat W)\|^2 / \|X W\|^2$; 0 where $X W$ is zero."""
    whole, rest = _energy(weights, gram), _energy(weights - new, gram)
    return jnp.where(whole > 0, rest / jnp.where(whole > 0, whole, 1), 0)


def _energy(weights: jax.Array, gram: jax.Array) -> jax.Array:
    return jnp.sum(weights * jnp.matmul(gram, weights, precision=HIGHEST))
