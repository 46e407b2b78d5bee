"""Finetuning of imported Wan pipelines on a folder of clips: what is learned, resumed, exported."""

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

import experiments.lora
from experiments import wan
from tests.published.test_wan_pipeline import pipeline
from tools import export_weights, import_weights
from vdit import run
from vdit.config.denoiser import build_denoiser, training_times
from vdit.config.identity import inherit
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.data.latents import Latents
from vdit.errors import UserError
from vdit.models.text import encode_features
from vdit.nn.patch import unpatchify
from vdit.objectives.diffusion import Dense
from vdit.published.layouts import STEM
from vdit.published.lora import WEIGHTS
from vdit.runtime.checkpoint import load_meta, newest_good_step, restore_ema
from vdit.runtime.metrics import read
from vdit.runtime.video import write_mp4
from vdit.sample import Given, load
from vdit.stages import pattern_table
from vdit.tokens import pattern_shares

PROMPT = "a small red ball falls"


def clip_folder(root: Path, count: int = 1) -> Path:
    """Films of a square that moves to the right, just long enough for one clip each."""
    root.mkdir()
    for i in range(count):
        video = np.zeros((9, 32, 48, 3), np.uint8)
        for frame in range(9):
            video[frame, 8:20, 2 + 4 * frame : 12 + 4 * frame, i % 3] = 255
        write_mp4(root / f"{i}.mp4", video, 16)
        (root / f"{i}.txt").write_text(PROMPT)
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The clips, or the source of a kind, or a fresh workdir that was imported from it."""
    root = tmp_path_factory.mktemp("wan")
    clip_folder(root / "clips", 2)
    count = iter(range(100))

    def place(what: str, kind: str = "t2v") -> Path:
        if what == "clips":
            return root / "clips"
        source, imported = root / f"source-{kind}", root / f"imported-{kind}"
        if not source.exists():
            name, _, two = kind.partition("-")
            pipeline(source, two or name, 0.9 if two else None)
            command = [f"--source={source}", f"--workdir={imported}"]
            assert import_weights.main(command) == 0
        if what == "source":
            return source
        return Path(shutil.copytree(imported, root / f"work-{next(count)}"))

    return place


def configured(clips: Path, **changes: Any) -> ConfigDict:
    """The smoke variant on eight devices; names of `changes` have _ for the dots."""
    config = wan.get_config("smoke")
    config.data.path = str(clips)
    config.dit.train.batch = 8
    config.dit.train.learning_rate = 0.01
    config.dit.train.warmup = 0
    config.run.dtype = "float32"
    config.update_from_flattened_dict(changes)
    return config


def losses(work: Path) -> list[float]:
    return [row["loss"] for row in read(work) if row["stage"] == "dit" and "loss" in row]


@pytest.mark.slow
def test_a_few_steps_learn_two_clips_and_resume_to_the_bit(
    places: Callable[..., Path], tmp_path: Path
) -> None:
    """From the imported weights; then the pipeline is exported, with the trained network in it."""
    work, cut = places("work"), places("work")
    directory = work / "checkpoints" / "dit"
    first, known = restore_ema(directory, 0)["dit"], load_meta(directory, 0)
    for to, count in ((work, 8), (cut, 4), (cut, 8)):
        steps = {"dit.train.steps": count, "run.save_every": 4}
        run.run(configured(places("clips"), **steps), to)
    learned = losses(work)
    assert len(learned) == 8 and np.mean(learned[-2:]) < 0.7 * np.mean(learned[:2])
    assert losses(cut) == learned
    ours, again = (restore_ema(to / "checkpoints" / "dit", 8) for to in (work, cut))
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    pairs = zip(jax.tree.leaves(ours["dit"]), jax.tree.leaves(first), strict=True)
    assert all((a != b).any() for a, b in pairs)
    # The autoencoder and the statistics of its latents are the imported ones.
    assert [path.name for path in (work / "checkpoints" / "vae").iterdir()] == ["0"]
    assert load_meta(directory, 8)["latents"] == known["latents"]
    _check_pipelines(work, places("source"), tmp_path)
    assert load(work).generate(PROMPT, steps=1, seconds=0.1)[0].video.shape == (5, 32, 48, 3)


def _check_pipelines(work: Path, source: Path, tmp_path: Path) -> None:
    """Links and copies: all but the transformer has the source's bytes."""
    for rest in ("link", "copy"):
        out = tmp_path / rest
        command = [f"--workdir={work}", f"--out={out}", f"--pipeline={rest}"]
        assert export_weights.main(command) == 0
        names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        here = {
            str(path.relative_to(out)) for part in out.iterdir()
            for path in [part, *part.rglob("*")] if path.is_file()
        }  # fmt: skip
        assert here == names
        for name in names:
            same = (out / name).read_bytes() == (source / name).read_bytes()
            assert same == (not name.startswith("transformer")), name
        assert (out / "vae").is_symlink() == (rest == "link")
        ours, theirs = (load_file(f / "transformer" / f"{STEM}.safetensors") for f in (out, source))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_an_untrained_pipeline_is_the_imported_one(
    places: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """Its source may have been moved, but not be another."""
    work, source = places("work"), places("source")
    out, moved = tmp_path / "out", Path(shutil.copytree(source, tmp_path / "moved"))
    command = [f"--workdir={work}", f"--out={out}", "--pipeline=copy"]
    assert export_weights.main([*command, f"--source={moved}"]) == 0
    for path in source.rglob("*.*"):
        assert (out / path.relative_to(source)).read_bytes() == path.read_bytes()
    for more, words in (
        ([f"--source={places('source', 'ti2v')}"], "is not the one that"),
        ([f"--source={tmp_path}"], "holds no model_index.json"),
        (["--own"], "one of them"),
        (["--stage=vae"], "take no --stage"),
    ):
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        assert export_weights.main([*command, *more]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1 and not out.exists()


def test_times_have_the_workdir_s_shift(places: Callable[..., Path]) -> None:
    """Logit-normal, then shifted by 5, which the folder's scheduler says."""
    config = configured(places("clips"))
    inherit(config, places("work"))
    u = np.linspace(0.01, 0.99, 99)
    got = training_times(config)(jax.numpy.asarray(u, jax.numpy.float32))
    odds = np.exp([NormalDist().inv_cdf(1 - x) for x in u])  # t / (1 - t)
    np.testing.assert_allclose(got, 5 * odds / (1 + 5 * odds), rtol=2e-5)


@pytest.mark.slow
def test_given_frames_are_trained_where_tokens_have_times(places: Callable[..., Path]) -> None:
    shares = {"dit.given.text": 0.2, "dit.given.image": 0.8, "dit.train.steps": 1}
    work = places("work", "ti2v")
    run.run(configured(places("clips"), **shares), work)
    image = np.zeros((1, 32, 48, 3), np.uint8)
    video = load(work).generate(PROMPT, given=[Given(image)], steps=1, seconds=0.1)[0].video
    np.testing.assert_array_equal(video[:1], image)
    with pytest.raises(UserError, match="given.image is 0.8 .* one time for all tokens"):
        run.run(configured(places("clips"), **shares), places("work"))


@pytest.mark.slow
def test_image_to_video_learns_from_first_frames(places: Callable[..., Path]) -> None:
    """Latents and features of each clip's first frame are cached; in front of them is a mask."""
    work = places("work", "i2v")
    config = configured(places("clips"), **{"dit.train.steps": 1})
    run.run(config, work)
    cached = [Latents(work / "latents")[i] for i in range(2)]
    batch = {name: np.stack([row[name] for row in cached]) for name in cached[0]}
    assert batch["beside"].shape == (2, 3, 8, 12, 3) and batch["image"].shape == (2, 10, 6)
    encoder, table = (
        build_text_encoder(config, build_tokenizer(config, work)),
        pattern_table(config),
    )
    denoiser, given = build_denoiser(config, encoder), pattern_shares(table, dict(config.dit.given))
    meta = load_meta(work / "checkpoints" / "dit", 1)["latents"]
    mean, std = (np.array(meta[name], np.float32) for name in ("mean", "std"))
    rows = Dense(table, given, training_times(config), 0.0)
    batch |= {"ordinal": np.arange(2, dtype=np.uint32)}
    frozen = {"mean": jax.numpy.asarray(mean), "std": jax.numpy.asarray(std)}
    condition = rows.draw(denoiser, {}, frozen, batch, jax.random.key(0)).condition
    beside = unpatchify(condition.beside.reshape(2, 3, 4, 6, -1), (1, 2, 2))
    assert (beside[:, 0, ..., :4] == 1).all() and (beside[:, 1:, ..., :4] == 0).all()
    plain = (batch["beside"].astype(np.float32) - mean) / std
    np.testing.assert_allclose(beside[..., 4:], plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(condition.image, batch["image"].astype(np.float32))
    # Eight devices have encoded the captions together.
    params = encoder.init(jax.random.key(0), batch["ids"], batch["mask"])
    features = encode_features(encoder, params, batch["ids"], batch["mask"])
    np.testing.assert_allclose(batch["features"], features, atol=1e-3)
    # The first latent frame is of the image alone, as the clip's own; the others are of grey.
    np.testing.assert_allclose(batch["beside"][:, 0], batch["latent"][:, 0], atol=2e-3)
    assert np.abs(batch["beside"][:, 1:] - batch["latent"][:, 1:3]).max() > 0.1
    image = np.zeros((1, 32, 48, 3), np.uint8)
    video = load(work).generate(PROMPT, given=[Given(image)], steps=1, seconds=0.1)[0].video
    assert video.shape == (5, 32, 48, 3)


@pytest.mark.slow
def test_experts_are_trained_one_by_one(places: Callable[..., Path], tmp_path: Path) -> None:
    """Each at its own times; the other one stays the imported one, also in the pipeline."""
    work = places("work", "a14b-t2v")
    directory = work / "checkpoints"
    config = configured(places("clips"), **{"dit.train.steps": 1})
    config.stages = ("latents", "low")
    run.run(config, work)
    assert [newest_good_step(directory / stage) for stage in ("dit", "low")] == [0, 1]
    out = tmp_path / "out"
    assert export_weights.main([f"--workdir={work}", f"--out={out}", "--pipeline=link"]) == 0
    assert [p.name for p in sorted(out.iterdir()) if not p.is_symlink()] == ["transformer_2"]
    config.stages = ("latents", "dit", "low")
    run.run(config, work)
    assert [newest_good_step(directory / stage) for stage in ("dit", "low")] == [1, 1]
    high, low = (training_times(config, stage) for stage in ("dit", "low"))
    u = jax.numpy.linspace(0.0, 0.999, 500)
    assert (high(u) >= 0.9).all() and (low(u) <= 0.9).all() and low(u).max() > 0.89
    config.stages = ("latents", "low")
    with pytest.raises(UserError, match="low is allowed for two experts"):
        run.run(configured(places("clips"), stages=config.stages), places("work"))


@pytest.mark.slow
def test_experts_have_adapters_of_their_own(places: Callable[..., Path], tmp_path: Path) -> None:
    """One is trained, then both; a file of each is merged into its own, as in the workdir."""
    base, new = places("work", "a14b-t2v"), tmp_path / "new"
    config = experiments.lora.get_config(str(base))
    assert config.stages == ("latents", "dit", "low", "sample")
    config.data.path, config.data.frames, config.data.size = str(places("clips")), 9, (32, 48)
    config.dit.train.steps, config.dit.train.warmup, config.dit.lora.rank = 1, 0, 2
    config.dit.train.learning_rate = 0.1

    def video(workdir: Path, *lora: str) -> np.ndarray:
        options: dict[str, Any] = {"steps": 2, "seconds": 0.1, "seed": 1, "size": (32, 48)}
        (made,) = load(workdir, lora=lora).generate(PROMPT, **options)
        return made.video.astype(int)

    def export(name: str, *more: str) -> Path:
        out = tmp_path / name
        assert export_weights.main([f"--workdir={new}", f"--out={out}", *more]) == 0
        return out

    plain, low = video(base), Path("transformer_2", WEIGHTS)
    for stages, written in ((("latents", "low"), [low]), (("dit",), [Path(WEIGHTS), low])):
        config.stages = stages
        run.run(config, new)
        files = export(f"files {stages}", "--lora")
        assert sorted(p.relative_to(files) for p in files.rglob("*.safetensors")) == written
        named = [f"{'low=' if path == low else ''}{files / path}" for path in written]
        made = video(new)
        assert np.abs(made - plain).max() > 1 and np.abs(video(base, *named) - made).max() <= 1
    for text, words in (("low=a.safetensors", "second of two experts"), ("low=:x", "FILE:WEIGHT")):
        with pytest.raises(UserError, match=words):
            load(places("work"), lora=[text])
    whole, again = export("whole", "--pipeline=link"), tmp_path / "again"
    assert import_weights.main([f"--source={whole}", f"--workdir={again}"]) == 0
    assert np.abs(video(again) - made).max() <= 1


@pytest.mark.slow
def test_meshes_learn_the_same(places: Callable[..., Path]) -> None:
    found = []
    for mesh in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "sequence": 2}):
        work = places("work")
        axes = {f"mesh.{name}": size for name, size in mesh.items()}
        run.run(configured(places("clips"), **axes, **{"dit.train.steps": 2}), work)
        found.append(losses(work))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    "variant, changes, words",
    [
        ("1.3b", {}, "dit.preset was '16x2x2', now '1536x30x12'"),
        ("smoke", {"vae.width": 8}, "vae.width was 4, now 8"),
        ("smoke", {"text.length": 100}, "text.length was 512, now 100"),
        ("smoke", {"data.shapes": ((9, 32, 48, 16.0),)}, "clips of one shape"),
    ],
)
def test_other_networks_are_refused(
    variant: str, changes: dict[str, Any], words: str, places: Callable[..., Path]
) -> None:
    work = places("work")
    before = (work / "config.json").read_bytes()
    config = wan.get_config(variant)
    config.update_from_flattened_dict({"data.path": str(places("clips"))} | changes)
    with pytest.raises(UserError) as caught:
        run.run(config, work)
    assert words in str(caught.value)
    assert (work / "config.json").read_bytes() == before


def test_a_workdir_must_be_imported_first(places: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tools.import_weights"):
        run.run(configured(places("clips")), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="known variants are 1.3b, 14b, a14b, 5b, smoke"):
        wan.get_config("2b")
