"""The TFDS builder of a set of clips from one of vdit's sources."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Read = Callable[[int], Mapping[str, Any]]  # clip i of a split


def feature(value: Any) -> Any:
    """The feature that keeps a value as it is: text, arrays, and dicts of them."""
    if isinstance(value, str):
        return tfds.features.Text()
    if isinstance(value, Mapping):
        return tfds.features.FeaturesDict({name: feature(part) for name, part in value.items()})
    array = np.asarray(value)
    encoding = "zlib" if array.ndim else "none"
    return tfds.features.Tensor(shape=array.shape, dtype=array.dtype, encoding=encoding)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Clips with captions and, of the world, its truth; in the order that they come in."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Mapping[str, tuple[int, Read]], fps: float, **options: Any) -> None:
        self._splits, self._fps = splits, fps
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        _, read = self._splits["train"]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clips of one length, size and rate, with captions.",
            features=feature(dict(read(0))),
            metadata=tfds.core.MetadataDict({"fps": self._fps}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(*part) for name, part in self._splits.items()}

    def _generate_examples(self, count: int, read: Read) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(count):
            yield index, dict(read(index))
