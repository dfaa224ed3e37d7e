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

    return run


def draw(quick: bool) -> Figure:
    (images, labels), _ = digits(100 if quick else 200)
    steps = 40 if quick else 400
    sizes = (16,) if quick else (32, 128, 512)
    rates = np.geomspace(0.2, 6.4, 2 if quick else 6)
    kept = int(np.argmin(np.abs(rates - 1.6)))
    figure, (ntk, mup, depths, losses_ax) = panels(4, width=3.4)

    def measure(width: int, depth: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        run = make_run(width, depth, kind, (images, labels), steps)
        sharpness, losses = jax.jit(jax.vmap(run))(rates)
        print(f"{kind}, width {width}, depth {depth}: {float(sharpness[kept, -1]):.2f}")
        return np.asarray(sharpness[kept]), np.asarray(losses)

    for ax, kind, line in ((ntk, "NTK", "--"), (mup, "muP", "-")):
        for width, color in zip(sizes, COLORS, strict=False):
            sharpness, losses = measure(width, 2, kind)
            ax.plot(sharpness, color=color, label=f"width {width}")
            losses_ax.loglog(rates, losses, f"o{line}", markersize=3, color=color)
    for depth, color in zip((1, 2) if quick else (1, 2, 4), COLORS, strict=False):
        depths.plot(
            measure(sizes[len(sizes) // 2], depth, "muP")[0], color=color, label=f"depth {depth}"
        )
    titles = {ntk: "NTK", mup: "muP", depths: f"muP, width {sizes[len(sizes) // 2]}"}
    for ax, title in titles.items():
        ax.axhline(2, color="0.5", linestyle="--", linewidth=1)
        ax.set(title=f"{title}: rate times sharpness", xlabel="step", ylim=(0, 3.5))
        ax.legend(frameon=False, fontsize="small")
    losses_ax.set(title="last loss; NTK dashed", xlabel="learning rate", ylim=(1e-4, 1))
    losses_ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    losses_ax.minorticks_off()
    return figure


if __name__ == "__main__":
    main(draw, __file__)
