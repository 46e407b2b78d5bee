"""Clips in chunks and frames in tiles: the same video, in memory that does not grow."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import FLAGS

from experiments.base import get_config
from vdit import show
from vdit.config import default, joined
from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import latent_shape, token_pixels
from vdit.config.text import Vocabulary, build_text_encoder
from vdit.errors import UserError
from vdit.models.autoencoder import decode_in_chunks, encode_in_chunks
from vdit.sample import Clip, Given, Model, Result, whole_spans
from vdit.show import write_result

MODELS = {"vivit": (2, 4, 4), "causal": (2, 4, 4), "kl": (1, 4, 4)}


def small_model(kind: str = "vivit") -> Model:
    """A random autoencoder, ready to decode; no denoiser."""
    config = get_config("smoke")
    config.run.dtype = "float32"
    config.vae.model, config.vae.patch = kind, MODELS[kind]
    config.vae.multipliers, config.vae.blocks, config.vae.groups = (1, 1, 2), 1, 2
    config.vae.width, config.vae.channels, config.vae.window = 8, 3, 2
    vae = build_vae(config)
    shape = vae.latent_shape(1, 8, 8)
    args = jnp.zeros((1, 1, 8, 8, 3)), jnp.zeros((1, *shape))
    params = {"vae": jax.jit(vae.init)(jax.random.key(0), *args)["params"]}
    encoder = build_text_encoder(config, Vocabulary(300))
    statistics = {"mean": np.full(3, 0.1, np.float32), "std": np.full(3, 2.0, np.float32)}
    return Model(config, None, encoder, params, statistics)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_are_the_whole(kind: str) -> None:
    model, p = small_model(kind), MODELS[kind][0]
    video = jax.random.uniform(jax.random.key(1), (1, 1 + 6 * p, 10, 12, 3), minval=-1.0)
    apply = jax.jit(
        lambda method, x, state: model.codec.vae.apply(
            {"params": model.params["vae"]}, x, state, method=method
        ),
        static_argnums=0,
    )
    mean, _, _ = apply("encode", video, None)
    whole, _ = apply("decode", mean, None)
    calls = []

    def encode(x: Any, state: Any) -> Any:
        calls.append(x.shape[1])
        return apply("encode", x, state)[::2]

    found = encode_in_chunks(encode, video, p, 3)
    assert calls == [1 + 2 * p, 3 * p, p]
    np.testing.assert_allclose(found, mean, atol=1e-5)
    parts = list(
        decode_in_chunks(lambda *x: apply("decode", *x), mean, MODELS[kind], chunk=3, tile=0)
    )
    assert [part.shape[1] for part in parts] == calls
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_each_tile_carries_its_own_state() -> None:
    """A decoder whose frames are sums over all latents before, so far from all states alike."""
    patch = _, q, r = (2, 4, 2)
    latent = jax.random.normal(jax.random.key(0), (1, 5, 5, 6, 3))

    def decode(part: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        total = jnp.cumsum(part, axis=1) + (0.0 if state is None else state)
        assert max(part.shape[2:4]) <= 4
        return total.repeat(q, axis=2).repeat(r, axis=3), total[:, -1:]

    parts = list(decode_in_chunks(decode, latent, patch, chunk=2, tile=16))
    assert [part.shape[1] for part in parts] == [2, 2, 1]
    # Tiles that agree where they overlap are blended to the same: any seam would show.
    want = jnp.cumsum(latent, axis=1).repeat(q, axis=2).repeat(r, axis=3)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=1e-5)


def test_tiles_are_only_for_what_is_larger() -> None:
    model = small_model()
    latent = jax.random.normal(jax.random.key(2), (1, 3, 4, 5, 3))
    model.config.vae.tile = 0
    whole = model.decode(latent, 15, 20)
    assert whole.shape == (1, 5, 15, 20, 3)
    model.config.vae.tile = 20
    np.testing.assert_array_equal(model.decode(latent, 15, 20), whole)
    model.config.vae.tile = 16
    tiles = model.decode(latent, 15, 20)
    assert tiles.shape == whole.shape and (tiles != whole).any()


def test_given_frames_come_back_in_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av
    from PIL import Image

    monkeypatch.setattr(show, "PREVIEW", 20)
    model = small_model()
    latent = jax.random.normal(jax.random.key(3), (1, 24, 2, 2, 3))
    rng = np.random.default_rng(0)
    given = [Given(rng.integers(0, 255, (n, 8, 8, 3), np.uint8), at) for n, at in ((3, 0), (30, 5))]
    videos = {}
    for chunk in (2, 16, 1000):
        model.config.vae.chunk = chunk
        result = Result({"fps": 8}, lambda: model._parts(latent, given, 8, 8))
        assert len(list(result.parts())) == -(-latent.shape[1] // chunk)
        videos[chunk] = result.video
        np.testing.assert_array_equal(result.video[:3], given[0].video)
        np.testing.assert_array_equal(result.video[5:35], given[1].video)
    for video in videos.values():
        assert np.abs(video.astype(int) - videos[2]).max() <= 1  # rounding
    write_result(tmp_path / "a.mp4", result, 1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(videos[2])
    with Image.open(tmp_path / "a.webp") as image:
        assert 0 < getattr(image, "n_frames", 1) <= 20 < len(videos[2])


def test_what_is_shown_as_given_is_what_the_model_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    p, clip = 4, Clip(17, 10.0, 8, 8)
    model = small_model()
    model.config.vae.patch = (p, 4, 4)
    latent = np.zeros((17, 2, 2, 3), np.float32)
    encoded: list[np.ndarray] = []

    def encode(video: np.ndarray) -> np.ndarray:
        encoded.append(video[0])
        return np.zeros((1, 1 + (video.shape[1] - 1) // p, 2, 2, 3), np.float32)

    monkeypatch.setattr(model, "tokenizer", SimpleNamespace(encode=lambda texts, what="": None))
    monkeypatch.setattr(model, "text", lambda texts: (np.zeros((1, 1, 2)), np.zeros((1, 1, 2, 2))))
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "stream", lambda *_: [np.zeros((1, 17, 8, 8, 3), np.uint8)])
    for frames, at in itertools.product((1, 2, 4, 5, 7, 9, 30), (0, 3, 16)):
        video = np.random.default_rng(0).integers(1, 255, (frames, 8, 8, 3), np.uint8)
        encoded.clear()
        (ask,) = model.asks(["a ball"], clip, 1, 0, [Given(video, at)], ())
        inputs, _ = model._inputs([ask], clip)
        shown = model._result(ask, latent, clip, {}).video
        used = 1 + (min(frames, 17 - at) - 1) // p * p
        assert len(encoded) == 1 and np.array_equal(encoded[0], video[:used])
        assert np.array_equal(shown[at : at + used], video[:used])
        assert not shown[at + used :].any() and not shown[:at].any()
        assert int(np.asarray(inputs.given_Bn).sum()) == 1 + (used - 1) // p
        said = f"the first {used} of {frames} frames are used"
        assert (said in capsys.readouterr().out) == (used < frames)
    video = np.zeros((5, 8, 8, 3), np.uint8)
    assert len(whole_spans([Given(video, 8), Given(video, 3)], 17, p)[0]) == 2
    for frames in ((0, 0), (7, 3)):  # what is shown could be what one of both is alone
        with pytest.raises(UserError, match="given frames may not overlap"):
            whole_spans([Given(video, frame) for frame in frames], 17, p)


MEASURE = """
import json, sys
from pathlib import Path
import jax, numpy as np
import test_streaming as own
from vdit.sample import Result
from vdit.show import write_result

chunk, frames, folder = json.loads(sys.argv[1])
model = own.small_model("causal")
model.config.vae.chunk = chunk

def peak(frames):
    video = np.zeros((1, frames, 32, 32, 3), np.uint8)
    latent = jax.block_until_ready(model.encode(video))
    parts = lambda: model._parts(latent, (), 32, 32)
    write_result(Path(folder) / "a.mp4", Result({"fps": 24}, parts), 1)
    status = Path("/proc/self/status").read_text()  # rusage begins at the parent's peak
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

print(json.dumps([peak(n) for n in frames]))
"""


def measured(chunk: int, frames: list[int], folder: Path) -> list[float]:
    """Peak memory in MB of a process that encodes and writes clips, one after another."""
    root = Path(__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    env["XLA_FLAGS"] = FLAGS
    command = [sys.executable, "-c", MEASURE, json.dumps([chunk, frames, str(folder)])]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak")
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """17 frames and 1,441 by causal convolutions, in chunks of two latent frames; and as one chunk,
    which does grow."""
    short, long = measured(2, [17, 1441], tmp_path)
    whole = measured(1000, [17, 1441], tmp_path)[1]
    print(f"peak MB: 17 frames {short:.0f}, 1,441 {long:.0f}; whole {whole:.0f}")
    assert long < 1.2 * short
    assert whole - short > 3 * (long - short)


def test_what_is_no_chunk_or_tile_is_refused() -> None:
    for name, value in (("chunk", 0), ("tile", 16), ("tile", -1)):
        config = default()
        config.vae[name] = value
        with pytest.raises(UserError, match=f"vae.{name}"):
            joined.check(config)


def test_any_size_goes_with_any_patch_of_the_denoiser() -> None:
    """Places of 4x4 pixels, two by two in a token: 10x13 pixels are 16x16 to the denoiser."""
    model = small_model()
    model.config.dit.patch = (2, 2)
    assert token_pixels(model.config) == (8, 8)
    assert latent_shape(model.config, 3, 10, 13) == (2, 4, 4, 3)
    video = np.random.default_rng(0).integers(0, 255, (1, 3, 10, 13, 3), np.uint8)
    latent = model.encode(video)
    assert latent.shape == (1, 2, 4, 4, 3)
    # The last row and column stand for the picture's edges.
    edged = np.pad(video, ((0, 0), (0, 0), (0, 6), (0, 3), (0, 0)), mode="edge")
    np.testing.assert_array_equal(latent, model.encode(edged))
    assert model.decode(latent, 10, 13).shape == video.shape
    model.config.dit.patch = (1, 1)
    assert latent_shape(model.config, 3, 10, 13) == (2, 3, 4, 3)
