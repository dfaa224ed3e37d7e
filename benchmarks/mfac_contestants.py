"""What the M-FAC benchmarks compare, and on what: gradients, full windows, peers.

Every contestant is a step ``(state, gradient) -> (state, update)``.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import timing

from curvax.fisher import SparseWindow
from curvax.fisher.window._blocks import Blocks

PyTree = Any
HIGHEST = jax.lax.Precision.HIGHEST
DAMPING = 1e-5


def gradient_window(like: PyTree, number: int, key: jax.Array, noise: float) -> PyTree:
    """Rows that are a common mean, ``like`` at unit norm, and noise of that relative norm.

    Each leaf's noise has the scale of its mean.
    """
    leaves, treedef = jax.tree.flatten(optax.tree.scale(1 / optax.tree.norm(like), like))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        _noisy_rows(leaf, key, number, noise) for leaf, key in zip(leaves, keys, strict=True)
    )


@jax.jit(static_argnums=2)
def _noisy_rows(mean: jax.Array, key: jax.Array, number: int, noise: float) -> jax.Array:
    scale = noise * jnp.sqrt(jnp.mean(mean**2))
    return mean + scale * jax.random.normal(key, (number, *mean.shape))


@jax.jit
def row(window: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda rows: rows[index], window)


def flat(tree: PyTree, number: int) -> np.ndarray:
    return np.concatenate([np.reshape(x, (number, -1)) for x in jax.tree.leaves(tree)], axis=1)


# --- The published recurrences (Section 4 of the paper), in their matrix form ---
#
# Theirs: the Gram matrix S = G G^T is kept and its newest row and column replaced; A = S / damping
# + m I = L D L^T is factored, the coefficients B = L^{-1} / damping are formed, and
# F^{-1} x = x / damping - G^T c with c = B^T D^{-1} p and p = L^{-1} G x / damping.
# Ours: L and D come from LAPACK's Cholesky factor and not from m rank-one steps, and L^{-1}
# from a triangular solve, so that only matrix arithmetic is compared.


class Published(NamedTuple):
    rows: jax.Array
    gram: jax.Array
    slot: jax.Array


def published_step(state: Published, grad: jax.Array, damping: float = DAMPING) -> Any:
    number, slot = len(state.rows), state.slot
    rows = jax.lax.dynamic_update_index_in_dim(state.rows, grad, slot, axis=0)
    products = jnp.matmul(rows, grad, precision=HIGHEST)
    gram = state.gram.at[slot].set(products).at[:, slot].set(products)

    identity = jnp.eye(number, dtype=grad.dtype)
    factor = jnp.linalg.cholesky(gram / damping + number * identity)
    pivots = jnp.diagonal(factor)
    lower = factor / pivots
    solve = jax.scipy.linalg.solve_triangular
    coefficients = solve(lower, identity, lower=True, unit_diagonal=True) / damping
    substituted = solve(lower, products / damping, lower=True, unit_diagonal=True)
    weights = jnp.matmul(substituted / pivots**2, coefficients, precision=HIGHEST)
    update = grad / damping - jnp.matmul(weights, rows, precision=HIGHEST)
    return Published(rows, gram, (slot + 1) % number), update


def published_numpy(rows: np.ndarray, gram: np.ndarray, pool: list[Any]) -> timing.Loop:
    """The same in NumPy, as a loop; ``rows`` and ``gram`` are written in place."""
    rounds = itertools.cycle(enumerate(pool))
    shift = len(rows) * np.eye(len(rows), dtype=rows.dtype)

    def step(slot: int, grad: np.ndarray) -> np.ndarray:
        rows[slot] = grad
        products = rows @ grad
        gram[slot] = gram[:, slot] = products
        matrix = gram / np.float32(DAMPING) + shift
        factor = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
        pivots = np.diagonal(factor)
        lower = factor / pivots
        inverse, _ = scipy.linalg.lapack.strtri(lower, lower=1, unitdiag=1)
        coefficients = inverse / np.float32(DAMPING)
        substituted = scipy.linalg.solve_triangular(
            lower, products / DAMPING, lower=True, unit_diagonal=True, check_finite=False
        )
        weights = (substituted / pivots**2) @ coefficients
        return grad / np.float32(DAMPING) - weights.astype(np.float32) @ rows

    def loop(steps: int) -> None:
        for _ in range(steps):
            slot, (grad,) = next(rounds)
            step(slot, np.asarray(grad))

    return loop


# --- The products and curvax ---


def products(window: PyTree, grad: PyTree) -> jax.Array:
    """Each row times the gradient, leaf by leaf and added up in turn."""
    pairs = zip(jax.tree.leaves(window), jax.tree.leaves(grad), strict=True)
    return sum(jnp.tensordot(r, g, axes=g.ndim, precision=HIGHEST) for r, g in pairs)


def bare_step(state: tuple[PyTree, jax.Array], grad: PyTree) -> Any:
    """Two passes over the window; a step waits for the last one through its weights."""
    window, last = state
    weights = products(window, grad) + 1e-6 * last
    update = jax.tree.map(lambda r: jnp.tensordot(weights, r, axes=1, precision=HIGHEST), window)
    return (window, weights), update


def filled_state(tx: Any, window: PyTree, number: int) -> Any:
    """The state after the rows of ``window``: the first step replaces row 0 by itself."""
    state = tx.init(jax.tree.map(lambda rows: rows[0], window))
    kept = []
    for index in range(number):
        compressed, as_tree = _compress(state.window, row(window, index))
        kept.append(flat(as_tree, 1)[0])
        state = state._replace(window=_push(state.window, compressed, index))
    rows = np.stack(kept)
    return state._replace(gram=jnp.asarray(rows @ rows.T), count=jnp.asarray(number, jnp.int32))


@jax.jit
def _compress(window: Any, grad: PyTree) -> Any:
    return window.compress(grad)


@jax.jit(donate_argnums=0)
def _push(window: Any, compressed: Any, slot: Any) -> Any:
    return window.push(compressed, slot)


def curvax_step(tx: Any) -> Callable[..., Any]:
    def step(state: PyTree, grad: PyTree) -> Any:
        update, state = tx.update(grad, state)
        return state, update

    return step


# --- A sparse window of BERT-base's size ---


def bert_shapes() -> list[PyTree]:
    """Shapes of BERT-base's parameters: 110 million."""
    width, hidden = 768, 3072
    attention = [(width, width), (width,)] * 4
    feed_forward = [(width, hidden), (hidden,), (hidden, width), (width,)]
    layer = [*attention, *feed_forward, *[(width,)] * 4]
    embeddings = [(30522, width), (512, width), (2, width), (width,), (width,)]
    shapes = [*embeddings, *layer * 12, (width, width), (width,)]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _sparse_rows(like: Any, block_size: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Random rows for a leaf, of the shape and dtype of ``like``, and their positions.

    Each row has the same values times a random factor, at the same scattered positions shifted at
    random: distinct in the block, and 32-bit numbers only in a fused loop.
    """
    generator = np.random.default_rng(seed)
    scattered = generator.permutation(block_size)[: len(like)].astype(np.int32)
    scattered = scattered.reshape(-1, *[1] * (like.ndim - 1))
    shifts = generator.integers(block_size, size=(1, *like.shape[1:]), dtype=np.int32)
    factors = generator.standard_normal(like.shape[-1], dtype=np.float32)
    values = generator.standard_normal((*like.shape[:-1], 1), dtype=np.float32)
    positions = _expanded_positions(shifts, scattered, block_size)
    return _expanded(factors, values, like.dtype), positions


@jax.jit(static_argnums=2)
def _expanded(factors: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
    return (factors * values).astype(dtype)


@jax.jit(static_argnums=2)
def _expanded_positions(shifts: jax.Array, scattered: jax.Array, size: int) -> jax.Array:
    return ((scattered + shifts) % size).astype(jnp.int16)


def large_state(tx: Any, shapes: PyTree) -> Any:
    """A state with a full window, made in place of 1024 steps."""
    state = jax.eval_shape(tx.init, shapes)
    leaves = zip(shapes, state.window.values, strict=True)
    pairs = [
        _sparse_rows(like, Blocks.of(leaf.shape).size, seed)
        for seed, (leaf, like) in enumerate(leaves)
    ]
    values, positions = zip(*pairs, strict=True)
    kept = sum(math.prod(v.shape[:-1]) for v in values)
    rest = state._replace(window=None)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return zeros._replace(
        window=SparseWindow(list(values), list(positions)),
        gram=kept * jnp.eye(len(state.gram)),  # random rows are all but orthogonal
        count=jnp.asarray(len(state.gram), jnp.int32),
    )
