"""Optional dependencies: a missing one says which command installs it."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextlib.contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Wraps the imports of packages that ``curvax[extra]`` installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(
            f'{package} is not installed; it comes with: python -m pip install "curvax[{extra}]"',
            name=error.name,
        ) from error


def new_axes(width: float = 6.0, height: float = 3.6) -> "Axes":
    """Axes of a new figure, whose size is in inches; it belongs to no window."""
    with from_extra("plot"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()
