"""The latent cache: the data set of the DiT, encoded once.

A cache is a folder of ArrayRecord shards, a summary of each, and a manifest with the digest of all
that the content depends on. Shards are written atomically, so an interrupted encoding resumes at
the first missing shard. Process i of N writes shards i, i + N, ...
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeGuard

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from grain.sources import ArrayRecordDataSource

from vdit.data.packing import Sizes
from vdit.errors import UserError
from vdit.models.chunks import row_places
from vdit.runtime.files import appears, atomic_path, write_text

LEAST = 0.05  # precision of a collapsed channel; others have about 1 to 100
MANIFEST = "manifest.json"
SHARD = re.compile(r"[\w.-]+\.array_record")

Elements = Iterable[Mapping[str, np.ndarray]]
Encode = Callable[[range], Elements]


class Latents:
    """Random access to a finished cache; an element is a dict of arrays."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} holds no finished latent cache; run the stage latents")
        self.manifest: dict[str, Any] = manifest
        paths = [self.folder / name for name in manifest["shards"]]
        for path, summary in zip(paths, self._summaries(), strict=True):
            size = path.stat().st_size if path.exists() else "no"
            if size != summary["bytes"]:
                raise damaged(path, f"has {size} bytes instead of {summary['bytes']}")
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError as error:
            self._blame(error)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        try:
            return serialization.msgpack_restore(self._records[index])
        except RuntimeError as error:
            self._blame(error)

    def _summaries(self) -> Iterator[dict[str, Any]]:
        return (_summary(self.folder, name) for name in self.manifest["shards"])

    def _blame(self, error: RuntimeError) -> NoReturn:
        """Raises a `UserError` that names the damaged shard, else `error`."""
        self.verify()
        raise error

    def verify(self, index: int = 0, count: int = 1) -> None:
        """Checks the digests of shards index, index + count, ...; a `UserError` names a bad one."""
        for name in self.manifest["shards"][index::count]:
            if _sha256(self.folder / name) != _summary(self.folder, name)["sha256"]:
                raise damaged(self.folder / name, "is not what was written")

    def sizes(self, patch: tuple[int, int]) -> Sizes:
        """Tokens and caption tokens of every clip, from the summaries; `patch` is rows, columns.

        Raises `UserError` for latents that do not divide into patches.
        """
        # Extra spans, stored behind a clip, replace as many of its latent frames.
        shapes, text = [], []
        for row in self._summaries():
            shapes += [(n, *s[1:]) for s, n in zip(row["shapes"], row["frames"], strict=True)]
            text += row["text"]
        shape_N3 = np.array(shapes)
        if (shape_N3[:, 1:] % np.array(patch)).any():
            raise UserError(f"dit.patch {patch} does not divide latents of {self.folder}")
        return Sizes(shape_N3.prod(1) // (patch[0] * patch[1]), np.array(text))

    def longest(self) -> tuple[int, int] | None:
        """Token places for the longest caption of a clip and of a shot, rounded up to 8.

        At most those that are stored; None if the summaries lack them.
        """
        rows = list(self._summaries())
        if not all("longest" in row for row in rows):
            return None
        stored = self[0]["mask"].shape[-1]
        most = np.max([row["longest"] for row in rows], axis=0).tolist()
        clip, shot = (min(-(-max(places, 1) // 8) * 8, stored) for places in most)
        return clip, shot

    def statistics(self) -> dict[str, np.ndarray]:
        """The "mean" and "std" (Z,) with which latents are normalised."""
        return {name: np.asarray(self.manifest[name], np.float32) for name in ("mean", "std")}


def units(variance_Z: np.ndarray, noise_Z: np.ndarray | None) -> np.ndarray:
    """Divisors (Z,) of the latents' channels, which bring the mean variance to 1.

    `variance_Z` is that of the latents, `noise_Z` that of the autoencoder's posterior. Where
    reconstruction error and KL balance, a squared error in a channel costs in proportion to
    1 / noise - 1 (zero derivative by the noise: Kingma and Welling 2014, Appendix B). In these
    units equal errors cost alike, precise channels emerge from a sampler's noise first, and
    collapsed channels stay near zero, where unit variance would make their noise count as much as
    any signal. Without `noise_Z` all channels share one divisor (Rombach et al. 2022).
    """
    precision = np.ones_like(variance_Z)
    if noise_Z is not None:
        precision = np.maximum(1.0 / np.maximum(noise_Z, 1e-8) - 1.0, LEAST)
    scale = np.sqrt(max(float((variance_Z * precision).mean()), 1e-12))
    return scale / np.sqrt(precision)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a finished cache, or None."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete its folder") from error
    if not _is_manifest(manifest):
        raise UserError(f"{path} is no manifest of a latent cache; delete its folder")
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether the fields are complete, and the shards are file names in the folder."""
    if not isinstance(value, dict) or "digest" not in value:
        return False
    shards, mean, std = (value.get(name) for name in ("shards", "mean", "std"))
    return (
        isinstance(value.get("count"), int)
        and isinstance(shards, list)
        and all(isinstance(name, str) and SHARD.fullmatch(name) for name in shards)
        and _are_numbers(mean, float)
        and _are_numbers(std, float)
        and len(mean) == len(std)
    )


def _is_summary(value: Any) -> bool:
    """Whether the fields are those that `_write_shard` writes."""
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
        return False
    shapes, longest = value.get("shapes"), value.get("longest", [0, 0])
    lists = {name: float for name in ("sum", "square", "noise")} | {"text": int, "frames": int}
    return (
        all(_are_numbers(value.get(name), kind) for name, kind in lists.items())
        and _are_numbers([value.get("number"), value.get("bytes")], int)
        and _are_numbers(longest, int)
        and len(longest) == 2
        and isinstance(shapes, list)
        and all(_are_numbers(shape, int) and len(shape) == 3 for shape in shapes)
        and len(value["text"]) == len(value["frames"]) == len(shapes)
    )


def _are_numbers(values: Any, kind: type) -> TypeGuard[list[float]]:
    """Whether it is a list of finite numbers; for int, of integers from 0 on."""
    allowed = (int,) if kind is int else (int, float)
    return isinstance(values, list) and all(
        type(value) in allowed and abs(value) < 1e30 and (kind is float or value >= 0)
        for value in values
    )


def is_complete(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> bool:
    """Whether every shard of a finished cache and its summary exist."""
    names = [name for shard in manifest["shards"] for name in (shard, f"{shard}.json")]
    return all((Path(folder) / name).exists() for name in names)


def damaged(path: Path, how: str) -> UserError:
    """The error for a shard that is not as it was written."""
    return UserError(f"{path} {how}; delete it and run again: it alone is encoded again")


def _summary(folder: Path, shard: str) -> dict[str, Any]:
    path = folder / f"{shard}.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    if not _is_summary(summary):
        raise damaged(path, "is no summary of a shard")
    return summary


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_kind(
    indices: Sequence[int], kind: Callable[[int], int], encode: Callable[[list[int]], Elements]
) -> Elements:
    """The elements of `indices` in order; `encode` gets those of one kind together."""
    buckets: dict[int, list[int]] = {}
    for index in indices:
        buckets.setdefault(kind(index), []).append(index)
    encoded = {name: iter(encode(bucket)) for name, bucket in buckets.items()}
    for index in indices:
        yield next(encoded[kind(index)])


def write_cache(
    folder: str | os.PathLike[str], digest: str, count: int, shard_size: int, encode: Encode,
    progress: Callable[[int], None] = lambda done: None, stop: Callable[[], bool] = lambda: False,
    process: tuple[int, int] = (0, 1), together: Callable[[str], None] = lambda what: None,
) -> bool:  # fmt: skip
    """Fills a cache with `count` elements, shard by shard; False if `stop` ended it early.

    `encode(indices)` yields the elements of one shard, in order. Each has "latent"
    (stored, h, w, Z) and may have the caption's "mask" and "frames", the number of latent frames
    without extra spans; shapes may vary. The posterior's "variance" (Z,) is not stored, but sets
    the `units` of the channels. Statistics come from the shards' sums, so a resumed encoding ends
    with the same manifest as an uninterrupted one.

    `process` is (index, count). All processes call `stop` equally often, `together` is their
    barrier, and process 0 writes the manifest.
    """
    folder = Path(folder)
    index, of = process
    starts = range(0, count, shard_size)
    names = [f"{digest[:12]}-{start:08d}.array_record" for start in starts]
    for first in range(0, len(names), of):
        if stop():
            return False
        mine = first + index
        if mine < len(names):
            indices = range(starts[mine], min(starts[mine] + shard_size, count))
            _write_shard(folder, names[mine], indices, encode)
        progress(min((first + of) * shard_size, count))
    together("shards")
    if index == 0:
        write_text(folder / MANIFEST, json.dumps(_manifest(folder, digest, count, names), indent=1))
    together("manifest")
    appears(folder / MANIFEST)
    return True


def _write_shard(folder: Path, name: str, indices: range, encode: Encode) -> None:
    """Writes a shard and its summary, unless both exist."""
    summary = folder / f"{name}.json"
    if summary.exists() and (folder / name).exists():
        return
    total, square, noise, number = np.zeros(()), np.zeros(()), np.zeros(0), 0
    shapes, frames, text, longest = [], [], [], np.zeros(2, int)
    with atomic_path(folder / name) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for element in encode(indices):
            stored = {key: value for key, value in element.items() if key != "variance"}
            writer.write(serialization.msgpack_serialize(stored))
            flat = np.asarray(element["latent"], np.float64)
            flat = flat.reshape(-1, flat.shape[-1])
            total, square = total + flat.sum(0), square + np.square(flat).sum(0)
            number += len(flat)
            if "variance" in element:
                each = len(flat) * np.asarray(element["variance"], np.float64)
                noise = noise + each if noise.size else each
            shapes.append(list(element["latent"].shape[:3]))
            frames.append(int(element.get("frames", len(element["latent"]))))
            places = np.atleast_1d(row_places(element.get("mask", np.zeros(1, bool))))
            text.append(int(places.sum()))
            longest = np.maximum(longest, [places[0], places[1:].max(initial=0)])
        writer.close()
        if not np.isfinite(square).all():
            raise UserError(
                f"{folder}: the autoencoder's latents are not finite; train stage vae anew, with"
                " a smaller config.vae.train.learning_rate and another --workdir"
            )
        content = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
    content |= {"sum": total.tolist(), "square": square.tolist(), "number": number}
    content |= {"noise": noise.tolist(), "shapes": shapes, "frames": frames, "text": text}
    write_text(summary, json.dumps(content | {"longest": longest.tolist()}))


def _manifest(folder: Path, digest: str, count: int, names: list[str]) -> dict[str, Any]:
    """The manifest of a cache whose shards are complete."""
    for name in names:
        appears(folder / f"{name}.json")
    rows = [_summary(folder, name) for name in names]
    number = sum(row["number"] for row in rows)
    mean = np.sum([row["sum"] for row in rows], axis=0) / number
    variance = np.sum([row["square"] for row in rows], axis=0) / number - mean**2
    noise = np.sum([row["noise"] for row in rows], axis=0) / number if rows[0]["noise"] else None
    std = units(np.maximum(variance, 0.0), noise)
    manifest = {"digest": digest, "count": count, "shards": names}
    return manifest | {"mean": list(mean), "std": list(std)}
