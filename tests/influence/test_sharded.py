"""On a mesh of eight devices: the scores of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import influence
from tests.contract.meshes import make_mesh

LOSS = "softmax_cross_entropy"
INPUTS = np.random.default_rng(0).standard_normal((12, 8))
LABELS = np.arange(12) % 3
TEST = INPUTS[:3] + 1, LABELS[:3]
SPECS = {"first": jax.P(None, "x"), "second": jax.P("x", None)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"])
    if jax.typeof(hidden).sharding.mesh.are_all_axes_explicit:
        return jax.lax.dot_general(
            hidden, params["second"], (((1,), (0,)), ((), ())), out_sharding=jax.P(None, None)
        )
    return hidden @ params["second"]


def make_params():
    rng = np.random.default_rng(1)
    return {"first": rng.standard_normal((8, 16)) / 3, "second": rng.standard_normal((16, 3)) / 4}


def numbers(params, **options):
    function = influence.ggn_influence(
        network, LOSS, params, (INPUTS, LABELS), micro_batch_size=18, **options
    )
    return np.vstack([function.scores(TEST).scores, function.self_influence().values])


def sharded(mesh):
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put(make_params(), shardings)


def test_sharded_parameters_give_the_same_scores():
    expected = numbers(make_params(), damping=0.1)
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        found = numbers(sharded(mesh), damping=0.1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_blocks_spread_over_devices_give_the_same_scores():
    expected = numbers(make_params(), damping=0.1, block_size=20)
    mesh = make_mesh("automatic")
    found = numbers(sharded(mesh), damping=0.1, block_size=20, mesh=mesh)
    np.testing.assert_allclose(found, expected, atol=1e-12)
