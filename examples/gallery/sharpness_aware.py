"""Sharpness-aware minimization, and how far a step goes in the space of functions.

python examples/gallery/sharpness_aware.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, apply_mlp, cross_entropy, digits, init_mlp, main, panels
from matplotlib.figure import Figure

import curvax

RADIUS = 0.3


def gradient(params: Any, *batch: Any) -> Any:
    return jax.grad(cross_entropy)(params, *batch)


def raised(params: Any, *batch: Any) -> Any:
    """The parameters a radius away, along the gradient."""
    grads = gradient(params, *batch)
    length = RADIUS / optax.tree.norm(grads)
    return jax.tree.map(lambda p, g: p + length * g, params, grads)


def gradient_of_sam(params: Any, *batch: Any) -> Any:
    return gradient(raised(params, *batch), *batch)


def rho_sharpness(params: Any, *batch: Any) -> jax.Array:
    """How much the loss rises within a small ball, by a step along the gradient."""
    return cross_entropy(raised(params, *batch), *batch) - cross_entropy(params, *batch)


def divergence(old: Any, new: Any, inputs: jax.Array) -> jax.Array:
    """The mean Kullback-Leibler divergence of two networks' predictions."""
    first, second = (jax.nn.log_softmax(apply_mlp(p, inputs)) for p in (old, new))
    return jnp.mean(jnp.sum(jnp.exp(first) * (first - second), axis=1))


def draw(quick: bool) -> Figure:
    data, test = digits()
    start = init_mlp(jax.random.key(0), (64, 64, 10))
    steps = 30 if quick else 1500

    contestants = {
        "SGD": (gradient, optax.sgd(0.3), BLUE),
        "SAM": (gradient_of_sam, optax.sgd(0.3), ORANGE),
        "Adam": (gradient, optax.adam(0.002), GREEN),
    }
    figure, (left, middle, right) = panels(3)
    for name, (gradient_fn, tx, color) in contestants.items():

        @jax.jit
        def run(params: Any, gradient_fn: Any = gradient_fn, tx: Any = tx) -> Any:
            def step(carry: Any, key: jax.Array) -> Any:
                params, state = carry
                chosen = jax.random.randint(key, (64,), 0, len(data[0]))
                batch = data[0][chosen], data[1][chosen]
                updates, state = tx.update(gradient_fn(params, *batch), state, params)
                new = optax.apply_updates(params, updates)
                product = curvax.fisher_vp(
                    apply_mlp, "softmax_cross_entropy", params, updates, *data
                )
                seen = (
                    cross_entropy(params, *test),
                    rho_sharpness(params, *data),
                    divergence(params, new, data[0]),
                    optax.tree.vdot(updates, product) / 2,
                )
                return (new, state), seen

            keys = jax.random.split(jax.random.key(1), steps)
            return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

        losses, sharpness, measured, predicted = map(np.asarray, run(start))
        left.semilogy(losses, color=color, label=name, linewidth=0.8)
        middle.semilogy(sharpness, color=color, linewidth=0.8)
        right.loglog(predicted, measured, ".", color=color, markersize=2)
        ratio = np.median(measured / predicted)
        print(f"{name}: rho-sharpness {sharpness[-50:].mean():.4f}, KL over d'Fd/2 {ratio:.3f}")
    left.set(xlabel="step", title="test loss")
    left.legend(frameon=False, fontsize="small")
    middle.set(xlabel="step", title=f"rise of the loss within {RADIUS}")
    right.axline((1e-4, 1e-4), (1e-3, 1e-3), color="0.5", linestyle=":")
    right.set(xlabel="$d^T F d\\,/\\,2$", title="KL divergence of a step")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
