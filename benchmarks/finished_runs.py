"""Finished runs, kept by what they depend on, so that an interrupted benchmark can resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FinishedRuns:
    """Finished runs in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = {entry["key"]: entry["run"] for entry in map(json.loads, lines)}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.runs:
            self.runs[key] = make()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "run": self.runs[key]}) + "\n")
        return self.runs[key]
