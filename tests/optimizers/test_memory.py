"""The bytes of a state, known from shapes, and the refusal of what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.optimizers import _memory


def nbytes(tree):
    leaves = jax.tree.leaves(optax.tree.unwrap_random_key_data(tree))
    return sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        curvax.adahessian(0.1),
        curvax.mfac(num_grads=7),
        curvax.mfac(num_grads=7, momentum=0.9, window_dtype="bfloat16"),
        curvax.mfac(num_grads=7, density=0.1),
    ],
)
def test_the_bytes_are_those_of_the_state_that_init_builds(tx):
    params = {"w": jnp.ones((30, 20)), "b": jnp.ones(20)}
    assert curvax.state_bytes(tx, params) == nbytes(tx.init(params))
    shapes = jax.eval_shape(lambda: params)
    assert curvax.state_bytes(tx, shapes) == nbytes(tx.init(params))


def test_a_sharded_state_counts_what_one_device_holds():
    mesh = jax.make_mesh((8,), ("x",))
    params = jax.device_put(jnp.ones((16, 4)), jax.NamedSharding(mesh, jax.P("x")))
    tx = curvax.scale_by_mfac(num_grads=5)
    whole = curvax.state_bytes(tx, jax.eval_shape(lambda: jnp.ones((16, 4))))
    rows = 5 * 16 * 4 * 4
    assert curvax.state_bytes(tx, params) == whole - rows + rows // 8


def test_a_window_larger_than_the_memory_is_refused_with_the_bytes(monkeypatch):
    monkeypatch.setattr(_memory, "_machine_memory", lambda: 10_000)
    params = {"w": jnp.ones((30, 20))}
    message = r"num_grads=100, density=None.*240,000 bytes|240,000 bytes.*num_grads=100"
    with pytest.raises(ValueError, match=message):
        curvax.mfac(num_grads=100).init(params)
    curvax.mfac(num_grads=2).init(params)
    # Under a trace no device is known; shapes can be asked for.
    jax.eval_shape(curvax.mfac(num_grads=100).init, params)


def test_the_memory_of_the_machine_is_known():
    assert 2**28 < _memory._machine_memory() < np.inf
