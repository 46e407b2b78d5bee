"""The whole road at smoke size, once, by the command that users type; then what it left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from several import LIMIT

import vdit
from experiments import base
from vdit import main
from vdit.config import joined
from vdit.errors import UserError
from vdit.runtime.checkpoint import newest_good_step, restore_ema
from vdit.runtime.metrics import read
from vdit.sample import Given, Model

ROOT = Path(__file__).parents[1]
SMOKE = "--config=experiments/base.py:smoke"
FLAGS = "--xla_backend_optimization_level=0"


def start(*args: str) -> "subprocess.Popen[str]":
    env = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "vdit.main", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)


def run(*args: str) -> tuple[int, str, str]:
    process = start(*args)
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line of a refusal, in this process: each of its own would import for seconds."""
    monkeypatch.chdir(ROOT)

    def ask(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vdit", *args])
        try:
            status = main.main()
        finally:
            main.FLAGS.unparse_flags()
            for name in [name for name in main.FLAGS if name.startswith("config.")]:
                delattr(main.FLAGS, name)  # defined by its use
        return one_line(status, capsys.readouterr().err)

    return ask


def one_line(status: int, err: str) -> str:
    assert status == 2, err
    assert err.startswith("vdit: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("road") / "run"
    status, out, err = run(SMOKE, f"--workdir={workdir}")
    assert status == 0, out + err
    return workdir


@pytest.fixture(scope="module")
def model(road: Path) -> Model:
    return vdit.load(road)


def test_it_leaves_what_a_user_can_rely_on(road: Path) -> None:
    config = json.loads((road / "config.json").read_text())
    assert config["vae"]["width"] == 32
    assert newest_good_step(road / "checkpoints" / "vae") == 12
    assert newest_good_step(road / "checkpoints" / "dit") == 12
    for task in ("text", "image", "extend"):
        made = sorted((road / "samples").glob(f"{task}-*.mp4"))
        assert len(made) == 4
        about = json.loads(made[0].with_suffix(".json").read_text())
        assert about["prompt"] and about["frames"] == 17 and "seed" in about
    assert (road / "samples" / "wall.webp").is_file()
    assert (road / "report.html").stat().st_size > 10_000
    assert list((road / "tensorboard").rglob("events*"))


def test_every_number_is_in_the_metrics(road: Path) -> None:
    rows = read(road)
    losses = {stage: [r["step"] for r in rows if r["stage"] == stage] for stage in ("vae", "dit")}
    assert losses == {"vae": [4, 8, 12], "dit": [4, 8, 12]}
    scores = [r for r in rows if r["stage"] == "eval" and "split" in r]
    kinds = {(r["split"], r["objects"]) for r in scores}
    assert kinds == {
        (split, objects)
        for split in ("real", "reconstructed", "generated", "paraphrased")
        for objects in ("one", "two", "all")
    }
    names = {"clips", "captions", "colour", "shape", "size", "motion", "permanence"}
    assert all(names | {"every_attribute", "gravity_error_median"} <= set(r) for r in scores)
    real = [r for r in scores if r["split"] == "real" and r["objects"] == "all"]
    assert real[0]["every_attribute"] == 1.0
    assert [r["given_exact"] for r in rows if "task" in r] == [1.0, 1.0]


def test_a_finished_run_is_only_looked_at_again(road: Path) -> None:
    before = (road / "checkpoints" / "dit" / "12" / "digests.json").stat().st_mtime_ns
    status, out, err = run(SMOKE, f"--workdir={road}", "--config.stages=('vae','latents','dit')")
    assert status == 0, out + err
    assert (road / "checkpoints" / "dit" / "12" / "digests.json").stat().st_mtime_ns == before


def test_a_run_that_was_stopped_in_every_stage_ends_with_the_same_bits(
    road: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    stages = "--config.stages=('vae','latents','dit')"
    args = (SMOKE, f"--workdir={workdir}", stages, "--config.run.log_every=1")
    codes = []
    for stage in ("vae", "dit"):
        process = start(*args)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and process.poll() is None:
            if any(r["stage"] == stage for r in read(workdir)):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        out, err = process.communicate(timeout=LIMIT)
        codes.append(process.returncode)
        assert process.returncode in (143, 0), out + err
        if process.returncode == 143:
            assert "stopped" in err
    assert 143 in codes  # a machine may be faster than a signal, once
    status, out, err = run(*args)
    assert status == 0, out + err
    for stage in ("vae", "dit"):
        whole, cut = (restore_ema(folder / "checkpoints" / stage, 12) for folder in (road, workdir))
        jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_the_same_seed_gives_the_same_video_and_another_one_another(model: Model) -> None:
    prompt = "a small red ball falls"
    first, again, other = (model.generate(prompt, seed=seed)[0].video for seed in (5, 5, 6))
    assert first.shape == (17, 32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_given_frames_come_back_exactly_wherever_they_are(model: Model) -> None:
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    parts = [Given(clip, 0), Given(clip[:1], 16)]
    video = model.generate("a ball", given=parts)[0].video
    np.testing.assert_array_equal(video[:5], clip)
    np.testing.assert_array_equal(video[16], clip[0])
    with pytest.raises(UserError, match="frame 17"):
        model.generate("a ball", given=[Given(clip, 17)])


def test_given_frames_need_no_program_of_their_own(model: Model) -> None:
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    model.generate("a ball", num=3, steps=2)
    run, *_ = model.scan._compiled.values()
    compiled = run._cache_size()
    for given in (Given(clip, 0), Given(clip[:1], 0)):
        model.generate("a ball", num=3, steps=2, given=[given])
    assert run._cache_size() == compiled


def test_length_rate_size_and_number_are_free(model: Model) -> None:
    made = model.generate("a ball", 0.5, fps=20, size=(24, 40), num=2, steps=2, guidance=1.0)
    assert [r.video.shape for r in made] == [(13, 24, 40, 3)] * 2
    assert made[1].settings["seed"] == made[0].settings["seed"] + 1


def test_pushing_away_changes_a_video_and_not_what_is_given(model: Model) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    plain, pushed = (
        model.generate("a ball", given=[Given(clip, 0)], push=push)[0] for push in (0.0, 3.0)
    )
    assert pushed.settings["push"] == 3.0
    np.testing.assert_array_equal(pushed.video[:5], clip)
    assert (pushed.video[5:] != plain.video[5:]).any()
    config = base.get_config("smoke")
    config.sample.push, config.sample.skip = 1.0, (0.5, 0.5)
    with pytest.raises(UserError, match="one of its 2 layers"):
        joined.check(config)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_every_sampler_runs(model: Model, sampler: str) -> None:
    assert model.generate("a ball", sampler=sampler, steps=2)[0].video.shape[0] == 17


def test_sampling_from_the_command_line(road: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), "red").save(tmp_path / "first.png")
    status, out, err = run(
        "--mode=sample", f"--workdir={road}", f"--out={tmp_path}", "--prompt=a red ball falls",
        "--seconds=1", f"--given={tmp_path / 'first.png'}@0", "--num=2",
    )  # fmt: skip
    assert status == 0, err
    assert "1.3 s" in out and "resized to 32x32" in out
    made = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert made == ["a-red-ball-falls-0.mp4", "a-red-ball-falls-1.mp4"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config=experiments/base.py", "--config.vae.widht=3"], "widht"),
        (["--config=experiments/base.py", "--config.vae.width=wide"], "wide"),
        (["--config=experiments/base.py:tiny"], "known variants"),
        (["--config=experiments/nothing.py"], "no such file"),
        (["--config=experiments/base.py", "--config.dit.preset=XXL"], "known are"),
        (["--config=experiments/base.py", "--config.data.frames=16"], "1 + k*4"),
        (["--config=experiments/base.py", "--config.mesh.fsdp=7"], "device"),
        (["--config=experiments/base.py", "--config.dit.process=ddmp"], "known are"),
        (["--config=experiments/base.py", "--config.dit.process=ddpm"], "logit_normal"),
        (["--config=experiments/base.py", "--config.sample.sampler=eulr"], "known are"),
        (["--config=experiments/base.py", "--config.run.remat=some"], "known are"),
        (["--mode=dream", "--workdir=x"], "known are"),
        (["--mode=sample", "--workdir=/nowhere", "--prompt=x"], "config.json"),
        (["--config=experiments/folder.py"], "path"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1].lstrip("-"),
)
def test_wrong_flags_are_one_line(
    args: Sequence[str], words: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    extra = [] if any("workdir" in arg for arg in args) else [f"--workdir={tmp_path / 'w'}"]
    assert words in refused(*args, *extra)


def test_a_process_that_refuses_says_no_more_and_ends_with_2(tmp_path: Path) -> None:
    status, out, err = run(SMOKE, f"--workdir={tmp_path / 'w'}", "--config.mesh.fsdp=7")
    assert "device" in one_line(status, err) and not out


def test_wrong_requests_are_one_line(
    road: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    ask = ("--mode=sample", f"--workdir={road}", f"--out={tmp_path}")
    line = refused(*ask, f"--prompt={'ball ' * 2000}")
    assert "4000 tokens" in line and "160" in line
    assert "0 to 1.6 s" in refused(*ask, "--prompt=x", "--given=x.png@9")
    assert "--prompt" in refused(*ask)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    assert "bad.mp4" in refused(*ask, "--prompt=x", f"--given={bad}@0")
    assert not list(tmp_path.glob("x*"))


def test_a_relative_workdir_is_as_good(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road.parent)
    assert vdit.load("run").config.vae.width == 32


def test_a_workdir_of_another_model_is_refused_by_the_difference(
    road: Path, refused: Callable[..., str]
) -> None:
    before = (road / "config.json").read_text()
    line = refused(SMOKE, f"--workdir={road}", "--config.vae.channels=4")
    assert "vae.channels was 8, now 4" in line
    assert (road / "config.json").read_text() == before


def test_a_read_only_place_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    assert str(file) in refused(SMOKE, f"--workdir={file / 'run'}")
