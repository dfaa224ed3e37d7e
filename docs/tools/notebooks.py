"""Writes the notebooks, with the outputs that are committed, as pages of the site.

python docs/tools/notebooks.py
"""

import re
import shutil
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "notebooks"
# A page fetches nothing from elsewhere: the badge becomes a plain link.
_BADGE = re.compile(r"\[!\[([^]]+)\]\([^)]+\)\]")


def main() -> None:
    """Replaces all pages, so that none outlives its notebook."""
    shutil.rmtree(PAGES, ignore_errors=True)
    exporter, writer = (
        MarkdownExporter(),
        FilesWriter(build_directory=str(PAGES)),
    )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        resources = {
            "unique_key": path.stem,
            "output_files_dir": f"{path.stem}_files",
        }
        text, resources = exporter.from_filename(path, resources=resources)
        page = _BADGE.sub(r"[\1]", text)
        writer.write(page, resources, notebook_name=path.stem)


if __name__ == "__main__":
    main()
