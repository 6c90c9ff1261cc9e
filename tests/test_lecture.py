"""docs/lecture.ipynb: its cells import what exists, its outputs are whole and small, and it runs."""

import ast
import importlib
import itertools
import json
import re
import sys

from conftest import ROOT

import pytest

FILE = ROOT / "docs/lecture.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
OUTPUTS = [output for cell in CELLS for output in cell["outputs"]]


def kinds(cell):
    """What a cell shows, in order; text may come in several pieces."""
    shown = [sorted(output.get("data", [output["output_type"]])) for output in cell["outputs"]]
    return [kind for kind, _ in itertools.groupby(shown)]


def test_the_notebook_was_run_from_top_to_bottom():
    assert NOTEBOOK["nbformat"] == 4
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert {output["output_type"] for output in OUTPUTS} == {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in OUTPUTS if "name" in output} == {"stdout"}  # no warnings
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) == 7


def test_the_notebook_is_small():
    assert FILE.stat().st_size < 400_000


def test_outputs_know_no_machine():
    machine = re.compile(r"/(home|root|tmp|var|work|Users)/|[A-Z]:\\|0x[0-9a-fA-F]{6}|Warning")
    for output in OUTPUTS:
        text = "".join([*output.get("text", []), *output.get("data", {}).get("text/plain", [])])
        assert not machine.search(text), text


@pytest.mark.parametrize("source", SOURCES, ids=range(1, len(SOURCES) + 1))
def test_cells_import_names_that_exist(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_our_imports_come_before_torchs():
    """support/__init__.py sets what torch reads while it is imported; without it, cells run far slower on a
    busy CPU."""
    lines = "\n".join(SOURCES).splitlines()
    assert lines.index("from train_gpt2 import GPT") < lines.index("import torch")


def test_cells_define_nothing_that_the_project_has():
    """They import the real functions, never copies."""
    definition = (ast.FunctionDef, ast.ClassDef)
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    names = {node.name for tree in trees for node in tree.body if isinstance(node, definition)}
    nodes = [node for source in SOURCES for node in ast.walk(ast.parse(source))]
    own = {node.name for node in nodes if isinstance(node, definition)}
    assert "get_lr" in names
    assert not own & names


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"], ids=["root", "docs"])
def test_the_first_cell_finds_the_root(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    exec(SOURCES[0], names)
    assert names["ROOT"] == ROOT
    assert sys.path[0] == str(ROOT)


@pytest.mark.slow
def test_the_notebook_runs():
    """In a kernel of its own; 10 steps are enough to see every cell run and show what it showed."""
    for needed in ("nbclient", "ipykernel"):
        pytest.importorskip(needed, reason=f"to run the notebook: pip install {needed}")
    import nbclient
    import nbformat

    notebook = nbformat.read(FILE, as_version=4)
    (setup,) = (cell for cell in notebook.cells if "STEPS =" in cell.source)
    setup.source, n_changed = re.subn(r"(?m)^STEPS = \d+", "STEPS = 10", setup.source)
    assert n_changed == 1
    options = {"timeout": 600, "kernel_name": "python3", "coalesce_streams": True}
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": FILE.parent}}, **options).execute()
    now = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [kinds(cell) for cell in now] == [kinds(cell) for cell in CELLS]
    printed = "".join(output.text for cell in now for output in cell.outputs if "text" in output)
    assert "loss before training" in printed
    loss = float(re.search(r"bytes +loss before training ([\d.]+)", printed)[1])
    assert loss == pytest.approx(5.55, abs=0.1)  # ln 257
    assert float(re.search(r"^divided .*difference (\S+)", printed, re.MULTILINE)[1]) < 1e-5
    assert float(re.search(r"^not divided .*difference (\S+)", printed, re.MULTILINE)[1]) == pytest.approx(3)
