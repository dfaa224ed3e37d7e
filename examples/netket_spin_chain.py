r"""curvax's natural gradient inside NetKet, beside NetKet's own: the same spin chain, step by step.

    pip install netket
    python examples/netket_spin_chain.py
    python examples/netket_spin_chain.py --momentum 0.8 --driver dense

Hilbert space, Hamiltonian, sampler, wave function and Monte Carlo state are NetKet's, twice from
one seed. One state is updated by `netket.driver.VMC_SR`, the other by `curvax.natural_gradient`.
Prints the energies of both, and how far their updates are apart as long as the samples are the
same. All is in double precision.

With the centred derivatives $O$ of n log-amplitudes, and the local energies $E$, NetKet's update is
$(S + \lambda)^{-1} F$ with $S = \operatorname{Re} O^H O / n$ and the energy's gradient
$F = 2 \operatorname{Re} O^H (E - \bar E) / n$; curvax's has $\operatorname{Re} O^H s / n$ for the
cotangents $s$. So the cotangents are $2 E$, and ``damping`` is ``diag_shift``. A complex parameter
is two real ones for both.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from spin_chain import at_least_two, even, exact_energy
from tqdm import tqdm

import curvax

try:
    import netket as nk
except ImportError:
    nk = None

PyTree = Any

# How NetKet solves: for the parameters, or for the samples with the Jacobian computed at once or
# as it is needed.
DRIVERS = {
    "dense": {"use_ntk": False},
    "ntk": {"use_ntk": True, "on_the_fly": False},
    "on-the-fly": {"use_ntk": True, "on_the_fly": True},
}


def make_hamiltonian(spins: int) -> Any:
    """The periodic transverse-field Ising chain at its critical field."""
    graph = nk.graph.Chain(spins, pbc=True)
    return nk.operator.IsingJax(nk.hilbert.Spin(0.5, spins), graph, h=1.0, J=-1.0)


def make_state(hilbert: Any, args: argparse.Namespace) -> Any:
    return nk.vqs.MCState(
        nk.sampler.MetropolisLocal(hilbert, n_chains=args.samples),
        nk.models.RBM(alpha=args.alpha, param_dtype=complex, use_visible_bias=False),
        n_samples=args.samples,
        seed=args.seed,
        sampler_seed=args.seed,
    )


class NetketLoop:
    """NetKet's driver, one step at a time."""

    def __init__(self, hamiltonian: Any, state: Any, args: argparse.Namespace):
        self.state = state
        self.driver = nk.driver.VMC_SR(
            hamiltonian,
            optax.sgd(args.learning_rate),
            variational_state=state,
            diag_shift=args.diag_shift,
            momentum=args.momentum or None,
            **DRIVERS[args.driver],
        )

    def step(self) -> float:
        """Samples, updates the parameters, and returns the energy before that."""
        self.driver.reset_step()
        energy, direction = self.driver.compute_loss_and_update()
        self.driver.update_parameters(direction)
        return float(energy.mean.real)


class CurvaxLoop:
    """The same with an Optax transformation in the driver's place."""

    def __init__(self, hamiltonian: Any, state: Any, args: argparse.Namespace):
        self.hamiltonian = hamiltonian
        self.state = state
        self.tx = curvax.natural_gradient(
            args.learning_rate, args.diag_shift, momentum=args.momentum, centered=True
        )
        self.tx_state = self.tx.init(state.parameters)

    def step(self) -> float:
        self.state.reset()
        samples = self.state.samples  # of shape (chains, samples in each, spins)
        energies = self.state.local_estimators(self.hamiltonian).reshape(-1)
        self.state.parameters, self.tx_state = self._update(
            self.state.parameters, self.tx_state, samples.reshape(len(energies), -1), energies
        )
        return float(energies.mean().real)

    @partial(jax.jit, static_argnums=0)
    def _update(
        self, params: PyTree, tx_state: PyTree, spins: jax.Array, energies: jax.Array
    ) -> tuple[PyTree, PyTree]:
        updates, tx_state = self.tx.update(
            None,
            tx_state,
            params,
            outputs_fn=lambda params, spins: self.state.model.apply({"params": params}, spins),
            batch=(spins,),
            cotangents=2 * energies,
        )
        return optax.apply_updates(params, updates), tx_state


class Comparison(NamedTuple):
    """Energies of each step, and the updates' relative differences until the samples differ."""

    netket: list[float]
    curvax: list[float]
    differences: list[float]


def compare(args: argparse.Namespace) -> Comparison:
    """Both loops, each with a state of its own that starts from the same seed."""
    hamiltonian = make_hamiltonian(args.spins)
    loops = [
        loop(hamiltonian, make_state(hamiltonian.hilbert, args), args)
        for loop in (NetketLoop, CurvaxLoop)
    ]
    found = Comparison([], [], [])
    same_samples = True
    for _ in tqdm(range(args.steps), unit="step", disable=None):
        before = [loop.state.parameters for loop in loops]
        energies = [loop.step() for loop in loops]
        found.netket.append(energies[0])
        found.curvax.append(energies[1])
        theirs, ours = (
            flat(loop.state.parameters) - flat(old) for loop, old in zip(loops, before, strict=True)
        )
        same_samples = same_samples and np.isclose(*energies, rtol=1e-8, atol=0)
        if same_samples:
            found.differences.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return found


def flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def table(found: Comparison, exact: float) -> str:
    """Some steps, and the mean of the last fifth."""
    steps = len(found.netket)
    shown = sorted({0, 1, 2, 5, 10, 20, 50, 100, 200, 500} & set(range(steps)) | {steps - 1})
    rows = [f"{'step':>9}      NetKet      curvax  difference of the updates"]
    rows += [
        f"{step:9}  {found.netket[step]:10.5f}  {found.curvax[step]:10.5f}"
        + (f"  {found.differences[step]:25.1e}" if step < len(found.differences) else "")
        for step in shown
    ]
    last = slice(-max(1, steps // 5), None)
    means = np.mean(found.netket[last]), np.mean(found.curvax[last])
    rows += [
        f"{'last mean':>9}  {means[0]:10.5f}  {means[1]:10.5f}",
        f"{'over exact':>9} {means[0] - exact:10.1e}  {means[1] - exact:10.1e}",
        f"{'exact':>9}  {exact:10.5f}",
    ]
    return "\n".join(rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N")
    option("--spins", type=even, default=12, help="an even number (default: %(default)s)")
    option("--alpha", type=int, default=3, help="hidden units for each spin (default: %(default)s)")
    option("--samples", type=at_least_two, default=256, help="default: %(default)s")
    option("--steps", type=at_least_two, default=100, help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    option = partial(parser.add_argument, metavar="X", type=float)
    option("--learning-rate", default=0.02, help="default: %(default)s")
    option("--diag-shift", default=1e-3, help="default: %(default)s")
    option("--momentum", default=0.0, help="that of SPRING (default: %(default)s)")
    parser.add_argument(
        "--driver",
        choices=tuple(DRIVERS),
        default="on-the-fly",
        help="how NetKet solves (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if nk is None:
        parser.exit(2, "This example needs NetKet: pip install netket\n")
    print(table(compare(args), exact_energy(args.spins)))


if __name__ == "__main__":
    main()
