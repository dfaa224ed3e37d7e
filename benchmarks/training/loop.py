"""One run: a contestant on a task with a rate and a seed."""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from training.optimizers import Contestant
from training.steppers import Stepper
from training.tasks.task import Numbers, Task, Variables

PyTree = Any


class Run(NamedTuple):
    """What a run leaves.

    Attributes:
      steps: the steps after which it was judged.
      train_losses: the mean loss of the batches since the last of them.
      validation: the numbers on validation data, a list for each name.
      test: the numbers on test data at the end; empty in a trial.
      diverged: the step at which the loss was found not to be finite; None if it never was.
      seconds: of all steps, without compilation and judging.
    """

    steps: list[int]
    train_losses: list[float]
    validation: dict[str, list[float]]
    test: Numbers
    diverged: int | None
    seconds: float


class Program:
    """The compiled steps of a contestant on a task; all runs share them, with any rate."""

    def __init__(self, task: Task, contestant: Contestant) -> None:
        self.task = task
        self._contestant = contestant
        self.in_scan = task.scannable or jax.default_backend() != "cpu"
        self._step = jax.jit(self._one_step, static_argnames="refresh", donate_argnums=(0, 1))
        self._chunk = jax.jit(self._many_steps, donate_argnums=(0, 1))
        self._programs: dict[Any, Any] = {}

    def run(self, rate: float, seed: int, *, is_trial: bool) -> Run:
        """Trains from the seed's initial parameters, over the seed's batches."""
        task = self.task
        key = jax.random.key(seed)
        variables = jax.jit(task.init)(jax.random.fold_in(key, 0))
        stepper = self._stepper(np.float32(rate))
        carry = variables, jax.jit(stepper.init)(variables.params)
        batches = order_of_examples(task, seed)
        run = Run([], [], {}, {}, None, 0.0)
        length = task.steps // task.evaluations
        for first in range(0, length * task.evaluations, length):
            indices = np.stack([next(batches) for _ in range(length)])
            carry, losses, seconds = self._advance(
                carry, indices, first, np.float32(rate), key, stepper
            )
            run = run._replace(seconds=run.seconds + seconds)
            run.steps.append(first + length)
            run.train_losses.append(float(np.mean(losses)))
            if not math.isfinite(run.train_losses[-1]):
                return run._replace(diverged=run.steps[-1])
            for name, value in task.evaluate(carry[0], "validation").items():
                run.validation.setdefault(name, []).append(value)
            if not math.isfinite(run.validation[task.metric][-1]):
                return run._replace(diverged=run.steps[-1])
        return run if is_trial else run._replace(test=task.evaluate(carry[0], "test"))

    def _stepper(self, rate: Any) -> Stepper:
        task = self.task
        return self._contestant.make(task, lambda count: rate * task.schedule(count, task.steps))

    def _one_step(
        self,
        variables: Variables,
        state: PyTree,
        data: PyTree,
        indices: Any,
        number: Any,
        rate: Any,
        key: Any,
        refresh: bool | None = None,
    ) -> Any:
        sample_key, noise_key = jax.random.split(jax.random.fold_in(key, 1 + number))
        batch = self.task.sample(data, indices, sample_key)
        stepper = self._stepper(rate)
        return stepper.step(variables, state, batch, noise_key, refresh)

    def _many_steps(
        self, variables: Variables, state: PyTree, data: PyTree, indices: Any, *rest: Any
    ) -> Any:
        first, rate, key = rest

        def body(carry: Any, xs: Any) -> Any:
            variables, state, loss = self._one_step(*carry, data, *xs, rate, key)
            return (variables, state), loss

        numbers = first + np.arange(len(indices))
        carry, losses = jax.lax.scan(body, (variables, state), (indices, numbers))
        return *carry, losses

    def _advance(
        self, carry: Any, indices: Any, first: int, rate: Any, key: Any, stepper: Stepper
    ) -> tuple[Any, Any, float]:
        """Many steps: what is carried, the losses, and the seconds that they took."""
        data = self.task.data
        if self.in_scan:
            arguments = (*carry, data, indices, np.int32(first), rate, key)
            chunk = self._compiled(self._chunk, arguments)
            start = time.perf_counter()
            *carry, losses = jax.block_until_ready(chunk(*arguments))
            return tuple(carry), losses, time.perf_counter() - start
        refreshes = [stepper.due(number) for number in range(first, first + len(indices))]
        arguments = (data, indices[0], np.int32(first), rate, key)
        steps = {r: self._compiled(self._step, (*carry, *arguments), r) for r in set(refreshes)}
        losses = []
        start = time.perf_counter()
        for number, (chosen, refresh) in enumerate(zip(indices, refreshes, strict=True), first):
            *carry, loss = steps[refresh](*carry, data, chosen, np.int32(number), rate, key)
            losses.append(loss)
        jax.block_until_ready(losses)
        return tuple(carry), losses, time.perf_counter() - start

    def _compiled(self, function: Any, arguments: Any, refresh: bool | None = None) -> Any:
        key = function, refresh
        if key not in self._programs:
            static = {} if function is self._chunk else {"refresh": refresh}
            self._programs[key] = function.lower(*arguments, **static).compile()
        return self._programs[key]


def order_of_examples(task: Task, seed: int) -> Iterator[np.ndarray]:
    """The indices of each batch: all examples in a new order, epoch after epoch."""
    if task.num_examples is None:
        while True:
            yield np.zeros(0, np.int32)
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(task.num_examples).astype(np.int32)
        for first in range(0, len(order) - task.batch_size + 1, task.batch_size):
            yield order[first : first + task.batch_size]
