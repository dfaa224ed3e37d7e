"""Linear mode connectivity: networks that share the start of training are joined by a flat line.

python examples/gallery/connectivity.py
"""

from typing import Any

import jax
import optax
from common import BLUE, GREEN, ORANGE, PINK, cross_entropy, digits, init_mlp, main, panels, train
from matplotlib.figure import Figure

from curvax import spectrum

LAYERS = ("0", "1", "2", "3")


def draw(quick: bool) -> Figure:
    data, test = digits()
    steps = 50 if quick else 1500

    def trained(start: Any, seed: int, number: int = steps, batch_size: int = 32) -> Any:
        tx = optax.sgd(0.15 * min(1, batch_size / 32), momentum=0.9)
        options = {"batch_size": batch_size, "key": seed}
        return train(cross_entropy, start, tx, data, number, **options)[0]

    start, other = (init_mlp(jax.random.key(seed), (64, 24, 24, 24, 10)) for seed in (0, 1))
    shared = trained(start, 2, steps // 15)
    pairs = {
        "two initializations": (trained(start, 3), trained(other, 4), PINK),
        "one initialization": (trained(start, 3), trained(start, 4), ORANGE),
        f"{steps // 15} shared steps": (trained(shared, 3), trained(shared, 4), BLUE),
        "small and large batches": (
            trained(shared, 3, batch_size=8),
            trained(shared, 4, batch_size=512),
            GREEN,
        ),
    }
    points = 5 if quick else 25
    if quick:
        pairs = dict(list(pairs.items())[:2])
    figure, (left, middle, right) = panels(3)
    for number, (name, (first, last, color)) in enumerate(pairs.items()):
        line = [first, last]
        curve = spectrum.loss_along(cross_entropy, line, [test], num_points=points)
        left.semilogy(curve.positions, curve.losses, color=color, label=name)
        positions, sharpness = curve.positions[:: 2 if quick else 3], []
        for t in positions:
            between = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, first, last)
            hessian = spectrum.hessian_operator(cross_entropy, between, [data])
            sharpness.append(spectrum.top_eigenpairs(hessian, 1, key=0, tolerance=1e-2).values[0])
        middle.semilogy(positions, sharpness, "o-", markersize=3, color=color)
        rises = [
            spectrum.loss_along(
                cross_entropy,
                line,
                [test],
                num_points=points,
                select=lambda path, _, layer=layer: path.startswith(f"{layer}/"),
            ).losses
            for layer in LAYERS
        ]
        # One layer alone ends at no trained network: the most that the loss rises on its way.
        rises = [float(max(losses) - losses[0]) for losses in rises]
        places = [place + 0.2 * (number - 1.5) for place in range(len(LAYERS) + 1)]
        right.bar(places, [curve.barrier, *rises], width=0.2, color=color)
        print(f"{name}: barrier {curve.barrier:.2f}, by layer {[round(r, 2) for r in rises]}")
    left.set(xlabel="place on the line", title="test loss")
    left.legend(frameon=False, fontsize="small")
    middle.set(xlabel="place on the line", title="sharpness of the training loss")
    right.set(
        title="barrier, and rise by layer",
        xticks=range(5),
        xticklabels=["all", *(f"layer {n}" for n in LAYERS)],
    )
    return figure


if __name__ == "__main__":
    main(draw, __file__)
