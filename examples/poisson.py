"""Solves Poisson's equation by a neural network: Adam, L-BFGS, natural gradient and SPRING.

    python examples/poisson.py
    python examples/poisson.py --seconds 60 --width 64

Each optimizer has the same time, in float64 and without compilation. Prints the errors against the
exact solution, and the path of a plot of them over time.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import curvax

PyTree = Any
Step = Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree, jax.Array]]

INSIDE, BOUNDARY = 400, 112  # points of a batch
BOUNDARY_WEIGHT = 10.0  # of a residual on the boundary


def solution(points: jax.Array) -> jax.Array:
    r"""$u = \sin(\pi x) \sin(\pi y)$, which is zero on the boundary of the unit square."""
    return jnp.sin(math.pi * points[..., 0]) * jnp.sin(math.pi * points[..., 1])


def init(key: jax.Array, width: int) -> PyTree:
    widths = (2, width, width, 1)
    keys = jax.random.split(key, len(widths) - 1)
    glorot = jax.nn.initializers.glorot_normal(dtype=jnp.float64)
    return [
        {"kernel": glorot(keys[k], widths[k : k + 2]), "bias": jnp.zeros(widths[k + 1])}
        for k in range(len(keys))
    ]


def field(params: PyTree, points: jax.Array) -> jax.Array:
    """The network's solution at points (n, 2)."""
    *hidden, last = params
    for layer in hidden:
        points = jnp.tanh(points @ layer["kernel"] + layer["bias"])
    return (points @ last["kernel"] + last["bias"])[:, 0]


def laplacian(params: PyTree, points: jax.Array) -> jax.Array:
    def second_derivative(axis: int) -> jax.Array:
        direction = jnp.zeros_like(points).at[:, axis].set(1.0)

        def derivative(points: jax.Array) -> jax.Array:
            return jax.jvp(partial(field, params), (points,), (direction,))[1]

        return jax.jvp(derivative, (points,), (direction,))[1]

    return second_derivative(0) + second_derivative(1)


def residuals(params: PyTree, points: jax.Array, on_boundary: jax.Array) -> jax.Array:
    r"""What is missing to $\Delta u = -2 \pi^2 u$ inside, and to $u = 0$ on the boundary."""
    inside = laplacian(params, points) + 2 * math.pi**2 * solution(points)
    return jnp.where(on_boundary, BOUNDARY_WEIGHT * field(params, points), inside)


def loss(params: PyTree, points: jax.Array, on_boundary: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(residuals(params, points, on_boundary) ** 2)


def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random points inside and on the four sides, and which are on the boundary."""
    inside_key, along_key = jax.random.split(key)
    inside = jax.random.uniform(inside_key, (INSIDE, 2))
    along = jax.random.uniform(along_key, (BOUNDARY,))
    side = jnp.arange(BOUNDARY) % 4
    across = (side % 2).astype(along.dtype)
    horizontal, vertical = jnp.stack([along, across], 1), jnp.stack([across, along], 1)
    boundary = jnp.where(side[:, None] < 2, horizontal, vertical)
    return jnp.concatenate([inside, boundary]), jnp.arange(INSIDE + BOUNDARY) >= INSIDE


@jax.jit
def relative_error(params: PyTree) -> jax.Array:
    r"""$\lVert u - u^* \rVert / \lVert u^* \rVert$ on a fine grid."""
    axis = jnp.linspace(0, 1, 101)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    return jnp.linalg.norm(field(params, grid) - solution(grid)) / jnp.linalg.norm(solution(grid))


def adam() -> tuple[Any, Step]:
    tx = optax.adam(optax.exponential_decay(1e-2, 1000, 0.8))

    def step(params: PyTree, state: PyTree, key: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, *sample(key))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def lbfgs() -> tuple[Any, Step]:
    """Always on the same points, as differences of gradients need them."""
    tx = optax.lbfgs()

    def step(params: PyTree, state: PyTree, key: jax.Array) -> Any:
        del key
        batch = sample(jax.random.key(0))

        def value_fn(params: PyTree) -> jax.Array:
            return loss(params, *batch)

        value, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def natural_gradient() -> tuple[Any, Step]:
    """Whole Gauss-Newton steps, shortened by a line search on the batch."""
    tx = optax.chain(
        curvax.scale_by_natural_gradient(damping=1e-7),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15, decrease_factor=0.5),
    )

    # A line search hands on the arguments that the function names.
    def value_fn(params: PyTree, outputs_fn: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean(outputs_fn(params, *batch) ** 2)

    def step(params: PyTree, state: PyTree, key: jax.Array) -> Any:
        call = {"outputs_fn": residuals, "batch": sample(key)}
        value, grads = jax.value_and_grad(value_fn)(params, **call)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn, **call
        )
        return optax.apply_updates(params, updates), state, value

    return tx, step


def spring() -> tuple[Any, Step]:
    """Half steps that carry directions over, within a trust region."""
    tx = curvax.natural_gradient(0.5, damping=1e-5, momentum=0.5, max_fisher_norm=1.0)

    def step(params: PyTree, state: PyTree, key: jax.Array) -> Any:
        batch = sample(key)
        updates, state = tx.update(None, state, params, outputs_fn=residuals, batch=batch)
        return optax.apply_updates(params, updates), state, loss(params, *batch)

    return tx, step


class Contestant(NamedTuple):
    """An optimizer, and how many steps are taken between evaluations."""

    make: Callable[[], tuple[Any, Step]]
    steps: int


CONTESTANTS = {
    "Adam": Contestant(adam, 200),
    "L-BFGS": Contestant(lbfgs, 100),
    "natural gradient": Contestant(natural_gradient, 4),
    "SPRING": Contestant(spring, 4),
}


class Curve(NamedTuple):
    """Errors over time."""

    seconds: list[float]
    steps: list[int]
    errors: list[float]


def run(contestant: Contestant, seconds: float, width: int, seed: int) -> Curve:
    """Trains for so many seconds; compilation and evaluations are not counted."""
    tx, step = contestant.make()
    number = contestant.steps
    key, init_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, width)
    state = tx.init(params)

    @jax.jit
    def several(params: PyTree, state: PyTree, keys: jax.Array) -> Any:
        def body(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            *carry, value = step(*carry, key)
            return tuple(carry), value

        return jax.lax.scan(body, (params, state), keys)[0]

    def keys_from(first: int, number: int) -> jax.Array:
        return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(number))

    compiled = several.lower(params, state, keys_from(0, number)).compile()
    curve = Curve([0.0], [0], [float(relative_error(params))])
    while curve.seconds[-1] < seconds:
        start = time.perf_counter()
        params, state = jax.block_until_ready(
            compiled(params, state, keys_from(curve.steps[-1], number))
        )
        curve.seconds.append(curve.seconds[-1] + time.perf_counter() - start)
        curve.steps.append(curve.steps[-1] + number)
        curve.errors.append(float(relative_error(params)))
    return curve


def plot(curves: dict[str, Curve], path: Path) -> None:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(
        curves.items(), ("#cc79a7", "#009e73", "#0072b2", "#d55e00"), strict=True
    ):
        axes.semilogy(curve.seconds, curve.errors, "-", color=color, label=name)
    axes.set(xlabel="seconds", ylabel="relative error of the solution")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/poisson.png"), metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    with jax.enable_x64(True):
        curves = {
            name: run(contestant, args.seconds, args.width, args.seed)
            for name, contestant in CONTESTANTS.items()
        }
    print(f"{'':16}   steps  relative error after {args.seconds:g} s  the best")
    for name, curve in curves.items():
        print(
            f"{name:16}  {curve.steps[-1]:6}  {curve.errors[-1]:25.1e}  {np.min(curve.errors):8.1e}"
        )
    plot(curves, args.output)
    print(f"Errors over time: {args.output}")


if __name__ == "__main__":
    main()
