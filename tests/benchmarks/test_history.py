"""The history of benchmark results: a tiny run, and the picture of several versions."""

import json
from xml.etree import ElementTree

import pytest

import curvax

history = pytest.importorskip("history", reason="no matplotlib beside the oldest dependencies")


@pytest.fixture
def record(tmp_path):
    history.main(["--tiny", "--output", str(tmp_path), "--picture", str(tmp_path / "first.svg")])
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    return json.loads(line)


def test_a_run_is_a_record_of_ratios_and_a_picture(record, tmp_path):
    assert record["version"] == curvax.__version__
    assert record["commit"]
    assert len(record["ratios"]) == 6
    for low, middle, high in record["ratios"].values():
        assert 0 < low <= middle <= high
    assert ElementTree.parse(tmp_path / "first.svg").getroot().tag.endswith("svg")

    name = next(iter(record["ratios"]))
    later = {**record, "version": "0.2.0", "name": "another", "ratios": {"new": [1, 2, 3]}}
    again = {**record, "version": "0.3.0", "ratios": {name: [1, 2, 3]}}
    for picture in (tmp_path / "one.svg", tmp_path / "other.svg"):
        history.draw([record, later, again], picture)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert ">0.3.0<" in (tmp_path / "one.svg").read_text()
