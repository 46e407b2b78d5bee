"""The latent cache: what the DiT trains on, encoded once.

A cache is a folder of ArrayRecord shards and a manifest with the digest of everything that its
content depends on. Shards are written whole or not at all, so an interrupted encoding goes on
with the first shard that is missing.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from grain.sources import ArrayRecordDataSource

from vdit.errors import UserError
from vdit.runtime.files import atomic_path, write_text

MANIFEST = "manifest.json"


class Latents:
    """Random access to a finished cache; the element is a dict of arrays."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if self.manifest is None:
            raise UserError(f"{folder} holds no finished latent cache; run the stage latents")
        self._records = ArrayRecordDataSource(
            [str(self.folder / name) for name in self.manifest["shards"]]
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        return serialization.msgpack_restore(self._records[index])

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean and standard deviation (Z,) of the clips' latents."""
        assert self.manifest is not None
        return {name: np.asarray(self.manifest[name], np.float32) for name in ("mean", "std")}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a finished cache, or None."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete its folder") from error


def write_cache(
    folder: str | os.PathLike[str],
    digest: str,
    count: int,
    shard_size: int,
    encode: Callable[[range], Iterable[Mapping[str, np.ndarray]]],
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Fills a cache with `count` elements, shard by shard; False if `stop` asked to leave early.

    `encode(indices)` yields the elements of one shard, in order; each has "latent"
    (stored, h, w, Z). Mean and deviation are taken over the shards' stored sums, so a resumed
    encoding ends with the same manifest as one that was never stopped.
    """
    folder = Path(folder)
    shards, sums = [], []
    for start in range(0, count, shard_size):
        if stop():
            return False
        name = f"{digest[:12]}-{start:08d}.array_record"
        indices = range(start, min(start + shard_size, count))
        summary = folder / f"{name}.json"
        if not summary.exists() or not (folder / name).exists():
            total, square, number = np.zeros(()), np.zeros(()), 0
            with atomic_path(folder / name) as temporary:
                writer = ArrayRecordWriter(str(temporary), "group_size:1")
                for element in encode(indices):
                    writer.write(serialization.msgpack_serialize(dict(element)))
                    flat = np.asarray(element["latent"], np.float64)
                    flat = flat.reshape(-1, flat.shape[-1])
                    total, square = total + flat.sum(0), square + np.square(flat).sum(0)
                    number += len(flat)
                writer.close()
            sums_row = {"sum": total.tolist(), "square": square.tolist(), "number": number}
            write_text(summary, json.dumps(sums_row))
        shards.append(name)
        sums.append(json.loads(summary.read_text(encoding="utf-8")))
        progress(indices.stop)
    number = sum(row["number"] for row in sums)
    mean = np.sum([row["sum"] for row in sums], axis=0) / number
    variance = np.sum([row["square"] for row in sums], axis=0) / number - mean**2
    manifest = {
        "digest": digest,
        "count": count,
        "shards": shards,
        "mean": list(mean),
        "std": list(np.sqrt(np.maximum(variance, 1e-12))),
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return True
