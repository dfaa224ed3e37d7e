"""Every public name is documented, with an example where it is a function."""

import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest

import curvax
import curvax.curvature
import curvax.fisher
import curvax.influence
import curvax.optimizers
import curvax.pruning
import curvax.spectrum

ROOT = Path(__file__).parents[1]
PACKAGES = ("influence", "pruning", "spectrum")
TOP_LEVEL = [name for name in curvax.__all__ if name not in PACKAGES]
INNER = [
    *(f"fisher.{name}" for name in curvax.fisher.__all__ if name not in TOP_LEVEL),
    *(f"{package}.{name}" for package in PACKAGES for name in getattr(curvax, package).__all__),
]
PUBLIC = [*TOP_LEVEL, *INNER]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(attrgetter(name)(curvax))]


def docstring_of(name):
    return attrgetter(name)(curvax).__doc__


def test_the_top_level_hands_on_what_its_packages_offer():
    offered = [*curvax.curvature.__all__, *curvax.optimizers.__all__]
    assert sorted(curvax.__all__) == sorted([*offered, *PACKAGES, "KernelLayout", "inverse_fisher"])


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring_of_its_own(name):
    docstring = docstring_of(name)
    assert docstring
    assert "Alias for field" not in docstring


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_returns_and_shows_an_example(name):
    docstring = docstring_of(name)
    for section in ("Args:", "Returns:", "Example:", ">>>"):
        assert section in docstring


def test_each_name_is_on_one_api_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^(?:### )?::: curvax\.(\S+)$", pages, flags=re.MULTILINE)
    assert sorted(documented) == sorted(PUBLIC)
