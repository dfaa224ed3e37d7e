"""The static inverse: exact against dense inverses, in any layout, wherever the gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.contract.collectives import collectives, moved

SHAPES = {"a": (4, 3), "b": (5,), "c": (), "d": (0, 2), "e": (2, 3, 2)}
DIM = 12 + 5 + 1 + 12
NUM_GRADS = 8
# Blocks smaller than the number of gradients, equal, and larger; with ragged tails and without.
every_block_size = pytest.mark.parametrize("block_size", [None, 1, 5, 7, 8, 15, 1000])
every_scope = pytest.mark.parametrize("block_scope", ["tree", "leaf"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tree_of_rows(seed=0, number=NUM_GRADS, make=jnp.asarray):
    """Gradients that share a mean, so that every pair of entries is coupled."""
    rng = np.random.default_rng(seed)
    return {
        name: make(rng.standard_normal((number, *shape)) + rng.standard_normal(shape))
        for name, shape in SHAPES.items()
    }


def flat(rows):
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(rows)], axis=1)


def ravel(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def block_of(column, block_size, block_scope):
    """The block that a column belongs to: a number for each."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    starts = (
        np.repeat(np.cumsum([0, *sizes[:-1]]), sizes) if block_scope == "leaf" else np.zeros(DIM)
    )
    inside = column - starts
    return starts * 10**6 + (0 if block_size is None else inside // block_size)


def dense(rows, damping, block_size=None, block_scope="tree"):
    G = flat(rows)
    blocks = block_of(np.arange(DIM), block_size, block_scope)
    F = damping * np.eye(DIM) + G.T @ G / len(G)
    return np.linalg.inv(np.where(blocks[:, np.newaxis] == blocks, F, 0))


def vector_like(rows, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape[1:])), rows)


@every_scope
@every_block_size
def test_products_diagonal_and_elements_are_those_of_the_dense_inverse(block_size, block_scope):
    for damping in (1e-2, 1e-5):
        rows = tree_of_rows()
        expected = dense(rows, damping, block_size, block_scope)
        inverse = curvax.inverse_fisher(
            rows, damping, block_size=block_size, block_scope=block_scope
        )
        vector = vector_like(rows)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            ravel(inverse.solve(vector)), expected @ ravel(vector), atol=1e-9 * scale
        )
        np.testing.assert_allclose(
            ravel(inverse.diagonal()), np.diag(expected), rtol=1e-9, atol=1e-12 * scale
        )
        for i, j in ((0, 0), (3, 4), (4, 3), (2, 29), (12, 12), (29, 28)):
            np.testing.assert_allclose(
                inverse.element(i, j), expected[i, j], rtol=1e-9, atol=1e-10 * scale
            )


def test_a_matrix_of_gradients_is_a_tree_of_one_leaf():
    rows = flat(tree_of_rows())
    inverse = curvax.inverse_fisher(rows, 0.1)
    expected = dense(tree_of_rows(), 0.1)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=1e-10)
    np.testing.assert_allclose(inverse.solve(np.ones(DIM)), expected.sum(axis=1), rtol=1e-9)


@every_block_size
def test_gradients_of_the_host_are_streamed_by_columns(block_size, tmp_path):
    rows = tree_of_rows(make=np.asarray)
    for name, leaf in rows.items():
        if leaf.size:
            mapped = np.lib.format.open_memmap(
                tmp_path / f"{name}.npy", mode="w+", dtype=leaf.dtype, shape=leaf.shape
            )
            mapped[...] = leaf
            rows[name] = mapped
    # Few enough bytes for several batches in any layout.
    inverse = curvax.inverse_fisher(rows, 1e-3, block_size=block_size, workspace_bytes=400)
    expected = dense(rows, 1e-3, block_size)
    np.testing.assert_allclose(ravel(inverse.diagonal()), np.diag(expected), rtol=1e-9)
    ones = jax.tree.map(lambda x: np.ones(x.shape[1:]), rows)
    np.testing.assert_allclose(ravel(inverse.solve(ones)), expected.sum(axis=1), atol=1e-8)


@pytest.mark.parametrize("block_size", [5, 15])
def test_chunks_are_reduced_as_they_come(block_size):
    rows = tree_of_rows(number=11)
    chunks = (jax.tree.map(lambda x, k=k: x[k : k + 3], rows) for k in range(0, 11, 3))
    inverse = curvax.inverse_fisher(chunks, 1e-3, block_size=block_size)
    expected = dense(rows, 1e-3, block_size)
    assert inverse.num_grads == 11
    np.testing.assert_allclose(ravel(inverse.diagonal()), np.diag(expected), rtol=1e-9)
    vector = vector_like(rows)
    np.testing.assert_allclose(ravel(inverse.solve(vector)), expected @ ravel(vector), atol=1e-8)


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("block_size", [2, 3, 15])
def test_blocks_over_a_mesh_equal_those_of_one_device(block_size, shape):
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)])
    rows, vector = tree_of_rows(), vector_like(tree_of_rows())
    alone = curvax.inverse_fisher(rows, 1e-3, block_size=block_size)
    spread = curvax.inverse_fisher(rows, 1e-3, block_size=block_size, mesh=mesh)
    np.testing.assert_allclose(ravel(spread.diagonal()), ravel(alone.diagonal()), rtol=1e-12)
    np.testing.assert_allclose(
        ravel(spread.solve(vector)), ravel(alone.solve(vector)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(1700,), (4, 425), (100,), (1, 512)])
def test_columns_in_chunks_give_the_same_sums(shape):
    from curvax.fisher.inverse._gram import Cut, gram_of_cut, squares_of_cut

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((512, *shape))  # 512 columns of 512 float64 make a chunk
    triangle = np.tril(rng.standard_normal((512, 512)))
    flat = rows.reshape(512, -1)
    np.testing.assert_allclose(gram_of_cut(rows, cut=Cut(True, 1)), flat @ flat.T, atol=1e-10)
    projected, squares = squares_of_cut(triangle, rows, cut=Cut(True, 1))
    assert projected.shape == squares.shape == shape
    np.testing.assert_allclose(np.ravel(projected), np.sum((triangle @ flat) ** 2, axis=0))
    np.testing.assert_allclose(np.ravel(squares), np.sum(flat**2, axis=0))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_gradients_stay_where_they_are(kind):
    from curvax.fisher.inverse._gram import Cut, gram_of_cut, squares_of_cut

    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
    rows = jax.device_put(
        jnp.asarray(np.random.default_rng(0).standard_normal((NUM_GRADS, 3, 16))),
        jax.NamedSharding(mesh, jax.P(None, None, "x")),
    )
    with jax.set_mesh(mesh):
        inverse = curvax.inverse_fisher({"kernel": rows}, 1e-3)
        diagonal = inverse.diagonal()["kernel"]
        solved = inverse.solve({"kernel": jnp.ones((3, 16))})["kernel"]
        assert not moved(collectives(gram_of_cut.lower(rows, cut=Cut(False, None)).compile()))
        factor = jnp.eye(NUM_GRADS)
        assert not collectives(squares_of_cut.lower(factor, rows, cut=Cut(False, None)).compile())
    assert diagonal.sharding.is_equivalent_to(rows[0].sharding, 2)
    G = np.asarray(rows).reshape(NUM_GRADS, -1)
    expected = np.linalg.inv(1e-3 * np.eye(48) + G.T @ G / NUM_GRADS)
    np.testing.assert_allclose(np.ravel(diagonal), np.diag(expected), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(solved), expected.sum(axis=1), atol=1e-8)


@pytest.mark.parametrize("block_size", [None, 4, 40])
@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-7])
def test_in_float32_the_diagonal_keeps_to_its_bounds_and_its_digits(block_size, damping):
    rng = np.random.default_rng(0)
    G = (rng.standard_normal((16, 60)) + 3 * rng.standard_normal(60)) / 10
    inverse = curvax.inverse_fisher(jnp.asarray(G, jnp.float32), damping, block_size=block_size)
    blocks = np.arange(60) // (block_size or 60)
    F = np.where(blocks[:, np.newaxis] == blocks, G.T @ G / 16, 0) + damping * np.eye(60)
    diagonal = np.asarray(inverse.diagonal(), np.float64)
    assert diagonal.dtype == np.float64
    assert inverse.diagonal().dtype == jnp.float32
    assert np.all(diagonal <= 1 / damping * (1 + 1e-6))
    assert np.all(diagonal >= 1 / np.diag(F) * (1 - 1e-5))
    np.testing.assert_allclose(diagonal, np.diag(np.linalg.inv(F)), rtol=5e-3)


def test_float64_when_asked():
    rows = jnp.asarray(flat(tree_of_rows()), jnp.float32)
    inverse = curvax.inverse_fisher(rows, 1e-6, dtype=jnp.float64)
    G = np.asarray(rows, np.float64)
    expected = np.linalg.inv(1e-6 * np.eye(DIM) + G.T @ G / NUM_GRADS)
    assert inverse.diagonal().dtype == jnp.float64
    np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=1e-9)


@pytest.mark.parametrize("block_size", [None, 3, 20])
def test_a_weight_without_gradient_has_the_inverse_of_the_damping(block_size):
    G = flat(tree_of_rows()).copy()
    G[:, [4, 20]] = 0
    diagonal = curvax.inverse_fisher(G, 0.01, block_size=block_size).diagonal()
    np.testing.assert_allclose(diagonal[np.array([4, 20])], 100, rtol=1e-12)


def test_a_matrix_that_float32_cannot_factor_is_damped_a_little_more_and_counted():
    rows = jnp.ones((32, 40), jnp.float32) * jnp.float32(1e3)
    inverse = curvax.inverse_fisher(rows, 1e-12)
    assert inverse.num_failed == 1
    assert np.all(np.isfinite(inverse.diagonal()))
    assert np.all(np.isfinite(inverse.solve(jnp.ones(40))))


class TestBadInput:
    @pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
    def test_damping_must_be_positive(self, damping):
        with pytest.raises(ValueError, match=r"damping must be a number in \(0"):
            curvax.inverse_fisher(np.ones((2, 3)), damping)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
    def test_a_gradient_that_is_not_finite_is_named(self, value, make):
        rows = {"a": make(np.ones((3, 2))), "b": make(np.full((3, 2), [[1], [1], [value]]))}
        with pytest.raises(ValueError, match=r"at b, in gradients \[2\]"):
            curvax.inverse_fisher(rows, 0.1)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({}, "at least one gradient"),
            (np.ones((0, 3)), "at least one gradient"),
            (np.ones(()), "at least one gradient"),
            (np.ones((2, 0)), "at least one entry"),
            ({"a": np.ones((2, 3)), "b": np.ones((3, 3))}, "same number of rows.*at b"),
            (np.ones((2, 3), int), "real or complex floating-point, got int"),
        ],
    )
    def test_gradients_must_be_rows_of_numbers(self, rows, message):
        with pytest.raises(ValueError, match=message):
            curvax.inverse_fisher(rows, 0.1)

    @pytest.mark.parametrize(
        "options", [{"block_size": 0}, {"block_scope": "row"}, {"workspace_bytes": 0}]
    )
    def test_options_have_their_ranges(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            curvax.inverse_fisher(np.ones((2, 3)), 0.1, **options)

    def test_a_mesh_needs_blocks(self):
        with pytest.raises(ValueError, match="mesh spreads blocks"):
            curvax.inverse_fisher(np.ones((2, 3)), mesh=jax.make_mesh((2,), ("x",)))

    def test_a_stream_needs_blocks_and_a_first_chunk(self):
        with pytest.raises(ValueError, match="needs a block_size"):
            curvax.inverse_fisher(iter([np.ones((2, 3))]), 0.1)
        with pytest.raises(ValueError, match="stream of gradients is empty"):
            curvax.inverse_fisher(iter([]), 0.1, block_size=2)
        with pytest.raises(ValueError, match="a chunk's gradient must match"):
            curvax.inverse_fisher(iter([np.ones((2, 3)), np.ones((2, 4))]), 0.1, block_size=2)

    def test_float64_needs_its_switch(self):
        with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
            curvax.inverse_fisher(np.ones((2, 3)), 0.1, dtype=jnp.float64)

    def test_a_vector_must_match(self):
        with pytest.raises(ValueError, match="the vector must match"):
            curvax.inverse_fisher(np.ones((2, 3)), 0.1).solve(np.ones(4))

    @pytest.mark.parametrize("indices", [(-1, 0), (0, 3)])
    def test_an_element_must_exist(self, indices):
        with pytest.raises(IndexError, match="lies outside the 3 x 3 matrix"):
            curvax.inverse_fisher(np.ones((2, 3)), 0.1).element(*indices)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.complex64])
def test_the_computation_is_in_float32_or_float64(dtype):
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'float64'"):
        curvax.inverse_fisher(jnp.ones((2, 2)), 0.1, dtype=dtype)


def test_a_damping_of_numpy_leaves_the_dtype_alone():
    with jax.enable_x64():
        inverse = curvax.inverse_fisher(jnp.ones((2, 3), jnp.float32), np.float64(0.1))
        assert inverse.solve(jnp.ones(3, jnp.float32)).dtype == jnp.float32
