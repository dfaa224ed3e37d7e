"""Trains a small network with AdaHessian on whatever devices there are, one process or several.

    python examples/many_devices.py              # the devices of this machine
    python examples/many_devices.py --devices 8  # eight devices, simulated on the CPU

Two processes on one machine, each with four of the eight devices:

    python examples/many_devices.py --devices 4 --num-processes 2 --process-id 0 &
    python examples/many_devices.py --devices 4 --num-processes 2 --process-id 1

On hosts, `--coordinator` is the address of process 0. Where the cluster is known to JAX, as on TPU
pods and under SLURM, start `--cluster` on each host instead. Prints the losses, which are the same
on any number of devices up to rounding.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

PyTree = Any
INPUTS, WIDTH, CLASSES, BATCH_SIZE = 32, 64, 8, 240
# Hidden units are split over the devices of the axis "model": columns of one kernel, rows of one.
SPECS = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model", None), "bias": P()},
}


def make_mesh() -> Mesh:
    """All devices of all processes; two hold a copy of the model if their number is even."""
    model = 2 - jax.device_count() % 2
    return jax.make_mesh(
        (jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def init(key: jax.Array) -> PyTree:
    """Kernels of variance one over the fan-in, and zero biases."""
    shapes = {"hidden": (INPUTS, WIDTH), "out": (WIDTH, CLASSES)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5, "bias": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def network(params: PyTree, inputs: jax.Array) -> jax.Array:
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss_fn(params: PyTree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the whole batch, wherever its examples lie."""
    logits = network(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sharded_start(mesh: Mesh, tx: optax.GradientTransformation) -> tuple[PyTree, PyTree]:
    """Parameters and the optimizer's state, each part made on the device that holds it."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)
    return params, state


def sharded_batch(mesh: Mesh, generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """Inputs and labels, split over the axis "data"; a device is given its own examples only."""
    inputs = generator.standard_normal((BATCH_SIZE, INPUTS), np.float32)
    labels = inputs[:, :CLASSES].argmax(axis=1)
    sharding = NamedSharding(mesh, P("data"))
    return tuple(
        jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for array in (inputs, labels.astype(np.int32))
    )


def train(mesh: Mesh, num_steps: int) -> list[float]:
    """The loss at each step."""
    tx = curvax.adahessian(0.3, nesterov=True)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss_fn)

    @jax.jit
    def step(params: PyTree, state: PyTree, inputs: jax.Array, labels: jax.Array) -> Any:
        loss, grads, diag = one_pass(params, inputs, labels, state=state)
        updates, state = tx.update(grads, state, params, hessian_diag=diag)
        return optax.apply_updates(params, updates), state, loss

    params, state = sharded_start(mesh, tx)
    generator, losses = np.random.default_rng(0), []  # the same batches in each process
    for _ in range(num_steps):
        params, state, loss = step(params, state, *sharded_batch(mesh, generator))
        losses.append(float(loss))
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--coordinator", default="127.0.0.1:8476", metavar="HOST:PORT")
    parser.add_argument("--cluster", action="store_true", help="JAX finds the other processes")
    args = parser.parse_args(arguments)

    # Before anything else: the number of devices is fixed once the first array is made.
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.cluster:
        jax.distributed.initialize()
    elif args.num_processes > 1:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)

    mesh = make_mesh()
    losses = train(mesh, args.steps)
    if jax.process_index() == 0:
        print(f"{jax.device_count()} devices, {jax.process_count()} processes, {dict(mesh.shape)}")
        for number in range(0, args.steps - 1, 10):
            print(f"step {number:3}  loss {losses[number]:.8f}")
        print(f"step {args.steps - 1:3}  loss {losses[-1]:.8f}")


if __name__ == "__main__":
    main()
