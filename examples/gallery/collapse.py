"""Neural collapse beside the class structure of the Hessian's spectrum.

python examples/gallery/collapse.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, PINK, apply_mlp, digits, features, init_mlp, main, panels
from matplotlib.figure import Figure

from curvax import spectrum

CLASSES, DECAY = 4, 5e-3
NAMES = {"within": BLUE, "norms": ORANGE, "angles": GREEN, "duality": PINK}


def draw(quick: bool) -> Figure:
    (images, labels), _ = digits()
    images = images[labels < CLASSES][:500]
    images, labels = images - images.mean(axis=0), labels[labels < CLASSES][:500]
    numbers = jnp.arange(len(labels))
    # Every second class keeps a fifth of its examples.
    unbalanced = (labels % 2 == 0) | (numbers % 5 == 0)
    cases = {
        "ReLU, balanced": (jax.nn.relu, jnp.ones(len(labels), bool)),
        "linear, balanced": (lambda x: x, jnp.ones(len(labels), bool)),
        "ReLU, unbalanced": (jax.nn.relu, unbalanced),
    }
    checkpoints = np.unique(
        np.geomspace(5, 40 if quick else 10_000, 4 if quick else 14).astype(int)
    )
    figure, axes = panels(4, width=3.4)
    for ax, (name, (activation, chosen)) in zip(axes, cases.items(), strict=False):
        data = images[chosen], labels[chosen]

        def loss_fn(params: Any, inputs: Any, targets: Any, act: Any = activation) -> jax.Array:
            logits = apply_mlp(params, inputs, act)
            fit = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
            return fit + DECAY / 2 * optax.tree.norm(params, squared=True)

        tx = optax.sgd(0.1, momentum=0.9)

        @jax.jit
        def run(
            carry: Any, number: int, loss_fn: Any = loss_fn, data: Any = data, tx: Any = tx
        ) -> Any:
            def step(_: int, carry: Any) -> Any:
                params, state = carry
                updates, state = tx.update(jax.grad(loss_fn)(params, *data), state)
                return optax.apply_updates(params, updates), state

            return jax.lax.fori_loop(0, number, step, carry)

        params = init_mlp(jax.random.key(0), (64, 64, 64, 64, CLASSES))
        carry, done, rows = (params, tx.init(params)), 0, []
        for number in checkpoints:
            carry, done = run(carry, number - done), number
            last = carry[0][-1]
            inputs = features(carry[0], data[0], activation)
            rows.append(spectrum.neural_collapse(inputs, data[1], last["kernel"], last["bias"]))
        for field, color in NAMES.items():
            values = [getattr(row, field) for row in rows]
            ax.loglog(checkpoints, values, "o-", markersize=3, color=color, label=field)
        ax.set(title=name, xlabel="step", ylim=(1e-2, 3))
        hessian = spectrum.hessian_operator(loss_fn, carry[0], [data])
        top = spectrum.top_eigenpairs(hessian, 20, key=0, tolerance=1e-2).values
        axes[3].semilogy(np.arange(1, 21), top, "o-", markersize=3, linewidth=0.5, label=name)
        measured = ", ".join(f"{value:.3f}" for value in rows[-1])
        gap = top[CLASSES - 2] / top[CLASSES - 1]
        print(f"{name}: {measured}; eigenvalue {CLASSES - 1} over the next {gap:.2f}")
    axes[0].legend(frameon=False, fontsize="small")
    axes[3].axvline(CLASSES - 0.5, color="0.5", linestyle=":")
    axes[3].set(title="largest eigenvalues", xlabel="number")
    axes[3].legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
