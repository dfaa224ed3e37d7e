"""What whole training steps gather on a TPU, beside Adam's.

A product takes the derivative of the gradient along a probe, so a probe travels as its weight does:
where a weight is gathered, so is its tangent. M-FAC takes no derivative of its own.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.hlo import collectives

from .compiler import array, compiled, make_mesh, state_of

WIDTH, HIDDEN, BATCH = 1024, 2048, 1024
# For each mesh: its axes, and how the first weight of a block, the second and the batch are split.
MESHES = {
    "fsdp": ({"x": 8}, P("x", None), P("x", None), P("x", None)),
    "tensor": ({"y": 8}, P(None, "y"), P("y", None), P()),
    "both": ({"x": 4, "y": 2}, P("x", "y"), P("y", "x"), P("x", None)),
}
KINDS = ("all-gather", "all-to-all", "collective-permute")
every_mesh = pytest.mark.parametrize("mesh", MESHES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def loss_of(batch, dtype):
    """Two blocks that compute in ``dtype`` with weights in float32."""

    def loss(params, x):
        for block in params:
            hidden = jnp.tanh((x * block["scale"]).astype(dtype) @ block["up"].astype(dtype))
            x = x + (hidden @ block["down"].astype(dtype)).astype(jnp.float32)
            x = jax.lax.with_sharding_constraint(x, batch)
        return jnp.mean(jnp.square(x))

    return loss


def adam(loss):
    return optax.adam(0.1), jax.value_and_grad(loss)


def adahessian(loss):
    return curvax.adahessian(0.1), curvax.value_grad_and_hessian_diag_from_state(loss)


def mfac(**options):
    return lambda loss: (curvax.mfac(0.1, num_grads=16, **options), jax.value_and_grad(loss))


@functools.cache
def gathered(optimizer, mesh, dtype):
    """The bytes that one training step moves to a chip, not counting sums."""
    axes, up, down, rows = MESHES[mesh]
    described = make_mesh("v5e:2x4", tuple(axes.values()), tuple(axes))
    batch = NamedSharding(described, rows)
    block = {
        "up": array((WIDTH, HIDDEN), NamedSharding(described, up)),
        "down": array((HIDDEN, WIDTH), NamedSharding(described, down)),
        "scale": array((WIDTH,), NamedSharding(described, P())),
    }
    tx, gradient = optimizer(loss_of(batch, dtype))

    def step(params, state, x):
        if optimizer is adahessian:
            value, grads, diag = gradient(params, x, state=state)
            updates, state = tx.update(grads, state, params, hessian_diag=diag)
        else:
            value, grads = gradient(params, x)
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = (block, block)
    program = compiled(step, params, state_of(tx, params), array((BATCH, WIDTH), batch))
    found = collectives(program.as_text())
    return sum(one.num_bytes * one.runs for one in found if one.kind in KINDS)


@every_dtype
@every_mesh
def test_adahessian_gathers_at_most_twice_what_adam_does(mesh, dtype):
    assert gathered(adahessian, mesh, dtype) <= 2 * gathered(adam, mesh, dtype)


def test_a_probe_of_float32_weights_travels_as_bytes():
    assert gathered(adahessian, "both", "float32") <= 1.25 * gathered(adam, "both", "float32")


DENSE, LOW, SPARSE = mfac(), mfac(window_dtype="bfloat16"), mfac(density=0.01)


@pytest.mark.parametrize("optimizer", [DENSE, LOW, SPARSE], ids=["dense", "low", "sparse"])
@every_mesh
def test_mfac_gathers_what_adam_does(mesh, optimizer):
    assert gathered(optimizer, mesh, "bfloat16") == gathered(adam, mesh, "bfloat16")


def test_weights_split_over_the_batchs_axis_are_gathered():
    assert gathered(adam, "fsdp", "bfloat16") > 0
