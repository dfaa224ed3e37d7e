"""Every product of the inverse, of every kind of rows, against a dense matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax

SHAPES = {"kernel": (3, 4), "scale": (), "bias": (5,)}
DIM = 18
NUM_GRADS = 7
DAMPING = 0.03
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.25])

BOTH = {"centered": True, "weights": WEIGHTS}
KINDS = {
    "plain": {},
    "weighted": {"weights": WEIGHTS},
    "complex": {},
    "complex, centered and weighted": BOTH,
    "real part, centered and weighted": {**BOTH, "real_part": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# The whole matrix in sample space; blocks in that of the gradients; larger ones in sample space.
every_block_size = pytest.mark.parametrize("block_size", [None, 5, 16])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def is_complex(kind):
    return "complex" in kind or "real part" in kind


def gradients(kind="plain", seed=0):
    rng = np.random.default_rng(seed)

    def leaf(shape):
        rows = rng.standard_normal((NUM_GRADS, *shape)) + rng.standard_normal(shape)
        return rows + 1j * rng.standard_normal(rows.shape) if is_complex(kind) else rows

    return {name: leaf(shape) for name, shape in SHAPES.items()}


def flat(tree, batch=1):
    leaves = [np.reshape(x, (*np.shape(x)[:batch], -1)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def tree_of(vector):
    sizes = [int(np.prod(SHAPES[name])) for name in sorted(SHAPES)]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {
        name: np.reshape(part, SHAPES[name])
        for name, part in zip(sorted(SHAPES), parts, strict=True)
    }


def prepared(rows, weights=None, centered=False, real_part=False):
    """The rows of G, weighted and centred, and the normalizer."""
    del real_part
    weights = np.ones(len(rows)) if weights is None else weights
    mean = weights @ rows / weights.sum() if centered else 0
    return np.sqrt(weights)[:, np.newaxis] * (rows - mean), weights.sum()


def fisher(rows, block_size=None, **options):
    G, normalizer = prepared(rows, **options)
    F = G.conj().T @ G / normalizer
    F = F.real if options.get("real_part") else F
    blocks = np.arange(DIM) // (block_size or DIM)
    return np.where(blocks[:, np.newaxis] == blocks, F, 0) + DAMPING * np.eye(DIM)


def vector(kind, seed=1):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(DIM)
    return real + 1j * rng.standard_normal(DIM) if "complex" in kind else real


def case(kind, block_size):
    grads = gradients(kind)
    options = KINDS[kind]
    inverse = curvax.inverse_fisher(
        jax.tree.map(jnp.asarray, grads), DAMPING, block_size=block_size, **options
    )
    return inverse, fisher(flat(grads), block_size, **options)


@every_kind
@every_block_size
def test_products_diagonal_and_elements(kind, block_size):
    inverse, F = case(kind, block_size)
    v = vector(kind)
    expected = np.linalg.inv(F)
    np.testing.assert_allclose(flat(inverse.solve(tree_of(v)), 0), expected @ v, rtol=1e-9)
    diagonal = flat(inverse.diagonal(), 0)
    assert diagonal.dtype == np.float64
    np.testing.assert_allclose(diagonal, np.diag(expected).real, rtol=1e-9)
    for i, j in ((0, 0), (1, 4), (4, 1), (2, 17)):
        np.testing.assert_allclose(inverse.element(i, j), expected[i, j], atol=1e-9)


@every_kind
@every_block_size
def test_combinations_of_gradients_in_sample_space(kind, block_size):
    inverse, F = case(kind, block_size)
    rng = np.random.default_rng(2)
    samples = rng.standard_normal((3, NUM_GRADS))
    if is_complex(kind):
        samples = samples + 1j * rng.standard_normal(samples.shape)
    G, _ = prepared(flat(gradients(kind)), **KINDS[kind])
    weights = KINDS[kind].get("weights", np.ones(NUM_GRADS))
    sums = samples * np.sqrt(weights) @ G.conj()
    sums = sums.real if "real part" in kind else sums
    expected = np.linalg.solve(F, sums.T).T
    several = inverse.solve_in_sample_space(samples)
    np.testing.assert_allclose(flat(several), expected, rtol=1e-8, atol=1e-10)
    one = inverse.solve_in_sample_space(samples[1])
    np.testing.assert_allclose(flat(one, 0), expected[1], rtol=1e-8, atol=1e-10)


@every_kind
@every_block_size
def test_quadratic_form_and_determinant(kind, block_size):
    inverse, F = case(kind, block_size)
    v = vector(kind)
    expected = np.vdot(v, np.linalg.solve(F, v)).real
    np.testing.assert_allclose(inverse.quadratic_form(tree_of(v)), expected, rtol=1e-10)
    np.testing.assert_allclose(inverse.logdet(), np.linalg.slogdet(F)[1], rtol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "complex, centered and weighted"])
@every_block_size
def test_samples_have_the_inverse_as_their_covariance(kind, block_size):
    inverse, F = case(kind, block_size)
    number = 40_000
    keys = jax.random.split(jax.random.key(0), number)
    draws = flat(jax.vmap(inverse.sample)(keys))
    # Whitened, their covariance is the identity.
    white = draws @ np.linalg.cholesky(F).conj()
    error = white.conj().T @ white / number - np.eye(DIM)
    assert np.abs(error).max() < 5 * np.sqrt(2 / number)
    assert np.abs(white.mean(axis=0)).max() < 5 / np.sqrt(number)


@pytest.mark.parametrize("kind", ["plain", "real part, centered and weighted"])
@pytest.mark.parametrize("block_size", [None, 5])
def test_gradients_of_the_host_give_the_same(kind, block_size):
    grads = gradients(kind)
    on_host = curvax.inverse_fisher(
        grads, DAMPING, block_size=block_size, workspace_bytes=700, **KINDS[kind]
    )
    on_device, _ = case(kind, block_size)
    v, samples = tree_of(vector(kind)), np.arange(NUM_GRADS) - 2.0
    for ours, theirs in (
        (on_host.solve(v), on_device.solve(v)),
        (on_host.diagonal(), on_device.diagonal()),
        (on_host.quadratic_form(v), on_device.quadratic_form(v)),
        (on_host.logdet(), on_device.logdet()),
        (on_host.solve_in_sample_space(samples), on_device.solve_in_sample_space(samples)),
    ):
        np.testing.assert_allclose(flat(ours, 0), flat(theirs, 0), rtol=1e-9, atol=1e-12)


def one_direction(seed=0, number=128, size=2000):
    """Rows that share a mean ten times longer than what they differ in: ill-conditioned."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(size)
    noise = 0.3 * rng.standard_normal((number, size)) / np.sqrt(size)
    return (mean / np.linalg.norm(mean) + noise).astype(np.float32)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("damping", [1e-5, 1e-7])
@pytest.mark.parametrize("block_size", [None, 500])
def test_in_float32_sample_space_loses_no_digits(damping, seed, block_size):
    rows = one_direction(seed)
    samples = np.random.default_rng(seed + 1).standard_normal(128).astype(np.float32)
    inverse = curvax.inverse_fisher(jnp.asarray(rows), damping, block_size=block_size)
    found = np.asarray(inverse.solve_in_sample_space(samples), np.float64)
    assert inverse.solve_in_sample_space(samples).dtype == jnp.float32
    width = block_size or rows.shape[1]
    blocks = np.split(rows.astype(np.float64), rows.shape[1] // width, axis=1)
    expected = np.concatenate(
        [
            128 * G.T @ np.linalg.solve(128 * damping * np.eye(128) + G @ G.T, samples)
            for G in blocks
        ]
    )
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("damping", [1e-3, 1e-7])
@pytest.mark.parametrize("block_size", [None, 500])
def test_in_float32_a_product_is_as_good_as_its_rounded_vector(damping, block_size):
    rows = one_direction()
    G = rows.astype(np.float64)
    samples = np.random.default_rng(1).standard_normal(128)
    vector = G.T @ samples
    inverse = curvax.inverse_fisher(jnp.asarray(rows), damping, block_size=block_size)
    found = np.asarray(inverse.solve(vector.astype(np.float32)), np.float64)
    blocks = np.arange(2000) // (block_size or 2000)
    F = np.where(blocks[:, np.newaxis] == blocks, G.T @ G / 128, 0) + damping * np.eye(2000)
    exact = np.linalg.solve(F, np.stack([vector, vector.astype(np.float32)], axis=1)).T
    from_rounding = np.linalg.norm(exact[1] - exact[0])
    from_product = np.linalg.norm(found - exact[1])
    assert from_product < 8 * from_rounding + 1e-5 * np.linalg.norm(exact[0])


class TestBadInput:
    @pytest.mark.parametrize("samples", [np.ones(3), np.ones((2, 3)), np.ones((1, 1, 7)), 1.0])
    def test_samples_have_a_number_for_each_gradient(self, samples):
        inverse, _ = case("plain", None)
        with pytest.raises(ValueError, match=r"samples must have shape \(7,\) or \(k, 7\)"):
            inverse.solve_in_sample_space(samples)

    def test_a_real_matrix_refuses_complex_vectors(self):
        inverse, _ = case("plain", None)
        with pytest.raises(ValueError, match="samples must be real"):
            inverse.solve_in_sample_space(1j * np.ones(NUM_GRADS))
        for kind in ("plain", "real part, centered and weighted"):
            inverse, _ = case(kind, None)
            for product in (inverse.solve, inverse.quadratic_form):
                with pytest.raises(ValueError, match="the vector must be real"):
                    product(tree_of(1j * np.ones(DIM)))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (np.ones(6), r"shape \(7,\), one per gradient, got \(6,\)"),
            (1.0, r"shape \(7,\)"),
            (np.full(7, -1.0), "finite and at least zero"),
            (np.full(7, np.nan), "finite and at least zero"),
            (1j * np.ones(7), "finite and at least zero"),
            (np.zeros(7), "must not all be zero"),
        ],
    )
    def test_weights_are_not_negative(self, weights, message):
        with pytest.raises(ValueError, match=message):
            curvax.inverse_fisher(gradients(), weights=weights)

    def test_a_real_part_is_of_complex_gradients(self):
        with pytest.raises(ValueError, match="real_part=True needs complex gradients"):
            curvax.inverse_fisher(gradients(), real_part=True)

    def test_one_gradient_has_no_covariance(self):
        with pytest.raises(ValueError, match="at least two gradients"):
            curvax.inverse_fisher(np.ones((1, 3)), centered=True)

    @pytest.mark.parametrize(
        "options", [{"weights": np.ones(2)}, {"centered": True}, {"real_part": True}]
    )
    def test_a_stream_is_read_once(self, options):
        with pytest.raises(ValueError, match="a stream of gradients is read once"):
            curvax.inverse_fisher(iter([np.ones((2, 3))]), block_size=2, **options)

    def test_a_stream_keeps_no_gradients(self):
        inverse = curvax.inverse_fisher(iter([np.ones((2, 3))]), block_size=2)
        with pytest.raises(ValueError, match="those of a stream are not kept"):
            inverse.solve_in_sample_space(np.ones(2))
