"""What the notebooks hold, without running them, and the script of the fifth."""

import builtins
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.links import ROOT, check

SCRIPT = ROOT / "examples" / "many_devices.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))  # none in a source distribution
COLAB = "https://colab.research.google.com/github/curvax/curvax/blob/main/notebooks/"
MAX_BYTES = 250_000


def source(cell):
    return "".join(cell["source"])


def is_install(cell):
    return "%pip" in source(cell)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return json.loads(path.read_text())


@pytest.fixture
def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def text(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join(map(source, cells))


def test_the_format_is_valid(notebook):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(notebook))


def test_nothing_of_a_run_is_in_the_metadata(notebook):
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == [f"cell-{number:02}" for number in range(len(ids))]


def test_it_is_small(path):
    assert path.stat().st_size < MAX_BYTES


def test_every_cell_ran_in_order(code):
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def test_what_is_shown_or_printed_is_there(code):
    for cell in code:
        kinds = {
            kind
            for output in cell["outputs"]
            for kind in output.get("data", {output.get("name"): 0})
        }
        if "plt.show()" in source(cell):
            assert "image/png" in kinds
        if re.search(r"^print\(", source(cell), flags=re.MULTILINE):
            assert "stdout" in kinds


def test_outputs_are_free_of_errors_warnings_and_paths(code):
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] in {"stream", "display_data"}
        assert output.get("name") != "stderr"
        shown = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not re.search(r"/(home|root|tmp|Users|usr|work)/|\x1b|Warning|it/s\]", shown)


def test_there_are_no_progress_bars(code):
    assert not any("tqdm" in source(cell) for cell in code)


def test_the_install_cell_is_the_second_and_the_same_in_all(notebook):
    cell = notebook["cells"][1]
    first = json.loads(NOTEBOOKS[0].read_text())["cells"][1]
    assert is_install(cell)
    assert source(cell) == source(first)
    assert cell["outputs"] == []


def test_the_badge_opens_this_notebook(path, text):
    assert re.findall(re.escape(COLAB) + r"[^)]*", text) == [COLAB + path.name]


def test_links_hold_on_colab(text):
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)
    for link in links:
        check(link)


def test_it_ends_with_exercises(text):
    exercises = text.split("## Exercises")[1]
    assert exercises.count("<details") == exercises.count("</details>") >= 2


@pytest.fixture
def installed_by(monkeypatch):
    """A function that runs the install cell in a folder, and returns what pip is given, or None."""
    cell = (
        json.loads(NOTEBOOKS[0].read_text())["cells"][1] if NOTEBOOKS else pytest.skip("none here")
    )
    run = re.sub(r'%pip install --quiet "(.*)"', r"""given.append(f"\1")""", source(cell))

    def install(folder, found):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(importlib.util, "find_spec", found)
        given = []
        exec(run, {"__builtins__": builtins, "given": given})
        return given[0] if given else None

    return install


def missing(_):
    return None


def test_the_install_cell_is_quiet_where_all_is_there(installed_by, tmp_path):
    assert installed_by(tmp_path, importlib.util.find_spec) is None


def test_the_install_cell_takes_an_index_without_a_clone(installed_by, tmp_path):
    assert installed_by(tmp_path, missing) == "curvax[examples]"


@pytest.mark.parametrize("place", ["clone/notebooks", "clone", "."])
def test_the_install_cell_takes_a_clone_around_or_below(installed_by, monkeypatch, tmp_path, place):
    clone = tmp_path / ("curvax" if place == "." else "clone")
    for folder in (clone / "curvax", clone / "notebooks"):
        folder.mkdir(parents=True)
    (clone / "curvax" / "__init__.py").touch()
    assert installed_by(tmp_path / place, missing) == f"{clone}[examples]"


def test_a_folder_named_curvax_is_no_installation(installed_by, tmp_path):
    def namespace(name):
        return importlib.util.spec_from_loader(name, loader=None)

    assert installed_by(tmp_path, namespace) == "curvax[examples]"


def losses(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return re.findall(r"loss (\S+)", result.stdout), result.stdout


def test_many_devices_give_the_losses_of_one():
    one, _ = losses("--devices", "1", "--steps", "6")
    eight, output = losses("--devices", "8", "--steps", "6")
    assert "8 devices, 1 processes, {'data': 4, 'model': 2}" in output
    assert [float(loss) for loss in eight] == pytest.approx([float(loss) for loss in one], rel=1e-5)
    assert float(one[-1]) < float(one[0]) / 2
