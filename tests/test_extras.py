"""What is missing names the command that installs it, and the package works without it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from curvax import pruning, spectrum

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPERATOR = spectrum.Operator(lambda vector: 2 * vector, jnp.ones(3))


def density_plot():
    spectrum.plot_density(spectrum.spectral_density(OPERATOR, key=jax.random.key(0)))


def pruning_plot():
    pruning.prune(jnp.ones((4, 4)).at[0].set(0.1), None, 0.25, method="magnitude").plot()


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("matplotlib.figure", "plot", density_plot),
        ("matplotlib.figure", "plot", pruning_plot),
        ("scipy.sparse.linalg", "spectrum", OPERATOR.to_scipy),
        ("lineax", "spectrum", OPERATOR.to_lineax),
    ],
)
def test_a_missing_package_names_the_extra_that_has_it(monkeypatch, module, extra, use):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ModuleNotFoundError, match=rf'{package} is not .* "curvax\[{extra}\]"'):
        use()
    assert any(requirement.startswith(package) for requirement in EXTRAS[extra])


def test_all_has_what_every_extra_for_users_has():
    (everything,) = EXTRAS["all"]
    names = everything.removeprefix("curvax[").removesuffix("]").split(",")
    assert set(names) == {"examples", "flax", "plot", "spectrum"}


def test_the_package_imports_only_itself_beside_jax_optax_and_numpy():
    program = (
        "import sys, jax, optax, numpy\n"
        "before = set(sys.modules)\n"
        "import curvax, curvax.influence, curvax.pruning, curvax.spectrum\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] != 'curvax'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []
