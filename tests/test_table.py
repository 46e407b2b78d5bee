"""The score table of workdirs."""

import json
from pathlib import Path

import pytest

from tools.table import main


def workdir(path: Path, colour: float) -> Path:
    path.mkdir()
    score = {"clips": 8, "colour": colour, "colour_low": 0.1, "colour_high": 0.9}
    rows = [
        {"split": "generated", "objects": "one", **score, "gravity_error_median": colour / 2},
        {"split": "reconstructed", "objects": "all", "clips": 8, "psnr": 29.5, "ssim": 0.91},
        {
            "task": "extension", "clips": 4, "psnr_next": 20.0, "psnr_frozen": 18.0,
            "psnr_reconstructed": 29.0, "gain_db": 2.0, "gain_db_low": 1.0, "gain_db_high": 3.0,
        },
    ]  # fmt: skip
    lines = [json.dumps({"stage": "eval", "step": 1, **row}) for row in rows]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_runs_stand_beside_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [workdir(tmp_path / name, value) for name, value in (("a", 0.5), ("b", 0.75))]
    assert main([str(path) for path in made]) == 0
    out = capsys.readouterr().out
    assert "| a | generated | one | 8 | 0.50 (0.10–0.90) |" in out
    assert "| mean of 2 (least–most) | generated | one | 16 | 0.62 (0.50–0.75) |" in out
    assert "31.2% (25.0%–37.5%) |" in out
    assert "| b | reconstruction, all | 8 | 29.5 dB, SSIM 0.910 |" in out
    assert "| b | extension | 4 | 20.0 dB | 18.0 dB; reconstructed 29.0 | +2.0 dB (+1.0 to" in out


def test_other_oracles_scores_and_lengths_have_tables_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = {"objects": "all", "clips": 4, "place": 1.0, "place_low": 0.5, "place_high": 1.0}
    drifts = {f"{name}_drift_percent_a_second": 0.5 for name in ("colour", "contrast", "sharpness")}
    whole = {"frames_whole": 0.5, "frames_whole_first": 1.0, "frames_whole_last": 0.25}
    length = {"task": "length", "way": "one_pass", "clips": 4, "permanence": 0.25}
    rows = [
        {"split": "real", **score}, {"split": "generated", **score, "place": 0.75},
        {**length, **whole, **drifts},
    ]  # fmt: skip
    lines = [json.dumps({"stage": "eval", "step": 1, **row}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"| {tmp_path.name} | real (4) | generated (4) |" in out
    assert "| place | 1.00 | 0.75 (0.50–1.00) |" in out
    assert "| one pass | 4 | 0.25 | 0.50 | 1.00, 0.25 | 0.500% |" in out
    assert "| objects |" not in out


def test_a_workdir_without_scores_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no scores" in capsys.readouterr().err
