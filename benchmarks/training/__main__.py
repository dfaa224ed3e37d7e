"""Optimizers on training tasks, with equal numbers of trials.

    make bench-training ARGS="--data-dir DIR"
    make bench-training ARGS="--tasks fashion --optimizers Adam AdaHessian --seeds 3"

Each optimizer gets six trials of its learning rate on each task, found by the same search and
judged on validation data at a seed that the tables do not use; then runs at the best rate, which
are judged on test data once. Finished runs are kept in results/training, one JSON line each: a
stopped benchmark goes on where it was, and files of several machines add up.
"""

import argparse
import re
import sys
from pathlib import Path

import timing
from tqdm import tqdm

from training import report
from training.candidates import CANDIDATES
from training.experiment import Experiment
from training.optimizers import CONTESTANTS
from training.records import RESULTS, Records
from training.tasks import TASKS
from training.tasks.task import DataError

ROOT = Path(__file__).parents[2]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="training")
    parser.add_argument("--tasks", nargs="+", default=[""], help="parts of the tasks' names")
    parser.add_argument("--optimizers", nargs="+", default=[".*"], help="regular expressions")
    parser.add_argument("--size", choices=("cpu", "accelerator"), default="cpu")
    parser.add_argument("--seeds", type=int, default=5, help="runs at the best rate")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--candidates", action="store_true", help="ideas, not the contestants")
    parser.add_argument("--report", action="store_true", help="only the tables, of what is there")
    return parser.parse_args()


def _report(records: Records, folder: Path) -> None:
    """The tables; those of the committed results with the pages that show them."""
    is_committed = folder == RESULTS
    report.write(records, folder, ROOT / "docs" / "images" if is_committed else folder)
    if is_committed:
        report.update_summary(records, ROOT / "README.md")


def main() -> None:
    args = parse_args()
    head = timing.environment(("curvax", "jax", "optax", "flax"))
    records = Records(args.output, timing.results_path(head, "", Path()).name.strip("_"))
    if args.report:
        _report(records, args.output)
        return
    machine = {"name": head["name"], "versions": head["versions"], "date": head["date"]}
    names = [name for name in TASKS if any(part in name for part in args.tasks)]
    missing = []
    for task_name in names:
        try:
            task = TASKS[task_name](args.size, args.data_dir)
        except DataError as error:
            missing.append(str(error))
            continue
        contestants = CANDIDATES if args.candidates else CONTESTANTS
        with tqdm(contestants.items(), task_name, disable=None) as progress:
            for name, contestant in progress:
                wanted = any(re.fullmatch(pattern, name) for pattern in args.optimizers)
                if wanted and (contestant.only is None or task_name in contestant.only):
                    experiment = Experiment(task, args.size, name, contestant, records, machine)
                    experiment.run(args.seeds, progress.set_description)
    _report(records, args.output)
    if missing:
        sys.exit("\n".join(["Not all tasks have data:", *missing]))


if __name__ == "__main__":
    main()
