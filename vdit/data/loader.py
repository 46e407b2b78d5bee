"""Loading: endless shuffled batches of a random-access source, resumable from a state.

`batches` serves clips of one shape, `PackedBatches` rows of clips of any shape.
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
Result = TypeVar("Result")


class Source(Protocol):
    """A data source: random access by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]: ...


def batches(
    source: Source, batch: int, seed: int, fields: tuple[str, ...], threads: int = 1,
    shuffle: bool = True, process: tuple[int, int] = (0, 1),
) -> "Batches":  # fmt: skip
    """An endless iterator over this process's part of each batch.

    `process` is (index, count): a batch is dealt round robin to the processes, so a step has the
    same samples on any number of them. Each element carries "ordinal" (uint32), its number in the
    global stream: noise is keyed by it. The order does not depend on the number of threads. Raises
    `UserError` for a batch that does not divide among the processes.
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
    """Refuses a batch that does not divide among the processes."""
    if batch < 1 or batch % count:
        raise UserError(f"{name} on {count} processes; allowed: a multiple of {count}")


def ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields read(item) for each item; a thread reads the next one while one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[Result] | None = None
        for item in items:
            done, waiting = waiting, pool.submit(read, item)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()


class Batches(grain.DatasetIterator):
    """Batches of a stream; the state is the number of the next element in the global stream, so
    a run can resume on another number of processes."""

    def __init__(self, begin: Callable[[int], Iterator[dict[str, np.ndarray]]], batch: int) -> None:
        super().__init__()
        self._begin, self._batch, self._next = begin, batch, 0
        self._iterator = begin(0)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._next += self._batch
        return batch

    def get_state(self) -> dict[str, int]:
        """The start of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resumes from the state of another iterator, on any number of processes."""
        self.close()
        self._next = int(state["next_index"])
        self._iterator = self._begin(self._next)

    def close(self) -> None:
        """Stops the threads."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()


class PackedBatches(grain.DatasetIterator):
    """An endless iterator over this process's rows of packed clips, "tokens" (B, L, C) and so on.

    `read(clip, ordinal)` returns a clip as a `Sample`; `threads` threads call it. The stream is the
    rows of each epoch (`packing.plan_epoch`) in turn, with each clip once an epoch. A batch is the
    next `batch` rows, dealt round robin to the processes, so their order is the same on any number
    of processes; the state is the next row's epoch and number. An ordinal is the clip's number in
    the shuffled stream of clips.

    `process` is (index, count), as in `batches`. Raises `UserError` for clips that fit no row, and
    for a batch that does not divide among the processes.
    """

    def __init__(
        self, read: Callable[[int, int], Sample], sizes: Sizes, budget: Budget, batch: int,
        seed: int, patch: tuple[int, int], threads: int = 1, process: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        # First: an iterator whose arguments are refused is closed too.
        self._ahead: deque[tuple[list[Future], tuple[int, int]]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=threads)
        self._index, self._count = process
        check_share(f"batch of {batch} packed rows", batch, self._count)
        check_sizes(sizes, budget)
        self._read, self._budget, self._patch, self._batch = read, budget, patch, batch
        plan = functools.partial(plan_epoch, sizes, budget, seed)
        self.plan: Callable[[int], Plan] = functools.lru_cache(maxsize=2)(plan)  # of an epoch
        self._next = self._reading = (0, 0)  # epoch and row: next to return, next to read

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._ahead) < 2:  # reads one batch while another is used
            self._read_ahead()
        rows, self._next = self._ahead.popleft()
        arrays = [row.result() for row in rows]
        return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}

    def get_state(self) -> dict[str, int]:
        """The start of the next batch."""
        return {"epoch": self._next[0], "row": self._next[1]}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resumes from the state of another iterator, on any number of processes."""
        self._ahead.clear()
        self._next = self._reading = (int(state["epoch"]), int(state["row"]))

    def close(self) -> None:
        """Stops the threads, each after the row that it reads."""
        self._ahead.clear()
        # Without waiting: garbage collection may close an iterator in one of these threads.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        """Starts reading the next batch."""
        epoch, row = self._reading
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
        self._reading = (epoch, row)
        self._ahead.append((rows, self._reading))

    def _row(self, clips: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        return pack([self._read(*clip) for clip in clips], self._budget, self._patch)
