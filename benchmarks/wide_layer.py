"""Seconds, memory and error of `prune_layer`: a layer of 4096 x 4096, and a small one exactly.

    PYTHONPATH=. python benchmarks/wide_layer.py

The inputs are activations of a ReLU whose units are correlated, as those of trained layers are.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from curvax import pruning

RESULTS = Path(__file__).with_name("results")
NM = pruning.NM(2, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"update": "sweep"},
    "SparseGPT's choice, all kept weights fitted": {},
    "exact Optimal Brain Surgeon": {"method": "greedy"},
}
TARGETS: dict[str, tuple[float | None, pruning.NM | None]] = {
    "50 %": (0.5, None),
    "2:4": (None, NM),
}


def layer(features: int, outputs: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """A kernel, and inputs whose covariance has eigenvalues that fall with their number."""
    keys = jax.random.split(jax.random.key(0), 3)
    mixing = jax.random.normal(keys[0], (features, features)) / jnp.arange(1, features + 1)[:, None]
    inputs = jax.nn.relu(jax.random.normal(keys[1], (rows, features)) @ mixing)
    return jax.random.normal(keys[2], (features, outputs)) / np.sqrt(features), inputs


def run(kernel: jax.Array, inputs: jax.Array, target: str, **options: Any) -> dict[str, Any]:
    """Seconds with compilations, the memory on top of kernel and inputs, the relative error."""
    sparsity, structure = TARGETS[target]
    before = timing.peak_memory(reset=True)
    start = time.perf_counter()
    result = pruning.prune_layer(kernel, inputs, sparsity, structure=structure, **options)
    jax.block_until_ready(result.kernel)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": timing.peak_memory() - before,
        "error": result.error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=4096, help="of the wide layer")
    args = parser.parse_args()
    wide, small = args.width, 192
    layers = {
        f"{wide} x {wide}, {wide} inputs": (layer(wide, wide, wide), list(SETTINGS)[:4]),
        f"{small} x 64, {4 * small} inputs": (layer(small, 64, 4 * small), list(SETTINGS)),
    }
    rows = [
        {"layer": name, "target": target, "method": method}
        | run(*arrays, target, **SETTINGS[method])
        for name, (arrays, methods) in layers.items()
        for target in TARGETS
        for method in timing.tqdm(methods, desc=f"{name}, {target}", leave=False)
    ]
    environment = timing.environment(("curvax", "jax"))
    timing.write({**environment, "rows": rows}, table(rows), "wide_layer", RESULTS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "`prune_layer`, compilations included; memory on top of the kernel and its inputs.\n",
        "| layer | target | method | seconds | MiB | relative error of the outputs |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        *(
            f"| {row['layer']} | {row['target']} | {row['method']} | {row['seconds']:.1f} "
            f"| {row['bytes'] / 2**20:.0f} | {row['error']:.4f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
