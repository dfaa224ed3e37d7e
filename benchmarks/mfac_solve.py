"""The m x m equations of an M-FAC step: ways to solve them, alone and before a pass over memory.

    python benchmarks/mfac_solve.py [--parts alone product streams]

* alone: a solve by itself.
* product: a solve and then a product with a window of (m, 100000), which LAPACK's waiting threads
  slow down on a CPU.
* streams: the O(m^2) update of an explicit inverse, which was tried and not kept: the part of its
  steps that must factor again, by the condition of the gradients.

Contestants alternate in one run. Writes JSON and a table to benchmarks/results/ under the
hardware's name.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timing

from curvax.fisher import _cholesky, solve_damped_gram

HIGHEST = jax.lax.Precision.HIGHEST
DAMPING = 1e-6
FEATURES = 2000
NOISES = (1.0, 0.3, 0.1, 0.04)
WIDTH = 100_000  # of the window in the product
CYCLE = 8
ALONE = "product alone"

# --- The inverse of K by bordering ---

TOLERANCE = 1e-2
ROUNDS = 3


class Bordered(NamedTuple):
    """The inverse of K, kept explicitly.

    Attributes:
      gram: the inner products of the gradients.
      inverse: P, of shape (m, m).
      slot: int32 scalar, the row that is replaced next.
      refactored: int32 scalar, the steps that factored K again.
    """

    gram: jax.Array
    inverse: jax.Array
    slot: jax.Array
    refactored: jax.Array

    @classmethod
    def of(cls, gram: jax.Array, shift: float) -> "Bordered":
        zeros = (jnp.zeros((), jnp.int32) for _ in range(2))
        return cls(gram, _inverse(gram, shift), *zeros)


def bordered_step(state: Bordered, row: jax.Array) -> tuple[Bordered, jax.Array]:
    """Replaces a row and a column of K and solves for the same unit vector.

    The old column of P is refined, deleted by a rank-one step, and the new one bordered and
    refined: all products of a matrix and a vector.
    """
    slot, shift = state.slot, len(row) * DAMPING
    unit = jnp.zeros_like(row).at[slot].set(1)
    old = state.inverse[:, slot]
    old = old + _times(state.inverse, unit - _damped(state.gram, old, shift))
    gram = state.gram.at[slot].set(row).at[:, slot].set(row)

    def without(vector: jax.Array) -> jax.Array:
        """The inverse of K less a row and a column, times a vector."""
        vector = vector.at[slot].set(0)
        product = _times(state.inverse, vector)
        return (product - old * (_dot(old, vector) / old[slot])).at[slot].set(0)

    border = row.at[slot].set(0)
    image = without(border)
    column = (unit - image) / (row[slot] + shift - _dot(border, image))
    for _ in range(ROUNDS):
        residual = unit - _damped(gram, column, shift)
        column = column + without(residual) + column * (_dot(column, residual) / column[slot])

    def update(_: None) -> tuple[jax.Array, jax.Array]:
        inverse = state.inverse - jnp.outer(old, old / old[slot])
        inverse = inverse + jnp.outer(column, column / column[slot])
        return inverse.at[slot].set(column).at[:, slot].set(column), column

    def refactor(_: None) -> tuple[jax.Array, jax.Array]:
        inverse = _inverse(gram, shift)
        fresh = inverse[:, slot]
        return inverse, fresh + _times(inverse, unit - _damped(gram, fresh, shift))

    length = jnp.sqrt(jnp.diagonal(gram) + shift)
    residual = unit - _damped(gram, column, shift)
    accurate = jnp.sum(jnp.abs(residual) * length) <= TOLERANCE * length[slot]
    inverse, solution = jax.lax.cond(accurate, update, refactor, None)
    refactored = state.refactored + ~accurate
    return Bordered(gram, inverse, (slot + 1) % len(row), refactored), solution


def _inverse(gram: jax.Array, shift: float) -> jax.Array:
    scale = 1 / jnp.sqrt(jnp.diagonal(gram) + shift)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    matrix = (gram + shift * identity) * scale[:, jnp.newaxis] * scale
    factor = jnp.linalg.cholesky(matrix)
    root = jax.scipy.linalg.solve_triangular(factor, identity, lower=True) * scale
    return _times(root.T, root)


def _damped(gram: jax.Array, vector: jax.Array, shift: float) -> jax.Array:
    return _times(gram, vector) + shift * vector


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, precision=HIGHEST)


# --- Solvers as steps: (state, row of the Gram matrix) -> (state, solution) ---


def lapack(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), rhs)


def from_gram(gram: jax.Array, rhs: jax.Array) -> jax.Array:
    return solve_damped_gram(gram, jnp.float32(len(rhs) * DAMPING), rhs).x


def damped(solve: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def solve_damped(gram: jax.Array, rhs: jax.Array) -> jax.Array:
        return solve(gram + len(rhs) * DAMPING * jnp.eye(len(rhs), dtype=gram.dtype), rhs)

    return solve_damped


def blocked(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    return _cholesky.blocked_cholesky(matrix).solve(rhs)


def substituting(size: int) -> Callable[..., jax.Array]:
    """The blocked solver with blocks of another size inverted by substitution."""

    def solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
        with mock.patch.object(_cholesky, "_SUBSTITUTED", size):
            return blocked(matrix, rhs)

    return solve


SOLVERS = {
    "LAPACK's Cholesky": damped(lapack),
    "blocked_cholesky": damped(blocked),
    "blocked_cholesky, by doubling alone": damped(substituting(1)),
    "blocked_cholesky, substitution in blocks of 32": damped(substituting(32)),
    "solve_damped_gram": from_gram,
}
BORDERED = "bordered inverse"


def solver_step(solve: Callable[..., jax.Array]) -> Callable[..., Any]:
    def step(state: tuple[jax.Array, jax.Array], row: jax.Array) -> Any:
        gram, slot = state
        gram = gram.at[slot].set(row).at[:, slot].set(row)
        unit = jnp.zeros_like(row).at[slot].set(1)
        return (gram, (slot + 1) % len(row)), solve(gram, unit)

    return step


def with_product(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, and then the product of the window with its solution."""

    def both(state: tuple[Any, jax.Array], row: jax.Array) -> Any:
        inner, window = state
        inner, solution = step(inner, row)
        return (inner, window), _times(solution, window)

    return both


def product_step(state: tuple[jax.Array, jax.Array], row: jax.Array) -> Any:
    """The product alone; a step waits for the last."""
    last, window = state
    product = _times(row + 1e-30 * last, window)
    return (product[: len(row)], window), product


def steps_and_states(gram: jax.Array) -> dict[str, tuple[Callable[..., Any], Any]]:
    def fresh() -> tuple[jax.Array, jax.Array]:
        return jnp.array(gram), jnp.zeros((), jnp.int32)

    entries = {name: (solver_step(solve), fresh()) for name, solve in SOLVERS.items()}
    entries[BORDERED] = (bordered_step, Bordered.of(jnp.array(gram), len(gram) * DAMPING))
    return entries


# --- Measurements ---


def gradients(number: int, noise: float, seed: int = 0) -> np.ndarray:
    """A mean of unit norm and noise of that relative norm, in float64."""
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(FEATURES)
    noises = generator.standard_normal((number, FEATURES)) / np.sqrt(FEATURES)
    return mean / np.linalg.norm(mean) + noise * noises


def rows_in_place(gram: jax.Array) -> list[tuple[jax.Array]]:
    """Each row of the matrix in turn, which leaves it unchanged."""
    return [(row,) for row in gram]


def measure_alone(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for size in args.sizes:
        grads = gradients(size, noise=0.3)
        gram = jnp.asarray(grads @ grads.T, jnp.float32)
        loops = {
            name: timing.Streaming(*entry, rows_in_place(gram))
            for name, entry in steps_and_states(gram).items()
        }
        results[size] = _times_of(loops, args)
        results[size][BORDERED]["refactored"] = int(loops[BORDERED].state.refactored)
    return results


def measure_product(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for size in args.sizes:
        grads = gradients(size, noise=0.3)
        gram = jnp.asarray(grads @ grads.T, jnp.float32)
        window = jax.random.normal(jax.random.key(0), (size, WIDTH))
        entries = {
            name: (with_product(step), (state, jnp.copy(window)))
            for name, (step, state) in steps_and_states(gram).items()
        }
        entries[ALONE] = (product_step, (jnp.zeros(size), window))
        pool = rows_in_place(gram)
        loops = {name: timing.Streaming(*entry, pool) for name, entry in entries.items()}
        results[size] = _times_of(loops, args)
        del loops, entries, window
    return results


def _times_of(loops: dict[str, timing.Loop], args: argparse.Namespace) -> dict[str, Any]:
    return timing.time_loops(loops, seconds=args.seconds, cycle=CYCLE, blocks=args.blocks)


def measure_streams(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = []
    for size, noise in itertools.product(args.stream_sizes, NOISES):
        grads = gradients(3 * size, noise)
        rows = [grads[_window(t, size)] @ grads[t] for t in range(size, len(grads))]
        rows = [jnp.asarray(row, jnp.float32) for row in rows]
        first = grads[:size] @ grads[:size].T
        state = Bordered.of(jnp.asarray(first, jnp.float32), size * DAMPING)
        step = jax.jit(bordered_step, donate_argnums=0).lower(state, rows[0]).compile()
        start = time.perf_counter()
        for row in rows:
            state, solution = step(state, row)
        jax.block_until_ready(solution)
        cases.append({
            "num_grads": size,
            "noise": noise,
            "scaled_condition": _scaled_condition(grads[-size:]),
            "seconds_per_step": (time.perf_counter() - start) / len(rows),
            "refactored": int(state.refactored) / len(rows),
            "error": _error(solution, grads[-size:]),
        })  # fmt: skip
    return cases


def _window(index: int, size: int) -> np.ndarray:
    """Which gradients are in the rows of a full ring buffer once number ``index`` is in."""
    rows = np.arange(size)
    return index - (index - rows) % size


def _scaled_condition(grads: np.ndarray) -> float:
    damped_gram = grads @ grads.T + len(grads) * DAMPING * np.eye(len(grads))
    scale = 1 / np.sqrt(np.diagonal(damped_gram))
    return float(np.linalg.cond(damped_gram * scale[:, np.newaxis] * scale))


def _error(solution: jax.Array, grads: np.ndarray) -> float:
    """The last update's error against float64: the last gradient is in the last row."""
    damped_gram = grads @ grads.T + len(grads) * DAMPING * np.eye(len(grads))
    exact = np.linalg.solve(damped_gram, np.eye(len(grads))[-1]) @ grads
    return float(np.linalg.norm(np.asarray(solution) @ grads - exact) / np.linalg.norm(exact))


# --- Tables ---


def times_table(title: str) -> Callable[..., list[str]]:
    def table(results: dict[str, Any]) -> list[str]:
        sizes = list(results)
        lines = ["", f"### {title}, milliseconds", ""]
        lines += ["| solver | " + " | ".join(f"m = {size}" for size in sizes) + " |"]
        lines += ["| --- |" + " ---: |" * len(sizes)]
        for name in results[sizes[0]]:
            times = [f"{results[size][name]['median_s'] * 1e3:.2f}" for size in sizes]
            lines.append(f"| {name} | " + " | ".join(times) + " |")
        return lines

    return table


def streams_table(cases: list[dict[str, Any]]) -> list[str]:
    lines = ["", "### The bordered inverse on streams of gradients", ""]
    lines += ["| m | scaled condition | ms a step | steps that factor again | error of the last |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: |"]
    for case in cases:
        lines.append(
            f"| {case['num_grads']} | {case['scaled_condition']:.1e} "
            f"| {case['seconds_per_step'] * 1e3:.2f} | {case['refactored']:.1%} "
            f"| {case['error']:.1e} |"
        )
    return lines


PARTS: dict[str, tuple[Callable[..., Any], Callable[..., list[str]]]] = {
    "alone": (measure_alone, times_table("A solve")),
    "product": (measure_product, times_table(f"A solve and a product with (m, {WIDTH})")),
    "streams": (measure_streams, streams_table),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--blocks", type=int, default=5, help="blocks for each contestant")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a block lasts")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--stream-sizes", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    parts = {part: PARTS[part][0](args) for part in PARTS if part in args.parts}
    results = {
        **timing.environment(("curvax", "jax", "jaxlib", "numpy", "scipy")),
        "settings": {"damping": DAMPING, "blocks": args.blocks, "seconds": args.seconds},
        "parts": parts,
    }
    lines = [f"Measured on {results['name']} by `python benchmarks/mfac_solve.py`."]
    for part, result in parts.items():
        lines += PARTS[part][1](result)
    timing.write(results, "\n".join(lines) + "\n", "mfac_solve", args.output)


if __name__ == "__main__":
    main()
