"""Links each `curvax.name` in the pages and docstrings to that name's API entry."""

import re
from typing import Any

# In running text only: a heading would link to itself.
_SYMBOL = re.compile(r"(?<!<a)<code>(curvax(?:\.\w+)+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Wraps a symbol's code in the element that mkdocs-autorefs resolves after all pages."""
    return _SYMBOL.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
