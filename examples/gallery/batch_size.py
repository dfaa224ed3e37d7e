"""The largest eigenvalue of a batch's Hessian falls with the batch size: so rates may grow with it.

python examples/gallery/batch_size.py
"""

import jax
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, cross_entropy, digits, init_mlp, main, panels, train
from matplotlib.figure import Figure

from curvax import spectrum


def draw(quick: bool) -> Figure:
    data, _ = digits()
    start = init_mlp(jax.random.key(0), (64, 32, 10))
    params, _ = train(cross_entropy, start, optax.sgd(0.1), data, 200, batch_size=32)
    sizes = (8, 64) if quick else (4, 8, 16, 32, 64, 128, 256, 512)
    study = spectrum.batch_size_study(
        cross_entropy, params, data, sizes, key=1, num_draws=2 if quick else 8, tolerance=1e-2
    )
    figure, (left, right) = panels(2, width=5)
    spectrum.plot_batch_sizes(study, ax=left)

    rates = np.geomspace(0.1, 6, 4 if quick else 13)
    for size, color in zip((8, 64, 512), (BLUE, ORANGE, GREEN), strict=True):

        @jax.jit
        @jax.vmap
        def last_losses(rate: jax.Array, size: int = size) -> jax.Array:
            steps = 20 if quick else 300
            options = {"batch_size": size, "key": 2}
            return train(cross_entropy, params, optax.sgd(rate), data, steps, **options)[1][-50:]

        losses = np.nanmean(last_losses(rates), axis=1)
        right.loglog(rates, losses, "o-", markersize=3, color=color, label=f"batches of {size}")
        if size in sizes:
            stable = spectrum.step_sizes(study.largest[sizes.index(size)].mean()).largest_stable
            right.axvline(stable, color=color, linestyle=":")
            print(f"batches of {size}: 2 / largest eigenvalue {stable:.2f}")
    right.set(xlabel="learning rate", title="loss after 300 steps", ylim=(1e-2, 10))
    right.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main(draw, __file__)
