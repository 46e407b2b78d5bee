"""Batches: any random-access source, shuffled, repeated, batched, with a state to resume from.

Dense batches of clips that are all alike (`batches`), and rows of clips of any size
(`PackedBatches`).
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, SupportsIndex, TypeVar

import grain
import numpy as np

from vdit.data.packing import Plan, Sample, Sizes, check_sizes, pack, plan_epoch
from vdit.errors import UserError
from vdit.tokens import Budget

Item = TypeVar("Item")
Made = TypeVar("Made")


class Source(Protocol):
    """What data sources are: random access by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]: ...


def batches(
    source: Source, batch: int, seed: int, fields: tuple[str, ...], threads: int = 1,
    shuffle: bool = True, process: tuple[int, int] = (0, 1),
) -> "Batches":  # fmt: skip
    """An endless iterator over batches of a share of the source.

    `process` is (index, count): the `batch` samples of a step are dealt round robin to so many
    shares, so a step has the same samples on any number of processes. Every element carries
    "ordinal" (uint32), its number in the stream of all: noise is keyed by it. The order does not
    depend on the number of threads. Raises `UserError` for a batch that cannot be shared evenly.
    """
    index, count = process
    check_share(f"batch of {batch}", batch, count)
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat(None).map_with_index(
        lambda index, element: {
            **{name: element[name] for name in fields},
            "ordinal": np.uint32(index % 2**32),
        }
    )
    share = batch // count
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * share)

    def begin(first: int) -> Iterator[dict[str, np.ndarray]]:
        return iter(dataset[first + index :: count].to_iter_dataset(options).batch(share))

    return Batches(begin, batch)


def check_share(name: str, batch: int, count: int) -> None:
    """Refuses a batch that processes cannot share evenly."""
    if batch < 1 or batch % count:
        raise UserError(f"{name} on {count} processes; allowed: a multiple of {count}")


def ahead(read: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """read(item) of each in turn; the next is read by a thread while one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[Made] | None = None
        for item in items:
            done, waiting = waiting, pool.submit(read, item)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()


class Batches(grain.DatasetIterator):
    """Batches from an element of the stream on; the state is the next one's number in it.

    That number is of all processes together, so another number of them can go on.
    """

    def __init__(self, begin: Callable[[int], Iterator[dict[str, np.ndarray]]], batch: int) -> None:
        super().__init__()
        self._begin, self._batch, self._next = begin, batch, 0
        self._iterator = begin(0)

    def __next__(self) -> dict[str, np.ndarray]:
        made = next(self._iterator)
        self._next += self._batch
        return made

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where another iterator was, on any number of processes."""
        self.close()
        self._next = int(state["next_index"])
        self._iterator = self._begin(self._next)

    def close(self) -> None:
        """Stops the threads."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()


class PackedBatches(grain.DatasetIterator):
    """An endless iterator over this process's rows of packed clips, "tokens" (B, L, C) and so on.

    `read(clip, ordinal)` gives the clip of that index as a `Sample`; it is called from `threads`
    threads. The stream is each epoch's rows (`packing.plan_epoch`) one after another, each clip
    once an epoch. A batch is the next `batch` rows of the stream, over all processes, dealt round
    robin: so the order of rows is the same on any number of processes, and the state is the number
    of the next row: an epoch and a row of it. An ordinal is the clip's number in the stream of
    clips as the epochs' shuffles give it.

    `process` is (index, count), as in `batches`. Raises `UserError` for clips that no row can
    hold, and for a batch that the processes cannot share evenly.
    """

    def __init__(
        self, read: Callable[[int, int], Sample], sizes: Sizes, budget: Budget, batch: int,
        seed: int, patch: tuple[int, int], threads: int = 1, process: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        # First, for an iterator that is refused is closed too.
        self._ahead: deque[tuple[list[Future], tuple[int, int]]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=threads)
        self._index, self._count = process
        check_share(f"batch of {batch} packed rows", batch, self._count)
        check_sizes(sizes, budget)
        self._read, self._budget, self._patch, self._batch = read, budget, patch, batch
        plan = functools.partial(plan_epoch, sizes, budget, seed)
        self.plan: Callable[[int], Plan] = functools.lru_cache(maxsize=2)(plan)  # of an epoch
        self._next = self._asked = (0, 0)  # epoch and row of the next batch: given out, read

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._ahead) < 2:  # one batch is read while another is used
            self._ask()
        rows, self._next = self._ahead.popleft()
        made = [row.result() for row in rows]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {"epoch": self._next[0], "row": self._next[1]}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where another iterator was, on any number of processes."""
        self._ahead.clear()
        self._next = self._asked = (int(state["epoch"]), int(state["row"]))

    def close(self) -> None:
        """Stops the threads, each after the row that it reads."""
        self._ahead.clear()
        # Not waited for: a forgotten iterator may be closed by one of these threads.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> None:
        """Begins to read the next batch."""
        epoch, row = self._asked
        rows = []
        for number in range(self._batch):
            if row == len(self.plan(epoch)):
                epoch, row = epoch + 1, 0
            plan = self.plan(epoch)
            if number % self._count == self._index:
                places = plan.row(row)
                first = epoch * len(plan.order)
                clips = [(int(plan.order[place]), first + int(place)) for place in places]
                rows.append(self._pool.submit(self._row, clips))
            row += 1
        self._asked = (epoch, row)
        self._ahead.append((rows, self._asked))

    def _row(self, clips: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        return pack([self._read(*clip) for clip in clips], self._budget, self._patch)
