"""Training runs for `accelerator.py`: ResNet-20 at published settings, a seed at each visit."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import timing

from training.experiment import Experiment
from training.published import PUBLISHED
from training.records import Records
from training.tasks import TASKS
from training.tasks.task import Task

Rows = dict[str, dict[str, Any]]


def all_cases(args: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
    """The next seed of each optimizer, by name; finished runs are in ``output/training``."""
    size = "tiny" if args.tiny else "accelerator"
    head = timing.environment(("curvax", "jax", "optax", "flax"))
    name = timing.results_path(head, "", args.output).name.strip("_")
    records = Records(args.output / "training", name)
    machine = {"name": head["name"], "versions": head["versions"], "date": head["date"]}

    @functools.cache
    def task() -> Task:
        return TASKS["cifar-resnet"](size, args.data_dir)

    def case(name: str, seed: int) -> Rows:
        experiment = Experiment(task(), size, name, PUBLISHED[name], records, machine)
        line = experiment.run_published(seed)
        numbers = {f"test_{key}": value for key, value in line["test"].items()}
        ends = {"diverged": line["diverged"], "seconds": line["seconds"]}
        return {PUBLISHED[name].words: {**numbers, **ends}}

    cases = {}
    for name in PUBLISHED:
        seeds = {key.seed for key in records.lines if (key.size, key.optimizer) == (size, name)}
        seed = next(number for number in range(len(seeds) + 1) if number not in seeds)
        cases[f"ResNet-20 on CIFAR-10, {name}, seed {seed}"] = functools.partial(case, name, seed)
    return cases
