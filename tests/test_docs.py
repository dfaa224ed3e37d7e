"""The site: its pages, and how its versions are published."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(set(DOCS.rglob("*.md")) - set((DOCS / "notebooks").glob("*.md")))
# Written when the site is built.
NOTEBOOKS = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]


def code_lines(page):
    """The lines of a page's fenced code, with their numbers."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            yield number, line


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_code_fits_a_page_of_80_columns(page):
    assert [number for number, line in code_lines(page) if len(line) > 80] == []


def test_examples_of_docstrings_fit_too():
    lines = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "curvax").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r" *(>>>|\.\.\.) ", line) and len(line.strip()) > 80
    ]
    assert lines == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_files_of_the_site(page):
    """Images too, which the build does not check."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https://|#)([^)#\s]+)", text)
    targets = [(page.parent / link).resolve() for link in links]
    assert [path for path in targets if not (path.is_file() and DOCS in path.parents)] == []


def test_each_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    navigation = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", config, flags=re.MULTILINE)
    pages = [str(page.relative_to(DOCS)) for page in PAGES]
    assert sorted(navigation) == sorted([*pages, *NOTEBOOKS])


@pytest.fixture
def publish():
    spec = importlib.util.spec_from_file_location("publish", DOCS / "tools" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.publish


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    for page in ("index.html", "404.html", "api/mfac/index.html", "sitemap.xml"):
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(page)
    return folder


def aliases(pages):
    entries = json.loads((pages / "versions.json").read_text())
    return {entry["version"]: entry["aliases"] for entry in entries}


def test_the_newest_release_is_the_stable_one(publish, site, tmp_path):
    pages = tmp_path / "pages"
    for version in ("dev", "0.9.0", "0.10.0", "0.9.1"):
        (site / "index.html").write_text(version)
        publish(site, pages, version)
    assert aliases(pages) == {"dev": [], "0.10.0": ["stable"], "0.9.1": [], "0.9.0": []}
    assert list(aliases(pages)) == ["dev", "0.10.0", "0.9.1", "0.9.0"]
    assert (pages / "stable" / "index.html").read_text() == "0.10.0"


def test_a_pre_release_is_not_the_stable_one(publish, site, tmp_path):
    pages = tmp_path / "pages"
    for version in ("0.9.0", "0.10.0rc1"):
        publish(site, pages, version)
    assert aliases(pages) == {"0.10.0rc1": [], "0.9.0": ["stable"]}


def test_an_address_without_a_version_leads_to_the_newest_release(publish, site, tmp_path):
    pages = tmp_path / "pages"
    publish(site, pages, "dev")
    assert 'url=dev/"' in (pages / "index.html").read_text()
    publish(site, pages, "0.1.0")
    assert 'url=stable/"' in (pages / "index.html").read_text()
    assert 'url=../../stable/api/mfac/"' in (pages / "api" / "mfac" / "index.html").read_text()


def test_a_version_is_replaced(publish, site, tmp_path):
    pages = tmp_path / "pages"
    publish(site, pages, "dev")
    (site / "api" / "mfac" / "index.html").unlink()
    publish(site, pages, "dev")
    assert not (pages / "dev" / "api" / "mfac" / "index.html").exists()
