"""Width scales the bulk of the Hessian's spectrum, and the data its outliers.

python examples/gallery/width_and_data.py
"""

import jax
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, cross_entropy, digits, init_mlp, main, panels, train
from matplotlib.figure import Figure

from curvax import spectrum


def draw(quick: bool) -> Figure:
    (images, labels), _ = digits(400 if quick else 1400)
    steps, number = (20, 10) if quick else (400, 20)
    figure, (left, middle, right) = panels(3)

    def trained_hessian(width: int, num_classes: int) -> spectrum.Operator:
        chosen = labels < num_classes
        data = images[chosen], labels[chosen]
        params = init_mlp(jax.random.key(0), (64, width, width, num_classes))
        params, _ = train(cross_entropy, params, optax.sgd(0.3), data, steps)
        return spectrum.hessian_operator(cross_entropy, params, [data])

    widths = (16, 32) if quick else (16, 64, 256)
    thresholds = np.geomspace(1e-4, 3, 100)
    for width, color in zip(widths, (BLUE, ORANGE, GREEN), strict=False):
        hessian = trained_hessian(width, 10)
        density = spectrum.spectral_density(hessian, key=0, order=2 * number + 40, num_probes=4)
        # What lies above a threshold, of all eigenvalues: the weights of the quadrature's nodes.
        nodes, weights = np.concatenate(density.nodes), np.concatenate(density.weights)
        shares = (weights * (nodes > thresholds[:, np.newaxis])).sum(axis=1) / len(density.nodes)
        label = f"width {width}: {hessian.size:,}"
        left.loglog(thresholds, hessian.size * shares, color=color, label=label)
        top = spectrum.top_eigenpairs(hessian, number, key=1, tolerance=1e-2).values
        middle.semilogy(np.arange(1, number + 1), top, "o", markersize=3, color=color, label=label)
        print(f"width {width}: {hessian.size * shares[0]:.0f} eigenvalues above 1e-4")
    for num_classes, color in zip(
        (4,) if quick else (2, 4, 8), (BLUE, ORANGE, GREEN), strict=False
    ):
        hessian = trained_hessian(widths[1], num_classes)
        top = spectrum.top_eigenpairs(hessian, 12, key=1, tolerance=1e-2).values
        style = {"markersize": 3, "color": color, "label": f"{num_classes} classes"}
        right.semilogy(np.arange(1, 13), top, "o-", linewidth=0.5, **style)
        right.axvline(num_classes - 0.5, color=color, linestyle=":", linewidth=1)

    left.set(xlabel="$x$", ylim=(0.5, None), title="eigenvalues above $x$")
    left.legend(frameon=False, fontsize="small", title="parameters")
    middle.set(xlabel="number", title="the largest, 10 classes")
    middle.axvline(9.5, color="0.5", linestyle=":")
    right.set(xlabel="number", title="the largest, at one width")
    right.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
