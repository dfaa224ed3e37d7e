"""Time of the inverse Fisher matrix and its diagonal: curvax against the published recurrences.

    python benchmarks/inverse_fisher.py
    python benchmarks/inverse_fisher.py --block-sizes 128 --blocks 5

512 gradients of 270,000 parameters, the whole matrix and blocks of 128 and 2000. The recurrences
are written plainly in NumPy and in PyTorch, where blocks are batched. Contestants take turns in one
process; ratios are of medians. Errors are of the diagonal and of a product, against float64.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch

import curvax

DAMPING = 1e-5


def gradients(number: int, size: int, seed: int) -> np.ndarray:
    """A common mean of unit norm and noise of the same norm, as a network's batches give."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((number, size), np.float32)
    rows += rng.standard_normal(size, np.float32)
    rows /= np.float32(np.sqrt(size))
    return rows


# --- The published recurrence (Section 3 of the paper): one gradient after the other ---


def published_numpy(rows: np.ndarray, block_size: int | None) -> np.ndarray:
    """The diagonal of the inverse; blocks one after the other."""
    size = block_size or rows.shape[1]
    parts = [rows[:, start : start + size] for start in range(0, rows.shape[1], size)]
    return np.concatenate([_numpy_block(np.ascontiguousarray(part)) for part in parts])


def _numpy_block(rows: np.ndarray) -> np.ndarray:
    number = len(rows)
    vectors, denominators = np.empty_like(rows), np.empty(number, rows.dtype)
    for i, grad in enumerate(rows):
        weights = (vectors[:i] @ grad) / denominators[:i]
        vectors[i] = grad / rows.dtype.type(DAMPING) - weights @ vectors[:i]
        denominators[i] = number + grad @ vectors[i]
    return 1 / DAMPING - np.einsum("mi,mi,m->i", vectors, vectors, 1 / denominators)


@torch.no_grad()
def published_torch(rows: torch.Tensor, block_size: int | None) -> torch.Tensor:
    """The same; all blocks but a ragged tail in one batch."""
    number, total = rows.shape
    size = block_size or total
    whole = total // size * size
    batches = [rows[:, :whole].reshape(number, -1, size).transpose(0, 1)]
    if whole < total:
        batches.append(rows[:, whole:].unsqueeze(0))
    return torch.cat([_torch_blocks(batch.contiguous()).reshape(-1) for batch in batches])


def _torch_blocks(rows: torch.Tensor) -> torch.Tensor:
    blocks, number, _ = rows.shape
    vectors = torch.empty_like(rows)
    denominators = torch.empty(blocks, number, dtype=rows.dtype)
    for i in range(number):
        grad = rows[:, i]
        vectors[:, i] = grad / DAMPING
        if i:
            weights = torch.bmm(vectors[:, :i], grad.unsqueeze(2)).squeeze(2) / denominators[:, :i]
            vectors[:, i] -= torch.bmm(weights.unsqueeze(1), vectors[:, :i]).squeeze(1)
        denominators[:, i] = number + (grad * vectors[:, i]).sum(1)
    return 1 / DAMPING - (vectors**2 / denominators.unsqueeze(2)).sum(1)


def ours(rows: jax.Array, block_size: int | None) -> jax.Array:
    return curvax.inverse_fisher(rows, DAMPING, block_size=block_size).diagonal()


def measure(rows: np.ndarray, block_size: int | None, args: argparse.Namespace) -> dict[str, Any]:
    on_device, as_tensor = jnp.asarray(rows), torch.from_numpy(rows)
    contestants = {
        "curvax": lambda: ours(on_device, block_size),
        "published, PyTorch": lambda: published_torch(as_tensor, block_size),
        "published, NumPy": lambda: published_numpy(rows, block_size),
    }
    exact = reference(rows, block_size)
    errors = {
        name: float(np.abs(np.asarray(run()) - exact).max() / np.abs(exact).max())
        for name, run in contestants.items()
    }
    loops = {name: timing.repeated(run) for name, run in contestants.items()}
    times = timing.time_loops(loops, seconds=0.0, cycle=1, blocks=args.blocks)
    base = times["curvax"]["median_s"]
    return {
        name: {**times[name], "ratio": times[name]["median_s"] / base, "error": errors[name]}
        for name in contestants
    }


def reference(rows: np.ndarray, block_size: int | None) -> np.ndarray:
    with jax.enable_x64(True):
        inverse = curvax.inverse_fisher(
            rows.astype(np.float64), DAMPING, block_size=block_size, workspace_bytes=2**29
        )
        return np.asarray(inverse.diagonal())


def table(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"Measured on {results['name']} by `python benchmarks/inverse_fisher.py`.",
        "",
        f"Inverse and diagonal of {settings['num_grads']} gradients of {settings['size']:,} "
        f"parameters, float32, damping {DAMPING}; the error is the largest of the diagonal "
        "against float64, relative to its largest entry.",
        "",
        "| matrix | contestant | seconds | over curvax | error |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {matrix} | {name} | {row['median_s']:.2f} | {row['ratio']:.2f} | {row['error']:.1e} |"
        for matrix, rows in results["matrices"].items()
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-grads", type=int, default=512)
    parser.add_argument("--size", type=int, default=270_000)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[0, 128, 2000])
    parser.add_argument(
        "--blocks", type=int, default=3, help="turns of each contestant, at least 2"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = gradients(args.num_grads, args.size, seed=0)
    matrices = {
        f"blocks of {size}" if size else "full": measure(rows, size or None, args)
        for size in args.block_sizes
    }
    results = {
        **timing.environment(("curvax", "jax", "numpy", "torch")),
        "settings": {"num_grads": args.num_grads, "size": args.size, "blocks": args.blocks},
        "matrices": matrices,
    }
    timing.write(results, table(results), "inverse_fisher", args.output)


if __name__ == "__main__":
    main()
