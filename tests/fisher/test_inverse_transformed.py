"""The inverse as a pure function: under jit, vmap, shard_map and grad, and compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import curvax

pytestmark = pytest.mark.oldest
every_block_size = pytest.mark.parametrize("block_size", [None, 4, 12])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rows(seed=0, number=6, shape=(4, 5)):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.standard_normal((number, *shape)) + 1),
        "bias": jnp.asarray(rng.standard_normal((number, 3)) + 1),
    }


def like(tree):
    return jax.tree.map(lambda leaf: jnp.cos(leaf[0]), tree)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, theirs)


@every_block_size
def test_an_inverse_is_made_and_used_under_jit(block_size):
    grads = rows()
    vector = like(grads)

    @jax.jit
    def inside(grads, damping, vector):
        inverse = curvax.inverse_fisher(grads, damping, block_size=block_size)
        samples = jnp.arange(6.0)
        return inverse, (
            inverse.solve(vector),
            inverse.diagonal(),
            inverse.solve_in_sample_space(samples),
            inverse.quadratic_form(vector),
            inverse.logdet(),
            inverse.sample(1),
            inverse.num_failed,
        )

    inverse, found = inside(grads, 0.1, vector)
    outside = curvax.inverse_fisher(grads, 0.1, block_size=block_size)
    expected = (
        outside.solve(vector),
        outside.diagonal(),
        outside.solve_in_sample_space(jnp.arange(6.0)),
        outside.quadratic_form(vector),
        outside.logdet(),
        outside.sample(1),
        outside.num_failed,
    )
    assert_close(found, expected)
    assert_close(inverse.solve(vector), expected[0])  # a pytree, returned from jit


@every_block_size
def test_an_inverse_is_handed_to_a_compiled_function(block_size):
    grads = rows()
    inverse = curvax.inverse_fisher(grads, 0.1, block_size=block_size)
    solved = jax.jit(lambda inverse, vector: inverse.solve(vector))(inverse, like(grads))
    assert_close(solved, inverse.solve(like(grads)))


@every_block_size
def test_an_ensemble_of_inverses_under_vmap(block_size):
    members = [rows(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def solve(grads, vector):
        return curvax.inverse_fisher(grads, 0.1, block_size=block_size).solve(vector)

    vectors = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(like, members))
    found = jax.vmap(solve)(stacked, vectors)
    for index, member in enumerate(members):
        assert_close(jax.tree.map(lambda x, i=index: x[i], found), solve(member, like(member)))


@every_block_size
def test_each_device_inverts_its_own_gradients_under_shard_map(block_size):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    stacked = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(rows(seed) for seed in range(4))
    )

    def diagonal(grads):
        inverse = curvax.inverse_fisher(grads, 0.1, block_size=block_size)
        return jax.tree.map(lambda leaf: leaf[jnp.newaxis], inverse.diagonal())

    spec = jax.P("x")
    found = jax.jit(jax.shard_map(diagonal, mesh=mesh, in_specs=spec, out_specs=spec))(stacked)
    for index in range(4):
        alone = curvax.inverse_fisher(rows(index), 0.1, block_size=block_size).diagonal()
        assert_close(jax.tree.map(lambda x, i=index: x[i], found), alone)


@every_block_size
def test_all_products_are_differentiable_by_gradients_and_damping(block_size):
    @jax.jit
    def value(grads, damping):
        inverse = curvax.inverse_fisher(grads, damping, block_size=block_size)
        vector = like(rows())
        products = inverse.solve(vector), inverse.solve_in_sample_space(jnp.arange(6.0))
        sums = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(products)]
        return sum(sums) + inverse.logdet() + inverse.quadratic_form(vector)

    check_grads(value, (rows(), 0.3), order=1, modes=("rev",), rtol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_sharded_gradients_under_jit(kind, block_size):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
    grads = rows(shape=(3, 16))["kernel"]
    alone = curvax.inverse_fisher(grads, 0.1, block_size=block_size)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(grads, jax.NamedSharding(mesh, jax.P(None, None, "x")))

        @jax.jit
        def products(grads):
            inverse = curvax.inverse_fisher(grads, 0.1, block_size=block_size)
            return inverse.diagonal(), inverse.solve_in_sample_space(jnp.arange(6.0))

        diagonal, product = products(sharded)
    assert_close(diagonal, alone.diagonal())
    assert_close(product, alone.solve_in_sample_space(jnp.arange(6.0)))


def test_a_second_call_on_a_mesh_compiles_nothing():
    mesh = jax.make_mesh((4,), ("x",))
    compiled = []

    def count(name, *_, **__):
        compiled.append(name) if name.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(count)
    grads, vector = rows(), like(rows())

    def products():
        inverse = curvax.inverse_fisher(grads, 0.1, block_size=4, mesh=mesh, workspace_bytes=3000)
        products = inverse.solve(vector), inverse.diagonal(), inverse.logdet()
        return *products, inverse.solve_in_sample_space(jnp.ones(6)), inverse.sample(0)

    first = products()
    assert compiled
    compiled.clear()
    assert_close(products(), first)
    assert not compiled
