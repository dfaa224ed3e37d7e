"""Progress bars for long work, drawn by tqdm where it is installed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(total: int | None, description: str, shown: bool) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` parts of the work."""
    tqdm = _tqdm() if shown else None
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc=description) as bar:
        yield lambda: bar.update() and None


def _tqdm() -> Any | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
