"""The Hessian spectrum of a network on Fashion-MNIST: against other libraries, and of all data.

    python benchmarks/spectrum.py
    python benchmarks/spectrum.py --parts peers --rounds 1 --output build

Three parts. ``peers``: eigenvalues, trace and a Lanczos run of one batch by curvax, matfree,
curvlinops and PyHessian, on the same weights; every measurement is a separate process, so that its
memory can be measured. ``full``: the spectrum over 10,000 images, with its time and a plot.
``edge``: sharpness over full-batch gradient descent, from the tracker. JSON, tables and plots go to
benchmarks/results/ under the hardware's name; the trained network is kept in build/spectrum/.
"""

import argparse
import functools
import itertools
import json
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
from spectrum_contestants import CONTESTANTS, TOP, Problem, logits, loss_fn
from spectrum_report import plot_edge, plot_full, table
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


def trained(epochs: int, data: Dataset) -> Any:
    """The network after so many epochs of SGD with momentum, trained once."""
    path = FOLDER / f"mlp_{epochs}_epochs.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *jax.tree.leaves(_train(epochs, data)))
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
    leaves = jax.tree.leaves(problem.weights)
    np.savez(FOLDER / "problem.npz", problem.images, problem.labels, *leaves)
    tasks = {name: list(make(problem)) for name, make in CONTESTANTS.items()}
    cells = [(task, name) for task in tasks["curvax"] for name in tasks if task in tasks[name]]
    runs: dict[tuple[str, str], list[Any]] = {cell: [] for cell in cells}
    for task, name in tqdm(cells * args.rounds, unit="process"):
        command = [sys.executable, __file__, "--measure", name, task]
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
    return Problem(trained(args.epochs[0], data), images, data.train_labels[: args.peer_images])


def measure(name: str, task: str) -> None:
    """One library's task: its first run, its second, and the memory beyond what was there."""
    with np.load(FOLDER / "problem.npz") as arrays:
        images, labels, *leaves = (arrays[f"arr_{k}"] for k in range(len(arrays.files)))
    weights = list(zip(leaves[::2], leaves[1::2], strict=True))
    run = CONTESTANTS[name](Problem(weights, images, labels))[task]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
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
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def exact_eigenvalues(problem: Problem) -> list[float]:
    """In float64 by SciPy, to full precision."""
    from scipy.sparse.linalg import eigsh

    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), problem.weights)
        batch = jnp.asarray(problem.images, jnp.float64), jnp.asarray(problem.labels)
        operator = spectrum.hessian_operator(loss_fn, params, [batch])
        values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=1e-8)[0]
    return sorted(values.tolist(), reverse=True)


# --- The spectrum of all data ---


def full(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Largest eigenvalues and density of the Hessian over many images, streamed in batches."""
    results, spectra = {}, {}
    for epochs in args.epochs:
        row, density, pairs = _full(epochs, args.full_images, data)
        results[str(epochs)], spectra[epochs] = row, (density, pairs)
    plot_full(spectra, args.output)
    return results


def _full(
    epochs: int, num_images: int, data: Dataset
) -> tuple[dict[str, Any], spectrum.SpectralDensity, Any]:
    params = jax.tree.map(jnp.asarray, trained(epochs, data))
    images, labels = flat_images(data.train_images[:num_images]), data.train_labels
    starts = range(0, num_images, 2000)
    batches = [(images[k : k + 2000], labels[k : min(k + 2000, num_images)]) for k in starts]
    hessian = spectrum.hessian_operator(loss_fn, params, batches)
    start = time.perf_counter()
    pairs = spectrum.top_eigenpairs(hessian, 2 * NUM_CLASSES, key=jax.random.key(1), tolerance=1e-2)
    middle = time.perf_counter()
    density = spectrum.spectral_density(
        hessian, key=jax.random.key(2), order=80, num_probes=4, progress=True
    )
    end = time.perf_counter()
    ratios = pairs.values[:-1] / pairs.values[1:]
    row = {
        "parameters": hessian.size,
        "images": num_images,
        "eigenvalues": pairs.values.tolist(),
        "residuals": np.asarray(pairs.residuals).tolist(),
        "eigenvalue_seconds": middle - start,
        "eigenvalue_products": int(pairs.num_matvecs),
        "density_seconds": end - middle,
        "density_products": density.num_matvecs,
        "wasserstein_error": density.wasserstein_error,
        "share_near_zero": _share_near_zero(density, pairs.values[0]),
        "lowest_node": float(min(map(np.min, density.nodes))),
        "ninth_over_tenth": float(ratios[NUM_CLASSES - 2]),
        "widest_of_the_next": float(ratios[NUM_CLASSES - 1 :].max()),
    }
    return row, density, pairs


def _share_near_zero(density: spectrum.SpectralDensity, largest: float) -> float:
    nodes, weights = np.concatenate(density.nodes), np.concatenate(density.weights)
    return float(weights[np.abs(nodes) < 0.01 * largest].sum() / weights.sum())


# --- The edge of stability ---


def edge(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Full-batch gradient descent at several rates, with its sharpness."""
    count = args.edge_images
    images = flat_images(data.train_images[:count])
    images = jnp.asarray(images - images.mean(axis=0))
    targets = jax.nn.one_hot(data.train_labels[:count], NUM_CLASSES)
    params = jax.tree.map(jnp.asarray, initial_params(1, (784, 32, 32, NUM_CLASSES)))

    def loss(params: Any) -> jax.Array:
        return ((logits(params, images) - targets) ** 2).sum(axis=1).mean() / 2

    results = {}
    for rate in tqdm(args.edge_rates, desc="rates"):
        tx = optax.chain(spectrum.track_sharpness(rate, update_interval=5), optax.sgd(rate))

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
        late = sharpness[-len(sharpness) // 4 :] * rate / 2
        results[str(rate)] = {
            "losses": losses[::5].tolist(),
            "sharpness": sharpness[::5].tolist(),
            "first_sharpness": float(sharpness[0]),
            "lowest_sharpness": float(sharpness.min()),
            "late_median_over_edge": float(np.median(late)),
            "late_range_over_edge": [float(late.min()), float(late.max())],
            "last_loss": float(losses[-1]),
        }
    plot_edge(results, args)
    return results


def _num_parameters(weights: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


PARTS = {"peers": peers, "full": full, "edge": edge}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[1, 10],
        help="of training, of two networks; the first is for the peers",
    )
    parser.add_argument("--peer-images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--full-images", type=int, default=10_000)
    parser.add_argument("--edge-images", type=int, default=1000)
    parser.add_argument("--edge-steps", type=int, default=4000)
    parser.add_argument("--edge-rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--data-dir", type=Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "TASK"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.measure:
        measure(*args.measure)
        return
    data = from_idx_files(args.data_dir)
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
