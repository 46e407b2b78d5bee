"""PyTorch's DataLoader with PyAV over a folder of films, for tools/benching/loader.py.

Run by a Python with torch and PyAV, with one JSON argument; prints a JSON line per size and number
of workers. A clip is decoded the usual way: open, seek to the preceding key frame, decode up to the
wanted frames, resize.
"""

import bisect
import json
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Films(Dataset):
    """Clip i starts i * stride frames into the concatenated videos."""

    def __init__(self, folder: str, frames: int, fps: float, side: int) -> None:
        self.paths = sorted(Path(folder).glob("*.mp4"))
        self.frames, self.fps, self.side = frames, fps, side
        self.starts = []
        for number, path in enumerate(self.paths):
            with av.open(str(path)) as container:
                stream: Any = container.streams.video[0]
                seconds = float(stream.frames / stream.average_rate)
            last = seconds - frames / fps
            self.starts += [(number, at / 10) for at in range(int(last * 10))]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        number, start = self.starts[index]
        times = [start + k / self.fps for k in range(self.frames)]
        found: list[np.ndarray] = []
        with av.open(str(self.paths[number])) as container:
            stream: Any = container.streams.video[0]
            base: Fraction = stream.time_base
            container.seek(int(start / base), stream=stream, backward=True)
            shown: list[tuple[float, Any]] = []
            frame: Any
            for frame in container.decode(stream):
                shown.append((float(frame.pts * base), frame))
                if shown[-1][0] >= times[-1]:
                    break
            begun = [at for at, _ in shown]
            for wanted in times:
                at = max(bisect.bisect_right(begun, wanted + 1e-6) - 1, 0)
                frame = shown[at][1]
                scaled = frame.reformat(self.side, self.side, "rgb24", interpolation="AREA")
                found.append(scaled.to_ndarray())
        return torch.from_numpy(np.stack(found))


def main() -> None:
    """Measures and prints the rates."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for side in asked["sizes"]:
        films = Films(asked["films"], asked["frames"], asked["fps"], side)
        for workers in asked["workers"]:
            loader = DataLoader(
                films, asked["batch"], shuffle=True, num_workers=workers, drop_last=True,
                persistent_workers=workers > 0,
            )  # fmt: skip

            def endless(loader: Any = loader) -> Any:
                while True:
                    yield from loader

            stream = endless()
            next(stream), next(stream)
            count, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < asked["seconds"]:
                count += len(next(stream))
            size = f"{asked['frames']}x{side}x{side}"
            row = {"source": "PyTorch DataLoader, PyAV", "size": size, "workers": workers}
            print(json.dumps(row | {"rate": count / took}), flush=True)
            del stream, loader


if __name__ == "__main__":
    main()
