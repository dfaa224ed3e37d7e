"""Random probe trees: a key per leaf, and each leaf's dtype and sharding.

A probe ``z`` has independent entries of mean zero and variance one, so that
``E[z zᵀ] = I`` over the whole tree. That needs a key per leaf: two leaves of equal shape
that share a key share a probe, and the product of their off-diagonal Hessian block is then
counted as diagonal.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from curvax._checks import as_key, check_arrays, check_choice
from curvax._trees import PyTree, Tree, is_inexact, varying_like

Distribution = Literal["rademacher", "normal"]


def _rademacher(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, *, out_sharding: Any
) -> jax.Array:
    """Like ``jax.random.rademacher``, which takes a sharding only since JAX 0.10."""
    # Where a loss gathers a sharded weight, it gathers the probe. Converted outside the compiled
    # sampler, a probe then travels as bytes, if the loss does not convert weights itself.
    return _signs(key, shape, out_sharding=out_sharding).astype(dtype)


@functools.partial(jax.jit, static_argnums=1, static_argnames="out_sharding")
def _signs(key: jax.Array, shape: tuple[int, ...], *, out_sharding: Any) -> jax.Array:
    bits = jax.random.bits(key, shape, jnp.uint8, out_sharding=out_sharding)
    return 1 - 2 * (bits & 1).astype(jnp.int8)


_SAMPLERS: dict[Distribution, Callable[..., jax.Array]] = {
    "rademacher": _rademacher,
    "normal": jax.random.normal,
}


def random_probe(
    key: jax.Array | int, params: Tree, distribution: Distribution = "rademacher"
) -> Tree:
    r"""Draws a tree of independent random entries with mean zero and variance one.

    Rademacher entries are $\pm 1$ with equal probability; they give the diagonal and
    the trace with the least variance among such distributions. A complex leaf counts as two
    real ones: its probe is $a + i b$ with independent $a, b$, each of variance
    one.

    Args:
      key: a PRNG key, typed or raw, or an integer seed. Each leaf uses its own split of it.
      params: a tree of arrays; only shapes, dtypes and shardings are read.
      distribution: ``"rademacher"`` or ``"normal"``.

    Returns:
      A tree like ``params`` with the leaves' shapes, dtypes and, on a mesh with explicit
      axes, shardings. The same key gives the same values on one device and on many.
      Integer and bool leaves, which have no curvature, get zeros.

    Raises:
      ValueError: if ``distribution`` is neither of the two.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}
      >>> probe = curvax.random_probe(jax.random.key(0), params)
      >>> probe["bias"].dtype, bool(jnp.all(jnp.abs(probe["kernel"]) == 1))
      (dtype(bfloat16), True)
    """
    check_choice("distribution", distribution, get_args(Distribution))
    check_arrays(params)
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        return params
    keys = jax.random.split(as_key(key), len(leaves))
    probes = [
        _leaf_probe(leaf_key, leaf, distribution)
        for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, probes)


def _leaf_probe(key: jax.Array, leaf: Any, distribution: Distribution) -> jax.Array:
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if not is_inexact(leaf):
        return jnp.zeros_like(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(
            *(_leaf_probe(half, jnp.real(leaf), distribution) for half in _halves(key))
        )
    # On explicit meshes a sampler's result is replicated unless told otherwise.
    sampler = _SAMPLERS[distribution]
    probe = sampler(key, shape, dtype, out_sharding=jax.typeof(leaf).sharding)
    return varying_like(probe, leaf)


def _halves(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return first, second


def times_probe(probe: PyTree, product: PyTree) -> PyTree:
    r"""The signed estimate $z \odot Hz$ of a diagonal, leaf by leaf.

    For a complex leaf the result holds the two real diagonals,
    $\partial^2/\partial x^2 + i\,\partial^2/\partial y^2$: JAX's gradient is
    $\partial_x - i\,\partial_y$, which makes them
    $\Re z\,\Re h$ and $-\Im z\,\Im h$.
    """

    def leaf(z: jax.Array, h: jax.Array) -> jax.Array:
        if not jnp.iscomplexobj(h):
            return z * h
        return jax.lax.complex(jnp.real(z) * jnp.real(h), -jnp.imag(z) * jnp.imag(h))

    return jax.tree.map(leaf, probe, product)
