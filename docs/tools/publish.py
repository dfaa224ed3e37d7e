"""Builds the site of one version into a checkout of the branch that GitHub Pages shows.

    python docs/tools/publish.py PAGES VERSION

PAGES then holds a folder for each version, a copy of the newest release in `stable/`, the list
that the version selector reads, and at the root one redirect for each page, so that an address
without a version leads to the newest release, or to `dev` before the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
REDIRECT = """<!doctype html>
<meta charset="utf-8">
<title>curvax</title>
<link rel="canonical" href="{target}">
<meta http-equiv="refresh" content="0; url={target}">
<script>location.replace("{target}" + location.search + location.hash)</script>
"""


def build(version: str) -> Path:
    """The site of a version, with its selector, and links to the source of its tag."""
    environment = {
        "PYTHONPATH": "docs/tools",
        # Zensical takes the address that search engines should know from this.
        "MIKE_DOCS_VERSION": "dev" if version == "dev" else "stable",
        "DOCS_VERSIONS": "mike",
        "DOCS_REVISION": "main" if version == "dev" else f"v{version}",
    }
    notebooks = [sys.executable, "docs/tools/notebooks.py"]
    subprocess.run(notebooks, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    return ROOT / "site"


def place(site: Path, folder: Path) -> None:
    """A copy of a site, and nothing that was there before."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site, folder)


def order(version: str) -> Version:
    """The order of releases; `dev` is newer than all."""
    return Version("9999" if version == "dev" else version)


def list_versions(pages: Path) -> str:
    """Writes `versions.json` from the folders, and says which version is the newest release."""
    names = [path.parent.name for path in pages.glob("*/sitemap.xml")]
    versions = sorted({*names} - {"stable"}, key=order, reverse=True)
    releases = (
        version
        for version in versions
        if version != "dev" and not order(version).is_prerelease
    )
    newest = next(releases, "dev")
    entries = [
        {
            "version": version,
            "title": version,
            "aliases": ["stable"] * (version == newest != "dev"),
        }
        for version in versions
    ]
    (pages / "versions.json").write_text(json.dumps(entries, indent=2) + "\n")
    return newest


def redirect(pages: Path, shown: str) -> None:
    """A redirect from each page's address without a version."""
    for page in (pages / shown).rglob("index.html"):
        folder = page.parent.relative_to(pages / shown)
        up = "../" * len(folder.parts)
        target = "/".join([up + shown, *folder.parts, ""])
        (pages / folder).mkdir(parents=True, exist_ok=True)
        (pages / folder / "index.html").write_text(
            REDIRECT.format(target=target)
        )


def publish(site: Path, pages: Path, version: str) -> None:
    """Adds or replaces a version."""
    place(site, pages / version)
    newest = list_versions(pages)
    if newest == version != "dev":
        place(site, pages / "stable")
    shown = "dev" if newest == "dev" else "stable"
    redirect(pages, shown)
    shutil.copy(pages / shown / "404.html", pages)
    (pages / ".nojekyll").touch()  # files as they are


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path)
    parser.add_argument("version", help="a release, 0.1.0, or dev")
    arguments = parser.parse_args()
    publish(build(arguments.version), arguments.pages, arguments.version)
