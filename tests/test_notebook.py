"""The notebook runs from its first cell to its last, with the weights of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_look.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient: pip install 'brixel[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'brixel[notebook]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'brixel[notebook]'")
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'brixel[demo]'")
    if not (ROOT / "demo" / "dinov2_vits14.safetensors").is_file():
        pytest.skip("needs the weights of the demo: python -m brixel_cli.demo demo")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output for output in outputs if output.output_type == "execute_result"]
    assert shown[0].data["text/plain"] == "torch.Size([384, 32, 48])"
    assert sum("image/png" in output.data for output in shown) == 5


def test_the_notebook_is_stored_without_results() -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'brixel[notebook]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
    assert 'find_spec("brixel_cli")' in notebook.cells[1].source  # the first cell of code installs, where it has to
