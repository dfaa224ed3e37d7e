"""Trains a Flax Linen CNN with AdaHessian, prunes it, fine-tunes it, saves and reloads it.

    python examples/linen_cnn.py
    python examples/linen_cnn.py --sparsity 0.95

The images are scikit-learn's digits. Prints the test accuracy after each stage.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import curvax
from curvax import pruning

PyTree = Any
Split = tuple[np.ndarray, np.ndarray]  # images and labels


class CNN(nn.Module):
    """Two convolutions with batch normalization, and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for filters in (16, 32):
            x = nn.Conv(filters, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    """Flax's, with the running statistics of batch normalization."""

    batch_stats: PyTree


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training_loss(
    params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, PyTree]:
    """The loss and the new statistics, which come back once, as auxiliary data."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changed = CNN().apply(variables, images, train=True, mutable=["batch_stats"])
    return cross_entropy(logits, labels), changed["batch_stats"]


def loss_fn(params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """In evaluation mode: pruning wants gradients of single examples."""
    variables = {"params": params, "batch_stats": batch_stats}
    return cross_entropy(CNN().apply(variables, images, train=False), labels)


def new_statistics(params: PyTree, batch_stats: PyTree, images: jax.Array) -> PyTree:
    """The running statistics after a batch."""
    variables = {"params": params, "batch_stats": batch_stats}
    return CNN().apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]


one_pass = curvax.value_grad_and_hessian_diag_from_state(training_loss, has_aux=True)


# refresh=True: fresh curvature at every step without a conditional, in which a CPU computes the
# gradients of convolutions slowly. TrainState.apply_gradients takes no extra arguments.
@partial(jax.jit, donate_argnums=0)
def step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    (_, batch_stats), grads, diag = one_pass(
        state.params, state.batch_stats, images, labels, state=state.opt_state, refresh=True
    )
    updates, opt_state = state.tx.update(
        grads, state.opt_state, state.params, hessian_diag=diag, refresh=True
    )
    params = optax.apply_updates(state.params, updates)
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats
    )


@jax.jit
def accuracy(
    params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = CNN().apply({"params": params, "batch_stats": batch_stats}, images, train=False)
    return (logits.argmax(axis=-1) == labels).mean()


def train(
    params: PyTree,
    batch_stats: PyTree,
    training: Split,
    args: argparse.Namespace,
    peak_learning_rate: float,
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx,
) -> TrainState:
    """AdaHessian with warm-up and a cosine; ``wrap`` is around it."""
    images, labels = training
    steps_per_epoch = len(images) // args.batch_size
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak_learning_rate, steps_per_epoch // 2, args.epochs * steps_per_epoch
    )
    tx = wrap(curvax.adahessian(schedule, nesterov=True, skip_zeros=True))
    # A copy: a step donates its state, and the caller's arrays stay his.
    params, batch_stats = jax.tree.map(jax.numpy.copy, (params, batch_stats))
    state = TrainState.create(apply_fn=CNN().apply, params=params, tx=tx, batch_stats=batch_stats)
    generator = np.random.default_rng(args.seed)
    for _ in tqdm(range(args.epochs), unit="epoch"):
        order = generator.permutation(len(images))[: steps_per_epoch * args.batch_size]
        for chosen in order.reshape(steps_per_epoch, args.batch_size):
            state = step(state, images[chosen], labels[chosen])
    return state


def prune(state: TrainState, training: Split, args: argparse.Namespace) -> tuple[Any, PyTree]:
    """Removes weights by Optimal Brain Surgeon; the result and the statistics that fit it."""
    images, labels = training
    chosen = images[:1024].reshape(8, 128, *images.shape[1:])

    def statistics(params: PyTree) -> PyTree:
        return pruning.reestimate_statistics(new_statistics, params, state.batch_stats, chosen)

    def batches(params: PyTree) -> list[Any]:
        fitting = statistics(params)
        examples = zip(images[: args.num_grads], labels[: args.num_grads], strict=True)
        return [(fitting, image[np.newaxis], label[np.newaxis]) for image, label in examples]

    result = pruning.prune_one_shot(
        loss_fn, state.params, batches, args.sparsity, num_grads=args.num_grads
    )
    return result, statistics(result.params)


def save_and_reload(state: TrainState, folder: Path) -> PyTree:
    """What is deployed: the parameters and the statistics, through a checkpoint of Orbax."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), variables, force=True)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, variables)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), abstract)


def zeros(params: PyTree) -> float:
    """The share of weights in kernels that are zero."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return float(sum((leaf == 0).sum() for leaf in kernels) / sum(leaf.size for leaf in kernels))


def run(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The test accuracy and the share of zeros after each stage."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    training_images, test_images, training_labels, test_labels = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    training = training_images, training_labels
    stages: dict[str, tuple[float, float]] = {}

    def judge(stage: str, params: PyTree, batch_stats: PyTree) -> None:
        share = float(accuracy(params, batch_stats, test_images, test_labels))
        stages[stage] = share, zeros(params)

    variables = CNN().init(jax.random.key(args.seed), images[:1], train=False)
    state = train(variables["params"], variables["batch_stats"], training, args, 0.3)
    judge("trained", state.params, state.batch_stats)

    result, batch_stats = prune(state, training, args)
    judge("pruned", result.params, batch_stats)

    keep = partial(pruning.keep_pruned, result.mask)
    state = train(result.params, batch_stats, training, args, 0.1, wrap=keep)
    judge("fine-tuned", state.params, state.batch_stats)

    reloaded = save_and_reload(state, args.output / "linen_cnn")
    judge("reloaded", reloaded["params"], reloaded["batch_stats"])
    return stages


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N", type=int)
    option("--epochs", default=10, help="of training, and again of fine-tuning: %(default)s")
    option("--batch-size", default=32, help="default: %(default)s")
    option("--num-grads", default=512, help="gradients of examples (default: %(default)s)")
    option("--seed", default=0, help="default: %(default)s")
    parser.add_argument("--sparsity", metavar="SHARE", type=float, default=0.9)
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build"),
        help="folder for the checkpoint (default: %(default)s)",
    )
    for stage, (share, pruned) in run(parser.parse_args(arguments)).items():
        print(f"{stage:10}  test accuracy {share:7.2%}  zeros {pruned:6.1%}")


if __name__ == "__main__":
    main()
