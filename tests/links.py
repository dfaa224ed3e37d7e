"""Absolute links to the project, and the files and headings that they lead to."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = "https://curvax.github.io/curvax/"
TREES = [
    "https://github.com/curvax/curvax/blob/main/",
    "https://github.com/curvax/curvax/tree/main/",
    "https://raw.githubusercontent.com/curvax/curvax/main/",
]


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def target_of(link):
    """The file that a link to the project shows, or None for a link elsewhere."""
    address = link.partition("#")[0]
    if address.startswith(SITE):
        name = address.removeprefix(SITE).strip("/") or "index"
        page = ROOT / "docs" / f"{name}.md"
        return page if page.is_file() else ROOT / "docs" / name / "index.md"
    for tree in TREES:
        if address.startswith(tree):
            return ROOT / address.removeprefix(tree)
    return None


def check(link):
    """Raises unless a link to the project leads to what is here; others are let through."""
    path, anchor = target_of(link), link.partition("#")[2]
    assert path is None or path.exists(), link
    assert path is None or not anchor or anchor in anchors(path), link
