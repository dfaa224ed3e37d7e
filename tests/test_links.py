"""The README shows on a package index: its links are absolute, and lead to what is here."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = "https://curvax.github.io/curvax/"
TREES = [
    "https://github.com/curvax/curvax/blob/main/",
    "https://github.com/curvax/curvax/tree/main/",
    "https://raw.githubusercontent.com/curvax/curvax/main/",
]
TEXT = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINKS = sorted({link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("#")})


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def target_of(link):
    """The file that a link to the project shows, or None for a link elsewhere."""
    address, _, anchor = link.partition("#")
    if address.startswith(SITE):
        name = address.removeprefix(SITE).strip("/") or "index"
        page = ROOT / "docs" / f"{name}.md"
        return (page if page.is_file() else ROOT / "docs" / name / "index.md"), anchor
    for tree in TREES:
        if address.startswith(tree):
            return ROOT / address.removeprefix(tree), anchor
    return None, anchor


def test_every_link_is_absolute():
    assert all(link.startswith("https://") for link in LINKS)


@pytest.mark.parametrize("link", [link for link in LINKS if target_of(link)[0]])
def test_a_link_to_the_project_leads_to_a_file_and_a_heading(link):
    path, anchor = target_of(link)
    assert path.exists()
    assert not anchor or anchor in anchors(path)


def test_links_within_the_page_lead_to_headings():
    own = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert own
    assert set(own) <= anchors(ROOT / "README.md")
