"""Progress bars of long work, drawn by tqdm where it is installed."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int | None, description: str, shown: bool) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` parts of the work."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda: None
        return
    with tqdm(total=total, desc=description) as bar:
        yield lambda: bar.update() and None
