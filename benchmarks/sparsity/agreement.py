"""Prunes a trained ResNet-20 with M-FAC's own recurrences and with curvax, on the same gradients.

    cd benchmarks; python -m sparsity.agreement --data-dir DIR

Both get the same vectors of weights and of 64 gradients in float32, in the order of PyTorch.
`benchmarks/inverse_fisher.py` times the inverses.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from training.tasks.task import PyTree, Variables

from curvax import pruning
from sparsity import published
from sparsity.methods import PUBLISHED, gradient_batches
from sparsity.networks import Network
from sparsity.report import RESULTS

BLOCK_SIZE = 128
SPARSITIES = (0.5, 0.9, 0.98)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = Network("cifar-resnet", args.data_dir)
    variables = network.trained(args.seed)
    weights, grads = (
        published.flat(variables.params),
        stored_gradients(network, variables, args.seed),
    )
    runs = [run(network, variables, weights, grads, sparsity, args.seed) for sparsity in SPARSITIES]
    environment = timing.environment(("curvax", "jax", "flax"))
    timing.write({**environment, "runs": runs}, "\n".join(table(runs)) + "\n", "agreement", RESULTS)


def stored_gradients(network: Network, variables: Variables, seed: int) -> np.ndarray:
    """Gradients (64, d) of batches at the dense weights."""
    gradient = jax.jit(jax.grad(network.loss))
    batches = gradient_batches(network, variables, seed)(variables.params)
    return np.stack([published.flat(gradient(variables.params, *batch)) for batch in batches])


def run(
    network: Network,
    variables: Variables,
    weights: np.ndarray,
    grads: np.ndarray,
    sparsity: float,
    seed: int,
) -> dict[str, Any]:
    """Both in one step to a sparsity: choices, kept weights, and test accuracy."""

    def by_recurrences(dtype: Any = np.float32) -> np.ndarray:
        number = int(sparsity * len(weights))
        return published.without_the_lowest(
            weights.astype(dtype), grads.astype(dtype), number, PUBLISHED["damping"], BLOCK_SIZE
        )

    def by_curvax() -> np.ndarray:
        result = pruning.prune(
            {"weights": weights},
            {"weights": grads},
            sparsity,
            select=lambda *_: True,
            block_size=BLOCK_SIZE,
            **PUBLISHED,
        )
        return np.asarray(result.params["weights"])

    def accuracy(pruned: np.ndarray) -> float:
        params: PyTree = published.with_flat(variables.params, pruned)
        return 1 - network.judged(variables._replace(params=params), seed)["error"]

    exact = by_recurrences(np.float64)
    line: dict[str, Any] = {"sparsity": sparsity}
    for name, prune in {"recurrences": by_recurrences, "curvax": by_curvax}.items():
        pruned = prune()
        both = (pruned != 0) & (exact != 0)
        line[name] = {
            "accuracy": accuracy(pruned),
            "other_choices": int(np.count_nonzero((pruned != 0) & (exact == 0))),
            "error": float(np.linalg.norm((pruned - exact)[both]) / np.linalg.norm(exact[both])),
        }
    return line


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "ResNet-20 on CIFAR-10 in one step, blocks of 128, damping 1e-5, 64 stored gradients, in "
        "float32; compared with the recurrences in float64.\n",
        "| sparsity | | other choices | relative error of kept weights | accuracy, % |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for run, name in itertools.product(runs, ("recurrences", "curvax")):
        row = run[name]
        lines.append(
            f"| {run['sparsity']:.0%} | {name} | {row['other_choices']} | {row['error']:.1e} "
            f"| {100 * row['accuracy']:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
