"""Trains a small character model in Flax NNX with AdamW, AdaHessian or M-FAC, and resumes it.

    python examples/nnx_transformer.py --optimizer adahessian
    python examples/nnx_transformer.py --optimizer adahessian --steps 600  # goes on from step 300

The text is Python's own reference, which comes with Python; `--text FILE` takes another. Prints
losses and what the optimizer's state tells, and saves checkpoints from which a run resumes exactly.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import curvax

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nnx.Module):
    """Causal self-attention and a multi-layer perceptron, each on normalized inputs."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        kinds = {"dtype": dtype, "rngs": rngs}  # compute in dtype, parameters stay float32
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **kinds)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, **kinds) for _ in range(2)])
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, **kinds)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, **kinds)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.norms[0](x), mask=mask))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))))


class Transformer(nnx.Module):
    """A character's logits from those before it."""

    def __init__(self, vocabulary: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocabulary, WIDTH, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(dtype, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(WIDTH, vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Recipe(NamedTuple):
    """An optimizer that is given a schedule and a mask, its peak rate, what its state tells."""

    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    peak_learning_rate: float
    watched: tuple[str, ...]


def adamw(schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=1e-2, mask=mask)


def adahessian(schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return curvax.adahessian(
        schedule,
        weight_decay=1e-4,  # its rates are a hundred times Adam's
        mask=mask,
        nesterov=True,
        update_interval=10,
        refresh_warmup=50,
    )


def mfac(schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(0.9, nesterov=True),
        curvax.scale_by_mfac(128, damping=0.1, window_scaling="relative"),
        optax.add_decayed_weights(1e-4, mask),
        optax.scale_by_learning_rate(schedule),
    )


RECIPES = {
    "adamw": Recipe(adamw, 0.004, ()),
    "adahessian": Recipe(adahessian, 0.3, ("refreshes", "refusals", "clipped")),
    "mfac": Recipe(mfac, 0.2, ("damping", "failures")),
}


def make_optimizer(recipe: Recipe, model: Transformer, steps: int) -> nnx.Optimizer:
    """Clips the gradient, decays matrices alone, warms up and falls to zero on a cosine."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.peak_learning_rate, warmup_steps=steps // 20, decay_steps=steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), recipe.make(schedule, matrices))
    return nnx.Optimizer(model, optax.with_extra_args_support(tx), wrt=nnx.Param)


def make_step(name: str) -> Callable[..., jax.Array]:
    """A step on the mean over micro-batches; AdaHessian's probe is the same for all of them."""
    value_and_grad = nnx.value_and_grad(loss_fn)
    one_pass = (
        curvax.for_nnx(curvax.value_grad_and_hessian_diag_from_state, loss_fn)
        if name == "adahessian"
        else lambda model, tokens, **_: (*value_and_grad(model, tokens), None)
    )

    @nnx.jit
    def step(model: Transformer, optimizer: nnx.Optimizer, micro_batches: jax.Array) -> jax.Array:
        passes = [one_pass(model, tokens, state=optimizer.opt_state) for tokens in micro_batches]
        loss, grads, diag = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *passes)
        optimizer.update(model, grads, hessian_diag=diag)
        return loss

    return step


compiled_loss = nnx.jit(loss_fn)


def evaluate(model: Transformer, tokens: jax.Array) -> float:
    """The loss without dropout."""
    model.eval()
    loss = compiled_loss(model, tokens)
    model.train()
    return float(loss)


def tokens_of(text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The text as numbers, split nine to one, and how many characters there are."""
    characters, tokens = np.unique(np.array(list(text)), return_inverse=True)
    split = int(0.9 * len(tokens))
    return tokens[:split], tokens[split:], len(characters)


def windows(tokens: np.ndarray, shape: tuple[int, ...], seed: Sequence[int]) -> np.ndarray:
    """Pieces of the text at random, one longer than the context; the same for the same seed."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - CONTEXT, shape)
    return tokens[starts[..., np.newaxis] + np.arange(CONTEXT + 1)]


def metrics_of(recipe: Recipe, optimizer: nnx.Optimizer) -> dict[str, float]:
    """The optimizer's own counters, sums over leaves."""
    state = optimizer.opt_state
    return {name: float(jnp.sum(optax.tree.get(state, name)[...])) for name in recipe.watched}


def train(args: argparse.Namespace, text: str) -> float:
    """Trains from the last checkpoint, if there is one; returns the last validation loss."""
    training, validation, vocabulary = tokens_of(text)
    recipe = RECIPES[args.optimizer]
    dtype = jnp.dtype(args.compute_dtype)
    model = Transformer(vocabulary, dtype, nnx.Rngs(args.seed, dropout=args.seed + 1))
    optimizer = make_optimizer(recipe, model, args.schedule_steps or args.steps)
    step = make_step(args.optimizer)
    judged = windows(validation, (64,), [args.seed])
    shape = (args.accumulate, args.batch_size // args.accumulate)

    folder = (args.output / f"transformer-{args.optimizer}").resolve()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as kept:
        start = kept.latest_step() or 0
        if start:
            whole = nnx.state((model, optimizer))
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, whole)
            nnx.update(
                (model, optimizer), kept.restore(start, args=ocp.args.StandardRestore(abstract))
            )
        progress = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step")
        loss = evaluate(model, judged)
        for number in progress:
            train_loss = step(model, optimizer, windows(training, shape, [args.seed, number]))
            if (number + 1) % args.every == 0 or number + 1 == args.steps:
                loss = evaluate(model, judged)
                told = metrics_of(recipe, optimizer)
                progress.write(
                    f"step {number + 1:5}  training {train_loss:.4f}  validation {loss:.4f}"
                    + "".join(f"  {name} {value:.4g}" for name, value in told.items())
                )
                state = nnx.state((model, optimizer))
                kept.save(number + 1, args=ocp.args.StandardSave(state))
    return loss


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N", type=int)
    parser.add_argument("--optimizer", choices=tuple(RECIPES), default="adahessian")
    parser.add_argument("--text", metavar="FILE", type=Path, help="default: Python's reference")
    option("--steps", default=300, help="default: %(default)s")
    option("--schedule-steps", help="of the learning rate (default: --steps)")
    option("--batch-size", default=32, help="default: %(default)s")
    option("--accumulate", default=2, help="micro-batches of a step (default: %(default)s)")
    option("--every", default=50, help="steps between checkpoints (default: %(default)s)")
    option("--seed", default=0, help="default: %(default)s")
    parser.add_argument(
        "--compute-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="%(default)s"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build"),
        help="folder for checkpoints (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.batch_size % args.accumulate:
        parser.error(f"--batch-size must be a multiple of --accumulate, {args.accumulate}")
    text = args.text.read_text() if args.text else "\n".join(topics.values())
    if len(text) < 20 * CONTEXT:
        parser.error(f"the text has {len(text)} characters; {20 * CONTEXT} are needed")
    print(f"\nvalidation loss: {train(args, text):.4f}")


if __name__ == "__main__":
    main()
