"""Clips of several shapes on the road: encoded by buckets, cached, packed, learned, resumed."""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from stopping import StopAt

from experiments.packed import get_config
from vdit import stages
from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.data import sources
from vdit.data.latents import Latents
from vdit.data.mixture import Mixture
from vdit.errors import UserError
from vdit.nn.patch import to_float
from vdit.runtime.checkpoint import restore_ema
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.runtime.video import write_mp4
from vdit.tokens import extra_spans
from vdit.train import Interrupted, Runtime

CLIPS = 30


def small() -> ConfigDict:
    """Three shapes, one of a size that the autoencoder's patch does not divide."""
    config = get_config("smoke")
    config.data.shapes = ((17, 32, 32, 10.0), (1, 32, 32, 10.0), (9, 20, 36, 5.0))
    config.dit.train.optimizer = "adamw"  # compiles sooner
    config.latents.clips, config.latents.shard, config.latents.batch = CLIPS, 12, 4
    config.dit.train.steps, config.dit.train.batch = 8, 2
    config.run.save_every, config.run.log_every = 100, 1
    config.dit.auxiliary = (("truth", 0.7),)
    return config


@contextlib.contextmanager
def runtime(config: ConfigDict, workdir: Path) -> Any:
    with Metrics(workdir) as metrics, Preemption() as preemption:
        yield Runtime(workdir, make_mesh({}, jax.devices()[:1]), metrics, preemption, config.run)


@pytest.fixture(scope="module")
def vae() -> Any:
    """An untrained autoencoder's parameters."""
    config = small()
    video = np.zeros((1, 17, 32, 32, 3), np.float32)
    model = build_vae(config)
    noise = np.zeros((1, *model.latent_shape(17, 32, 32)), np.float32)
    return {"vae": jax.jit(model.init)(jax.random.key(0), video, noise)["params"]}


@pytest.fixture(scope="module")
def cached(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("packed")
    with runtime(small(), workdir) as made:
        stages.cache_latents(small(), made, vae)
    return workdir


def test_every_clip_of_the_cache_is_what_it_is_alone(cached: Path, vae: Any) -> None:
    config, cache = small(), Latents(cached / "latents")
    clips, model = sources.training_clips(config, cached), build_vae(config)
    encode = jax.jit(
        lambda video: model.apply({"params": vae["vae"]}, to_float(video), method=model.encode)[0]
    )
    assert len(cache) == CLIPS
    shapes = [tuple(shape) for shape in config.data.shapes]
    for i in (*range(3), 13, CLIPS - 1):
        frames, height, width, fps = shapes[i % 3]
        assert clips[i]["video"].shape == (frames, height, width, 3)
        video, own = clips[i]["video"][None], 1 + (frames - 1) // 4
        spans = extra_spans(own, 4)
        parts = [video, *(video[:, first : first + count] for first, count in spans)]
        want = np.concatenate([np.asarray(encode(part))[0] for part in parts])
        assert cache[i]["frames"] == own and (len(spans) == 2) == (frames == 17)
        np.testing.assert_allclose(cache[i]["latent"], want, rtol=2e-3, atol=2e-3)  # float16
        assert cache[i]["fps"] == fps
    sizes = cache.sizes((1, 1))
    tokens = [
        int(cache[i]["frames"] * np.prod(cache[i]["latent"].shape[1:3])) for i in range(CLIPS)
    ]
    assert sizes.tokens.tolist() == tokens and set(tokens) == {16, 45, 80}
    assert sizes.text.tolist() == [int(cache[i]["mask"].sum()) for i in range(CLIPS)]


def test_what_is_damaged_is_named_and_a_shard_is_encoded_again_alone(
    cached: Path, vae: Any, tmp_path: Path
) -> None:
    config, folder = small(), tmp_path / "latents"
    shutil.copytree(cached / "latents", folder)
    shutil.copy(cached / "tokenizer.json", tmp_path)
    names = json.loads((folder / "manifest.json").read_text())["shards"]
    bad, summary = folder / names[1], folder / f"{names[1]}.json"
    good = bad.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    with runtime(config, tmp_path) as made:

        def refused(words: str) -> None:
            with pytest.raises(UserError, match=words):
                stages.cache_latents(config, made, vae)

        bad.write_bytes(flipped)
        refused(f"{names[1]} is not what was written; delete it")
        (folder / "manifest.json").rename(tmp_path / "kept")  # as if it had been stopped
        refused(f"{names[1]} is not what was written; delete it")
        assert (folder / "manifest.json").read_bytes() == (tmp_path / "kept").read_bytes()
        bad.write_bytes(good[:-100])
        refused(f"{names[1]} has {len(good) - 100} bytes instead of {len(good)}")
        bad.write_bytes(good)
        summary.write_text(summary.read_text()[:40])
        refused(f"{names[1]}.json cannot be read")
        summary.write_text("[]")
        refused(f"{names[1]}.json is no summary of a shard; delete it")
        summary.unlink()  # as it was told; the shard then is encoded again too
        before = {path.name: path.stat().st_ino for path in folder.iterdir()}
        stages.cache_latents(config, made, vae)
    for path in (cached / "latents").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    again = {n for n in before if (folder / n).stat().st_ino != before[n]}
    assert again == {names[1], "manifest.json"}


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """Says how often a function named step was compiled so far."""
    named = re.compile(r"Compiling (jit\()?step\b")
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: sum(bool(named.match(row.getMessage())) for row in caplog.records)


@pytest.fixture
def kept_compilations(tmp_path: Path) -> Iterator[None]:
    """What is compiled again is read from disk, where the machine can: same program, less time."""
    name = "jax_compilation_cache_dir"
    before = jax.config.jax_compilation_cache_dir
    jax.config.update(name, str(tmp_path / "compiled"))
    compilation_cache.reset_cache()
    yield
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def test_it_compiles_once_and_a_stop_in_the_middle_of_an_epoch_changes_no_bit(
    cached: Path, compiled: Callable[[], int], kept_compilations: None
) -> None:
    config = small()
    folders = [cached, cached.parent / "stopped"]
    folders[1].mkdir()
    for name in ("latents", "tokenizer.json"):
        (folders[1] / name).symlink_to(cached / name)
    with runtime(config, folders[0]) as made:
        cache = Latents(folders[0] / "latents")
        stages.train_dit(config, made, cache)
    assert compiled() == 1
    with runtime(config, folders[1]) as made:
        stopping = dataclasses.replace(made, preemption=StopAt(2))
        with pytest.raises(Interrupted):
            stages.train_dit(config, stopping, cache)
        stages.train_dit(config, made, cache)
    rows = [[r for r in read(folder) if r["stage"] == "dit"] for folder in folders]
    packing = rows[0][0]
    assert packing["rows"] > 2 * 2 and 0 < packing["padding"] < 0.5  # step 2 is within an epoch
    assert packing["rows"] < 8 * 2  # and step 8 is in another
    losses = [[r["loss"] for r in part if "loss" in r] for part in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    whole, cut = (restore_ema(folder / "checkpoints" / "dit", 8) for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


class Numbers:
    def __init__(self, count: int, name: int) -> None:
        self.count, self.name = count, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {"clip": (self.name, int(index))}


def test_a_mixture_takes_turns() -> None:
    endless = Mixture([Numbers(9, 0), Numbers(9, 1)], (10.0, 5.0), True)
    assert [endless[i]["clip"] for i in range(3)] == [(0, 0), (1, 1), (0, 2)]
    assert [endless[i]["fps"] for i in range(2)] == [10.0, 5.0] and len(endless) == 9
    finite = Mixture([Numbers(2, 0), Numbers(3, 1)], (10.0, 5.0), False)
    assert [finite[i]["clip"] for i in range(len(finite))] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    with pytest.raises(IndexError):
        finite[4]
    sources = [Numbers(1, 0), Numbers(3, 1), Numbers(2, 2)]
    whole = Mixture(sources, (10.0, 5.0, 1.0), False, to_the_end=True)
    turns = [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (1, 2)]
    assert [whole[i]["clip"] for i in range(len(whole))] == turns
    assert [whole.kind(i) for i in range(len(whole))] == [kind for kind, _ in turns]
    with pytest.raises(UserError, match="0 sources"):
        Mixture([], (), True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data.shapes": ((16, 32, 32, 10.0),)}, r"1 \+ k\*4 frames"),
        ({"data.shapes": ((17, 32, 32),)}, "height, width, fps"),
        ({"data.shapes": ((17, 0, 32, 10.0),)}, "height, width, fps"),
        ({"data.shapes": ((17, "32", 32, 10.0),)}, "height, width, fps"),
        ({"data.shapes": ((17, 32, 32, float("nan")),)}, "height, width, fps"),
        ({"data.shapes": ((17, 3, 32, 10.0),)}, "each 4 or more"),
        ({"dit.given.last": -0.1}, "dit.given is .*shares of 0 and more"),
        ({"dit.given.text": 0.0, "dit.given.prefix": 0.0}, "text, image and prefix not all 0"),
        ({"dit.axes": "factorised"}, "joint is allowed with packed rows"),
        ({"dit.pack": (0, -1, 0)}, "three numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_packed_is_refused(changes: dict[str, Any], words: str) -> None:
    config = small()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_films_of_a_folder_are_packed_at_the_shapes_that_suit_them(
    vae: Any, tmp_path: Path
) -> None:
    config, root = small(), tmp_path / "films"
    root.mkdir()
    for number, (height, width) in enumerate([(64, 64), (64, 64), (40, 72), (40, 72)]):
        video = np.full((40, height, width, 3), 60 * number, np.uint8)
        video += np.arange(40, dtype=np.uint8)[:, None, None, None]
        write_mp4(root / f"{number}.mp4", video, fps=10)
        (root / f"{number}.txt").write_text(f"film {number}")
    config.data.source, config.data.path, config.dit.auxiliary = "folder", str(root), ()
    config.latents.shard, config.dit.train.steps, config.dit.train.warmup = 100, 2, 0
    joined.check(config)
    clips = sources.training_clips(config, tmp_path)
    held = sources.source(config, "heldout", tmp_path)
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for i in range(len(clips)):
        shape = tuple(config.data.shapes[clips.kind(i)][:3])
        assert clips[i]["video"].shape == (*shape, 3)
        kinds.setdefault(clips[i]["caption"], set()).add(shape)
    assert len(kinds) == 3 and not kinds.keys() & set(held.captions)
    square, wide = {(17, 32, 32), (1, 32, 32)}, {(9, 20, 36)}
    want = {f"film {k}": square if k < 2 else wide for k in range(4)}
    assert kinds == {caption: want[caption] for caption in kinds}
    with runtime(config, tmp_path) as made:
        cache = stages.cache_latents(config, made, vae)
        assert len(cache) == min(len(clips), CLIPS)
        assert [cache[i]["fps"] for i in range(4)] == [clips[i]["fps"] for i in range(4)]
        stages.train_dit(config, made, cache)
    losses = [row["loss"] for row in read(tmp_path) if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    config.data.shapes = (*config.data.shapes, (17, 40, 24, 10.0))
    with pytest.raises(UserError, match=r"\(17, 40, 24, 10.0\): every film .* suits better"):
        sources.training_clips(config, tmp_path)


def test_a_row_that_is_too_short_for_a_clip_is_refused(cached: Path) -> None:
    config = small()
    config.dit.pack = (40, 0, 0)
    encoder = build_text_encoder(config, build_tokenizer(config, cached))
    with runtime(config, cached) as made, pytest.raises(UserError, match="allowed: 40"):
        stages.packed_rows(config, made, Latents(cached / "latents"), encoder, "ids")
