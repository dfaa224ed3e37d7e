"""What the curvature of the tasks looks like along a run, to explain the tables of optimizers.

    cd benchmarks; python -m training.curvature --data-dir DIR

Each task is trained by AdaHessian with Nesterov momentum and zeros skipped, at the best rate on
record. After a tenth, the half and the whole of the run, 64 probes and 64 batches say how noisy the
estimates of the diagonal and the gradient are, how far AdaHessian's preconditioner differs from
Adam's, and how many directions the gradients of M-FAC's window have; stochastic Lanczos
quadrature gives the Hessian's spectrum. A quarter of an hour on two cores.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.flatten_util import ravel_pytree

import curvax
from curvax import spectrum
from training.experiment import Experiment
from training.loop import Program, order_of_examples
from training.optimizers import CONTESTANTS
from training.records import RESULTS, Records
from training.steppers import network_of
from training.tasks import TASKS
from training.tasks.task import Batch, Task, Variables

NAME = "AdaHessian, Nesterov, zeros skipped"
SAMPLES = 64
SPECTRUM_BATCHES = 4
COLUMNS = {
    "gradient_signal": "gradient",
    "probe_signal": "probe",
    "ggn_probe_signal": "output probe",
    "zeros": "zeros",
    "correlation": "correlation",
    "leaf_factor": "factor",
    "negative": "negative",
    "lowest": "lowest / highest",
    "directions": "directions",
}
Tree = Any


class Moments(NamedTuple):
    """Of each entry over the samples: mean, variance, and how often it was not zero."""

    mean: np.ndarray
    variance: np.ndarray
    nonzero: np.ndarray

    @classmethod
    def of(cls, samples: Iterator[Tree]) -> "Moments":
        total = squares = nonzero = np.zeros(())
        for sample in samples:
            vector = _vector(sample)
            total, squares = total + vector, squares + vector**2
            nonzero = nonzero + (vector != 0)
        mean = total / SAMPLES
        return cls(mean, (squares - SAMPLES * mean**2) / (SAMPLES - 1), nonzero)

    def signal(self) -> float:
        """Squared mean over mean square, each summed over entries; without the mean's own noise."""
        squared_mean = np.sum(self.mean**2 - self.variance / SAMPLES)
        return float(squared_mean / (squared_mean + self.variance.sum()))


def snapshots(task: Task, rate: float) -> dict[str, Variables]:
    """The variables after a tenth, the half and the whole of a run."""
    kept: list[Variables] = []

    def evaluate(variables: Variables, split: str) -> dict[str, float]:
        del split
        kept.append(jax.tree.map(jnp.copy, variables))
        return {task.metric: 0.0}

    watched = task._replace(evaluate=evaluate, evaluations=10)
    Program(watched, CONTESTANTS[NAME]).run(rate, seed=0, is_trial=True)
    return {"tenth": kept[0], "half": kept[4], "whole": kept[9]}


def measure(task: Task, variables: Variables) -> dict[str, float]:
    """The numbers of one point of a run."""
    params, statistics = variables
    noise_key = jax.random.key(1)
    batches = _batches(task)

    def loss_fn(params: Tree, inputs: Any, targets: Any) -> jax.Array:
        return task.mean_loss(params, inputs, targets, statistics, noise_key)[0]

    one_pass = jax.jit(curvax.value_grad_and_hessian_diag(loss_fn))
    from_outputs = jax.jit(
        curvax.value_grad_and_ggn_diag_from_outputs(network_of(task), task.loss, has_aux=True)
    )
    keys = jax.random.split(jax.random.key(2), SAMPLES)
    extra = {"statistics": statistics, "noise_key": noise_key}
    probes = Moments.of(one_pass(params, *batches[0], key=key)[2] for key in keys)
    ggn_probes = Moments.of(from_outputs(params, *batches[0], key=key, **extra)[2] for key in keys)
    passes = [
        one_pass(params, *batch, key=key)[1:] for batch, key in zip(batches, keys, strict=True)
    ]
    diags = Moments.of(diag for _, diag in passes)
    rows = np.stack([_vector(gradient) for gradient, _ in passes])
    gradients = Moments.of(iter(rows))
    return {
        "probe_signal": probes.signal(),
        "ggn_probe_signal": ggn_probes.signal(),
        "gradient_signal": gradients.signal(),
        "zeros": float(np.mean(1 - diags.nonzero / SAMPLES)),
        **_denominators(params, passes),
        **_spectrum(loss_fn, params, batches),
        "directions": _effective_rank(rows @ rows.T),
    }


def _denominators(params: Tree, passes: list[tuple[Tree, Tree]]) -> dict[str, float]:
    """How Adam's denominators go with AdaHessian's, on a logarithmic scale, after these batches.

    Their correlation within leaves, and the typical factor between leaves' mean ratios.
    """
    adam, adahessian = optax.scale_by_adam(), curvax.scale_by_adahessian()
    states = adam.init(params), adahessian.init(params)

    @jax.jit
    def step(states: Any, gradient: Tree, diag: Tree) -> Any:
        _, first = adam.update(gradient, states[0], params)
        _, other = adahessian.update(gradient, states[1], params, hessian_diag=diag)
        return first, other

    for gradient, diag in passes:
        states = step(states, gradient, diag)
    return _comparison(*(jax.tree.leaves(state.nu) for state in states))


def _comparison(of_adam: list[Any], of_hessian: list[Any]) -> dict[str, float]:
    """The two numbers of squared denominators, of the entries where neither is zero."""
    centred, ratios = [], []
    for pair in zip(of_adam, of_hessian, strict=True):
        squares = np.stack([np.ravel(leaf) for leaf in pair]).astype(np.float64)
        logs = 0.5 * np.log(squares[:, (squares > 0).all(axis=0)])
        if logs.size:
            means = logs.mean(axis=1, keepdims=True)
            centred.append(logs - means)
            ratios.append(means[0] - means[1])
    return {
        "correlation": float(np.corrcoef(np.concatenate(centred, axis=1))[0, 1]),
        "leaf_factor": float(np.exp(np.std(ratios))),
    }


def _spectrum(
    loss_fn: Callable[..., jax.Array], params: Tree, batches: list[Batch]
) -> dict[str, float]:
    """The part of the mean |eigenvalue| that is of negative ones, and the ends' ratio."""
    operator = spectrum.hessian_operator(
        loss_fn, params, batches[:SPECTRUM_BATCHES], batch_weight=lambda *_: 1.0
    )
    density = spectrum.spectral_density(operator, key=3, order=32, num_probes=2)
    sizes = np.concatenate(
        [nodes * weights for nodes, weights in zip(density.nodes, density.weights, strict=True)]
    )
    nodes = np.concatenate(density.nodes)
    return {
        "negative": float(-sizes[sizes < 0].sum() / np.abs(sizes).sum()),
        "lowest": float(nodes.min() / nodes.max()),
    }


def _effective_rank(gram: np.ndarray) -> float:
    r"""$(\sum \lambda)^2 / \sum \lambda^2$, from 1 for parallel rows to their number."""
    return float(np.trace(gram) ** 2 / np.sum(gram**2))


def _batches(task: Task) -> list[Batch]:
    order = order_of_examples(task, seed=2000)
    sample = jax.jit(task.sample)
    keys = jax.random.split(jax.random.key(4), SAMPLES)
    return [sample(task.data, next(order), key) for key in keys]


def _vector(tree: Tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| | after | {' | '.join(COLUMNS.values())} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
    ]
    for task, points in results["tasks"].items():
        for point, numbers in points.items():
            cells = " | ".join(f"{numbers[column]:.3g}" for column in COLUMNS)
            lines.append(f"| {task} | {point} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="training.curvature")
    parser.add_argument("--tasks", nargs="+", default=[""], help="parts of the tasks' names")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=RESULTS.parent)
    args = parser.parse_args()
    results = timing.environment(("curvax", "jax", "optax", "flax"))
    records = Records(RESULTS, "none")
    tasks = results["tasks"] = {}
    for name in timing.tqdm([name for name in TASKS if any(part in name for part in args.tasks)]):
        task = TASKS[name]("cpu", args.data_dir)
        experiment = Experiment(task, "cpu", NAME, CONTESTANTS[NAME], records, {})
        points = snapshots(task, experiment.best_rate()).items()
        tasks[name] = {point: measure(task, variables) for point, variables in points}
        jax.clear_caches()
    timing.write(results, table(results), "training_curvature", args.output)


if __name__ == "__main__":
    main()
