"""The state alone, with params, resumes a run bit for bit."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import serialization

import curvax

from .optimizers import every_layout
from .problems import coupled_loss, small_params
from .trees import assert_trees_equal


def make_run(row, tx):
    """A function that takes a number of steps, each on its own batch."""

    @jax.jit
    def step(params, state, shift):
        def loss(p):
            return coupled_loss(p, shift)

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, **row.from_function(loss))
        return optax.apply_updates(params, updates), state

    def run(params, state, first, last):
        for index in range(first, last):
            params, state = step(params, state, np.float32(0.1 * index))
        return {"params": params, "state": state}

    return run


def save_and_restore(path, tree, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", target)


@every_layout
def test_a_run_restored_by_orbax_continues_bit_for_bit(row, tmp_path):
    tx = row.make()
    run = make_run(row, tx)
    params = small_params()
    half = run(params, tx.init(params), 0, 3)
    uninterrupted = run(**half, first=3, last=7)
    abstract = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
    restored = save_and_restore(tmp_path, half, abstract)
    assert_trees_equal(restored, half)
    assert_trees_equal(run(**restored, first=3, last=7), uninterrupted)


@every_layout
def test_a_sharded_run_is_restored_with_its_shardings(row, tmp_path):
    tx = row.make()
    run = make_run(row, tx)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    specs = {"bias": sharding.update(spec=jax.P("x")), "kernel": sharding}
    params = jax.device_put(small_params(), specs)
    shardings = {"params": specs, "state": curvax.state_shardings(tx, params)}
    half = run(params, tx.init(params), 0, 3)
    uninterrupted = run(**half, first=3, last=5)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: {"params": params, "state": tx.init(params)}),
        shardings,
    )
    restored = save_and_restore(tmp_path, half, target)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    assert_trees_equal(run(**restored, first=3, last=5), uninterrupted)


@every_layout
def test_a_state_passes_through_flax_msgpack_as_key_data(row):
    tx = row.make()
    run = make_run(row, tx)
    params = small_params()
    half = run(params, tx.init(params), 0, 3)
    plain = optax.tree.unwrap_random_key_data(half)
    restored = serialization.from_bytes(plain, serialization.to_bytes(plain))
    wrapped = jax.tree.map(_as_before, restored, half)
    assert_trees_equal(run(**wrapped, first=3, last=5), run(**half, first=3, last=5))


def _as_before(leaf, original):
    if jax.dtypes.issubdtype(original.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(original))
    return jax.numpy.asarray(leaf)
