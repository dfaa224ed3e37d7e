"""The options of pruning a layer."""

from typing import Literal, NamedTuple, get_args

from curvax._checks import check_choice, check_count, check_range
from curvax.pruning._structures import NM, check_structure

LayerMethod = Literal["obs", "greedy", "wanda", "magnitude"]
LayerUpdate = Literal["sweep", "joint", "none"]
LayerDistribution = Literal["uniform", "erk"]
Order = Literal["natural", "diagonal"]


class LayerOptions(NamedTuple):
    """The checked options of pruning a layer."""

    method: LayerMethod = "obs"
    update: LayerUpdate | None = None
    structure: NM | None = None
    damping: float = 1e-2
    block_size: int = 128
    order: Order = "natural"

    def check(self) -> None:
        """Raises unless each option is valid by itself."""
        check_choice("method", self.method, get_args(LayerMethod))
        if self.update is not None:
            check_choice("update", self.update, get_args(LayerUpdate))
        check_choice("order", self.order, get_args(Order))
        check_range("damping", self.damping, low=0.0, open_high=True)
        check_count("block_size", self.block_size)
        check_structure(self.structure)
        if self.structure is not None and (
            not isinstance(self.structure, NM) or self.structure.axis is not None
        ):
            raise ValueError(
                "structure must be None or NM(n, m) along the fan-in for a layer, got "
                f"{self.structure!r}; for others use pruning.prune."
            )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The numbers of N:M."""
        return (self.structure.n, self.structure.m) if self.structure else None
