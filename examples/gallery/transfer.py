"""Why learning rates transfer over width: the sharpness that training reaches does, in muP.

python examples/gallery/transfer.py
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, PINK, digits, main, panels
from matplotlib.figure import Figure

from curvax import spectrum

COLORS = (BLUE, ORANGE, GREEN, PINK)


def make_run(width: int, depth: int, kind: str, data: Any, steps: int) -> Any:
    """Full-batch gradient descent: the sharpness in units of the rate, and the last loss."""
    widths = (data[0].shape[1], *[width] * depth, 10)
    keys = jax.random.split(jax.random.key(0), depth + 1)
    # Entries of variance one; each layer divides by the root of its fan-in, and in muP the last
    # one by the width, with a rate that grows with the width.
    shapes = itertools.pairwise(widths)
    params = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    scale = width**-0.5 if kind == "muP" else 1.0
    labels = jax.nn.one_hot(data[1], 10)

    def loss_fn(params: Any) -> jax.Array:
        x = data[0]
        for kernel in params[:-1]:
            x = jnp.tanh(x @ kernel / kernel.shape[0] ** 0.5 * 1.5)
        outputs = scale * x @ params[-1] / width**0.5
        return jnp.mean(jnp.sum((outputs - labels) ** 2, axis=1)) / 2

    def run(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        rate = rate * (width if kind == "muP" else 1.0)
        tx = optax.chain(
            spectrum.track_sharpness(1.0, update_interval=steps // 20), optax.scale(-1.0)
        )

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, obj_fn=loss_fn)
            params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
            return (params, state), (loss, rate * optax.tree.get(state, "sharpness"))

        _, (losses, sharpness) = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return sharpness, losses[-1]

    return jax.jit(run)


def draw(quick: bool) -> Figure:
    (images, labels), _ = digits(100 if quick else 300)
    data = images, labels
    steps = 40 if quick else 600
    sizes = (16, 32) if quick else (32, 128, 512)
    figure, axes = panels(4, width=3.4)
    for ax, (kind, kept) in zip(axes, (("NTK", 2.0), ("muP", 2.0)), strict=False):
        for width, color in zip(sizes, COLORS, strict=False):
            sharpness, _ = make_run(width, 2, kind, data, steps)(kept)
            ax.plot(sharpness, color=color, label=f"width {width}")
            print(f"{kind}, width {width}: rate times sharpness ends at {sharpness[-1]:.2f}")
        ax.axhline(2, color="0.5", linestyle="--", linewidth=1)
        ax.set(title=f"{kind}: rate times sharpness", xlabel="step", ylim=(0, 3))
        ax.legend(frameon=False, fontsize="small")
    rates = np.geomspace(0.1, 20, 3 if quick else 9)
    for ax, kind in zip(axes[2:], ("NTK", "muP"), strict=True):
        for width, color in zip(sizes, COLORS, strict=False):
            run = make_run(width, 2, kind, data, steps)
            losses = [float(run(rate)[1]) for rate in rates]
            ax.loglog(rates, losses, "o-", markersize=3, color=color, label=f"width {width}")
        ax.set(title=f"{kind}: last loss", xlabel="learning rate", ylim=(1e-4, 1))
    return figure


if __name__ == "__main__":
    main(draw, __file__)
