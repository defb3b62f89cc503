"""The notebooks run top to bottom, as a reader runs them, and are kept without outputs."""

import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from vggtorch.surgery import distillation

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))

SMALLER = {
    "seconds=20": "steps=3",
    "SIZE = 96": "SIZE = 48",
    "SIZE = 64": "SIZE = 32",
    "range(20)": "range(10)",
}


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.usefixtures("onnx_operators")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom(path, tmp_path, monkeypatch):
    """In the shell of a kernel, without its process, which would import everything again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which it replaces
    for name in ("MOMENTS", "HELD_OUT"):  # crops that every distillation looks at
        monkeypatch.setattr(distillation, name, 8)
    shell = InteractiveShell(
        ipython_dir=str(tmp_path), config=Config({"HistoryManager": {"enabled": False}})
    )
    shown = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source  # twenty seconds, and what can be seen in images, are the reader's
        for theirs, ours in SMALLER.items():
            source = source.replace(theirs, ours)
        with capture_output() as captured:
            result = shell.run_cell(source)
        result.raise_error()
        shown += bool(captured.stdout or captured.outputs)
    assert shown > 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
