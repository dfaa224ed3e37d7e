"""One of two processes that train together, or the only one: started by test_processes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax import pruning

STEPS = 7


def loss_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - 1.0) ** 2) + jnp.mean(params["scale"] ** 4)


def problem(mesh):
    """Parameters sharded over both axes of the mesh, and inputs."""

    def place(values, *spec):
        values = np.asarray(values, np.float64)
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    generator = np.random.default_rng(0)
    params = {
        "hidden": place(generator.standard_normal((8, 16)), "x", "y"),
        "out": place(generator.standard_normal((16, 4)), "y", None),
        "scale": place(0.5),
    }
    inputs = place(generator.standard_normal((32, 8)), "x", None)
    return params, inputs


def train(mesh, **options):
    """Parameters after a few steps."""
    params, inputs = problem(mesh)
    tx = curvax.mfac(0.01, num_grads=4, damping=0.01, **options)
    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)

    @jax.jit
    def step(params, state, inputs):
        updates, state = tx.update(jax.grad(loss_fn)(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state, inputs)
    return multihost_utils.process_allgather(params, tiled=True)


def natural_gradient_descent(mesh):
    """The same parameters after steps along F^-1 g, with F of single examples, all in one jit."""
    params, inputs = problem(mesh)

    @jax.jit
    def step(params, inputs):
        def outputs(params, example):
            return jnp.sum(jnp.tanh(example @ params["hidden"]) @ params["out"]) * params["scale"]

        values = jax.vmap(outputs, in_axes=(None, 0))(params, inputs)
        rows = jax.vmap(jax.grad(outputs), in_axes=(None, 0))(params, inputs)
        inverse = curvax.inverse_fisher(rows, 0.1)
        direction = inverse.solve_in_sample_space((values - 1) / len(values))
        return jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)

    for _ in range(STEPS):
        params = step(params, inputs)
    return multihost_utils.process_allgather(params, tiled=True)


def check_that_pruning_is_refused(mesh):
    """Weights on devices of another process cannot be read, which pruning says by itself."""
    params, _ = problem(mesh)
    try:
        pruning.prune(params, None, 0.5, method="magnitude")
    except ValueError as error:
        assert "on devices of other processes" in str(error)  # noqa: PT017
    else:
        raise AssertionError("pruning has read what it cannot")


def mesh_of(shape):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def main(output: str, processes: int, index: int, port: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_enable_x64", True)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    mesh = mesh_of((4, 2))
    results = {
        "dense": train(mesh),
        "sparse": train(mesh, density=0.3),
        "natural": natural_gradient_descent(mesh if processes > 1 else mesh_of((1, 1))),
    }
    if processes > 1:
        check_that_pruning_is_refused(mesh)
    if index == 0:
        flat, _ = jax.tree_util.tree_flatten_with_path(results)
        np.savez(Path(output), **{jax.tree_util.keystr(path): leaf for path, leaf in flat})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
