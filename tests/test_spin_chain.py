"""The spin chain's examples: the exact energy, and what is learned and printed."""

import importlib
import re
import sys
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """A function that imports a script of the examples by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(EXAMPLES / f"{name}.py"):
            del sys.modules[name]


@pytest.fixture
def comparison(example):
    """The script with NetKet, which makes double precision the default as it is imported."""
    before = jax.config.jax_enable_x64
    yield example("netket_spin_chain")
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def chain(example):
    return example("spin_chain")


def dense_hamiltonian(spins):
    """Of the transverse-field Ising chain at its critical field; basis states as bits, 0 for up."""
    x, z = np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, -1.0])

    def product(factors):
        return reduce(np.kron, [factors.get(site, np.eye(2)) for site in range(spins)])

    bonds = sum(product({site: z, (site + 1) % spins: z}) for site in range(spins))
    return -bonds - sum(product({site: x}) for site in range(spins))


def configurations(spins):
    bits = np.arange(2**spins)[:, None] >> np.arange(spins)[::-1] & 1
    return jnp.asarray(1.0 - 2 * bits)


@pytest.mark.parametrize("spins", [4, 6, 8])
def test_the_exact_energy_is_that_of_diagonalization(chain, spins):
    lowest = np.linalg.eigvalsh(dense_hamiltonian(spins))[0]
    np.testing.assert_allclose(chain.exact_energy(spins), lowest, rtol=1e-12)
    np.testing.assert_allclose(chain.exact_energy(spins), -2 / np.sin(np.pi / (2 * spins)))


def test_local_energies_are_those_of_the_dense_hamiltonian(chain):
    spins = configurations(4)
    model = chain.RBM(hidden=3)
    params = model.init(jax.random.key(0), spins)
    amplitudes = np.exp(np.asarray(model.apply(params, spins), complex))
    energies = chain.local_energies(lambda s: model.apply(params, s), spins)
    np.testing.assert_allclose(energies, dense_hamiltonian(4) @ amplitudes / amplitudes, rtol=1e-5)


def test_log_cosh_neither_overflows_nor_loses_digits(chain):
    x = np.array([0.0, 1e-3 + 2j, -0.7 + 0.3j, 3.0 - 1j])
    np.testing.assert_allclose(np.exp(chain.log_cosh(x)), np.cosh(x), rtol=1e-5)
    np.testing.assert_allclose(chain.log_cosh(jnp.asarray(-500.0 + 0j)), 500 - np.log(2), rtol=1e-6)


def test_samples_follow_the_squared_amplitudes(chain):
    spins = configurations(3)
    model = chain.RBM(hidden=3)
    params = jax.tree.map(lambda leaf: 10 * leaf, model.init(jax.random.key(1), spins))

    def log_amplitude(spins):
        return model.apply(params, spins)

    wanted = np.exp(2 * np.asarray(log_amplitude(spins)).real)
    start = jnp.ones((20_000, 3))
    found = jax.jit(lambda key: chain.sample(log_amplitude, start, key, 30))(jax.random.key(2))
    numbers = np.asarray(found < 0) @ np.array([4, 2, 1])
    shares = np.bincount(numbers, minlength=8) / len(numbers)
    np.testing.assert_allclose(shares, wanted / wanted.sum(), atol=0.015)


def test_every_optimizer_finds_the_energy(chain, capsys):
    chain.main(["--spins", "8", "--samples", "128", "--steps", "60"])
    output = capsys.readouterr().out
    for name in ("minSR", "SPRING", "Adam"):
        energy, error = map(float, re.search(rf"^{name} +(\S+) +(\S+)", output, re.M).groups())
        np.testing.assert_allclose(energy, chain.exact_energy(8), rtol=1e-2)
        assert 0 < error < 0.05
    assert output.splitlines()[-1] == "exact    -10.25166"


def test_an_odd_ring_is_refused(chain, capsys):
    with pytest.raises(SystemExit):
        chain.main(["--spins", "7"])
    assert "7 is odd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--driver", "dense"], ["--driver", "on-the-fly", "--momentum", "0.8"]]
)
def test_updates_equal_those_of_netket(comparison, options):
    pytest.importorskip("netket")
    sizes = ["--spins", "6", "--alpha", "1", "--samples", "32", "--steps", "5"]
    with jax.enable_x64(True):
        found = comparison.compare(comparison.make_parser().parse_args([*sizes, *options]))
    assert len(found.differences) == 5
    assert found.differences[0] < 1e-10
    assert max(found.differences) < 1e-6
    np.testing.assert_allclose(found.curvax, found.netket, rtol=1e-8)


def test_without_netket_one_sentence_says_what_is_missing(comparison, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "nk", None)
    with pytest.raises(SystemExit) as error:
        comparison.main([])
    assert error.value.code == 2
    assert capsys.readouterr().err == "This example needs NetKet: pip install netket\n"
