"""The communication of a compiled computation, read from its HLO."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax

_CALL = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that a collective operation produces, at its size on one device."""

    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(compiled: jax.stages.Compiled) -> Counter[Collective]:
    """Each array that ``compiled`` communicates, with how often."""
    found: Counter[Collective] = Counter()
    for line in compiled.as_text().splitlines():
        if call := _CALL.search(line):
            for shape in _ARRAY.findall(call["result"]):
                axes = tuple(int(axis) for axis in shape.split(",") if axis)
                found[Collective(call["kind"], axes)] += 1
    return found


def moved(found: Counter[Collective]) -> Counter[Collective]:
    """Those that move arrays between devices; the others sum them."""
    return Counter({one: n for one, n in found.items() if one.kind != "all-reduce"})


def largest_sum(found: Counter[Collective]) -> int:
    """The size of the largest array that is summed over devices."""
    return max((one.size for one in found if one.kind == "all-reduce"), default=0)
