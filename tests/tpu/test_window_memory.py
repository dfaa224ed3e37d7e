"""A step's memory on a TPU: the window is written in place, and nothing of its size is built."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax

from .compiler import array, compiled, num_bytes, one_chip, state_of

WINDOWS = {
    "float32": {"num_grads": 128},
    "bfloat16": {"num_grads": 256, "window_dtype": "bfloat16"},
    "sparse": {"num_grads": 1024, "density": 0.04},
}
INPUTS, OUTPUTS, BATCH = 4096, 2048, 256
PART = 0.2  # of the window


def loss(params, inputs):
    return jnp.mean(jnp.square(jnp.tanh(inputs @ params["kernel"] + params["bias"])))


def train_step(tx, carry, inputs):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, inputs)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value


def arguments(window):
    """The optimizer, its parameters and state, the bytes of its window."""
    where = one_chip()
    params = {"kernel": array((INPUTS, OUTPUTS), where), "bias": array((OUTPUTS,), where)}
    tx = curvax.mfac(1e-3, **WINDOWS[window])
    state = state_of(tx, params)
    return tx, (params, state), num_bytes(optax.tree.get(state, "window"))


@functools.cache
def memory_of_a_step(window):
    tx, carry, size = arguments(window)
    inputs = array((BATCH, INPUTS), one_chip())
    program = compiled(functools.partial(train_step, tx), carry, inputs, donate=(0,))
    return program.memory_analysis(), size


@functools.cache
def memory_of_a_loop(window):
    tx, carry, size = arguments(window)
    inputs = array((4, BATCH, INPUTS), one_chip())

    def loop(carry, inputs):
        return jax.lax.scan(functools.partial(train_step, tx), carry, inputs)

    return compiled(loop, carry, inputs, donate=(0,)).memory_analysis(), size


@pytest.mark.parametrize("window", WINDOWS)
def test_a_step_writes_the_window_in_place(window):
    memory, size = memory_of_a_step(window)
    assert memory.alias_size_in_bytes >= size


@pytest.mark.parametrize("window", WINDOWS)
def test_a_step_builds_nothing_of_the_windows_size(window):
    memory, size = memory_of_a_step(window)
    assert memory.temp_size_in_bytes < PART * size


@pytest.mark.parametrize("window", ["float32", "bfloat16"])
def test_a_loop_of_steps_builds_nothing_of_the_windows_size(window):
    memory, size = memory_of_a_loop(window)
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < PART * size
