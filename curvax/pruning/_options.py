"""The options of pruning, checked once, before any work is done."""

import dataclasses
from pathlib import Path
from typing import Literal, TypedDict, get_args

import jax

from curvax._checks import check_choice, check_count, check_range
from curvax._layouts import Layout, check_layout
from curvax._trees import Select
from curvax.pruning._structures import NM, OutputUnits, Structure, check_structure
from curvax.pruning._targets import Distribution, Sparsity, check_sparsity
from curvax.pruning._weights import is_kernel

Method = Literal["obs", "greedy", "fisher", "saliency", "magnitude", "random"]
Update = Literal["joint", "independent", "none"]
Storage = Literal["device", "host"]

NEED_GRADS = ("obs", "greedy", "fisher", "saliency")


class PruneOptions(TypedDict, total=False):
    """What `prune_one_shot` takes beside its own arguments: the options of `prune`."""

    method: Method
    update: Update | None
    select: Select
    distribution: Distribution
    min_density: float
    normalize_scores: bool
    structure: Structure | None
    layout: Layout
    damping: float
    relative_damping: bool
    block_size: int | None
    mesh: jax.sharding.Mesh | None
    key: jax.Array | int | None


class OneShotOptions(PruneOptions, total=False):
    """What `prune_gradually` passes on to `prune_one_shot`."""

    update: Update | None  # once more: pyright takes an inherited one for the method of dict
    recomputations: int
    num_grads: int | None
    per_example: bool
    micro_batch_size: int | None
    has_aux: bool
    storage: Storage | Path
    progress: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `prune`, which documents them; the defaults are there."""

    method: Method = "obs"
    update: Update | None = None
    select: Select = is_kernel
    distribution: Distribution = "global"
    min_density: float = 0.0
    normalize_scores: bool = False
    structure: Structure | None = None
    layout: Layout = "auto"
    damping: float = 0.1
    relative_damping: bool = True
    block_size: int | None = 128
    mesh: jax.sharding.Mesh | None = None
    key: jax.Array | int | None = None

    def __post_init__(self) -> None:
        """Raises unless each option is valid by itself, and with the others."""
        check_choice("method", self.method, get_args(Method))
        if self.update is not None:
            check_choice("update", self.update, get_args(Update))
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_range("min_density", self.min_density, low=0.0, high=1.0, open_high=True)
        check_structure(self.structure, self.distribution)
        check_layout(self.layout)
        check_range("damping", self.damping, low=0.0, open_low=True, open_high=True)
        if self.block_size is not None:
            check_count("block_size", self.block_size)
        if (
            isinstance(self.structure, NM)
            and self.min_density > self.structure.n / self.structure.m
        ):
            raise ValueError(
                f"min_density={self.min_density} is more than {self.structure} keeps: lower it."
            )
        if self.min_density and isinstance(self.structure, OutputUnits) and self.structure.coupled:
            raise ValueError(
                "min_density keeps a fraction of each leaf, but coupled units span several leaves: "
                "use one or the other."
            )
        if self.method == "greedy" and (self.block_size is None or self.structure is not None):
            raise ValueError(
                "method='greedy' removes single weights within blocks: it needs a block_size and "
                f"no structure, got block_size={self.block_size} and "
                f"structure={self.structure!r}."
            )

    @property
    def update_of_kept(self) -> Update:
        """How the kept weights change."""
        return self.update or ("joint" if self.method in ("obs", "greedy") else "none")

    @property
    def needs_grads(self) -> bool:
        """Whether gradients are asked for."""
        return self.method in NEED_GRADS or self.update_of_kept != "none"

    def target(self, sparsity: Sparsity | None) -> Sparsity:
        """The checked sparsity; for None, the most that N:M allows."""
        if sparsity is None:
            if not isinstance(self.structure, NM):
                raise ValueError(
                    "sparsity=None needs structure=NM(n, m), whose sparsity is 1 - n/m."
                )
            return 1 - self.structure.n / self.structure.m
        check_sparsity(sparsity)
        return sparsity
