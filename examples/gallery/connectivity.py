"""Linear mode connectivity: networks that share the start of training are joined by a flat line.

python examples/gallery/connectivity.py
"""

from typing import Any

import jax
import optax
from common import BLUE, GREEN, ORANGE, PINK, cross_entropy, digits, init_mlp, main, panels, train
from matplotlib.figure import Figure

from curvax import spectrum

LAYERS = ("0", "1", "2")


def draw(quick: bool) -> Figure:
    data, test = digits()
    steps = 30 if quick else 1500

    def trained(start: Any, seed: int, number: int = steps, batch_size: int = 32) -> Any:
        tx = optax.sgd(0.1, momentum=0.9)
        options = {"batch_size": batch_size, "key": seed}
        return train(cross_entropy, start, tx, data, number, **options)[0]

    start, other = (init_mlp(jax.random.key(seed), (64, 64, 64, 10)) for seed in (0, 1))
    shared = trained(start, 2, steps // 50)
    pairs = {
        "two initializations": (trained(start, 3), trained(other, 4), PINK),
        "one initialization": (trained(start, 3), trained(start, 4), ORANGE),
        f"{steps // 50} shared steps": (trained(shared, 3), trained(shared, 4), BLUE),
        "small and large batches": (
            trained(shared, 3, batch_size=16),
            trained(shared, 4, batch_size=512),
            GREEN,
        ),
    }
    points = 5 if quick else 25
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
        barriers = [
            spectrum.loss_along(
                cross_entropy,
                line,
                [test],
                num_points=points,
                select=lambda path, _, layer=layer: path.startswith(f"{layer}/"),
            ).barrier
            for layer in LAYERS
        ]
        places = [place + 0.2 * (number - 1.5) for place in range(len(LAYERS) + 1)]
        right.bar(places, [curve.barrier, *barriers], width=0.2, color=color)
        print(f"{name}: barrier {curve.barrier:.2f}, by layer {[round(b, 2) for b in barriers]}")
    left.set(xlabel="place on the line", title="test loss")
    left.legend(frameon=False, fontsize="small")
    middle.set(xlabel="place on the line", title="sharpness of the training loss")
    right.set(
        title="barrier", xticks=range(4), xticklabels=["all", *(f"layer {n}" for n in LAYERS)]
    )
    return figure


if __name__ == "__main__":
    main(draw, __file__)
