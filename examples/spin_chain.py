r"""Variational Monte Carlo of a spin chain with minSR, SPRING and Adam, against the exact energy.

    python examples/spin_chain.py
    python examples/spin_chain.py --spins 10 --steps 150

The Hamiltonian is that of the transverse-field Ising chain at its critical field,
$H = -\sum_i \sigma^z_i \sigma^z_{i+1} - \sum_i \sigma^x_i$, and the wave function a restricted
Boltzmann machine with complex parameters. All optimizers get as many samples and steps. Prints for
each the mean energy of the last steps, with its standard error over the Markov chains, and its
distance from the exact energy. minSR is `curvax.natural_gradient` without momentum, SPRING with.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import curvax

PyTree = Any
Step = Callable[..., tuple[PyTree, PyTree, jax.Array, jax.Array]]


def exact_energy(spins: int) -> float:
    """The ground-state energy at the critical field, of free fermions in an even ring."""
    momenta = np.pi * (2 * np.arange(spins) + 1) / spins
    return float(-np.sum(np.sqrt(2 + 2 * np.cos(momenta))))  # = -2 / sin(pi / (2 spins))


def log_cosh(x: jax.Array) -> jax.Array:
    """The logarithm of the hyperbolic cosine of complex numbers, without overflow."""
    x = jnp.where(x.real < 0, -x, x)
    return x + jnp.log((1 + jnp.exp(-2 * x)) / 2)


class RBM(nn.Module):
    """The log-amplitudes of spin configurations, of shape (n,)."""

    hidden: int

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        small = nn.initializers.normal(0.05, jnp.complex64)
        angles = nn.Dense(self.hidden, param_dtype=jnp.complex64, kernel_init=small)(spins)
        return log_cosh(angles).sum(axis=-1)


def sample(
    log_amplitude: Callable[[jax.Array], jax.Array], spins: jax.Array, key: jax.Array, flips: int
) -> jax.Array:
    """Moves every Markov chain by so many proposals to flip a single spin."""
    chains = jnp.arange(len(spins))

    def propose(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[Any, None]:
        spins, old = state
        for_site, for_choice = jax.random.split(key)
        site = jax.random.randint(for_site, chains.shape, 0, spins.shape[1])
        flipped = spins.at[chains, site].multiply(-1)
        new = log_amplitude(flipped)
        limit = jnp.exp(2 * (new - old).real)
        accepted = jax.random.uniform(for_choice, chains.shape) < limit
        spins = jnp.where(accepted[:, jnp.newaxis], flipped, spins)
        return (spins, jnp.where(accepted, new, old)), None

    start = spins, log_amplitude(spins)
    return jax.lax.scan(propose, start, jax.random.split(key, flips))[0][0]


def local_energies(log_amplitude: Callable[[jax.Array], jax.Array], spins: jax.Array) -> jax.Array:
    r"""$\langle s | H | \psi \rangle / \langle s | \psi \rangle$ of each configuration."""
    number = spins.shape[1]
    flipped = spins[:, jnp.newaxis] * (1 - 2 * jnp.eye(number))
    amplitudes = log_amplitude(flipped.reshape(-1, number)).reshape(-1, number)
    ratios = jnp.exp(amplitudes - log_amplitude(spins)[:, jnp.newaxis])
    return -jnp.sum(spins * jnp.roll(spins, 1, axis=1), axis=1) - jnp.sum(ratios, axis=1)


class Contestant(NamedTuple):
    """An optimizer, and whether it takes the samples or the energy's gradient."""

    tx: optax.GradientTransformationExtraArgs
    takes_samples: bool


def contestants(steps: int) -> dict[str, Contestant]:
    """All rates decay to zero. Adam's may be 0.005 to 0.05 with the same result; 0.1 fails."""

    def decaying(rate: float) -> optax.Schedule:
        return optax.cosine_decay_schedule(rate, steps)

    sr = partial(curvax.natural_gradient, damping=1e-3, centered=True)
    return {
        "minSR": Contestant(sr(decaying(0.05)), takes_samples=True),
        "SPRING": Contestant(sr(decaying(0.05), momentum=0.9), takes_samples=True),
        "Adam": Contestant(optax.adam(decaying(0.02)), takes_samples=False),
    }


def make_step(model: RBM, contestant: Contestant, flips: int) -> Step:
    """Samples, local energies and an update."""
    log_amplitude = model.apply

    def energy_gradient(params: PyTree, spins: jax.Array, energies: jax.Array) -> PyTree:
        centered = energies - energies.mean()

        def surrogate(params: PyTree) -> jax.Array:
            return 2 * jnp.mean(centered.conj() * log_amplitude(params, spins)).real

        # For complex parameters JAX returns the conjugate of the direction of steepest ascent.
        return jax.tree.map(jnp.conj, jax.grad(surrogate)(params))

    @jax.jit
    def step(params: PyTree, state: PyTree, spins: jax.Array, key: jax.Array) -> Any:
        current = partial(log_amplitude, params)
        spins = sample(current, spins, key, flips)
        energies = local_energies(current, spins)
        if contestant.takes_samples:
            updates, state = contestant.tx.update(
                None,
                state,
                params,
                outputs_fn=log_amplitude,
                batch=(spins,),
                cotangents=energies,
            )
        else:
            grads = energy_gradient(params, spins, energies)
            updates, state = contestant.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, spins, energies.real

    return step


class Result(NamedTuple):
    """The mean energy of the last steps, its standard error over chains, and a step's time."""

    energy: float
    error: float
    milliseconds_per_step: float


def train(name: str, contestant: Contestant, args: argparse.Namespace) -> Result:
    """Minimizes the energy; all contestants share initial parameters and the numbers drawn."""
    model = RBM(args.hidden or 3 * args.spins)
    keys = jax.random.split(jax.random.key(args.seed), 3)
    spins = jax.random.rademacher(keys[0], (args.samples, args.spins), jnp.float32)
    params = model.init(keys[1], spins)
    state = contestant.tx.init(params)
    step = make_step(model, contestant, flips=2 * args.spins)
    step = step.lower(params, state, spins, keys[2]).compile()  # so that no step's time includes it

    history = []
    start = time.perf_counter()
    progress = tqdm(range(args.steps), desc=f"{name:6}", unit="step", disable=None)
    for number in progress:
        key = jax.random.fold_in(keys[2], number)
        params, state, spins, energies = step(params, state, spins, key)
        history.append(energies)
        if number % 20 == 0:
            progress.set_postfix(energy=f"{energies.mean():.4f}")
    of_chains = np.mean(jax.device_get(history[-max(1, args.steps // 5) :]), axis=0)
    milliseconds = 1000 * (time.perf_counter() - start) / args.steps
    error = of_chains.std(ddof=1) / np.sqrt(len(of_chains))
    return Result(float(of_chains.mean()), float(error), milliseconds)


def table(results: dict[str, Result], exact: float) -> str:
    rows = [f"{'':6}      energy  standard error  relative error  ms a step"]
    rows += [
        f"{name:6}  {result.energy:10.5f}  {result.error:14.5f}"
        f"  {(result.energy - exact) / abs(exact):14.1e}  {result.milliseconds_per_step:9.1f}"
        for name, result in results.items()
    ]
    return "\n".join([*rows, f"{'exact':6}  {exact:10.5f}"])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N")
    option("--spins", type=even, default=14, help="an even number (default: %(default)s)")
    option("--hidden", type=at_least_two, help="hidden units (default: three for each spin)")
    option("--samples", type=at_least_two, default=256, help="default: %(default)s")
    option("--steps", type=at_least_two, default=200, help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is not at least 2")
    return number


def even(text: str) -> int:
    number = at_least_two(text)
    if number % 2:
        raise argparse.ArgumentTypeError(f"{number} is odd")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    results = {
        name: train(name, contestant, args) for name, contestant in contestants(args.steps).items()
    }
    print(f"\n{table(results, exact_energy(args.spins))}")


if __name__ == "__main__":
    main()
