"""A natural gradient step on a TPU: memory within the micro-batch, and what it communicates."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.hlo import collectives

from .compiler import array, compiled, make_mesh, num_bytes, one_chip, state_of

NUM_EXAMPLES, INPUTS, WIDTH = 1024, 512, 1024
SIZES = {"hidden": (INPUTS, WIDTH), "output": (WIDTH,)}


def residuals(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["output"]


def step_of(micro_batch_size):
    tx = curvax.natural_gradient(0.5, 1e-3, momentum=0.5, micro_batch_size=micro_batch_size)

    def step(params, state, inputs):
        updates, state = tx.update(None, state, params, outputs_fn=residuals, batch=(inputs,))
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


@functools.cache
def program(micro_batch_size, where, of_examples):
    tx, step = step_of(micro_batch_size)
    params = {name: array(shape, where) for name, shape in SIZES.items()}
    state = state_of(tx, params)
    return compiled(step, params, state, array((NUM_EXAMPLES, INPUTS), of_examples))


def test_memory_is_bounded_by_the_micro_batch():
    row = num_bytes({name: array(shape, one_chip()) for name, shape in SIZES.items()})
    memory = program(64, one_chip(), one_chip()).memory_analysis()
    matrices = 8 * 4 * NUM_EXAMPLES**2
    assert memory.temp_size_in_bytes < 5 * 64 * row + matrices
    assert memory.temp_size_in_bytes < NUM_EXAMPLES * row / 2


def test_eight_chips_gather_the_small_matrix_and_no_rows():
    mesh = make_mesh("v5e:2x4", (8,), ("data",))
    parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    found = collectives(program(256, *parts).as_text())
    rows = 256 // 8 * math.prod(SIZES["hidden"])
    assert found
    assert all(one.largest <= NUM_EXAMPLES**2 < rows for one in found)
    # What crosses the wires in a step: the matrix once, gradients and examples a few times.
    moved = sum(one.num_bytes * one.runs for one in found)
    gradient = 4 * math.prod(SIZES["hidden"])
    assert moved < 3 * 4 * NUM_EXAMPLES**2 + 6 * gradient + 8 * 4 * NUM_EXAMPLES * INPUTS
