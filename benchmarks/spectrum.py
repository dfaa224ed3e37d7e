"""The Hessian spectrum of a network on Fashion-MNIST: against other libraries, and of all data.

    python benchmarks/spectrum.py
    python benchmarks/spectrum.py --parts peers --rounds 1 --output build

Three parts. ``peers``: eigenvalues, trace and a Lanczos run of one batch by curvax, matfree,
curvlinops and PyHessian, on the same weights; every measurement is a process of its own, so that
its memory can be told. ``full``: the spectrum over 10,000 images, with its time and a plot.
``edge``: sharpness over full-batch gradient descent, from the tracker. JSON, tables and plots go to
benchmarks/results/ under the hardware's name; the trained network is kept in build/spectrum/.
"""

import argparse
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from matplotlib.figure import Figure
from spectrum_contestants import CONTESTANTS, TOP, Problem, logits, loss_fn
from tqdm import tqdm

from curvax import spectrum

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from datasets import Dataset, from_idx_files  # noqa: E402

WIDTHS = (784, 300, 100, 10)
NUM_CLASSES = WIDTHS[-1]
FOLDER = ROOT / "build" / "spectrum"
BATCH_SIZE = 128


def initial_params(seed: int, widths: tuple[int, ...] = WIDTHS) -> Any:
    rng = np.random.default_rng(seed)
    return [
        (
            (rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)).astype(np.float32),
            np.zeros(fan_out, np.float32),
        )
        for fan_in, fan_out in itertools.pairwise(widths)
    ]


def trained(args: argparse.Namespace, data: Dataset) -> Any:
    """The network after some epochs of SGD with momentum, trained once."""
    path = FOLDER / f"mlp_{args.epochs}_epochs.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *jax.tree.leaves(_train(args.epochs, data)))
    with np.load(path) as arrays:
        leaves = [arrays[f"arr_{k}"] for k in range(len(arrays.files))]
    return list(zip(leaves[::2], leaves[1::2], strict=True))


def _train(epochs: int, data: Dataset) -> Any:
    images, labels = flat_images(data.train_images), data.train_labels
    steps = epochs * (len(images) // BATCH_SIZE)
    tx = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    params = initial_params(0)
    state = tx.init(params)
    generator = np.random.default_rng(0)
    for _ in tqdm(range(epochs), desc="training", leave=False):
        order = generator.permutation(len(images))
        for start in range(0, len(images) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            params, state = step(params, state, images[chosen], labels[chosen])
    return jax.device_get(params)


def flat_images(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


# --- Against other libraries ---


def peers(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Times, memory and values of each task and library, in turn, each in a process of its own."""
    problem = peer_problem(args, data)
    tasks = {name: list(make(problem)) for name, make in CONTESTANTS.items()}
    cells = [(task, name) for task in tasks["curvax"] for name in tasks if task in tasks[name]]
    runs: dict[tuple[str, str], list[Any]] = {cell: [] for cell in cells}
    for task, name in tqdm(cells * args.rounds, unit="process"):
        command = [sys.executable, __file__, "--measure", name, task, *_inherited(args)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs[task, name].append(json.loads(done.stdout.splitlines()[-1]))
    exact = exact_eigenvalues(problem)
    results: dict[str, Any] = {"exact": exact, "parameters": _num_parameters(problem.weights)}
    for (task, name), repeats in runs.items():
        row = {
            "seconds": statistics.median(run["seconds"] for run in repeats),
            "first_seconds": statistics.median(run["first_seconds"] for run in repeats),
            "megabytes": statistics.median(run["megabytes"] for run in repeats),
            **repeats[0]["result"],
        }
        if "values" in row:
            row["error"] = max(abs(a - b) / b for a, b in zip(row["values"], exact, strict=True))
        results.setdefault(task, {})[name] = row
    return results


def peer_problem(args: argparse.Namespace, data: Dataset) -> Problem:
    images = flat_images(data.train_images[: args.peer_images])
    return Problem(trained(args, data), images, data.train_labels[: args.peer_images])


def _inherited(args: argparse.Namespace) -> list[str]:
    options = ("epochs", "peer_images", "data_dir")
    return [
        part for name in options for part in (f"--{name.replace('_', '-')}", str(vars(args)[name]))
    ]


def measure(args: argparse.Namespace, data: Dataset) -> None:
    """One library's task: its first run, its second, and the memory beyond what was there."""
    name, task = args.measure
    run = CONTESTANTS[name](peer_problem(args, data))[task]
    before = _peak_megabytes()
    start = time.perf_counter()
    run()
    middle = time.perf_counter()
    result = run()
    end = time.perf_counter()
    line = {
        "first_seconds": middle - start,
        "seconds": end - middle,
        "megabytes": _peak_megabytes() - before,
        "result": result,
    }
    print(json.dumps(line))


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exact_eigenvalues(problem: Problem) -> list[float]:
    """In float64 by SciPy, to all digits."""
    from scipy.sparse.linalg import eigsh

    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), problem.weights)
        batch = jnp.asarray(problem.images, jnp.float64), jnp.asarray(problem.labels)
        operator = spectrum.hessian_operator(loss_fn, params, [batch])
        values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=1e-8)[0]
    return sorted(values.tolist(), reverse=True)


def peers_table(rows: dict[str, Any], images: int) -> list[str]:
    lines = [
        f"Hessian of a network of {rows['parameters']:,} parameters on {images:,} images, float32. "
        "Seconds of a second run in the same process, over curvax's, of the first with what it "
        "compiles, and the memory of both beyond libraries and data.",
        "",
        "| task | library | seconds | over curvax | first run | memory, MB | result |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    titles = {
        "eigenvalues": f"{TOP} largest eigenvalues",
        "trace": "trace, 30 probes",
        "lanczos": "50 Lanczos steps",
    }
    for task, title in titles.items():
        for name, row in rows[task].items():
            ratio = row["seconds"] / rows[task]["curvax"]["seconds"]
            lines.append(
                f"| {title} | {name} | {row['seconds']:.2f} | {ratio:.2f} | "
                f"{row['first_seconds']:.2f} | {row['megabytes']:.0f} | {_result(row)} |"
            )
    return lines


def _result(row: dict[str, Any]) -> str:
    if "values" in row:
        products = f", {row['products']} products" if "products" in row else ""
        return f"largest {row['values'][0]:.4f}, error {row['error']:.0e}{products}"
    error = f" ± {row['standard_error']:.2f}" if "standard_error" in row else ""
    return f"{row['value']:.2f}{error}"


# --- The spectrum of all data ---


def full(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Largest eigenvalues and density of the Hessian over many images, streamed in batches."""
    params = jax.tree.map(jnp.asarray, trained(args, data))
    images = flat_images(data.train_images[: args.full_images])
    labels = data.train_labels[: args.full_images]
    starts = range(0, len(images), 2000)
    batches = [(images[k : k + 2000], labels[k : k + 2000]) for k in starts]
    hessian = spectrum.hessian_operator(loss_fn, params, batches)
    start = time.perf_counter()
    pairs = spectrum.top_eigenpairs(hessian, 2 * NUM_CLASSES, key=jax.random.key(1), tolerance=1e-2)
    middle = time.perf_counter()
    density = spectrum.spectral_density(
        hessian, key=jax.random.key(2), order=80, num_probes=4, progress=True
    )
    end = time.perf_counter()
    plot_full(density, pairs, args.output)
    ratios = pairs.values[:-1] / pairs.values[1:]
    return {
        "parameters": hessian.size,
        "images": len(images),
        "eigenvalues": pairs.values.tolist(),
        "residuals": np.asarray(pairs.residuals).tolist(),
        "eigenvalue_seconds": middle - start,
        "eigenvalue_products": int(pairs.num_products),
        "density_seconds": end - middle,
        "density_products": density.num_products,
        "wasserstein_error": density.wasserstein_error,
        "share_near_zero": _share_near_zero(density, pairs.values[0]),
        "most_negative_node": float(min(map(np.min, density.nodes))),
        "largest_gap_after": int(np.argmax(ratios[3:]) + 4),
        "gap_after_classes_less_one": float(ratios[NUM_CLASSES - 2]),
    }


def _share_near_zero(density: spectrum.SpectralDensity, largest: float) -> float:
    nodes, weights = np.concatenate(density.nodes), np.concatenate(density.weights)
    return float(weights[np.abs(nodes) < 0.01 * largest].sum() / weights.sum())


def plot_full(density: spectrum.SpectralDensity, pairs: Any, output: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    spectrum.plot_density(density, outliers=pairs.values[: NUM_CLASSES - 1], ax=left)
    left.set_title("density, and the nine largest eigenvalues", loc="left", fontsize="medium")
    right.plot(np.arange(1, len(pairs.values) + 1), pairs.values, "o", color="#0072b2")
    right.axvline(NUM_CLASSES - 0.5, color="0.5", linestyle=":")
    right.set(xlabel="number", yscale="log")
    right.set_title("largest eigenvalues; classes less one dotted", loc="left", fontsize="medium")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "spectrum_full.png", dpi=150)


def full_table(row: dict[str, Any]) -> list[str]:
    values = ", ".join(f"{value:.3g}" for value in row["eigenvalues"])
    return [
        f"Hessian of the same network over {row['images']:,} images, streamed in batches of 2,000: "
        f"the {len(row['eigenvalues'])} largest eigenvalues to 1 % in "
        f"{row['eigenvalue_seconds']:.0f} s ({row['eigenvalue_products']} products), the density "
        f"from 4 probes of order 80 in {row['density_seconds']:.0f} s ({row['density_products']} "
        f"products; Wasserstein error below {row['wasserstein_error']:.2g}).",
        "",
        f"Eigenvalues: {values}.",
        "",
        f"{row['share_near_zero']:.2%} of the density lie within 1 % of the largest eigenvalue "
        f"around zero; the lowest node is {row['most_negative_node']:.3g}. The ninth eigenvalue is "
        f"{row['gap_after_classes_less_one']:.2f} times the tenth; from the fourth on, the widest "
        f"gap follows eigenvalue {row['largest_gap_after']}.",
    ]


# --- The edge of stability ---


def edge(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Full-batch gradient descent at several rates, with its sharpness on the way."""
    count = args.edge_images
    images = jnp.asarray(flat_images(data.train_images[:count]))
    targets = jax.nn.one_hot(data.train_labels[:count], NUM_CLASSES)
    params = jax.tree.map(jnp.asarray, initial_params(1, (784, 32, 32, NUM_CLASSES)))

    def loss(params: Any) -> jax.Array:
        return ((logits(params, images) - targets) ** 2).sum(axis=1).mean() / 2

    results = {}
    for rate in tqdm(args.edge_rates, desc="rates"):
        tx = optax.chain(spectrum.track_sharpness(rate, every=5), optax.sgd(rate))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, obj_fn=loss)
            sharpness = optax.tree.get(state, "sharpness")
            return optax.apply_updates(params, updates), state, value, sharpness

        current = jax.tree.map(jnp.copy, params)
        state, trajectory = tx.init(current), []
        for _ in tqdm(range(args.edge_steps), desc=f"rate {rate}", leave=False):
            current, state, value, sharpness = step(current, state)
            trajectory.append((float(value), float(sharpness)))
        losses, sharpness = np.array(trajectory).T
        late = sharpness[len(sharpness) // 2 :] * rate / 2
        results[str(rate)] = {
            "losses": losses[::5].tolist(),
            "sharpness": sharpness[::5].tolist(),
            "first_sharpness": float(sharpness[0]),
            "late_median_over_edge": float(np.median(late)),
            "late_range_over_edge": [float(late.min()), float(late.max())],
            "last_loss": float(losses[-1]),
        }
    plot_edge(results, args)
    return results


def plot_edge(results: dict[str, Any], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for (rate, row), color in zip(results.items(), colors, strict=False):
        steps = 5 * np.arange(len(row["losses"]))
        left.semilogy(steps, row["losses"], color=color, label=f"rate {rate}")
        right.plot(steps, row["sharpness"], color=color)
        right.axhline(2 / float(rate), color=color, linestyle="--", linewidth=1)
    left.set(xlabel="step")
    left.set_title("training loss", loc="left", fontsize="medium")
    left.legend(frameon=False)
    right.set(xlabel="step")
    right.set_title("sharpness; 2 / rate dashed", loc="left", fontsize="medium")
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "spectrum_edge_of_stability.png", dpi=150)


def edge_table(rows: dict[str, Any], args: argparse.Namespace) -> list[str]:
    lines = [
        f"Gradient descent on the squared error of {args.edge_images:,} images, a network of two "
        f"hidden layers of 32, {args.edge_steps:,} steps. Sharpness over 2 / rate, in the second "
        "half of the run:",
        "",
        "| rate | 2 / rate | sharpness at the start | median over 2 / rate | range | last loss |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rate, row in rows.items():
        low, high = row["late_range_over_edge"]
        lines.append(
            f"| {rate} | {2 / float(rate):.0f} | {row['first_sharpness']:.1f} | "
            f"{row['late_median_over_edge']:.3f} | {low:.3f} to {high:.3f} | "
            f"{row['last_loss']:.4f} |"
        )
    return lines


# --- Output ---


def table(results: dict[str, Any], args: argparse.Namespace) -> str:
    parts = results["parts"]
    lines = [f"Measured on {results['name']} by `python benchmarks/spectrum.py`."]
    if "peers" in parts:
        lines += ["", *peers_table(parts["peers"], args.peer_images)]
    if "full" in parts:
        lines += ["", *full_table(parts["full"])]
    if "edge" in parts:
        lines += ["", *edge_table(parts["edge"], args)]
    return "\n".join(lines) + "\n"


def _num_parameters(weights: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


PARTS = {"peers": peers, "full": full, "edge": edge}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--epochs", type=int, default=10, help="of training the network")
    parser.add_argument("--peer-images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--full-images", type=int, default=10_000)
    parser.add_argument("--edge-images", type=int, default=1000)
    parser.add_argument("--edge-steps", type=int, default=3000)
    parser.add_argument("--edge-rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--data-dir", type=Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "TASK"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data = from_idx_files(args.data_dir)
    if args.measure:
        measure(args, data)
        return
    parts = {name: PARTS[name](args, data) for name in args.parts}
    skipped = ("data_dir", "output", "measure")
    results = {
        **timing.environment(
            ("curvax", "jax", "matfree", "torch", "curvlinops-for-pytorch", "PyHessian")
        ),
        "settings": {name: value for name, value in vars(args).items() if name not in skipped},
        "parts": parts,
    }
    timing.write(results, table(results, args), "spectrum", args.output)


if __name__ == "__main__":
    main()
