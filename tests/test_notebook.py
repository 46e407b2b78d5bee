"""The Colab notebook: made from its py:percent source, without outputs, and it runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from cheap import FLAGS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "notebooks" / "vdit_colab.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def test_the_notebook_is_made_from_its_source() -> None:
    made, kept = jupytext.read(SOURCE), nbformat.read(NOTEBOOK, as_version=4)
    hint = "run: jupytext --update --to ipynb notebooks/vdit_colab.py"
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (made, kept)]
    assert cells[0] == cells[1], hint
    for field in ("accelerator", "colab", "kernelspec"):
        assert made.metadata[field] == kept.metadata[field], hint
    for cell in kept.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "clear the outputs"


@pytest.mark.slow
def test_the_notebook_runs_at_smoke_size(tmp_path: Path) -> None:
    """In a copy of the tree, so that nothing is left behind in this one."""
    for name in ("vdit", "experiments", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    book = tmp_path / NOTEBOOK.relative_to(ROOT)
    chosen = {"VDIT_SMOKE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "--nbmake-timeout=1800"]
    done = subprocess.run(
        [*command, str(book)], cwd=tmp_path, env=os.environ | chosen, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = [
        output
        for cell in nbformat.read(book, as_version=4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    videos = [data["text/html"] for data in shown if "text/html" in data]
    assert len(videos) == 2 and all("data:image/webp;base64," in text for text in videos)
    (table,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    for split in ("real", "reconstructed", "generated"):
        assert table.count(f"| {split} |") == 3
    assert (tmp_path / "runs" / "colab-smoke" / "report.html").is_file()
