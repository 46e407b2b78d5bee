"""Batches: any random-access source, shuffled, repeated, batched, with a state to resume from."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, SupportsIndex

import grain
import jax
import numpy as np


class Source(Protocol):
    """What data sources are: random access by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]: ...


def batches(
    source: Source,
    batch: int,
    seed: int,
    fields: tuple[str, ...],
    threads: int = 1,
    shuffle: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless iterator over batches of this process's share of the source.

    Every element carries "ordinal" (uint32), its number in the stream of all processes: noise is
    keyed by it. The order does not depend on the number of threads; the iterator's state is a
    position in the stream (grain's `get_state` and `set_state`).
    """
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat(None).map_with_index(
        lambda index, element: {
            **{name: element[name] for name in fields},
            "ordinal": np.uint32(index % 2**32),
        }
    )
    dataset = dataset[jax.process_index() :: jax.process_count()]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch)
    return iter(dataset.to_iter_dataset(options).batch(batch // jax.process_count()))
