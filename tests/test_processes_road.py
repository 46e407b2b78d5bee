"""Every stage by two processes, by the command that users type, beside the same by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import toy
from several import ROOT, finish, start

import vdit
from vdit.data.latents import Latents
from vdit.runtime.checkpoint import newest_good_step
from vdit.runtime.metrics import read
from vdit.runtime.video import write_png
from vdit.sample import Given

TINY = {
    "data.frames": 5, "data.size": "(16,16)", "vae.width": 16, "text.width": 16,
    "dit.preset": "32x1x2", "vae.train.steps": 2, "dit.train.steps": 3,
    "vae.train.warmup": 1, "dit.train.warmup": 1, "vae.train.optimizer": "adamw",
    "dit.train.optimizer": "adamw", "latents.clips": 10,
    "latents.shard": 4, "latents.batch": 4, "eval.captions": 2, "sample.clips": 2,
    "sample.steps": 1, "sample.batch": 2, "run.log_every": 1, "run.dtype": "float32",
}  # fmt: skip
ALONE = ("--config.stages=('vae','latents','dit')",)
Ran = tuple[Path, list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ran]:
    """The workdir of as many processes, and what each of them left; all run at one time."""
    folder = tmp_path_factory.mktemp("roads")
    flags = ["--config=experiments/base.py:smoke"]
    flags += [f"--config.{name}={value}" for name, value in TINY.items()]
    started = {
        count: start(["-m", "vdit.main"], count, *flags, f"--workdir={folder / str(count)}", *more)
        for count, more in ((2, ()), (1, ALONE))
    }
    ended = finish([process for made in started.values() for process in made])
    return {2: (folder / "2", ended[:2]), 1: (folder / "1", ended[2:])}


def test_every_stage_ends_well_and_process_zero_alone_writes(roads: dict[int, Ran]) -> None:
    workdir, ended = roads[2]
    assert [status for status, _, _ in ended] == [0, 0], ended
    rows = read(workdir)
    assert [(r["stage"], r["step"]) for r in rows if "loss" in r] == [
        ("vae", 1), ("vae", 2), ("dit", 1), ("dit", 2), ("dit", 3),
    ]  # fmt: skip
    assert len([r for r in rows if r.get("split") == "generated" and r["objects"] == "all"]) == 1
    assert len(list((workdir / "samples").glob("text-*.mp4"))) == 2
    assert (workdir / "report.html").is_file()
    assert len(list(workdir.glob("tensorboard/dit/events*"))) == 1
    assert "all done" in ended[0][1] and "all done" not in ended[1][1]


def test_its_numbers_are_those_of_one_process(roads: dict[int, Ran]) -> None:
    (two, _), (one, ended) = roads[2], roads[1]
    assert ended[0][0] == 0, ended
    losses = [[r["loss"] for r in read(path) if "loss" in r] for path in (two, one)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (two / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    manifests = [json.loads((p / "latents/manifest.json").read_text()) for p in (two, one)]
    assert manifests[0]["shards"] == manifests[1]["shards"] and len(manifests[0]["shards"]) == 3
    np.testing.assert_allclose(manifests[0]["std"], manifests[1]["std"], rtol=1e-4)
    caches = [Latents(path / "latents") for path in (two, one)]
    for a, b in zip(*([cache[i] for i in range(10)] for cache in caches), strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])
        np.testing.assert_allclose(a["latent"], b["latent"], rtol=2e-3, atol=2e-3)  # float16
    for stage, step in (("vae", 2), ("dit", 3)):
        assert newest_good_step(two / "checkpoints" / stage) == step


def test_they_sample_what_one_process_samples(
    roads: dict[int, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of two devices, and one of four: parameters split over two, tokens over two."""
    workdir, _ = roads[2]
    first = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    write_png(tmp_path / "first.png", first)
    prompt = "a large red ball falls"
    request = [
        "--mode=sample", f"--workdir={workdir}", f"--prompt={prompt}", "--num=2", "--seed=7",
        f"--given={tmp_path / 'first.png'}@0",
    ]  # fmt: skip
    mesh = ["--config=experiments/base.py:smoke", "--config.mesh.data=1"]
    mesh += ["--config.mesh.fsdp=2", "--config.mesh.sequence=2"]
    out = tmp_path / "out"
    (one := tmp_path / "one").mkdir()
    program = [str(ROOT / "tests" / "toy.py")]
    ended = finish([
        *start(program, 2, *request, *mesh, f"--out={out}", devices=2, toy=f"latents:{tmp_path}"),
        *start(program, 1, *request, *mesh, f"--out={one}", devices=4, toy=f"latents:{one}"),
    ])  # fmt: skip
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    got = [np.load(path) for path in (tmp_path / "0.npy", tmp_path / "1.npy", one / "0.npy")]
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_allclose(got[0], got[2], rtol=1e-4, atol=1e-4)
    assert len(list(out.glob("*.mp4"))) == 2 and str(out) not in ended[1][1]

    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.setattr("vdit.model.Scan.__call__", vdit.model.Scan.__call__)  # comes back
    toy.keep_latents(alone)
    model = vdit.load(workdir)
    model.generate(prompt, num=2, seed=7, given=[Given(first[None])])
    want = np.load(alone / "0.npy")
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)
    model.generate("a small blue box rests", num=2, seed=7, given=[Given(first[None])])
    assert np.abs(np.load(alone / "0.npy") - want)[:, 1:].max() > 5e-3  # it hears of the text
