"""The notebook runs, with fewer steps."""

import nbclient
import nbformat
import pytest


@pytest.mark.filterwarnings("default")  # of Jupyter's packages
def test_tour(root, tmp_path, child_env, monkeypatch):
    notebook = nbformat.read(root / "examples" / "tour.ipynb", as_version=4)
    assert all(cell.outputs or i < 3 for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), (
        "no pictures"
    )
    [cell] = [cell for cell in notebook.cells if "STEPS = 600" in cell.source]
    cell.source = cell.source.replace("STEPS = 600", "STEPS = 8").replace(
        "settings = parse(", "config.sampling.steps = 2\nsettings = parse("
    )
    for name, value in child_env.items():
        monkeypatch.setenv(name, value)
    where = dict(metadata=dict(path=str(tmp_path)))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 8
    assert (tmp_path / "runs" / "tour" / "checkpoints" / "20").exists()
