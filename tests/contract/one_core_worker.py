"""Host loops over eight devices on one core: started by test_one_core."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from curvax import fisher, pruning, spectrum

NUMBER = 100  # more than programs that wait for each other get through by luck


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


def loss_fn(params, inputs, targets):
    return jnp.mean((network(params, inputs) - targets) ** 2)


def update_statistics(params, statistics, inputs, targets):
    return 0.9 * statistics + 0.1 * jnp.mean(network(params, inputs) - targets)


def problem(mesh):
    rng = np.random.default_rng(0)

    def place(shape, *spec):
        values = rng.standard_normal(shape).astype(np.float32)
        return jax.device_put(values, jax.NamedSharding(mesh, jax.P(*spec)))

    params = {
        "first": {"kernel": place((16, 40), None, "x"), "bias": place((40,), "x")},
        "second": {"kernel": place((40, 8), "x", None)},
    }
    batches = [(place((8, 16)), place((8, 8))) for _ in range(NUMBER)]
    grads = {f"leaf_{number}": place((4, 8, 3), None, "x") for number in range(NUMBER)}
    return params, batches, grads


def main():
    automatic = (jax.sharding.AxisType.Auto,)
    params, batches, grads = problem(jax.make_mesh((8,), ("x",), axis_types=automatic))
    inputs = jnp.concatenate([inputs for inputs, _ in batches[:48]])
    vector = jax.tree.map(jnp.ones_like, params)
    pruning.prune_one_shot(loss_fn, params, batches, 0.5, recomputations=2, num_grads=NUMBER)
    whole = tuple(jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))
    pruning.collect_gradients(loss_fn, params, [whole], 1, micro_batch_size=8)
    pruning.reestimate_statistics(update_statistics, params, jnp.zeros(()), batches)
    for linearize in (True, False):
        spectrum.hessian_operator(loss_fn, params, batches, linearize=linearize)(vector)
    spectrum.ntk_gram(network, params, inputs, micro_batch_size=16)
    inverse = fisher.inverse_fisher(grads, damping=0.1)
    inverse.solve(jax.tree.map(lambda rows: rows[0], grads))


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    jax.config.update("jax_num_cpu_devices", 8)
    main()
