"""Parity reports: every network against what diffusers' or transformers' blocks gave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_import_vivit import write_folder
from tools import import_weights

GOLDEN = Path(__file__).parent / "golden"
STORED = GOLDEN / "activations"
FOLDERS = {
    "dit": GOLDEN / "pipelines" / "dit" / "transformer",
    "latte": GOLDEN / "pipelines" / "latte" / "transformer",
    "unet": GOLDEN / "unet" / "sd1",
    "kl": GOLDEN / "vae" / "kl",
    "wan21": GOLDEN / "vae" / "wan21",
    "wan22": GOLDEN / "vae" / "wan22",
}
VIT = {"vit": "vit_plain", "vivit": "vivit_plain"}


def report(source: Path, stored: Path, work: Path, capsys: Any) -> dict[str, list[float]]:
    """A command's rows: largest and mean difference, and the largest reference, by block."""
    command = [f"--source={source}", f"--workdir={work}", f"--parity={stored}"]
    assert import_weights.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("block "))
    rows = [line.split() for line in lines[begin + 1 :]]
    return {row[0]: [float(x) for x in row[1:]] for row in rows if len(row) == 4}


@pytest.mark.parametrize("name", [*FOLDERS, *VIT])
def test_each_block_is_the_reference_s(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FOLDERS.get(name) or write_folder(tmp_path / "source", VIT[name])
    stored = STORED / f"{name}.npz"
    rows = report(source, stored, tmp_path / "work", capsys)
    there = [n.removeprefix("out/") for n in np.load(stored).files if n.startswith("out/")]
    assert list(rows) == there and len(there) > 2
    for largest, mean, reference in rows.values():
        assert mean <= largest < 2e-5 * reference


def test_an_activation_that_is_off_shows_in_its_own_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(STORED / "latte.npz"))
    block = "temporal_transformer_blocks.0"
    arrays[f"out/{block}"] = arrays[f"out/{block}"] + 0.5
    np.savez(tmp_path / "off.npz", **arrays)
    rows = report(FOLDERS["latte"], tmp_path / "off.npz", tmp_path / "work", capsys)
    assert rows.pop(block)[0] == 0.5 and all(row[0] < 1e-4 for row in rows.values())


GIVEN = {
    "in/time": np.zeros(2), "in/label": np.zeros(2, int), "out/proj_out_2": np.zeros((2, 4, 32))
}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        (None, "bad.npz"),
        ({"in/x": np.zeros(3)}, "holds no activations"),
        ({"x": np.zeros(3), "out/proj_out_2": np.zeros(3)}, "holds no activations"),
        ({"in/x": np.zeros(3), "out/conv_in": np.zeros(3)}, "(conv_in, ...) belong to another"),
        ({**GIVEN, "in/x": np.zeros((2, 1, 4, 4, 5))}, "its inputs do not fit"),
        ({"in/y": np.zeros(3), "out/proj_out_2": np.zeros(3)}, "has no input x"),
    ],
)
def test_a_file_of_something_else_is_one_line_and_nothing_is_written(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, work = tmp_path / "bad.npz", tmp_path / "work"
    path.write_bytes(b"nothing")
    if change is not None:
        np.savez(path, **change)
    command = [f"--source={FOLDERS['dit']}", f"--workdir={work}", f"--parity={path}"]
    assert import_weights.main(command) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and not work.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.npz"]
