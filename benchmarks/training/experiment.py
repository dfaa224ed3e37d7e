"""Trials, then runs at the best trial's rate: one contestant on one task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from training.comparison import final
from training.loop import Program
from training.optimizers import Contestant
from training.records import Key, Records
from training.search import best_rate, next_rate
from training.tasks.task import Task

TRIALS = 6
TRIAL_SEED = 1000
Line = dict[str, Any]


class Experiment(NamedTuple):
    """A contestant on a task, with what is recorded of it."""

    task: Task
    size: str
    name: str
    contestant: Contestant
    records: Records
    machine: dict[str, Any]

    def trials(self) -> list[Line]:
        """The trials that are recorded, in the order of the search."""
        losses: dict[float, float] = {}
        lines = []
        while len(lines) < TRIALS:
            line = self.records.get(self._key(self._next(losses), TRIAL_SEED, is_trial=True))
            if line is None:
                break
            lines.append(line)
            losses[line["rate"]] = final(line)
        return lines

    def run(self, seeds: int, progress: Callable[[str], Any]) -> None:
        """Runs what is missing: trials, then seeds."""
        program = Program(self.task, self.contestant)
        while len(lines := self.trials()) < TRIALS:
            losses = {line["rate"]: final(line) for line in lines}
            key = self._key(self._next(losses), TRIAL_SEED, is_trial=True)
            self._run(program, key, progress)
        for seed in range(seeds):
            key = self._key(self.best_rate(), seed, is_trial=False)
            if self.records.get(key) is None:
                self._run(program, key, progress)
        jax.clear_caches()

    def run_published(self, seed: int) -> Line:
        """One run at the rate that was published, without trials."""
        key = self._key(self.contestant.start, seed, is_trial=False)
        return self._run(Program(self.task, self.contestant), key, lambda _: None)

    def best_rate(self) -> float:
        return best_rate({line["rate"]: final(line) for line in self.trials()})

    def _next(self, losses: dict[float, float]) -> float:
        return next_rate(losses, self.contestant.start)

    def _key(self, rate: float, seed: int, *, is_trial: bool) -> Key:
        return Key(
            self.task.name, self.size, self.name, self.contestant.words, rate, seed, is_trial
        )

    def _run(self, program: Program, key: Key, progress: Callable[[str], Any]) -> Line:
        progress(f"{key.task}, {key.optimizer}, rate {key.rate:g}, seed {key.seed}")
        run = program.run(key.rate, key.seed, is_trial=key.is_trial)
        return self.records.add(
            key, {**run._asdict(), "metric": self.task.metric, "machine": self.machine}
        )
