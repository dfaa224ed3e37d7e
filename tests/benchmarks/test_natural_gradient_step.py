"""The benchmark of a natural gradient step, at a size for a test."""

import json
import sys

import natural_gradient


def test_it_writes_times_memory_and_errors_of_curvax(monkeypatch, tmp_path):
    monkeypatch.setattr(natural_gradient, "nk", None)  # as where NetKet is not installed
    sizes = ["--examples", "12", "--parameters", "600", "--micro-batch-sizes", "4", "--blocks", "2"]
    monkeypatch.setattr(sys, "argv", ["natural_gradient.py", *sizes, "--output", str(tmp_path)])
    natural_gradient.main()
    (path,) = tmp_path.glob("*.json")
    (rows,) = json.loads(path.read_text())["cases"].values()
    text = json.dumps(rows)
    assert "curvax" in text
    assert "micro-batches of 4" in text
