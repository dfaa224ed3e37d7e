"""Finished runs as JSON lines, which add up over days and machines."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "results" / "training"
VERSION = 1  # of the runs' meaning: a change of task or protocol raises it


class Key(NamedTuple):
    """What a run depends on; another machine's run with the same key is the same run."""

    task: str
    size: str
    optimizer: str
    settings: str
    rate: float
    seed: int
    is_trial: bool

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Key":
        return cls(*(line[field] for field in cls._fields))


class Records:
    """The runs of all files in a folder; new ones are appended to this machine's file."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.path = folder / f"{machine}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.lines: dict[Key, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in _read(path):
                self.lines.setdefault(Key.of(line), line)

    def get(self, key: Key) -> dict[str, Any] | None:
        return self.lines.get(key)

    def add(self, key: Key, run: dict[str, Any]) -> dict[str, Any]:
        line = {"version": VERSION, **key._asdict(), **run}
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(line) + "\n")
        self.lines[key] = line
        return line


def _read(path: Path) -> Iterator[dict[str, Any]]:
    others = unreadable = 0
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a run that was stopped while it wrote
            unreadable += 1
            continue
        if line.get("version") == VERSION:
            yield line
        else:
            others += 1
    if others or unreadable:
        warnings.warn(
            f"{path}: {others} runs of other versions than {VERSION} and {unreadable} incomplete "
            "lines are left out; they stay in the file.",
            stacklevel=3,
        )
