"""Lazy training keeps its tangent kernel and may grok; rich training turns it to the labels.

python examples/gallery/tangent_kernel.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, ORANGE, main, panels
from matplotlib.figure import Figure

from curvax import spectrum


def draw(quick: bool) -> Figure:
    size, width, num_train = (20, 30, 60) if quick else (40, 200, 300)
    keys = jax.random.split(jax.random.key(0), 5)
    teacher = jax.random.normal(keys[0], (size,)) / size**0.5
    inputs = jax.random.normal(keys[1], (num_train + 500, size))
    targets = (inputs @ teacher) ** 2 / 2
    train_set, test_set = (
        (inputs[:num_train], targets[:num_train]),
        (inputs[num_train:], targets[num_train:]),
    )
    start = {
        "hidden": jax.random.normal(keys[2], (size, width)) / size**0.5,
    }

    def network(params: Any, inputs: jax.Array) -> jax.Array:
        hidden = inputs @ params["hidden"]  # as in the paper, the last layer stays as it is
        return jnp.mean(hidden + 0.05 * hidden**2, axis=1, keepdims=True)

    figure, (left, middle, right) = panels(3)
    steps = np.unique(np.geomspace(1, 200 if quick else 50_000, 12 if quick else 30).astype(int))
    for alpha, color, name in ((0.5, ORANGE, "rich"), (8.0, BLUE, "lazy")):

        def outputs_of(params: Any, inputs: jax.Array, alpha: float = alpha) -> jax.Array:
            return alpha * (network(params, inputs) - network(start, inputs))

        def loss_fn(params: Any, inputs: Any, targets: Any, f: Any = outputs_of) -> jax.Array:
            return jnp.mean((f(params, inputs)[:, 0] - targets) ** 2)

        tx = optax.sgd(0.1 * width / alpha**2)

        @jax.jit
        def run(params: Any, number: int, loss_fn: Any = loss_fn, tx: Any = tx) -> Any:
            def step(_: int, params: Any) -> Any:
                grads = jax.grad(loss_fn)(params, *train_set)
                return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

            return jax.lax.fori_loop(0, number, step, params)

        probe, labels = train_set[0][:100], train_set[1][:100]
        kernel_at_start = spectrum.ntk_gram(outputs_of, start, probe)
        params, rows, done = start, [], 0
        for number in steps:
            params, done = run(params, number - done), number
            kernel = spectrum.ntk_gram(outputs_of, params, probe)
            rows.append(
                (
                    loss_fn(params, *train_set),
                    loss_fn(params, *test_set),
                    1 - spectrum.kernel_alignment(kernel, kernel_at_start),
                    spectrum.kernel_alignment(kernel, np.outer(labels, labels)),
                )
            )
        training, test, drift, alignment = np.array(rows).T
        left.loglog(steps, training, "--", color=color, label=f"{name}, training")
        left.loglog(steps, test, color=color, label=f"{name}, test")
        middle.semilogx(steps, drift, color=color, label=name)
        right.semilogx(steps, alignment, color=color, label=name)
        print(f"{name}: test loss {test[-1]:.4f}, drift {drift[-1]:.2f}, {alignment[-1]:.2f}")
    left.set(xlabel="step", title="squared error")
    middle.set(xlabel="step", title="drift of the kernel")
    right.set(xlabel="step", title="its alignment with the labels")
    left.legend(frameon=False, fontsize="small")
    right.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
