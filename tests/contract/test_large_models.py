"""A model of seven billion parameters: what its states take, and each device's share of them.

Arithmetic alone: the devices need not exist, and nothing is compiled.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 4096, 32, 11008, 32000
HEAD = WIDTH // HEADS
# Shapes and how they are split over the data's axis and the tensors' own; layers are stacked.
LLAMA = {
    "embedding": ((VOCABULARY, WIDTH), P("tensor", "data")),
    "query": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "data", "tensor", None)),
    "key": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "data", "tensor", None)),
    "value": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "data", "tensor", None)),
    "out": ((LAYERS, HEADS, HEAD, WIDTH), P(None, "tensor", None, "data")),
    "gate": ((LAYERS, WIDTH, HIDDEN), P(None, "data", "tensor")),
    "up": ((LAYERS, WIDTH, HIDDEN), P(None, "data", "tensor")),
    "down": ((LAYERS, HIDDEN, WIDTH), P(None, "tensor", "data")),
    "attention_norm": ((LAYERS, WIDTH), P(None, "tensor")),
    "mlp_norm": ((LAYERS, WIDTH), P(None, "tensor")),
    "norm": ((WIDTH,), P("tensor")),
    "head": ((WIDTH, VOCABULARY), P("data", "tensor")),
}
MESHES = [(8, 1), (32, 8), (16, 16), (256, 1), (64, 16), (256, 16)]
OPTIMIZERS = {
    "adahessian": curvax.adahessian(0.1),
    "dense": curvax.mfac(num_grads=16),
    "sparse": curvax.mfac(num_grads=256, density=0.01),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def llama(mesh=None):
    def leaf(shape, spec):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return {name: leaf(*leaf_of) for name, leaf_of in LLAMA.items()}


NUM_PARAMS = sum(math.prod(leaf.shape) for leaf in llama().values())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@every_optimizer
def test_each_device_holds_its_share_of_the_state(optimizer, mesh):
    tx = OPTIMIZERS[optimizer]
    total = curvax.state_bytes(tx, llama())
    on_one = curvax.state_bytes(tx, llama(AbstractMesh(mesh, ("data", "tensor"))))
    assert on_one == pytest.approx(total / math.prod(mesh), rel=0.05)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_parameter"),
    # Two averages; rows of float32; error feedback, values of float32 and positions of 16 bits.
    [("adahessian", 4 + 4), ("dense", 4 * 16), ("sparse", 4 + 256 * 0.01 * (4 + 2))],
)
def test_a_state_takes_the_bytes_that_are_documented(optimizer, bytes_a_parameter):
    total = curvax.state_bytes(OPTIMIZERS[optimizer], llama())
    # Of a block, sparse rows keep a whole number of entries, rounded down.
    assert 0.9 < total / (bytes_a_parameter * NUM_PARAMS) < 1.01


def test_the_model_has_seven_billion_parameters():
    assert NUM_PARAMS == 6_738_415_616


@every_optimizer
def test_an_update_counts_beyond_the_integers_of_32_bits(optimizer):
    tx, params = OPTIMIZERS[optimizer], llama()
    state = jax.eval_shape(tx.init, params)
    curvature = {"hessian_diag": params} if optimizer == "adahessian" else {}
    updates, new_state = jax.eval_shape(tx.update, params, state, params, **curvature)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
