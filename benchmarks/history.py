"""What curvax costs from version to version, as ratios within one run.

    python benchmarks/history.py

A short, fixed suite: each step alternates with the bare computation that it is built on, so that
machines and versions of JAX may change. Appends a record to benchmarks/results/history.jsonl and
draws all records into docs/images/history.svg. ``--tiny`` runs at sizes for a test.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import adahessian_step
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import mfac_step
import models_flax
import numpy as np
import timing
from matplotlib.figure import Figure

import curvax
from curvax import spectrum

ROOT = Path(__file__).parents[1]
Loops = dict[str, timing.Loop]


def model(tiny: bool) -> models_flax.Problem:
    if tiny:
        return models_flax.problem_of(nn.Dense(3), jnp.ones((2, 4)), jnp.arange(2))
    tokens = jax.random.randint(jax.random.key(0), (4, 129), 0, 256)
    return models_flax.problem_of(models_flax.Transformer(layers=2), tokens[:, :-1], tokens[:, 1:])


# Each function returns what is timed, and last what that is relative to.


def adahessian(tiny: bool) -> Loops:
    problem = model(tiny)
    contestants = adahessian_step.contestants(problem)
    names = ("AdaHessian, one pass", "AdaHessian, every 5th step, graph", adahessian_step.BASE)
    return {name: adahessian_step.compiled_loop(problem, *contestants[name])[0] for name in names}


def mfac(tiny: bool) -> Loops:
    number, size = (4, 300) if tiny else (64, 270_000)
    loops = mfac_step.update_contestants("tree", jnp.ones(size), number)
    return {
        "M-FAC's update": loops["curvax, float32"],
        "M-FAC's update, sparse": loops["curvax, density 0.01"],
        mfac_step.BARE: loops[mfac_step.BARE],
    }


def inverse_fisher(tiny: bool) -> Loops:
    rows = jax.random.normal(jax.random.key(0), (4, 300) if tiny else (256, 270_000))
    gram = jax.jit(lambda rows: rows @ rows.T)
    diagonal = lambda: curvax.inverse_fisher(rows, 1e-5).diagonal()  # noqa: E731
    return {
        "inverse Fisher's diagonal": timing.repeated(diagonal),
        "the Gram matrix": timing.repeated(lambda: gram(rows)),
    }


def lanczos(tiny: bool) -> Loops:
    problem, order = model(tiny), 10

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return problem.loss(params, inputs, targets, problem.statistics)[0]

    batch = problem.inputs, problem.targets
    operator = spectrum.hessian_operator(loss, problem.params, [batch], check_deterministic=False)
    start = operator.random_vector(jax.random.key(0))

    @jax.jit
    def product(params: Any, vector: Any, *batch: jax.Array) -> Any:
        return jax.jvp(lambda p: jax.grad(loss)(p, *batch), (params,), (vector,))[1]

    def products() -> Any:
        vector = start
        for _ in range(order):
            vector = product(problem.params, vector, *batch)
        return vector

    tridiagonal = lambda: spectrum.lanczos(operator, start, order).eigh()  # noqa: E731
    return {
        "Lanczos": timing.repeated(tridiagonal),
        "plain Hessian products": timing.repeated(products),
    }


SUITE = {adahessian: adahessian_step.CYCLE, mfac: mfac_step.CYCLE, inverse_fisher: 1, lanczos: 1}


def measure(tiny: bool) -> dict[str, list[float]]:
    """Quartiles and median of each time, over the median of what it is relative to."""
    seconds, blocks = (0.0, 2) if tiny else (0.5, 5)
    ratios = {}
    for make, cycle in SUITE.items():
        rows = timing.time_loops(make(tiny), seconds=seconds, cycle=cycle, blocks=blocks)
        base, unit = rows.popitem()
        for name, row in rows.items():
            times = row["lower_quartile_s"], row["median_s"], row["upper_quartile_s"]
            ratios[f"{name}, over {base}"] = [round(t / unit["median_s"], 3) for t in times]
    return ratios


def draw(records: list[dict[str, Any]], picture: Path) -> None:
    """A panel for each ratio, a line for each machine, over the versions as they came."""
    versions = list(dict.fromkeys(record["version"] for record in records))
    names = list(dict.fromkeys(name for record in records for name in record["ratios"]))
    figure = Figure(figsize=(12, 6), layout="constrained")
    for ax, name in zip(figure.subplots(2, -(-len(names) // 2)).flat, names, strict=False):
        for machine in dict.fromkeys(record["name"] for record in records):
            of_machine = {r["version"]: r["ratios"] for r in records if r["name"] == machine}
            points = [[versions.index(v), *r[name]] for v, r in of_machine.items() if name in r]
            place, low, middle, high = np.reshape(points, (-1, 4)).T
            ax.errorbar(place, middle, [middle - low, high - middle], fmt="o-", label=machine)
        ax.set_title(name, fontsize="small")
        ax.set_xticks(range(len(versions)), versions)
        ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    # The same records give the same file.
    with mpl.rc_context({"svg.hashsalt": "curvax", "svg.fonttype": "none"}):
        figure.savefig(picture, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "history.svg")
    args = parser.parse_args(arguments)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT)
    record = {
        "version": curvax.__version__,
        "commit": commit.decode().strip(),
        **timing.environment(("jax", "optax")),
        "ratios": measure(args.tiny),
    }
    path = args.output / "history.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    draw([json.loads(line) for line in path.read_text().splitlines()], args.picture)
    for name, (low, middle, high) in record["ratios"].items():
        print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
