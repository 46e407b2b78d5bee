"""tools.reconstruct: the oracle's scores of an autoencoder by itself."""

from pathlib import Path

import pytest
from test_export_weights import trained

from experiments import base, folder
from tools import reconstruct
from vdit.config.identity import write_config


def test_real_and_reconstructed_clips_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base.get_config("smoke")
    config.data.frames = 5
    trained(config, tmp_path / "work", "vae")
    flags = [f"--workdir={tmp_path / 'work'}", "--count=4", f"--picture={tmp_path / 'a.png'}"]
    assert reconstruct.main(flags) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert table["colour"][0] == "1.00" and float(table["colour"][1]) < 1.0
    assert 3.0 < float(table["psnr"][1]) < 20.0  # random weights
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str) -> str:
        assert reconstruct.main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith("reconstruct: ") and err.count("\n") == 1
        return err

    assert "1 is the least" in refused("--workdir=base", "--count=0")
    assert "config.json" in refused(f"--workdir={tmp_path}")
    write_config(folder.get_config(), tmp_path)
    assert "only simulated clips have an oracle" in refused(f"--workdir={tmp_path}")
