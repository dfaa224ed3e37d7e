"""Prunes trained networks by every method, and shows what is left of them.

    cd benchmarks; python -m sparsity --data-dir DIR
    python -m sparsity --networks shakespeare --targets 0.5 2:4 --seeds 0
    python -m sparsity --report

A network is trained once for each seed and kept in build/pruning. Finished runs are kept in
benchmarks/results/sparsity, those of all machines together, so that an interrupted benchmark goes
on; tables and pictures of all of them are written there at the end.
"""

import argparse
import json
from pathlib import Path

import timing
from timing import tqdm

from sparsity.experiment import Cell, run
from sparsity.methods import METHODS, SETTINGS
from sparsity.networks import RECIPES, Network
from sparsity.report import RESULTS, read_runs, write_report

TARGETS = ("0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "0.98", "2:4", "4:8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--networks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    option("--methods", nargs="+", choices=[*METHODS, *SETTINGS], default=list(METHODS))
    option("--targets", nargs="+", default=list(TARGETS), help="shares, or N:M")
    option("--seeds", nargs="+", type=int, default=[0, 1, 2])
    option("--data-dir", type=Path, default=Path("data"))
    option("--report", action="store_true", help="only write the tables of finished runs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.report:
        environment = timing.environment(("curvax", "jax", "flax"))
        path = timing.results_path(environment, "runs", RESULTS).with_suffix(".jsonl")
        done = read_runs()
        for name in args.networks:
            network = Network(name, args.data_dir)
            cells = [
                Cell(name, method, target, seed)
                for seed in args.seeds
                for target in args.targets
                for method in ("dense", *args.methods)
                if method != "dense" or target == args.targets[0]
            ]
            for cell in tqdm([cell for cell in cells if cell not in done], desc=name, unit="run"):
                line = {"key": cell, "run": run(cell, network), "machine": environment["name"]}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    write_report()


if __name__ == "__main__":
    main()
