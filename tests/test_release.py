"""What is written in several places of the repository says the same."""

import re
import tomllib
from pathlib import Path

import curvax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pythons(text, pattern):
    return set(re.findall(pattern + r"(3\.\d+)", text))


def test_the_citation_is_of_this_version():
    (version,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == curvax.__version__


def test_the_changelog_has_a_place_for_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {"Unreleased", curvax.__version__} & set(headings[:2])


def test_each_supported_python_is_tested():
    classified = pythons("\n".join(PROJECT["classifiers"]), "Python :: ")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert pythons(workflow, '"') == classified
    assert f">={min(classified)}" == PROJECT["requires-python"]


def test_the_page_on_support_names_the_bounds():
    page = (ROOT / "docs" / "support.md").read_text()
    bounds = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["flax"]]
    for name, bound in (requirement.split(">=") for requirement in bounds):
        assert re.search(rf"^\| .*\b{name}\b.*\b{bound}", page, re.MULTILINE | re.IGNORECASE)
