"""The refresh of the curvature: what the README's loop costs, and what an interval of 10 loses.

    python benchmarks/adahessian_refresh.py

First a step of a small CNN at interval 1, with the refresh left to the state (as in the README) and
with ``refresh=True``, alternating in one run. Then a ReLU network on scikit-learn's digits, three
seeds: interval 10 with and without warm-up and clip, against interval 1. Writes JSON and a table to
benchmarks/results/ under the hardware's name.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from sklearn.datasets import load_digits

import curvax

PyTree = Any
BATCH, SEEDS = 64, 3
LAYERS = (64, 64, 32, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    "interval 1, clip": {},
    "interval 1": {"clip_threshold": None},
    "interval 10": {"update_interval": 10, "clip_threshold": None},
    "interval 10, clip": {"update_interval": 10},
    "interval 10, warm-up 100": {
        "update_interval": 10,
        "refresh_warmup": 100,
        "clip_threshold": None,
    },
    "interval 10, warm-up 100, clip": {"update_interval": 10, "refresh_warmup": 100},
}
BASE = "interval 1, clip"


def conv_loss(params: PyTree, images: jax.Array, targets: jax.Array) -> jax.Array:
    for name in ("conv1", "conv2"):
        images = jax.nn.relu(
            jax.lax.conv_general_dilated(
                images,
                params[name],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )
    return jnp.mean((images.mean((1, 2)) @ params["head"] - targets) ** 2)


def step_times(args: argparse.Namespace) -> dict[str, Any]:
    """The README's loop against one with ``refresh=True``, on 32 images of 32x32x3."""
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    params = {
        "conv1": normal(keys[0], (3, 3, 3, 32)) * 0.2,
        "conv2": normal(keys[1], (3, 3, 32, 32)) * 0.06,
        "head": normal(keys[2], (32, 10)) * 0.2,
    }
    batch = normal(keys[3], (32, 32, 32, 3)), normal(keys[4], (32, 10))
    tx = curvax.adahessian(1e-3)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(conv_loss)

    def loop_of(refresh: bool | None) -> timing.Loop:
        @jax.jit
        def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
            _, grads, diag = one_pass(params, *batch, state=state, refresh=refresh)
            updates, state = tx.update(grads, state, params, hessian_diag=diag, refresh=refresh)
            return optax.apply_updates(params, updates), state

        carry = step(params, tx.init(params))

        def loop(steps: int) -> None:
            nonlocal carry
            for _ in range(steps):
                carry = step(*carry)
            jax.block_until_ready(carry)

        return loop

    loops = {"the README's loop": loop_of(None), "refresh=True": loop_of(True)}
    rows = timing.time_loops(loops, seconds=args.seconds, cycle=1, blocks=args.blocks)
    base = rows["refresh=True"]["median_s"]
    return {name: {**row, "ratio": row["median_s"] / base} for name, row in rows.items()}


def network(params: PyTree, inputs: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params: PyTree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    logits = network(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def final_losses(
    inputs: jax.Array, labels: jax.Array, options: dict[str, Any], args: argparse.Namespace
) -> list[float]:
    """The loss over all images after training, by seed."""
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss_fn)
    rate, steps = args.learning_rate, args.steps
    cosine = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    tx = curvax.adahessian(rate if args.constant else cosine, **options)

    def train(seed: jax.Array) -> jax.Array:
        key, order = jax.random.split(jax.random.key(seed))
        params = [
            {"kernel": jax.random.normal(k, (n, m)) * np.sqrt(2 / n), "bias": jnp.zeros(m)}
            for k, n, m in zip(jax.random.split(key, 3), LAYERS, LAYERS[1:], strict=False)
        ]

        def step(carry: tuple[PyTree, PyTree], index: jax.Array) -> Any:
            params, state = carry
            batch = inputs[index], labels[index]
            _, grads, diag = one_pass(params, *batch, state=state)
            updates, state = tx.update(grads, state, params, hessian_diag=diag)
            return (optax.apply_updates(params, updates), state), None

        indices = jax.random.randint(order, (steps, BATCH), 0, len(inputs))
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), indices)
        return loss_fn(params, inputs, labels)

    return [float(jax.jit(train)(seed)) for seed in range(SEEDS)]


def training(args: argparse.Namespace) -> dict[str, Any]:
    images, labels = load_digits(return_X_y=True)
    inputs, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    rows = {}
    for name, options in OPTIONS.items():
        losses = final_losses(inputs, labels, options, args)
        rows[name] = {
            "losses": losses,
            "mean": statistics.mean(losses),
            "deviation": statistics.stdev(losses),
        }
    return {name: {**row, "ratio": row["mean"] / rows[BASE]["mean"]} for name, row in rows.items()}


def table(results: dict[str, Any]) -> str:
    lines = [f"Measured on {results['name']} by `python benchmarks/adahessian_refresh.py`.", ""]
    lines += ["| a step of a small CNN at interval 1 | ms | ratio |", "| --- | ---: | ---: |"]
    for name, row in results["step"].items():
        lines.append(f"| {name} | {row['median_s'] * 1e3:.1f} | {row['ratio']:.3f} |")
    settings = results["settings"]
    steps = f"{settings['steps']} steps at {settings['learning_rate']}, {settings['schedule']}"
    lines += ["", f"| ReLU network, {steps} | training loss, {SEEDS} seeds | ratio |"]
    lines += ["| --- | ---: | ---: |"]
    for name, row in results["training"].items():
        loss = f"{row['mean']:.4g} ± {row['deviation']:.2g}"
        lines.append(f"| {name} | {loss} | {row['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=7, help="blocks for each contestant")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a block lasts")
    parser.add_argument("--steps", type=int, default=1200, help="of the ReLU network")
    parser.add_argument("--learning-rate", type=float, default=0.3, help="of the ReLU network")
    parser.add_argument("--constant", action="store_true", help="instead of a cosine schedule")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    results = {
        **timing.environment(("curvax", "jax", "jaxlib", "optax")),
        "settings": {
            "blocks": args.blocks,
            "seconds": args.seconds,
            "learning_rate": args.learning_rate,
            "steps": args.steps,
            "schedule": "constant" if args.constant else "cosine",
            "batch": BATCH,
        },
        "training": training(args),
        "step": step_times(args),
    }
    timing.write(results, table(results), "adahessian_refresh", args.output)


if __name__ == "__main__":
    main()
