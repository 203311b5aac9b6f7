"""Each notebook runs from top to bottom with the weights that come along, and is kept without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.paths import REPOSITORY, papers

nbformat = pytest.importorskip("nbformat")
FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What a reader must have seen at the end: pictures, and words that the program printed.
SEEN = {
    "text_to_image": (5, r"12,288 numbers a picture, 1,024 a latent"),
    "accelerators": (2, r"InstaFlow, 1 step +\d"),
    "architecture_search": (5, r"36 channels, 20 cells: .*36\d{5}"),
    "encoder": (2, r"ElectraForPreTraining"),
    "scenes": (3, r"a bathtub - \d+ Gaussians"),
}


def test_there_is_one_for_each_family_and_the_page_lists_them() -> None:
    assert {path.stem for path in NOTEBOOKS} == {*SEEN}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_small_without_outputs_and_leads_to_files_that_exist(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 40_000
    text = ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
        else:
            text += cell.source
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (FOLDER / target).exists(), target
    code = "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert any(re.search(rf"^from {paper} import load_", code, re.MULTILINE) for paper in papers())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, as after a plain install; a wrong cell fails with its traceback."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    pictures = sum(bool({"image/png", "image/svg+xml", "text/html"} & {*found}) for found in data)  # coloured text too
    words = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    least, told = SEEN[path.stem]
    assert pictures >= least
    assert re.search(told, words), words[-1500:]
