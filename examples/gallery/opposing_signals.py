"""Examples with opposing signals: a step along the top eigenvector helps some and hurts others.

python examples/gallery/opposing_signals.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GRAY, ORANGE, apply_mlp, digits, init_mlp, main, panels, train
from matplotlib.figure import Figure

from curvax import spectrum

RATE = 0.1


def squared_error(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    errors = apply_mlp(params, inputs) - jax.nn.one_hot(labels, 10)
    return jnp.mean(jnp.sum(errors**2, axis=1)) / 2


def draw(quick: bool) -> Figure:
    data, _ = digits(200 if quick else 500)
    params = init_mlp(jax.random.key(0), (64, 32, 32, 10))
    # Long enough to be at the edge of stability, where steps along the top eigenvector are long.
    params, losses = train(squared_error, params, optax.sgd(RATE), data, 50 if quick else 3000)
    hessian = spectrum.hessian_operator(squared_error, params, [data])
    pairs = spectrum.top_eigenpairs(hessian, 1, key=0)
    before = spectrum.example_projections(squared_error, params, data, pairs.vectors)
    grads = jax.grad(squared_error)(params, *data)
    stepped = optax.apply_updates(params, jax.tree.map(lambda g: -RATE * g, grads))
    after = spectrum.example_projections(squared_error, stepped, data, pairs.vectors)

    slopes, changes = before.slopes[:, 0], after.losses - before.losses
    mean_slope = slopes.mean()
    figure, (left, middle, right) = panels(3)
    left.semilogy(losses, color=GRAY, linewidth=0.8)
    left.set(
        xlabel="step", title=f"training loss; rate times sharpness {RATE * pairs.values[0]:.2f}"
    )
    helped = changes < 0
    for chosen, color, name in ((helped, BLUE, "lower loss"), (~helped, ORANGE, "higher loss")):
        middle.plot(slopes[chosen], changes[chosen], ".", color=color, label=name, markersize=4)
    largest = np.abs(slopes).max()
    line = np.array([-largest, largest])
    middle.plot(line, -RATE * mean_slope * line, color=GRAY, linewidth=1)
    middle.set(xlabel="slope along the top eigenvector", title="change of each example's loss")
    middle.legend(frameon=False, fontsize="small")
    order = np.argsort(-np.abs(changes))
    shares = np.cumsum(np.abs(changes[order])) / np.abs(changes).sum()
    right.plot(100 * np.arange(1, len(shares) + 1) / len(shares), 100 * shares, color=BLUE)
    right.set(xlabel="examples, %", title="their share of all change, %", ylim=(0, 100))
    tenth = shares[len(shares) // 10]
    print(f"a tenth of the examples has {tenth:.0%} of the change; the mean {changes.mean():.1e}")
    extremes = f"{slopes.min():.2f} to {slopes.max():.2f}"
    print(f"{helped.mean():.0%} helped; slopes {extremes}, mean {mean_slope:.3f}")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
