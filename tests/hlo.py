"""The instructions of a compiled program, read from its HLO, and how often each runs."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<opcode>[a-z][a-z\d\-]*)\("
)
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_LIMIT = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(?:[a-z]\w*)?\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"^(all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|reduce-scatter)(-start)?$"
)


class Instruction(NamedTuple):
    """An instruction where it is called from.

    Attributes:
      name: its name in the program.
      opcode: what it does.
      result: the type of what it returns.
      text: its whole line.
      runs: how often one execution runs it; a loop of unknown length counts as one turn.
      always: whether it runs in each execution: no branch and no such loop decides.
    """

    name: str
    opcode: str
    result: str
    text: str
    runs: int
    always: bool


class Collective(NamedTuple):
    """A communication between devices, with the bytes that one device has after it."""

    kind: str
    num_bytes: int
    runs: int
    largest: int  # array that it carries, in entries
    devices: str  # the groups that communicate


def instructions(program: str) -> list[Instruction]:
    """All instructions that the program's entry reaches; a computation may be called twice."""
    computations: dict[str, list[re.Match[str]]] = defaultdict(list)
    name = entry = ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            name = header["name"]
            entry = name if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            computations[name].append(found)

    def walk(name: str, runs: int, always: bool) -> Iterator[Instruction]:
        for found in computations[name]:
            text, opcode = found.string, found["opcode"]
            yield Instruction(found["name"], opcode, found["result"], text, runs, always)
            turns = turns_of_loop(text) if opcode == "while" else 1
            sure = always and opcode != "conditional" and turns is not None
            for called in _called(text):
                yield from walk(called, runs * (turns or 1), sure)

    def turns_of_loop(text: str) -> int | None:
        """How often a loop turns: known if it counts to a constant and nothing else ends it."""
        if trips := _TRIPS.search(text):
            return int(trips[1])
        condition = computations[re.search(r"condition=%?([\w.\-]+)", text)[1]]
        limits = [_LIMIT.search(found.string) for found in condition]
        bounds = [int(limit[1]) for limit in limits if limit]
        counts = condition[-1]["opcode"] == "compare" and "direction=LT" in condition[-1].string
        return bounds[0] if counts and len(bounds) == 1 else None

    return list(walk(entry, 1, True))


def _called(text: str) -> Iterator[str]:
    for names in _CALLED.findall(text):
        yield from (name.strip(" %") for name in names.strip("{}").split(","))


def cycles(found: list[Instruction]) -> int:
    """The compiler's own estimate of the cycles that these instructions take."""
    estimates = ((one, _CYCLES.search(one.text)) for one in found)
    return sum(int(estimate[1]) * one.runs for one, estimate in estimates if estimate)


def collectives(program: str) -> list[Collective]:
    """Each communication of the program once, although several fused steps may carry it out."""
    found: dict[tuple[str, str], Collective] = {}
    for one in instructions(program):
        call = _COLLECTIVE.match(one.opcode)
        if not call:
            continue
        kind = call[1]
        channel = re.search(r"channel_id=(\d+)", one.text)
        own = channel is None or kind == "collective-permute"  # these may share a channel
        key = kind, one.name if own else channel[1]
        arrays = _sizes(one.result)
        if kind == "collective-permute" and call[2]:
            arrays = arrays[1:2]  # of operand, result and two counters
        elif call[2] and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # of operands and results
        groups = re.search(r"replica_groups=(.*?), \w+=", one.text)
        new = Collective(
            kind,
            sum(size * width for size, width in arrays),
            one.runs,
            max((size for size, _ in arrays), default=0),
            groups[1] if groups else "",
        )
        found[key] = max(found.get(key, new), new, key=lambda c: c.num_bytes * c.runs)
    return list(found.values())


def _sizes(result: str) -> list[tuple[int, int]]:
    """The entries of each array of a type, and the bytes of an entry."""
    return [
        (math.prod(int(n) for n in shape.split(",") if n), _width(dtype))
        for dtype, shape in _ARRAY.findall(result)
    ]


def _width(dtype: str) -> int:
    """The bytes of an entry of ``pred``, ``bf16``, ``s8`` and so on."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
