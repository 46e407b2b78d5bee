"""The latent cache: what the DiT trains on, encoded once.

A cache is a folder of ArrayRecord shards and a manifest with the digest of everything that its
content depends on. Shards are written whole or not at all, so an interrupted encoding goes on
with the first shard that is missing; several processes write every so manieth shard each.
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

LEAST = 0.05  # of a channel that is switched off, beside a precision of some 1 to 100
MANIFEST = "manifest.json"
SHARD = re.compile(r"[\w.-]+\.array_record")


class Latents:
    """Random access to a finished cache; the element is a dict of arrays."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if self.manifest is None:
            raise UserError(f"{folder} holds no finished latent cache; run the stage latents")
        for name in self.manifest["shards"]:
            summary, path = _summary(self.folder, name), self.folder / name
            there = path.stat().st_size if path.exists() else "no"
            if there != summary.get("bytes", there):
                raise damaged(path, f"has {there} bytes instead of {summary['bytes']}")
        paths = [str(self.folder / name) for name in self.manifest["shards"]]
        try:
            self._records = ArrayRecordDataSource(paths)
        except RuntimeError as error:
            self._blame(error)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        try:
            return serialization.msgpack_restore(self._records[index])
        except RuntimeError as error:
            self._blame(error)

    def _blame(self, error: RuntimeError) -> NoReturn:
        """Says which shard could not be read; raises `error` if all are as they were written."""
        self.verify()
        raise error

    def verify(self, index: int = 0, count: int = 1) -> None:
        """Compares shards index, index + count, ... with their digests; a bad one is named."""
        assert self.manifest is not None
        for name in self.manifest["shards"][index::count]:
            want = _summary(self.folder, name).get("sha256")
            if want is not None and _sha256(self.folder / name) != want:
                raise damaged(self.folder / name, "is not what was written")

    def sizes(self, patch: tuple[int, int]) -> Sizes:
        """Tokens of `patch` rows and columns, and caption tokens, of every clip: no record is read.

        Raises `UserError` for latents that do not divide into patches.
        """
        assert self.manifest is not None
        rows = []
        for name in self.manifest["shards"]:
            rows.append(row := _summary(self.folder, name))
            if "shapes" not in row:
                raise damaged(self.folder / f"{name}.json", "does not tell the clips' shapes")
        # Spans that are stored behind a clip take the place of as many of its own latent frames.
        shapes = np.array([
            (count or shape[0], *shape[1:])
            for row in rows
            for shape, count in zip(
                row["shapes"], row.get("frames", [0] * len(row["shapes"])), strict=True
            )
        ])  # fmt: skip
        if (shapes[:, 1:] % np.array(patch)).any():
            raise UserError(f"dit.patch {patch} does not divide latents of {self.folder}")
        text = np.array([count for row in rows for count in row["text"]])
        return Sizes(shapes.prod(1) // (patch[0] * patch[1]), text)

    def longest(self) -> tuple[int, int] | None:
        """Places of the longest caption of a clip, and of a shot, rounded up to a multiple of 8, in
        those that are stored; None of a cache that does not tell."""
        assert self.manifest is not None
        rows = [_summary(self.folder, name) for name in self.manifest["shards"]]
        if not all("longest" in row for row in rows):
            return None
        told = [row["longest"] for row in rows]
        stored = self[0]["mask"].shape[-1]
        clip, shot = (min(-(-max(of, 1) // 8) * 8, stored) for of in np.max(told, axis=0).tolist())
        return clip, shot

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean (Z,) of the clips' latents, and the deviation (Z,) that they are divided by."""
        assert self.manifest is not None
        return {name: np.asarray(self.manifest[name], np.float32) for name in ("mean", "std")}


def units(variance_Z: np.ndarray, noise_Z: np.ndarray | None) -> np.ndarray:
    """What each channel of latents is divided by: deviations (Z,), so that the mean variance is 1.

    `variance_Z` is that of the latents, `noise_Z` that of the autoencoder's posterior. Where the
    error of a reconstruction and its KL are balanced, an error in channel c costs as many pixels as
    1 / noise - 1 of it (the derivative by the noise, Kingma and Welling 2014, Appendix B, is zero).
    In these units equal errors cost alike, precise channels stand out of a sampler's noise first,
    and a channel that the KL has switched off stays near zero: with a deviation of one it would be
    noise that counts as much as any other. Without `noise_Z` all channels have one deviation, as
    in latent diffusion (Rombach et al. 2022).
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
    """Whether all is there, and the shards are names of files in the folder."""
    if not isinstance(value, dict) or not {"digest", "count", "shards"} <= value.keys():
        return False
    shards: Any = value["shards"]
    mean, std = value.get("mean"), value.get("std")
    return (
        isinstance(value["count"], int)
        and isinstance(shards, list)
        and all(isinstance(name, str) and SHARD.fullmatch(name) for name in shards)
        and _are_numbers(mean, float)
        and _are_numbers(std, float)
        and len(mean) == len(std)
    )


def _is_summary(value: Any) -> bool:
    """Whether what is told of a shard is what `write_cache` tells."""
    if not isinstance(value, dict) or "number" not in value:
        return False
    shapes: Any = value.get("shapes", [])  # older caches tell none
    text: Any = value.get("text", [])
    return (
        _are_numbers(value.get("sum"), float)
        and _are_numbers(value.get("square"), float)
        and _are_numbers(value.get("noise", []), float)
        and _are_numbers([value["number"], value.get("bytes", 0)], int)
        and _are_numbers(value.get("longest", [0, 0]), int)
        and len(value.get("longest", [0, 0])) == 2
        and isinstance(shapes, list)
        and all(_are_numbers(shape, int) and len(shape) == 3 for shape in shapes)
        and all(
            _are_numbers(counts, int) and len(counts) == len(shapes)
            for counts in (text, value.get("frames", text))
        )
    )


def _are_numbers(values: Any, kind: type) -> TypeGuard[list[float]]:
    """Whether it is a list of finite numbers; of whole ones of at least 0 where `kind` is int."""
    allowed = (int,) if kind is int else (int, float)
    return isinstance(values, list) and all(
        type(value) in allowed and abs(value) < 1e30 and (kind is float or value >= 0)
        for value in values
    )


def is_whole(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> bool:
    """Whether every shard of a finished cache is there, and what is told of it."""
    names = [name for shard in manifest["shards"] for name in (shard, f"{shard}.json")]
    return all((Path(folder) / name).exists() for name in names)


def damaged(path: Path, how: str) -> UserError:
    """What to say of a shard that is not as it was written."""
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
    indices: Sequence[int],
    kind: Callable[[int], int],
    encode: Callable[[list[int]], Iterator[Mapping[str, np.ndarray]]],
) -> Iterator[Mapping[str, np.ndarray]]:
    """The elements of `indices` in order, where `encode` is given those of one kind together."""
    buckets: dict[int, list[int]] = {}
    for index in indices:
        buckets.setdefault(kind(index), []).append(index)
    encoded = {name: encode(bucket) for name, bucket in buckets.items()}
    for index in indices:
        yield next(encoded[kind(index)])


def write_cache(
    folder: str | os.PathLike[str],
    digest: str,
    count: int,
    shard_size: int,
    encode: Callable[[range], Iterable[Mapping[str, np.ndarray]]],
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
    process: tuple[int, int] = (0, 1),
    together: Callable[[str], None] = lambda what: None,
) -> bool:
    """Fills a cache with `count` elements, shard by shard; False if `stop` asked to leave early.

    `encode(indices)` yields the elements of one shard, in order; each has "latent"
    (stored, h, w, Z) and may have "mask", the caption's, and "frames", how many of the stored are
    the clip's own; shapes may differ. "variance" (Z,), the posterior's, is not stored: with it
    channels are measured in `units`. Mean and deviation are taken over the shards' stored sums, so
    a resumed encoding ends with the same manifest as one that was never stopped.

    `process` is (index, count): of several, each writes every count-th shard and asks `stop` as
    often as the others do; `together` waits for all of them, and process 0 writes the manifest.
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


def _write_shard(
    folder: Path,
    name: str,
    indices: range,
    encode: Callable[[range], Iterable[Mapping[str, np.ndarray]]],
) -> None:
    """One shard and what is told of it, if they are not there."""
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
        told = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
    told |= {"sum": total.tolist(), "square": square.tolist(), "number": number}
    told |= {"noise": noise.tolist()}
    told |= {"shapes": shapes, "frames": frames, "text": text, "longest": longest.tolist()}
    write_text(summary, json.dumps(told))


def _manifest(folder: Path, digest: str, count: int, names: list[str]) -> dict[str, Any]:
    """What is told of a cache whose shards are all there."""
    for name in names:
        appears(folder / f"{name}.json")
    sums = [_summary(folder, name) for name in names]
    number = sum(row["number"] for row in sums)
    mean = np.sum([row["sum"] for row in sums], axis=0) / number
    variance = np.sum([row["square"] for row in sums], axis=0) / number - mean**2
    told = [row for row in sums if row.get("noise")]  # shards of before tell none
    places = sum(row["number"] for row in told)
    noise = np.sum([row["noise"] for row in told], axis=0) / places if told else None
    std = units(np.maximum(variance, 0.0), noise)
    return {
        "digest": digest,
        "count": count,
        "shards": names,
        "mean": list(mean),
        "std": list(std),
    }
