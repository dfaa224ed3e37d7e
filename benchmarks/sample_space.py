"""Digits of a product F^-1 G^T s in float32: from the vector G^T s, and in sample space.

    python benchmarks/sample_space.py

128 gradients of 4,000 parameters, of length about one, that differ by a third of their length. The
published form is the difference (v - G^T K^-1 G v) / damping. Errors are relative to float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

import curvax

NUM_GRADS, SIZE = 128, 4000


def errors(rows: np.ndarray, samples: np.ndarray, damping: float) -> list[float]:
    wide = rows.astype(np.float64)
    gram = NUM_GRADS * damping * np.eye(NUM_GRADS) + wide @ wide.T
    exact = NUM_GRADS * wide.T @ np.linalg.solve(gram, samples)
    inverse = curvax.inverse_fisher(jnp.asarray(rows), damping)
    vector = jnp.asarray(rows).T @ samples
    products = (
        published(jnp.asarray(rows), vector, damping),
        inverse.solve(vector),
        inverse.solve_in_sample_space(samples),
    )
    return [
        float(np.linalg.norm(np.asarray(product, np.float64) - exact) / np.linalg.norm(exact))
        for product in products
    ]


def published(rows: jax.Array, vector: jax.Array, damping: float) -> jax.Array:
    gram = NUM_GRADS * damping * jnp.eye(NUM_GRADS) + jnp.matmul(rows, rows.T, precision="highest")
    factor = jax.scipy.linalg.cho_factor(gram)
    return (vector - rows.T @ jax.scipy.linalg.cho_solve(factor, rows @ vector)) / damping


def main() -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(SIZE)
    noise = 0.3 * rng.standard_normal((NUM_GRADS, SIZE)) / np.sqrt(SIZE)
    rows = (mean / np.linalg.norm(mean) + noise).astype(np.float32)
    samples = rng.standard_normal(NUM_GRADS).astype(np.float32)
    print("| damping | published form | `solve` | `solve_in_sample_space` |")
    print("|---|---:|---:|---:|")
    for power in range(4, 8):
        found = errors(rows, samples, 10.0**-power)
        print(f"| 1e-{power} | {' | '.join(f'{error:.0e}' for error in found)} |")


if __name__ == "__main__":
    main()
