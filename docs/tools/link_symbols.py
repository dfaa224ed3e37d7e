"""Links each `curvax.name` in the pages and docstrings to that name's API entry."""

import re
from re import Match
from typing import Any

from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

# Inside a link, or where a docstring's own pass has been, a name stays as it is.
_SYMBOL = re.compile(
    r"(<(?:a|autoref)\b[^>]*>)?<code>(curvax(?:\.\w+)+)</code>"
)


def _link(match: Match[str]) -> str:
    before, name = match.groups()
    if before:
        return match[0]
    return (
        f'<autoref optional identifier="{name}"><code>{name}</code></autoref>'
    )


class _LinkSymbols(Postprocessor):
    def run(self, text: str) -> str:
        """Wraps a name in the element that is resolved when all pages are known."""
        return _SYMBOL.sub(_link, text)


class _LinkSymbolsExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Comes after `raw_html`, which puts the code back into the text."""
        md.postprocessors.register(_LinkSymbols(md), "link_symbols", 5)


def makeExtension(**kwargs: Any) -> _LinkSymbolsExtension:  # noqa: N802
    """What Python-Markdown calls."""
    return _LinkSymbolsExtension(**kwargs)
