"""Stage latents: encodes the data set into the latent cache.

Dimension key: B clips, T frames, H height, W width, Z latent channels.
"""

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vdit.config.autoencoder import build_vae
from vdit.config.classes import write_classes
from vdit.config.denoiser import (
    build_dit,
    build_image_encoder,
    conditions_content,
    targets,
    token_pixels,
)
from vdit.config.identity import digest, stage_fields
from vdit.config.text import build_text_encoder, build_tokenizer, text_content
from vdit.data import sources
from vdit.data.clips import tell_skipped
from vdit.data.latents import Elements, Latents, by_kind, is_complete, read_manifest, write_cache
from vdit.data.loader import ahead
from vdit.errors import Interrupted, UserError
from vdit.initial import take_tokenizer
from vdit.models.autoencoder import encode_in_chunks
from vdit.models.text import encode_features
from vdit.models.wan import begun_with
from vdit.nn.patch import pad_to_multiple, to_float
from vdit.runtime.files import read_cache, write_text
from vdit.runtime.fingerprint import fingerprint
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import batch_sharding, local_mesh, make_mesh, spread, to_local
from vdit.runtime.processes import agreed, together, zero_first
from vdit.runtime.progress import Progress
from vdit.tokens import extra_spans, patterns, shot_list
from vdit.train import Params, Runtime

TOKENIZER_CAPTIONS = 4096  # captions from which the tokenizer is learned


def cache_latents(config: ConfigDict, runtime: Runtime, vae_params: Params) -> Latents:
    """Stage latents: caches each clip's latents, its extra spans' and its caption's ids."""
    folder = runtime.workdir / "latents"
    with zero_first("clips"):
        clips = sources.training_clips(config, runtime.workdir)
    if config.data.shapes or "vae" not in config.stages:  # else the stage vae has printed it
        tell_skipped(clips)
    # Files can change under the same configuration: the cache depends on their digest.
    content = text_content(config) | {"content": getattr(clips, "digest", "")}
    if "truth" in targets(config):
        content["truth"] = "with"
    if config.dit.lora.rank:  # fields say how the autoencoder was trained, unless it is a base's
        content["vae"] = fingerprint(vae_params["vae"])
    if build_dit(config).beside:
        content |= conditions_content(config) | {"beside": "with"}
    mine = digest(stage_fields(config, "latents") | content)
    count = min(config.latents.clips, len(clips))
    if agreed(_is_finished(folder, mine, count)):
        return _verified(folder)
    encoder = ClipEncoder(config, runtime, vae_params, clips)
    process = jax.process_index(), jax.process_count()
    with Progress("latents", count, active=process[0] == 0) as progress:
        done = write_cache(
            folder, mine, count, config.latents.shard, encoder.shard, progress.update,
            lambda: runtime.preemption.reached(0), process, together,
        )  # fmt: skip
    if not done:
        raise Interrupted("stage latents: stopped; whole shards are kept; run again")
    return _verified(folder)  # which may hold shards of an earlier run


def _is_finished(folder: Path, digest: str, count: int) -> bool:
    """Whether a cache of `count` clips is complete; `UserError` if its digest is another."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    if manifest["digest"] != digest:
        raise UserError(
            f"{folder} was made from another data set, VAE or text encoder, or for other"
            " dit.auxiliary; delete it or choose another --workdir"
        )
    return manifest["count"] == count and is_complete(folder, manifest)


def _verified(folder: Path) -> Latents:
    """A finished cache, its shards checked against their digests."""
    cache = Latents(folder)
    cache.verify(jax.process_index(), jax.process_count())
    return cache


class ClipEncoder:
    """Turns clips into elements of the cache, on the devices of this process."""

    def __init__(self, config: ConfigDict, runtime: Runtime, vae_params: Params, clips: Any):
        self._clips, self._data, self._batch = clips, config.data, config.latents.batch
        self._kind = getattr(clips, "kind", lambda index: 0)
        self._patch = tuple(config.vae.patch)
        self._truth = (
            sources.known(config, "truth", "dit.auxiliary") if "truth" in targets(config) else None
        )
        self._captions = CaptionEncoder(config, runtime.workdir, clips)
        self._videos = VideoEncoder(config, runtime, vae_params)
        # Image to video: the first frame's latents beside the noisy ones, and its features
        self._beside, self._images = build_dit(config).beside > 0, build_image_encoder(config)
        self._image_params = None if self._images is None else self._images.load()

    def shard(self, indices: range) -> Elements:
        """The elements of clips, in order; clips of one shape are encoded together."""
        return by_kind(indices, self._kind, self._alike)

    def _alike(self, indices: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """The elements of clips of one shape.

        While the device encodes a batch, the previous one is written and the next one is read.
        """
        shapes = self._data.shapes
        frames = int(shapes[self._kind(indices[0])][0]) if shapes else self._data.frames
        size = self._videos.batch_size(self._batch, frames)

        def read(start: int) -> tuple[list[Mapping[str, Any]], np.ndarray]:
            rows = [self._clips[i] for i in indices[start : start + size]]
            video = np.stack([row["video"] for row in rows])
            return rows, np.resize(video, (size, *video.shape[1:]))  # one shape, one compilation

        before = None
        for rows, video in ahead(read, range(0, len(indices), size)):
            encoded = self._videos.encode(video), self._image(video)
            if before is not None:
                yield from self._elements(*before)
            before = rows, encoded
        if before is not None:
            yield from self._elements(*before)

    def _image(self, video_BTHW3: np.ndarray) -> dict[str, jax.Array]:
        """ "beside" and "image" of clips, as `objectives.diffusion.Dense` takes them."""
        if not self._beside:
            return {}
        first, count = video_BTHW3[:, 0], video_BTHW3.shape[1]
        found = {"beside": self._videos.encode_alone(begun_with(first, count))}
        if self._images is not None:
            features = self._images.features(self._image_params, [*first])
            found["image"] = features.astype(jnp.float16)
        return found

    def _elements(
        self, rows: Sequence[Mapping[str, Any]], encoded: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        captions = self._captions.encode(rows)
        (latent, variance), image = jax.tree.map(np.asarray, encoded)
        for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            element = {"latent": latent[i], "variance": variance[i]} | caption
            element |= {name: value[i] for name, value in image.items()}
            if "fps" in row:  # data.shapes
                element["fps"] = np.float32(row["fps"])
                element["frames"] = np.int32(self._videos.latent_frames(len(row["video"])))
            if "label" in row:
                element["label"] = row["label"]
            if self._truth is not None:
                count = self._videos.latent_frames(len(row["video"]))
                element["truth"] = truth_of_latents(self._truth(row), count, self._patch)
            yield element


def truth_of_latents(truth_TNF: np.ndarray, count: int, patch: tuple[int, int, int]) -> np.ndarray:
    """The truth at the middle of each latent frame of a clip of `count`, extra spans included:
    float16 (stored, N, F), its places in rows and columns of latents."""
    at = patterns(count, patch[0], 1.0).times  # in frames
    low, high = np.floor(at).astype(int), np.ceil(at).astype(int)
    truth = truth_TNF[low] + (at - low)[:, None, None] * (truth_TNF[high] - truth_TNF[low])
    truth[..., 1:3] /= patch[1:]
    return truth.astype(np.float16)


def _texts(
    config: ConfigDict, clips: Any, indices: range, what: str = "clip"
) -> Iterator[tuple[str, str]]:
    """(where, caption) of clips, with those of their shots; of all clips where the source knows
    them without reading videos."""
    if hasattr(clips, "texts") or not indices:
        yield from clips.texts() if indices else ()
        return
    shots = sources.most_shots(config)
    with Progress(f"captions of {what}s", len(indices)) as progress:
        for done, i in enumerate(indices):
            for text in shot_list(clips[i], shots)[0]:
                yield f"{what} {i} of data.source={config.data.source}", text
            progress.update(done + 1)


def _first_captions(config: ConfigDict, clips: Any) -> Iterator[str]:
    """The captions that a tokenizer is learned from."""
    first = range(min(TOKENIZER_CAPTIONS, len(clips)))
    if hasattr(clips, "caption"):
        return (clips.caption(i) for i in first)
    shots = sources.most_shots(config)
    return (text for i in first for text in shot_list(clips[i], shots)[0])


def check_captions(config: ConfigDict, workdir: Path, clips: Any) -> None:
    """Refuses (UserError) captions over text.length of the training clips and of the held-out ones
    that the run samples and scores, before anything is trained.

    Where a clip is read for its caption, those that the tokenizer is learned from are enough unless
    one is near the limit. Writes the tokenizer, and captions.json: that the captions have passed.
    """
    if config.text.encoder == "none":
        return
    if config.data.shapes:
        clips = sources.training_clips(config, workdir)
    scored = [config.sample.clips] if "sample" in config.stages else []
    scored += [config.eval.captions, config.eval.given] if "eval" in config.stages else []
    heldout = sources.source(config, "heldout", workdir) if scored else ()
    content = text_content(config) | {"scored": scored}
    content |= {"digests": [getattr(x, "digest", "") for x in (clips, heldout)]}
    mine, passed = digest(stage_fields(config, "latents") | content), workdir / "captions.json"
    kept, file = read_cache(passed).get("digest"), workdir / "tokenizer.json"
    if kept == mine and (file.exists() or config.text.path):
        return
    begun = any((workdir / name).exists() for name in ("latents", "checkpoints/dit"))
    known = file.exists() and (begun or not kept)  # else a tokenizer of other captions
    first, shots = range(min(TOKENIZER_CAPTIONS, len(clips))), sources.most_shots(config)
    texts = list(_texts(config, clips, first))
    all_of = [text for _, text in texts]
    used, named = min(config.latents.clips, len(clips)), hasattr(clips, "texts")
    if not named:
        texts = texts[: used * (1 + shots)]
    tried = range(min(max(scored, default=0), len(heldout)))
    texts += _texts(config, heldout, tried, "held-out clip")
    with tempfile.TemporaryDirectory() as place:
        take_tokenizer(config, Path(place))
        make = functools.partial(_first_captions, config, clips) if named else lambda: all_of
        tokenizer = build_tokenizer(config, workdir if known else Path(place), make)
        new = Path(place) / file.name
        learned = new.read_text(encoding="utf-8") if new.exists() else ""
    tokens = {text: (tokenizer.count(text), where) for where, text in texts}
    if not named and max(tokens.values())[0] > 0.9 * tokenizer.length:
        rest = _texts(config, clips, range(first.stop, used))
        tokens |= {text: (tokenizer.count(text), where) for where, text in rest}
    if wrong := [counted for counted in tokens.values() if counted[0] > tokenizer.length]:
        (longest, where), more = max(wrong), f" (one of {len(wrong)})" if wrong[1:] else ""
        raise UserError(
            f"{where}: its caption is {longest} tokens long{more}; config.text.length allows"
            f" {config.text.length}"
        )
    if learned:
        write_text(file, learned)
    write_text(passed, json.dumps({"digest": mine}))


class CaptionEncoder:
    """Token ids of captions and, with `latents.features`, a frozen text encoder's features."""

    def __init__(self, config: ConfigDict, workdir: Path, clips: Any):
        self._shots = sources.most_shots(config)

        with zero_first("tokenizer"):
            if classes := getattr(clips, "classes", None):
                write_classes(config, workdir, classes)
            captions = functools.partial(_first_captions, config, clips)
            self._tokenizer = build_tokenizer(config, workdir, captions)
        self._encoder = build_text_encoder(config, self._tokenizer)
        self._params: Any = None
        if self._encoder.frozen and config.latents.features:
            empty = np.zeros((1, self._tokenizer.length), np.int32)
            with host_memory():
                params = self._encoder.init(jax.random.key(0), empty, empty > 0)
            # One device may not hold a large encoder: all of this process do together.
            self._params = spread(make_mesh({"fsdp": -1}, jax.local_devices()), params)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The "ids", "mask" and, if they are cached, "features" of each clip's caption.

        With shots the arrays have a row for the clip and one for each shot; "starts" are theirs.
        """
        texts, starts = zip(*(shot_list(row, self._shots) for row in rows), strict=True)
        ids, mask = self._tokenizer.encode([text for shots in texts for text in shots], "caption")
        arrays = {"ids": ids, "mask": mask}
        if self._params is not None:
            features = encode_features(self._encoder, self._params, ids, mask)
            arrays["features"] = features.astype(np.float16)
        if self._shots:
            shape = len(rows), 1 + self._shots
            arrays = {name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()}
            arrays["starts"] = np.stack(starts)
        return [{name: x[i] for name, x in arrays.items()} for i in range(len(rows))]


class VideoEncoder:
    """The autoencoder's encoder; a batch is sharded over the devices of this process."""

    def __init__(self, config: ConfigDict, runtime: Runtime, vae_params: Params):
        self._mesh = local_mesh(runtime.mesh, config.latents.batch)
        self._model = build_vae(config, self._mesh if self._mesh.size > 1 else None)
        self._patch, self._chunk = config.vae.patch[0], config.vae.chunk
        params = to_local(runtime.mesh, vae_params, self._mesh)["vae"]
        pixels = token_pixels(config)
        encode = jax.jit(functools.partial(_encode_chunk, self._model, pixels))
        self._encode_chunk = functools.partial(encode, params=params)

    def batch_size(self, most: int, frames: int) -> int:
        """Clips a batch: at most `most`, fewer of long clips, a multiple of the devices."""
        clips = min(most, most * self._chunk * self._patch // frames)
        return self._mesh.size * max(1, clips // self._mesh.size)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip without its extra spans."""
        return self._model.latent_shape(frames, 1, 1)[0]

    def encode(self, video_BTHW3: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Latents of clips followed by those of their extra spans, each encoded separately, and
        the posterior's variance (B, Z), a mean over positions."""
        with jax.set_mesh(self._mesh):
            video = jax.device_put(video_BTHW3, batch_sharding(self._mesh))
            spans = extra_spans(self.latent_frames(video.shape[1]), self._patch)
            parts = [video, *(video[:, first : first + n] for first, n in spans)]
            encoded = [
                encode_in_chunks(self._encode_chunk, part, self._patch, self._chunk)
                for part in parts
            ]
            latent, variance = jnp.split(jnp.concatenate(encoded, axis=1), 2, axis=-1)
            return latent.astype(jnp.float16), variance.mean((1, 2, 3))

    def encode_alone(self, video_BTHW3: np.ndarray) -> jax.Array:
        """Latents of clips, without extra spans."""
        with jax.set_mesh(self._mesh):
            video = jax.device_put(video_BTHW3, batch_sharding(self._mesh))
            encoded = encode_in_chunks(self._encode_chunk, video, self._patch, self._chunk)
            return jnp.split(encoded, 2, axis=-1)[0].astype(jnp.float16)


def _encode_chunk(
    model: Any, pixels: tuple[int, int], video: jax.Array, state: Any, params: Any
) -> tuple[jax.Array, Any]:
    """Mean and variance of a chunk, concatenated along channels, and the encoder's state."""
    video = to_float(pad_to_multiple(video, pixels))
    mean, log_variance, state = model.apply({"params": params}, video, state, method=model.encode)
    return jnp.concatenate([mean, jnp.exp(log_variance)], axis=-1), state
