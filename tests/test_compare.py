"""Networks at equal time: the table of variants, its arithmetic, and one run of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import compare
from vdit.config import default, joined
from vdit.config.autoencoder import build_vae

FIGURES = {
    "steps": 10, "seconds": 60.0, "minutes": 1.0, "device": "1 x cpu", "python": "3", "jax": "0",
}  # fmt: skip


@pytest.mark.parametrize("smoke", [False, True])
def test_every_variant_is_base_with_what_it_changes(smoke: bool) -> None:
    """All can be trained, learn and sample alike, and share one autoencoder where they can."""
    made = {name: compare.configured(name, 3, smoke) for name in compare.VARIANTS}
    for name, config in made.items():
        joined.check(config)
        assert config.seed == 3 and dict(config.dit.given)["text"] == 1.0
        first = compare.configured(f"vae-{compare.VARIANTS[name].vae}", 3, smoke)
        assert (config.vae, config.latents, config.data) == (first.vae, first.latents, first.data)
    assert all(config.sample == made["dit"].sample for config in made.values())
    assert (made["unet"].dit.model, made["unet"].dit.process) == ("unet", "flow")
    assert (made["context"].dit.text, default().dit.text) == ("context", "cross")
    shapes = {build_vae(config).latent_shape(17, 32, 32) for config in made.values()}
    assert len(shapes) == 1


def test_compilation_does_not_count() -> None:
    """Parts that begin with it, of a run and of one that went on, are as their steps usually."""
    rows = [
        {"step": 4, "steps_per_second": 0.1, "seconds": 40.0},
        {"step": 8, "steps_per_second": 2.0, "seconds": 42.0},
        {"step": 12, "steps_per_second": 0.2, "seconds": 20.0},
        {"step": 14, "steps_per_second": 1.0, "seconds": 22.0},
    ]
    assert compare.spent(rows, usual=0.5) == 4 * 0.5 + 2.0 + 4 * 0.5 + 2.0


def result(name: str, seed: int, motion: float = 0.0) -> dict[str, Any]:
    scores = dict.fromkeys(compare.COLUMNS, 0.5) | {compare.GRAVITY: None, "motion": motion}
    rows = [
        {"split": split, "objects": "all", "clips": 8, **scores, "psnr": 30.0 + seed, "ssim": 0.9}
        for split in ("real", "reconstructed", "generated")
    ]
    alone = name.startswith("vae-")
    parameters = {"vae": 2_000_000} if alone else {"dit": 900_000, "text": 100_000}
    made = {"name": name, "seed": seed, "parameters": parameters}
    return made | FIGURES | {"scores": [] if alone else rows}


def test_the_table_has_means_and_spreads() -> None:
    made = [result(name, seed, seed / 2) for seed in (0, 1) for name in ("vae-vivit", "dit")]
    lines = compare.tables(made).splitlines()
    assert "| DiT | 2 | 1.00M | 10 (10–10) | 6.000 (6.000–6.000) | 1.00 (1.00–1.00) |" in lines[2]
    assert "| 0.25 (0.00–0.50) |" in lines[2] and lines[2].endswith("| – |")
    assert lines[3].startswith("| real clips | 2 |")
    assert lines[4].startswith("| reconstructed, ViViT | 2 |")
    assert "| ViViT | 2 | 2.00M | 10 (10–10) |" in lines[-1]
    assert lines[-1].endswith("| 30.5 (30.0–31.0) dB | 0.900 (0.900–0.900) |")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--minutes"),
        (["--minutes=0"], "--minutes=0.0: a number above 0"),
        (["--minutes=1", "--seeds=0"], "--seeds=0"),
        (["--minutes=1", "--only=dit,gan"], "--only=gan: known are dit, context, unet"),
        (["--minutes=1", "--page=README.md"], "lacks the lines"),
        (["--minutes=1", "--page=docs/no.md"], "No such file"),
        (["--minutes=1", "--cores=two"], "numbers of this machine's cores"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*flags, f"--out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_share_an_autoencoder_and_are_not_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"before\n{compare.MARKERS[0]}\n{compare.MARKERS[1]}\nafter\n")
    flags = ["--minutes=0.01", "--seeds=1", "--smoke", f"--out={out}", f"--page={page}"]
    assert compare.main([*flags, "--only=dit"]) == 0
    first, told = page.read_text(), capsys.readouterr().out
    assert first.startswith("before\n") and first.endswith("\nafter\n")
    assert "| DiT | 1 |" in first and "| reconstructed, ViViT | 1 |" in first
    assert "dit: done in" in told
    shards = [next((out / name / "latents").glob("*.array_record")) for name in RUNS]
    assert len({path.stat().st_ino for path in shards}) == 1
    plan = json.loads((out / "dit-0" / "plan.json").read_text())
    made = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in made] == ["vae-vivit", "dit"]
    assert made[1]["steps"] == plan["steps"] and made[1]["seconds"] > 0
    assert compare.main([*flags, "--only=dit"]) == 0
    assert page.read_text() == first and "done in" not in capsys.readouterr().out
    assert compare.main([*flags, "--only=dit", "--minutes=0.02"]) == 2
    assert "is of 0.01 minutes, not of 0.02" in capsys.readouterr().err


RUNS = ("vae-vivit-0", "dit-0")
