"""Physics-informed networks (Raissi et al., 2019) on two equations, Poisson's and Burgers'.

The outputs of a task are residuals: of the equation at points inside, then of the given values at
points on the boundary, times a fixed weight. Their targets are zero, so the loss is the mean of
half the squared residuals.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import curvax
from training.tasks.task import (
    Batch,
    Numbers,
    PyTree,
    Task,
    Variables,
    mean_loss,
    warmup_cosine,
)

Field = Callable[[jax.Array], jax.Array]  # points (batch, axes) -> values (batch,)
VISCOSITY = 0.01 / math.pi
LOSS_BATCHES = 4  # batches in the fixed points of an evaluation's loss


class Size(NamedTuple):
    layers: int
    width: int
    inside: int  # points in a batch
    boundary: int
    steps: int


SIZES = {"cpu": Size(3, 32, 512, 128, 2000), "accelerator": Size(4, 128, 4096, 1024, 20000)}


class Equation(NamedTuple):
    """A boundary value problem, with its solution on fixed points for either split."""

    name: str
    words: str
    axes: int
    residual: Callable[[Field, jax.Array], jax.Array]
    boundary_value: Field
    boundary_weight: float  # a factor on the residual, so squared in the loss
    sample: Callable[[jax.Array, int, int], dict[str, jax.Array]]
    solutions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> points and values


class TanhNetwork(nn.Module):
    """A tanh network, in full float32: derivatives amplify the rounding of a TPU or of TF32."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        def dense(features: int) -> nn.Dense:
            init = nn.initializers.glorot_normal()
            return nn.Dense(features, kernel_init=init, precision=jax.lax.Precision.HIGHEST)

        x = points
        for _ in range(self.layers):
            x = nn.tanh(dense(self.width)(x))
        return dense(1)(x)[:, 0]


def poisson(size: str, data_dir: Path) -> Task:  # noqa: ARG001
    """-Laplace u = f: u = prod sin(pi x_i) in 2 dimensions, or sum cos(pi x_i) in 5."""
    axes, exact, f = (2, _sines, 2.0) if size == "cpu" else (5, _cosines, 1.0)

    def residual(field: Field, points: jax.Array) -> jax.Array:
        laplacian = sum(_derivatives(field, points, axis)[2] for axis in range(axes))
        return laplacian + f * math.pi**2 * exact(jnp, points)

    def solution(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return points, exact(np, points)

    unit = [(0.0, 1.0)] * axes
    points = {
        "validation": _grid(unit, (64, 64)) if axes == 2 else _scattered(axes, seed=0),
        "test": _grid(unit, (81, 81)) if axes == 2 else _scattered(axes, seed=1),
    }
    equation = Equation(
        name="poisson",
        words=f"Poisson's equation in {axes} dimensions by a physics-informed network",
        axes=axes,
        residual=residual,
        boundary_value=lambda points: exact(jnp, points),
        boundary_weight=30.0,
        sample=lambda key, inside, boundary: _sample_cube(key, inside, boundary, axes),
        solutions={split: solution(points[split]) for split in points},
    )
    return _task(equation, SIZES[size])


def burgers(size: str, data_dir: Path) -> Task:  # noqa: ARG001
    """u_t + u u_x = nu u_xx with nu = 0.01 / pi, from -sin(pi x), which becomes a shock at 0."""

    def residual(field: Field, points: jax.Array) -> jax.Array:
        _, u_t = _first_derivative(field, points, 0)
        u, u_x, u_xx = _derivatives(field, points, 1)
        return u_t + u * u_x - VISCOSITY * u_xx

    domain = [(0.0, 1.0), (-1.0, 1.0)]
    points = {"validation": _grid(domain, (64, 256)), "test": _grid(domain, (81, 257))}
    equation = Equation(
        name="burgers",
        words="Burgers' equation with viscosity 0.01 / pi by a physics-informed network",
        axes=2,
        residual=residual,
        boundary_value=lambda points: -jnp.sin(math.pi * points[:, 1]),  # zero at x = -1 and 1
        boundary_weight=5.0,
        sample=_sample_time_and_line,
        solutions={split: (points[split], burgers_solution(points[split])) for split in points},
    )
    return _task(equation, SIZES[size])


def burgers_solution(points: np.ndarray, nodes: int = 100) -> np.ndarray:
    """The solution at points (t, x) by Cole-Hopf and Gauss-Hermite quadrature, in float64.

    u(t, x) = -int sin(pi y) w(y) dy / int w(y) dy, where y = x - z sqrt(4 nu t) and
    w = exp(-cos(pi y) / (2 pi nu) - z^2) (Basdevant et al., 1986).
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    t, x = np.asarray(points, np.float64).T[:, :, None]
    y = x - z * np.sqrt(4 * VISCOSITY * t)
    logarithms = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY) + np.log(weights)
    w = np.exp(logarithms - logarithms.max(axis=1, keepdims=True))
    return -np.sum(np.sin(np.pi * y) * w, axis=1) / np.sum(w, axis=1)


def _task(equation: Equation, size: Size) -> Task:
    network = TanhNetwork(size.layers, size.width)

    def init(key: jax.Array) -> Variables:
        return Variables(network.init(key, jnp.zeros((1, equation.axes)))["params"], {})

    def apply(
        params: PyTree,
        inputs: dict[str, jax.Array],
        statistics: PyTree,
        key: jax.Array,  # noqa: ARG001
    ) -> tuple[jax.Array, PyTree]:
        def field(points: jax.Array) -> jax.Array:
            return network.apply({"params": params}, points)

        inside, boundary = inputs["inside"], inputs["boundary"]
        distance = field(boundary) - equation.boundary_value(boundary)
        residuals = (equation.residual(field, inside), equation.boundary_weight * distance)
        return jnp.concatenate(residuals)[:, None], statistics

    def sample(data: PyTree, indices: Any, key: jax.Array) -> Batch:  # noqa: ARG001
        inputs = equation.sample(key, size.inside, size.boundary)
        return inputs, jnp.zeros((size.inside + size.boundary, 1))

    return Task(
        name=equation.name,
        words=equation.words,
        metric="error",
        data={},
        num_examples=None,
        batch_size=size.inside,
        steps=size.steps,
        evaluations=10,
        init=init,
        apply=apply,
        loss=curvax.squared_error,
        sample=sample,
        evaluate=_evaluation(equation, size, network, apply),
        schedule=warmup_cosine,
        scannable=True,
    )


def _evaluation(
    equation: Equation, size: Size, network: nn.Module, apply: Callable[..., Any]
) -> Callable[[Variables, str], Numbers]:
    """The relative L2 error on a split's fixed points, and the loss on others."""
    seeds = {"validation": 0, "test": 1}

    @jax.jit
    def numbers(
        variables: Variables, points: jax.Array, values: jax.Array, seed: jax.Array
    ) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        counts = LOSS_BATCHES * size.inside, LOSS_BATCHES * size.boundary
        residuals, _ = apply(variables.params, equation.sample(key, *counts), {}, key)
        loss = mean_loss(curvax.squared_error, residuals, jnp.zeros_like(residuals))
        difference = network.apply({"params": variables.params}, points) - values
        error = jnp.linalg.norm(difference) / jnp.linalg.norm(values)
        return {"loss": loss, "error": error}

    def evaluate(variables: Variables, split: str) -> Numbers:
        points, values = (array.astype(np.float32) for array in equation.solutions[split])
        found = numbers(variables, points, values, seeds[split])
        return {name: float(number) for name, number in found.items()}

    return evaluate


def _first_derivative(field: Field, points: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The values and their derivatives along an axis; each value depends on its point alone."""
    direction = jnp.zeros_like(points).at[:, axis].set(1)
    return jax.jvp(field, (points,), (direction,))


def _derivatives(
    field: Field, points: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values and their first and second derivatives along an axis, forward over forward.

    On a CPU, Poisson's gradients took a fourteenth of the time with ``jax.hessian`` at each point.
    """

    def first(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _first_derivative(field, points, axis)

    (value, slope), (_, second) = _first_derivative(first, points, axis)
    return value, slope, second


def _sines(numpy: Any, points: Any) -> Any:
    return numpy.prod(numpy.sin(math.pi * points), axis=-1)


def _cosines(numpy: Any, points: Any) -> Any:
    return numpy.sum(numpy.cos(math.pi * points), axis=-1)


def _sample_cube(key: jax.Array, inside: int, boundary: int, axes: int) -> dict[str, jax.Array]:
    """Uniform points in the unit cube, and as many on each of its faces, or nearly."""
    keys = jax.random.split(key)
    face = jnp.arange(boundary) % (2 * axes)
    points = jax.random.uniform(keys[0], (boundary, axes))
    on_face = jnp.arange(axes) == (face // 2)[:, None]
    return {
        "inside": jax.random.uniform(keys[1], (inside, axes)),
        "boundary": jnp.where(on_face, (face % 2)[:, None].astype(points.dtype), points),
    }


def _sample_time_and_line(key: jax.Array, inside: int, boundary: int) -> dict[str, jax.Array]:
    """Uniform points (t, x); on the boundary half at t = 0, a quarter at either end of the line."""
    low, high = jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0])
    keys = jax.random.split(key)
    t, x = jax.random.uniform(keys[0], (boundary, 2), minval=low, maxval=high).T
    side = jnp.arange(boundary) % 4
    t, x = jnp.where(side < 2, 0.0, t), jnp.where(side < 2, x, 2.0 * side - 5)
    return {
        "inside": jax.random.uniform(keys[1], (inside, 2), minval=low, maxval=high),
        "boundary": jnp.stack([t, x], axis=1),
    }


def _grid(domain: list[tuple[float, float]], counts: tuple[int, ...]) -> np.ndarray:
    """The centers of cells: those of an even and of an odd number of cells never coincide."""
    lines = [
        low + (high - low) * (np.arange(count) + 0.5) / count
        for (low, high), count in zip(domain, counts, strict=True)
    ]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, len(counts))


def _scattered(axes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(16384, axes))
