"""What a step of M-FAC costs in time, memory and digits, against what it is made of.

    python benchmarks/mfac_step.py [--parts update step accuracy large]

* update: `curvax.scale_by_mfac` alone, against the two bare products over the same window and the
  published recurrences, on one flat leaf and on ResNet-20's tree.
* step: a whole training step of ResNet-20, against Adam's.
* accuracy: float32 against a float64 reference.
* large: a sparse window of 1024 gradients of a tree like BERT-base's, its memory included.

Contestants alternate in one run and ratios are within it. Writes JSON and a table to
benchmarks/results/ under the hardware's name.
"""

import argparse
import collections
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mfac_contestants as contestants
import models_flax
import numpy as np
import optax
import timing
from adahessian_step import plain, train_step
from mfac_contestants import DAMPING, flat, row

import curvax
from curvax.fisher import DenseWindow, solve_damped_gram

PyTree = Any
HIGHEST = jax.lax.Precision.HIGHEST
BARE = "two bare products"
OURS = {
    "curvax, float32": {},
    "curvax, bfloat16": {"window_dtype": "bfloat16"},
    "curvax, density 0.01": {"density": 0.01},
}
CYCLE = 4


# --- The update alone ---


def update_contestants(layout: str, like: PyTree, number: int) -> dict[str, timing.Loop]:
    window = contestants.gradient_window(like, number, jax.random.key(number), noise=1.0)
    pool = [(row(window, index),) for index in range(number)]
    loops: dict[str, timing.Loop] = {}
    for name, options in OURS.items():
        tx = curvax.scale_by_mfac(number, DAMPING, **options)
        loops[name] = timing.Streaming(
            contestants.curvax_step(tx), contestants.filled_state(tx, window, number), pool
        )
    if layout == "flat":
        rows = np.array(window)
        gram = rows @ rows.T
        state = contestants.Published(jnp.array(rows), jnp.array(gram), jnp.zeros((), jnp.int32))
        loops["published, JAX"] = timing.Streaming(contestants.published_step, state, pool)
        if jax.default_backend() == "cpu":
            loops["published, NumPy"] = contestants.published_numpy(rows, gram, pool)
    loops[BARE] = timing.Streaming(contestants.bare_step, (window, jnp.zeros(number)), pool)
    return loops


def measure_update(args: argparse.Namespace) -> list[dict[str, Any]]:
    params = models_flax.resnet20().params
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    tree = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    cases = []
    for layout, like in (("flat", jnp.ones(size)), ("tree", tree)):
        for number in args.sizes:
            loops = update_contestants(layout, like, number)
            rows = timing.time_loops(loops, seconds=args.seconds, cycle=CYCLE, blocks=args.blocks)
            for name, entry in rows.items():
                _describe(entry, loops[name], 4 * number * size)
                entry["ratio"] = entry["median_s"] / rows[BARE]["median_s"]
            cases.append({"layout": layout, "num_grads": number, "steps": rows})
            del loops
    return cases


def _describe(entry: dict[str, Any], loop: Any, dense_bytes: int) -> None:
    """Adds memory, speed and failures to a contestant's times."""
    window = getattr(getattr(loop, "state", None), "window", None)
    leaves = jax.tree.leaves(window)
    entry["window_bytes"] = sum(leaf.nbytes for leaf in leaves) if leaves else dense_bytes
    entry["gigabytes_per_s"] = 2e-9 * entry["window_bytes"] / entry["median_s"]
    if isinstance(loop, timing.Streaming):
        entry |= loop.memory
    if window is not None:
        entry["failures"] = int(loop.state.failures)


# --- A training step ---


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    problem = models_flax.resnet20(batch_size=32)
    keys = jax.random.split(jax.random.key(2), 8)
    batches = [(jax.random.normal(key, problem.inputs.shape), problem.targets) for key in keys]
    optimizers = {"optax.adam": optax.adam(1e-3)}
    for number in (128, 512):
        optimizers[f"curvax.mfac, {number} gradients"] = curvax.mfac(1e-3, num_grads=number)
    loops = {}
    for name, tx in optimizers.items():
        step = train_step(tx, plain(problem))
        carry = problem.params, tx.init(problem.params), problem.statistics
        carry = jax.tree.map(jnp.copy, carry)
        loops[name] = timing.Streaming(lambda *a, step=step: (step(*a), None), carry, batches)
    rows = timing.time_loops(loops, seconds=args.seconds, cycle=CYCLE, blocks=args.blocks)
    for name, entry in rows.items():
        entry["ratio"] = entry["median_s"] / rows["optax.adam"]["median_s"]
        entry |= loops[name].memory
        if "mfac" in name:
            entry["failures"] = int(optax.tree.get(loops[name].state[1], "failures"))
    return rows


# --- Digits ---

FORMS = (
    "published difference",
    "push-through, Gram rows summed naively",
    "push-through, as in curvax",
    "push-through, Gram rows in float64",
)


def measure_accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    return accuracy(resnet20_gradient(), args.accuracy_size, args.seeds)


def resnet20_gradient() -> PyTree:
    problem = models_flax.resnet20()
    loss = lambda p: problem.loss(p, problem.inputs, problem.targets, problem.statistics)[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(problem.params)


def accuracy(mean: PyTree, number: int, seeds: int) -> list[dict[str, Any]]:
    """Errors of the update by the last of ``number`` gradients around a mean."""
    dampings = (1e-5, 1e-6, 1e-7)
    streams = {damping: curvax.scale_by_mfac(number, damping) for damping in dampings}
    last = {damping: jax.jit(tx.update) for damping, tx in streams.items()}
    last_published = jax.jit(contestants.published_step)
    advance = jax.jit(contestants.curvax_step(streams[DAMPING]), donate_argnums=0)
    advance_published = jax.jit(contestants.published_step, donate_argnums=0)

    errors = collections.defaultdict(list)
    for noise, seed in itertools.product((0.3, 2.0), range(seeds)):
        window = contestants.gradient_window(mean, number, jax.random.key(seed), noise)
        rows = flat(window, number)
        state = streams[DAMPING].init(mean)
        theirs = contestants.Published(
            jnp.zeros_like(rows), jnp.zeros((number, number)), jnp.zeros((), jnp.int32)
        )
        for index in range(number - 1):
            state, _ = advance(state, row(window, index))
            theirs, _ = advance_published(theirs, jnp.asarray(rows[index]))
        grams = {"naively": _streamed_gram(window, number), "float64": _exact_gram(rows)}
        for damping in dampings:
            found = {FORMS[0]: last_published(theirs, jnp.asarray(rows[-1]), damping)[1]}
            found[FORMS[1]] = _push_through(window, grams["naively"], damping)
            found[FORMS[2]] = last[damping](row(window, -1), state)[0]
            found[FORMS[3]] = _push_through(window, grams["float64"], damping)
            exact = _exact_update(rows, damping)
            for form, update in found.items():
                error = np.linalg.norm(flat(update, 1)[0] - exact) / np.linalg.norm(exact)
                errors[noise, damping, form].append(float(error))
    return [
        {"noise": noise, "damping": damping, "form": form, "median": statistics.median(values),
         "errors": values}
        for (noise, damping, form), values in errors.items()
    ]  # fmt: skip


def _streamed_gram(window: PyTree, number: int) -> jax.Array:
    """The Gram matrix whose row i was summed, leaf by leaf, when gradient i came."""
    lower = jnp.tril(jnp.stack([_naive_products(window, index) for index in range(number)]))
    return lower + jnp.tril(lower, -1).T


@jax.jit
def _naive_products(window: PyTree, index: jax.Array) -> jax.Array:
    return contestants.products(window, row(window, index))


def _exact_gram(rows: np.ndarray) -> jax.Array:
    wide = rows.astype(np.float64)
    return jnp.asarray(wide @ wide.T, jnp.float32)


def _push_through(window: PyTree, gram: jax.Array, damping: float) -> PyTree:
    number = len(gram)
    newest = jnp.zeros(number).at[-1].set(1)
    solution = solve_damped_gram(gram, jnp.float32(number * damping), newest)
    return DenseWindow(window).combine(number * solution.x, row(window, 0))


def _exact_update(rows: np.ndarray, damping: float) -> np.ndarray:
    wide, number = rows.astype(np.float64), len(rows)
    damped = wide @ wide.T + number * damping * np.eye(number)
    return number * (np.linalg.solve(damped, np.eye(number)[-1]) @ wide)


# --- BERT-base ---


def large_child(dtype: str, steps: int, number: int) -> dict[str, Any]:
    """Times steps in this process, whose peak memory is the result's."""
    shapes = contestants.bert_shapes()
    size = sum(math.prod(leaf.shape) for leaf in shapes)
    tx = curvax.scale_by_mfac(number, DAMPING, density=0.01, window_dtype=dtype)
    draw = jax.jit(lambda key: [jax.random.normal(key, leaf.shape) for leaf in shapes])
    loop = timing.Streaming(
        contestants.curvax_step(tx),
        contestants.large_state(tx, shapes),
        [(draw(jax.random.key(1)),)],
    )
    seconds = []
    for index in range(steps + 1):
        loop._pool = iter([(draw(jax.random.key(index)),)])
        start = time.perf_counter()
        loop(1)
        seconds.append(time.perf_counter() - start)
    window_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state.window))
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "parameters": size,
        "num_grads": number,
        "median_s": statistics.median(seconds[1:]),
        "seconds": seconds[1:],
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device_memory": jax.devices()[0].memory_stats(),
        **loop.memory,
        "state_bytes": curvax.state_bytes(tx, shapes),
        "window_bytes_per_parameter": window_bytes / size,
        "failures": int(loop.state.failures),
    }


def measure_large(args: argparse.Namespace) -> dict[str, Any]:
    """One process for each dtype: peak memory is a process's, and children inherit it."""
    results = {}
    for dtype in args.large_dtypes:
        options = ["--large-child", dtype, "--large-steps", str(args.large_steps)]
        options += ["--large-size", str(args.large_size)]
        done = subprocess.run(
            [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
        )
        results[dtype] = json.loads(done.stdout.splitlines()[-1])
    return results


# --- Tables ---


def update_table(cases: list[dict[str, Any]]) -> list[str]:
    lines = []
    for case in cases:
        layout = {"flat": "one flat leaf", "tree": "ResNet-20's tree"}[case["layout"]]
        lines += ["", f"### Update, {case['num_grads']} gradients, {layout}", ""]
        lines += [f"| update | ms | over {BARE} | GB/s | temporary MB |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for name, entry in case["steps"].items():
            lines.append(
                f"| {name} | {entry['median_s'] * 1e3:.1f} | {entry['ratio']:.2f} "
                f"| {entry['gigabytes_per_s']:.1f} | {_megabytes(entry)} |"
            )
    return lines


def step_table(rows: dict[str, Any]) -> list[str]:
    lines = ["", "### Training step, ResNet-20, batch 32", ""]
    lines += ["| optimizer | ms | over Adam's | temporary MB |", "| --- | ---: | ---: | ---: |"]
    for name, entry in rows.items():
        milliseconds = f"{entry['median_s'] * 1e3:.1f}"
        lines.append(f"| {name} | {milliseconds} | {entry['ratio']:.2f} | {_megabytes(entry)} |")
    return lines


def _megabytes(entry: dict[str, Any]) -> str:
    return f"{entry['temporary_bytes'] / 1e6:.1f}" if "temporary_bytes" in entry else ""


def accuracy_table(cases: list[dict[str, Any]]) -> list[str]:
    dampings = list(dict.fromkeys(case["damping"] for case in cases))
    median = {(c["noise"], c["form"], c["damping"]): c["median"] for c in cases}
    lines = ["", "### Error of the float32 update, relative to float64", ""]
    lines += ["| noise | form | " + " | ".join(f"damping {d:.0e}" for d in dampings) + " |"]
    lines += ["| ---: | --- |" + " ---: |" * len(dampings)]
    for noise, form in dict.fromkeys((c["noise"], c["form"]) for c in cases):
        errors = " | ".join(f"{median[noise, form, damping]:.1e}" for damping in dampings)
        lines.append(f"| {noise} | {form} | {errors} |")
    return lines


def large_table(rows: dict[str, Any]) -> list[str]:
    first = next(iter(rows.values()))
    title = f"{first['parameters']:,} parameters, {first['num_grads']} gradients, density 0.01"
    lines = ["", f"### {title}", ""]
    lines += ["| values | seconds | state GB | peak resident GB | window bytes a parameter |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for dtype, entry in rows.items():
        lines.append(
            f"| {dtype} | {entry['median_s']:.2f} | {entry['state_bytes'] / 1e9:.2f} "
            f"| {entry['peak_resident_bytes'] / 1e9:.2f} "
            f"| {entry['window_bytes_per_parameter']:.1f} |"
        )
    return lines


# --- The command ---

# The large part first: a child's peak memory starts at what its parent holds.
PARTS: dict[str, tuple[Callable[..., Any], Callable[..., list[str]]]] = {
    "large": (measure_large, large_table),
    "update": (measure_update, update_table),
    "step": (measure_step, step_table),
    "accuracy": (measure_accuracy, accuracy_table),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--blocks", type=int, default=5, help="blocks for each contestant")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a block lasts")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracy part")
    parser.add_argument("--accuracy-size", type=int, default=256, help="gradients in its window")
    parser.add_argument("--large-dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--large-steps", type=int, default=5)
    parser.add_argument("--large-size", type=int, default=1024, help="gradients in its window")
    parser.add_argument("--large-child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.large_child:
        print(json.dumps(large_child(args.large_child, args.large_steps, args.large_size)))
        return
    parts = {part: PARTS[part][0](args) for part in PARTS if part in args.parts}
    packages = ("curvax", "jax", "jaxlib", "numpy", "scipy", "optax", "flax")
    names = ("blocks", "seconds", "sizes", "seeds", "accuracy_size", "large_steps", "large_size")
    results = {
        **timing.environment(packages),
        "settings": {"damping": DAMPING, **{name: getattr(args, name) for name in names}},
        "parts": parts,
    }
    lines = [f"Measured on {results['name']} by `python benchmarks/mfac_step.py`."]
    for part, result in parts.items():
        lines += PARTS[part][1](result)
    timing.write(results, "\n".join(lines) + "\n", "mfac_step", args.output)


if __name__ == "__main__":
    main()
