"""The benchmark of accelerators: what fails or is missing is reported, and the rest goes on."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

CASES = """
import jax.numpy as jnp
import timing

def all_cases(args):
    measure = timing.Measure(0.001, blocks=2)
    return {
        "too large": lambda: {"ones": {"bytes": int(jnp.ones(2**46).nbytes)}},
        "a row too large": lambda: measure.together({"large": large, "small": small}, cycle=1),
        "one by one": lambda: {
            "large": measure.alone(lambda: large, cycle=1),
            "small": measure.alone(lambda: small, cycle=1),
        },
        "good": lambda: measure.together({"small": small}, cycle=1),
    }

def large(steps):
    jnp.ones(2**46).block_until_ready()

def small(steps):
    jnp.ones(2).block_until_ready()
"""


@pytest.fixture
def benchmark_module(monkeypatch, tmp_path):
    """Imports a module of the benchmarks, which are scripts, or of the test's own folder."""
    before = set(sys.modules)
    for folder in (BENCHMARKS, tmp_path):
        monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(
            (str(BENCHMARKS), str(tmp_path))
        ):
            del sys.modules[name]


@pytest.fixture
def run(benchmark_module, monkeypatch, tmp_path):
    """Runs the benchmark with the cases of a module; gives its results and its exit status."""

    def run(cases, text):
        (tmp_path / f"{cases}.py").write_text(text)
        accelerator = benchmark_module("accelerator")
        options = ["--tiny", "--cases", cases, "--output", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["accelerator.py", *options])
        status = None
        try:
            accelerator.main()
        except SystemExit as exit_:
            status = exit_.code
        (results,) = (tmp_path / "results").glob("*.json")
        return json.loads(results.read_text())["cases"], status

    return run


def test_what_is_out_of_memory_is_reported_and_the_others_go_on(run, capsys):
    cases, status = run("large_cases", CASES)
    assert "RESOURCE_EXHAUSTED" in cases["too large"]["error"]
    for name in ("a row too large", "one by one"):
        assert "RESOURCE_EXHAUSTED" in cases[name]["large"]["error"]
        assert cases[name]["small"]["median_s"] > 0
    assert cases["good"]["small"]["median_s"] > 0
    assert status == "Not all could be measured: too large; a row too large; one by one."
    assert "Error: RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_the_next_run_tries_what_failed_and_keeps_the_rest(run):
    first = "def all_cases(args): return {'a': lambda: {}, 'b': lambda: 1 / 0}"
    assert run("first", first)[0] == {
        "a": {},
        "b": {"error": "ZeroDivisionError: division by zero"},
    }
    second = first.replace("lambda: {}", "lambda: 1 / 0").replace("'b': lambda: 1 / 0", "'b': dict")
    assert run("second", second) == ({"a": {}, "b": {}}, None)


def test_rows_of_other_numbers_than_times_are_in_the_table(run, capsys):
    row = "{'test_accuracy': 0.91234, 'seeds': 5}"
    run("accuracies", f"def all_cases(args): return {{'digits': lambda: {{'Adam': {row}}}}}")
    assert "| Adam | test accuracy 0.912, seeds 5 |" in capsys.readouterr().out


def test_a_missing_dependency_of_cases_is_a_sentence(run):
    cases, status = run("needy", "import a_library_that_nobody_has")
    assert cases["needy"]["error"].endswith("No module named 'a_library_that_nobody_has'")
    assert status == "Not all could be measured: needy."


class TestPyTorch:
    @pytest.fixture
    def rows(self, benchmark_module, monkeypatch, tmp_path):
        """The rows of a small model, where ``torch.py`` of the test's folder is PyTorch."""
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a busy machine are slow
        measure = benchmark_module("timing").Measure(0.001, blocks=2)
        return lambda: benchmark_module("accelerator_torch").rows("resnet20", 2, measure)

    def test_without_it_there_is_a_row_that_says_so(self, rows, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
        assert rows() == {"PyTorch": {"skipped": "PyTorch cannot be imported: no torch here"}}

    def test_a_process_that_dies_is_a_row(self, rows, tmp_path):
        (tmp_path / "torch.py").write_text("import sys; sys.exit('it died')")
        assert rows() == {"PyTorch": {"error": "exit status 1: it died"}}

    def test_a_package_that_is_missing_leaves_the_others(self, rows, tmp_path):
        pytest.importorskip("torch")
        for package in ("torch_optimizer", "pytorch_optimizer"):
            (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
        found = rows()
        assert found["torch.optim.Adam"]["ratio"] == 1
        assert found["torch-optimizer Adahessian"] == {"skipped": "not installed"}
        assert found["pytorch-optimizer AdaHessian"] == {"skipped": "not installed"}
