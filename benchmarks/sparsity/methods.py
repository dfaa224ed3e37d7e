"""The contestants: from a trained network and a target to pruned weights."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from training.tasks.task import PyTree, Variables

from curvax import pruning
from sparsity import published
from sparsity.networks import Network


class Target(NamedTuple):
    """How much is pruned: a share of the kernels' weights, or N of M.

    Attributes:
      name: ``"90 %"``, ``"2:4"``.
      sparsity: the share; None for N:M.
      structure: None for single weights.
    """

    name: str
    sparsity: float | None
    structure: pruning.NM | None = None

    @classmethod
    def of(cls, name: str) -> "Target":
        """From ``"0.9"`` or ``"2:4"``."""
        if ":" not in name:
            return cls(f"{float(name):.0%}", float(name))
        n, m = map(int, name.split(":"))
        return cls(name, None, pruning.NM(n, m))


Method = Callable[[Network, Variables, Target, int], Variables]


def of_weights(**options: Any) -> Method:
    """A method that sees the weights alone."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        del network
        result = pruning.prune(
            variables.params,
            None,
            target.sparsity,
            structure=target.structure,
            key=seed,
            **options,
        )
        return variables._replace(params=result.params)

    return method


def of_gradients(**options: Any) -> Method:
    """Gradients of the loss; statistics are estimated anew before each recomputation."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        result = pruned_by_gradients(network, variables, target, seed, **options)
        return variables._replace(params=result.params)

    return method


def pruned_by_gradients(
    network: Network, variables: Variables, target: Target, seed: int, **options: Any
) -> pruning.PruneResult[PyTree]:
    return pruning.prune_one_shot(
        network.loss,
        variables.params,
        gradient_batches(network, variables, seed, options.get("num_grads", 64)),
        target.sparsity,
        structure=target.structure,
        **options,
    )


def gradient_batches(
    network: Network, variables: Variables, seed: int, number: int = 64
) -> Callable[[PyTree], list[Any]]:
    """From the params of now to batches, with their statistics before the inputs."""
    batches = list(itertools.islice(network.batches(seed, network.recipe.batch_size), number))

    def with_statistics(params: PyTree) -> list[Any]:
        statistics = network.reestimated(params, variables.statistics, seed)
        return [(statistics, *batch) for batch in batches]

    return with_statistics


def of_recurrences(num_steps: int) -> Method:
    """M-FAC's own recurrences and order of work, of float32 as published."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        batches = gradient_batches(network, variables, seed)
        gradient = jax.jit(jax.grad(network.loss))

        def gradients_at(params: PyTree) -> list[PyTree]:
            return [gradient(params, *batch) for batch in batches(params)]

        if target.sparsity is None:
            raise ValueError(f"the published pruner takes a share of weights, not {target.name}.")
        params = published.prune(
            gradients_at, variables.params, target.sparsity, num_steps=num_steps
        )
        return variables._replace(params=params)

    return method


def of_layers(**options: Any) -> Method:
    """Layer by layer, from the inputs of calibration data."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        return reconstructed(
            network, variables, seed, target.sparsity, structure=target.structure, **options
        )

    return method


def of_both(**options: Any) -> Method:
    """The mask from gradients, the kept weights from each layer's outputs."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        mask = pruned_by_gradients(network, variables, target, seed, **options).mask
        return reconstructed(network, variables, seed, None, mask=mask)

    return method


def in_turn(num_steps: int) -> Method:
    """Steps of Optimal Brain Surgeon, with the outputs of the dense layers restored after each."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        result = pruning.prune_gradually(
            network.loss,
            variables.params,
            gradient_batches(network, variables, seed),
            pruning.geometric_sparsities(0.0, target.sparsity or 0.5, num_steps),
            lambda _, mask: reconstructed(network, variables, seed, None, mask=mask).params,
            recomputations=1,
        )
        return variables._replace(params=result.params)

    return method


_STAGES = 3  # of gradual pruning, each with a twelfth of the dense training after it


def gradually(**options: Any) -> Method:
    """In stages on a cubic schedule, fine-tuned after each."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        steps = network.task.steps // 12
        sparsities: list[Any] = [None]
        if target.sparsity is not None:
            sparsities = pruning.polynomial_sparsities(0.0, target.sparsity, _STAGES)
        mask = None
        for sparsity in sparsities:
            stage = target._replace(sparsity=sparsity)
            result = pruned_by_gradients(
                network, variables, stage, seed, mask=mask, recomputations=4, **options
            )
            mask = result.mask
            variables = network.tuned(
                variables._replace(params=result.params),
                seed,
                steps * _STAGES // len(sparsities),
                network.recipe.rate / 4,
                lambda tx, mask=mask: pruning.keep_pruned(mask, tx),
            )
        return variables

    return method


def on_schedule(**options: Any) -> Method:
    """Inside the training step, over two thirds of as many steps as `gradually` takes."""

    def method(network: Network, variables: Variables, target: Target, seed: int) -> Variables:
        steps = network.task.steps // 12 * _STAGES
        final = 0.5 if target.sparsity is None else target.sparsity
        sparsity = optax.polynomial_schedule(0.0, final, 3, steps * 2 // 3)
        interval = max(1, steps // 30)
        return network.tuned(
            variables,
            seed,
            steps,
            network.recipe.rate / 4,
            lambda tx: pruning.prune_on_schedule(
                sparsity, tx, update_interval=interval, structure=target.structure, **options
            ),
        )

    return method


def reconstructed(
    network: Network, variables: Variables, seed: int, sparsity: float | None, **options: Any
) -> Variables:
    size = network.recipe.calibration // 8
    inputs = [inputs for inputs, _ in itertools.islice(network.batches(seed, size), 8)]
    collections = {"batch_stats": variables.statistics} if network.has_statistics else {}
    result = pruning.prune_layers(
        network.task.model,
        variables.params,
        inputs,
        sparsity,
        variables=collections,
        **options,
    )
    return variables._replace(params=result.params)


PUBLISHED = {
    "update": "independent",
    "damping": 1e-5,
    "relative_damping": False,
}
METHODS: dict[str, Method] = {
    "random": of_weights(method="random"),
    "magnitude": of_weights(method="magnitude"),
    "magnitude, uniform": of_weights(method="magnitude", distribution="uniform"),
    "weight times gradient": of_gradients(method="saliency", recomputations=1),
    "diagonal Fisher": of_gradients(method="fisher", recomputations=1),
    "diagonal Fisher, 16 steps": of_gradients(method="fisher"),
    "M-FAC as published": of_gradients(**PUBLISHED, recomputations=1),
    "M-FAC as published, 16 steps": of_gradients(**PUBLISHED),
    "OBS": of_gradients(recomputations=1),
    "OBS, 4 steps": of_gradients(recomputations=4),
    "OBS, 16 steps": of_gradients(),
    "Wanda": of_layers(method="wanda", distribution="uniform"),
    "SparseGPT": of_layers(update="sweep", distribution="uniform"),
    "layer by layer": of_layers(),
    "OBS, 4 steps, then layer by layer": of_both(recomputations=4),
    "OBS, 16 steps, then layer by layer": of_both(),
    "gradual, magnitude": gradually(method="magnitude"),
    "gradual, OBS": gradually(),
    "on schedule, magnitude": on_schedule(),
    "on schedule, fisher": on_schedule(method="fisher"),
}
SETTINGS: dict[str, Method] = {  # of what is measured once, to choose defaults
    "OBS, 16 steps, damping 1": of_gradients(damping=1.0),
    "OBS, 16 steps, damping 0.01": of_gradients(damping=0.01),
    "OBS, 16 steps, 256 gradients": of_gradients(num_grads=256),
    "OBS, 16 steps, blocks of 32": of_gradients(block_size=32),
    "OBS, 16 steps, blocks of 512": of_gradients(block_size=512),
    "OBS, 16 steps, whole matrix": of_gradients(block_size=None),
    "OBS, 4 steps, uniform": of_gradients(recomputations=4, distribution="uniform"),
    "OBS, reconstructed after each of 4 steps": in_turn(4),
    "layer by layer, uniform": of_layers(distribution="uniform"),
    "layer by layer, damping 0.1": of_layers(damping=0.1),
    "SparseGPT, ERK": of_layers(update="sweep"),
    "M-FAC, its own recurrences": of_recurrences(1),
    "M-FAC, its own recurrences, 16 steps": of_recurrences(16),
    "Wanda, then least squares": of_layers(method="wanda", update="joint", distribution="uniform"),
}
