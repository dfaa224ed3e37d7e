"""Which leaves are pruned, and how many of their weights at a step: schedules and distributions."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_pattern, check_range, is_traced
from curvax._layouts import Layout, kernel_layout
from curvax._trees import PyTree, Select, named_leaves, shape_of
from curvax.pruning._erk import erk_densities, erk_ratio
from curvax.pruning._smallest import Pools, share
from curvax.pruning._structures import NM, check_structure, why_unfit
from curvax.pruning._targets import Distribution
from curvax.pruning._weights import Leaf

Method = Literal["magnitude", "saliency", "fisher", "hessian", "random"]
Sparsity = float | jax.Array | Callable[[Any], Any]  # a number, or a schedule of the count
LATE = 2**30  # a count at which schedules have ended


class Group(NamedTuple):
    """Leaves with a common sparsity, and how it is distributed among their pools.

    Attributes:
      sparsity: a number or a schedule.
      totals: the weights of each pool.
      ratios: for "erk" the densities of the pools, up to a common factor.
    """

    sparsity: Sparsity
    totals: tuple[int, ...]
    ratios: tuple[float, ...] | None

    def sparsities(self, count: jax.Array) -> jax.Array:
        """The sparsity of each pool."""
        sparsity = jnp.clip(value_at(self.sparsity, count), 0, 1)
        if self.ratios is None:
            return jnp.broadcast_to(sparsity, len(self.totals))
        densities = erk_densities(self.ratios, self.totals, 1 - sparsity)
        return jnp.where(sparsity > 0, 1 - densities, 0)


class Targets(NamedTuple):
    """The pools of all leaves that are pruned."""

    pools: Pools
    groups: tuple[Group, ...]

    def numbers(self, count: jax.Array) -> jax.Array:
        """How many weights of each pool are pruned at a step."""
        sparsities = [group.sparsities(count) for group in self.groups]
        return share(jnp.concatenate(sparsities), np.array(self.pools.totals))


def value_at(value: Sparsity, count: Any) -> jax.Array:
    """A number, or a schedule's value, in float32."""
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def check_share(name: str, value: Sparsity, most: float = 1.0, advice: str = "") -> None:
    """Raises, with advice, unless a number or a schedule's ends are between 0 and ``most``."""
    if not callable(value):
        check_range(name, value, low=0, high=1)
    with jax.ensure_compile_time_eval():
        for count in (0, LATE):
            reached = value_at(value, jnp.int32(count))
            if is_traced(reached):
                continue
            if not 0 <= reached <= 1:
                raise ValueError(
                    f"{name} must be in [0, 1] at each count, got {reached} at {count}: use a "
                    "schedule that stays in that range, such as optax.polynomial_schedule."
                )
            if reached > most + 1e-6 or (reached == 1 and advice):
                raise ValueError(f"{name} must not reach {reached}: {advice}")


def check_sparsity(
    sparsity: Sparsity | Mapping[str, Sparsity], structure: NM | None, min_density: float | None
) -> None:
    """Raises unless all numbers and schedules give shares that can be, and patterns are valid."""
    most, advice = 1.0, "nothing would be left; lower it."
    known = 0.0 if min_density is None or is_traced(min_density) else float(min_density)
    if known:
        most, advice = 1 - known, f"min_density={min_density} keeps more; lower one of them."
    if structure is not None:
        if known > structure.n / structure.m:
            raise ValueError(f"min_density={min_density} is more than {structure} keeps: lower it.")
        most = 1 - structure.n / structure.m
        advice = f"{structure} allows a sparsity of at most {most:.6g}."
    values = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    for pattern, value in values.items():
        check_pattern("sparsity", pattern)
        check_share(f"sparsity of {pattern!r}" if pattern else "sparsity", value, most, advice)


def check_nm(structure: NM | None, distribution: Distribution, regrow: Sparsity | None) -> None:
    """Raises unless the structure is valid and compatible with the other arguments."""
    if structure is None:
        return
    if not isinstance(structure, NM):
        raise ValueError(f"structure must be None or NM(n, m), got {structure!r}.")
    check_structure(structure, distribution)
    if regrow is not None:
        raise ValueError("regrow breaks the groups of NM(n, m): use one or the other.")


def pattern_of(name: str, sparsity: Sparsity | Mapping[str, Sparsity]) -> str | None:
    """The first pattern found in a leaf's name; the empty one if there are no patterns."""
    patterns = sparsity if isinstance(sparsity, Mapping) else [""]
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


def targets(
    leaves: Sequence[Leaf],
    sparsity: Sparsity | Mapping[str, Sparsity],
    distribution: Distribution,
) -> Targets:
    """The pools in which the weights of ``leaves`` are compared, and their sparsities."""
    patterns = [pattern_of(leaf.path, sparsity) for leaf in leaves]
    groups, pools, totals = [], [0] * len(leaves), list[int]()
    for pattern in dict.fromkeys(patterns):
        members = [index for index, found in enumerate(patterns) if found == pattern]
        sizes = tuple(leaves[index].size for index in members)
        for place, index in enumerate(members):
            pools[index] = len(totals) + (0 if distribution == "global" else place)
        value = sparsity[str(pattern)] if isinstance(sparsity, Mapping) else sparsity
        ratios = None
        if distribution == "global":
            sizes = (sum(sizes),)
        elif distribution == "erk":
            ratios = tuple(
                erk_ratio(leaves[index].layout, leaves[index].shape) for index in members
            )
        groups.append(Group(value, sizes, ratios))
        totals += sizes
    _check_totals(totals)
    return Targets(Pools(tuple(pools), tuple(totals)), tuple(groups))


def _check_totals(totals: Sequence[int]) -> None:
    if max(totals, default=0) >= 2**31:
        raise ValueError(
            f"at most 2^31 weights can be compared with each other, got {max(totals)}: use "
            "distribution='uniform', or patterns that give parts of the params their own sparsity."
        )


class Rule(NamedTuple):
    """How weights are chosen: the arguments of `prune_on_schedule`."""

    sparsity: Sparsity | Mapping[str, Sparsity]
    method: Method
    select: Select
    distribution: Distribution
    min_density: float | None
    structure: NM | None
    layout: Layout
    regrow: Sparsity | None

    def selects(self, name: str, leaf: Any) -> bool:
        """Whether a leaf is pruned."""
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return pattern_of(name, self.sparsity) is not None and self.select(name, leaf)


def chosen_names(rule: Rule, params: PyTree) -> set[str]:
    """The names of the leaves to prune; raises if none is chosen, or one cannot be pruned.

    Scalars and empty leaves may be chosen, but are not pruned; nor are, with a warning, leaves that
    cannot hold the structure.
    """
    entries = named_leaves(params)
    chosen = [(name, leaf) for name, leaf in entries if rule.selects(name, leaf)]
    paths = ", ".join(name for name, _ in entries)
    if entries and not chosen:
        raise ValueError(f"select chooses no leaf of params; their paths are: {paths}.")
    if isinstance(rule.sparsity, Mapping) and entries:
        used = {pattern_of(name, rule.sparsity) for name, _ in chosen}
        for pattern in rule.sparsity:
            if pattern not in used:
                raise ValueError(
                    f"sparsity's pattern {pattern!r} sets the target of no leaf: it matches none "
                    "that is selected, or earlier patterns match those first. Correct or remove "
                    f"it; the paths are: {paths}."
                )
    for name, leaf in chosen:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"only real weights can be pruned, got {dtype} at {name}.")
    leaves = [_leaf(rule, 0, name, shape_of(leaf)) for name, leaf in chosen]
    return _fitting(rule, [leaf for leaf in leaves if leaf.shape and leaf.size])


def _fitting(rule: Rule, leaves: list[Leaf]) -> set[str]:
    """The paths of the leaves that can hold the structure, with a warning of the others."""
    unfit = {leaf.path: reason for leaf in leaves if (reason := why_unfit(leaf, rule.structure))}
    listed = "; ".join(f"{path}: {reason}" for path, reason in unfit.items())
    if unfit and len(unfit) == len(leaves):
        raise ValueError(f"no selected leaf fits {rule.structure}: {listed}.")
    if unfit:
        warnings.warn(
            f"selected leaves do not fit {rule.structure} and are not pruned: {listed}. Exclude "
            "them with select.",
            stacklevel=5,
        )
    return {leaf.path for leaf in leaves} - unfit.keys()


def _leaf(rule: Rule, number: int, path: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf(number, path, shape, kernel_layout(path, shape, rule.layout), ())


class Plan(NamedTuple):
    """What is pruned, known when the step is traced.

    Attributes:
      positions: those of the pruned leaves among all leaves.
      leaves: their paths, shapes and layouts.
      axes: for N:M the axis of each along which groups lie.
      targets: how many of their weights are pruned.
    """

    positions: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    axes: tuple[int, ...] | None
    targets: Targets

    def of(self, tree: PyTree) -> list[Any]:
        """The leaves of ``tree`` that are pruned."""
        leaves = jax.tree.leaves(tree)
        return [leaves[position] for position in self.positions]


def make_plan(rule: Rule, params: PyTree, mask: PyTree) -> Plan:
    """The plan for leaves whose mask has their shape; other masks are scalars."""
    masks = jax.tree.leaves(mask)
    entries = [(name, shape_of(leaf)) for name, leaf in named_leaves(params)]
    positions = [
        index
        for index, ((_, shape), kept) in enumerate(zip(entries, masks, strict=True))
        if shape and shape_of(kept) == shape
    ]
    leaves = [_leaf(rule, position, *entries[position]) for position in positions]
    axes = None
    if rule.structure is not None:
        axes = tuple(_group_axis(leaf, rule.structure) for leaf in leaves)
    found = targets(leaves, rule.sparsity, rule.distribution)
    return Plan(tuple(positions), tuple(leaves), axes, found)


def _group_axis(leaf: Leaf, structure: NM) -> int:
    """The axis along which groups lie, of a leaf that can hold them."""
    if structure.axis is not None:
        return structure.axis % len(leaf.shape)
    assert leaf.layout is not None
    return leaf.layout.fan_in[-1]
