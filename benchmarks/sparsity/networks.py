"""The networks that are pruned: trained once for each seed, and kept in build/pruning."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models_flax import ResNet20
from timing import tqdm
from training.loop import order_of_examples
from training.tasks import images, language, translation
from training.tasks.task import Batch, Numbers, PyTree, Task, Variables, mean_loss

from curvax import pruning

FOLDER = Path(__file__).parents[2] / "build" / "pruning"


class Recipe(NamedTuple):
    """How a network is made and trained, and how much of its data pruning sees.

    Attributes:
      make: ``data directory -> Task``.
      rate: the peak of the learning rate, of AdamW.
      batch_size: the number of examples behind one gradient.
      calibration: the number of examples whose inputs each layer sees.
    """

    make: Callable[[Path], Task]
    rate: float
    batch_size: int
    calibration: int


RECIPES = {
    "cifar-resnet": Recipe(partial(images.cifar_resnet, "pruning"), 3e-3, 16, 1024),
    "fashion-resnet": Recipe(images.fashion_resnet, 3e-3, 16, 1024),
    "shakespeare": Recipe(partial(language.shakespeare, "pruning"), 2e-3, 8, 256),
    "multi30k": Recipe(partial(translation.multi30k, "pruning"), 2e-3, 16, 1024),
}


def _as_it_is(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return tx


class Network:
    """A task's network, its training, and its loss in evaluation mode."""

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name, self.recipe = name, RECIPES[name]
        self.task = self.recipe.make(data_dir)

    @property
    def has_statistics(self) -> bool:
        """Whether there is batch normalization."""
        return self.name.endswith("resnet")

    def variables(self, params: PyTree, statistics: PyTree) -> dict[str, PyTree]:
        """What the module is applied to."""
        return {"params": params} | ({"batch_stats": statistics} if statistics else {})

    def loss(self, params: PyTree, statistics: PyTree, inputs: Any, targets: Any) -> jax.Array:
        """The mean loss of a batch in evaluation mode."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        outputs = self.task.model.apply(self.variables(params, statistics), *inputs)
        return mean_loss(self.task.loss, outputs, targets)

    def reestimated(self, params: PyTree, statistics: PyTree, seed: int) -> PyTree:
        """The statistics of batch normalization for other weights, from 2048 images."""
        if not self.has_statistics:
            return statistics
        images = (inputs for inputs, _ in itertools.islice(self.batches(1000 + seed, 256), 8))
        return pruning.reestimate_statistics(_new_statistics, params, statistics, images)

    def share_of_zeros(self, params: PyTree) -> float:
        """Among the weights of kernels."""
        masks = [mask for mask in jax.tree.leaves(pruning.mask_of_zeros(params)) if mask.ndim]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)

    def judged(self, variables: Variables, seed: int) -> Numbers:
        """The numbers on test data, with statistics of the weights as they are."""
        statistics = self.reestimated(*variables, seed)
        return self.task.evaluate(variables._replace(statistics=statistics), "test")

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """An endless stream of random training batches, not augmented."""
        task, key = self.task._replace(batch_size=size), jax.random.key(seed)
        for number, indices in enumerate(order_of_examples(task, seed)):
            if task.num_examples is None:  # windows of a text
                keys = jax.random.split(
                    jax.random.fold_in(key, number), -(-size // task.batch_size)
                )
                parts = [self.task.sample(task.data, indices, one) for one in keys]
                yield jax.tree.map(lambda *x: jnp.concatenate(x)[:size], *parts)
            elif self.has_statistics:  # images, without augmentation
                yield tuple(array[indices] for array in task.data)
            else:
                yield task.sample(task.data, indices, key)

    def trained(self, seed: int) -> Variables:
        """The dense network of a seed, trained once with AdamW."""
        initial = jax.jit(self.task.init)(jax.random.key(seed))
        leaves, treedef = jax.tree.flatten(initial)
        path = FOLDER / f"{self.name}_{seed}.npz"
        if not path.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".new.npz")
            final = self.tuned(initial, seed, self.task.steps, self.recipe.rate)
            np.savez(aside, *jax.tree.leaves(final))
            aside.replace(path)
        with np.load(path) as arrays:
            return treedef.unflatten(jnp.asarray(arrays[f"arr_{k}"]) for k in range(len(leaves)))

    def tuned(
        self,
        variables: Variables,
        seed: int,
        steps: int,
        rate: float,
        wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _as_it_is,
    ) -> Variables:
        """So many steps of AdamW, perhaps wrapped, from ``variables`` on."""
        task = self.task
        tx = wrap(optax.adamw(lambda count: rate * task.schedule(count, steps)))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(variables: Variables, state: PyTree, indices: jax.Array, key: jax.Array) -> Any:
            sample_key, noise_key = jax.random.split(key)
            batch = task.sample(task.data, indices, sample_key)
            (loss, statistics), grads = jax.value_and_grad(task.mean_loss, has_aux=True)(
                variables.params, *batch, variables.statistics, noise_key
            )
            updates, state = tx.update(grads, state, variables.params)
            params = optax.apply_updates(variables.params, updates)
            return Variables(params, statistics), state, loss

        variables = jax.tree.map(jnp.array, variables)
        state, key = tx.init(variables.params), jax.random.key(seed)
        order = order_of_examples(task, seed)
        for number in tqdm(range(steps), desc=f"{self.name}, seed {seed}", leave=False):
            variables, state, _ = step(
                variables, state, next(order), jax.random.fold_in(key, number)
            )
        return variables


def _new_statistics(params: PyTree, statistics: PyTree, images: jax.Array) -> PyTree:
    variables = {"params": params, "batch_stats": statistics}
    return ResNet20().apply(variables, images, mutable=["batch_stats"])[1]["batch_stats"]
