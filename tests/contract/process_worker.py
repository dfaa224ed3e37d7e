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

STEPS = 7


def loss_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - 1.0) ** 2) + jnp.mean(params["scale"] ** 4)


def train(mesh, **options):
    """Parameters after a few steps, sharded over both axes of the mesh."""

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
    tx = curvax.mfac(0.01, num_grads=4, damping=0.01, **options)
    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)

    @jax.jit
    def step(params, state, inputs):
        updates, state = tx.update(jax.grad(loss_fn)(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state, inputs)
    return multihost_utils.process_allgather(params, tiled=True)


def main(output: str, processes: int, index: int, port: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_enable_x64", True)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    results = {"dense": train(mesh), "sparse": train(mesh, density=0.3)}
    if index == 0:
        flat, _ = jax.tree_util.tree_flatten_with_path(results)
        np.savez(Path(output), **{jax.tree_util.keystr(path): leaf for path, leaf in flat})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
