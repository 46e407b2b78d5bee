"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and the same as TensorBoard events.

Dimension key: N clips, T frames, H height, W width.
"""

import contextlib
import errno
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import vdit
from vdit.runtime.files import atomic_path, refusing
from vdit.runtime.video import gif_bytes, tile

Value = float | int | str | None


class Metrics:
    """Appends to WORKDIR/metrics.jsonl and to TensorBoard events in WORKDIR/tensorboard/STAGE.

    Each stage has its own event folder, so that `truncate` of one stage leaves the others alone.
    Only one process is `active`; the others write nothing. Raises `UserError` where the folder
    cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str], active: bool = True) -> None:
        self.workdir = Path(workdir)
        self.path = self.workdir / "metrics.jsonl"
        self.active = active
        self._rows: io.FileIO | None = None
        self._events: dict[str, Any] = {}

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends the row {"stage", "step", **values}, and its numbers as TensorBoard scalars.

        Values are strings or scalars on the host (Python, NumPy or one-element arrays). Floats are
        rounded to six significant digits; non-finite ones become null. A scalar's tag is
        stage/name, with the row's short strings in between: {"split": "real", ...} and
        {"split": "generated", ...} are separate curves.
        """
        if not self.active:
            return
        values = {name: v.item() if hasattr(v, "item") else v for name, v in values.items()}
        row = {"stage": stage, "step": int(step)}
        row |= {name: _rounded(value) for name, value in values.items()}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with refusing(self.path):
            if self._rows is None:
                self.workdir.mkdir(parents=True, exist_ok=True)
                _end_last_line(self.path)
                self._rows = open(self.path, "ab", buffering=0)
            if self._rows.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._scalars(stage, int(step), values)

    def video(self, stage: str, step: int, name: str, video: np.ndarray, fps: float) -> None:
        """Adds an animated GIF, of at most 50 frames a second, as a TensorBoard image.

        `video` is uint8 (T, H, W, 3), or (N, T, H, W, 3), which becomes a grid.
        """
        if not self.active:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        tiled_THW3 = tile(video)
        (_, h, w, _), gif = tiled_THW3.shape, gif_bytes(tiled_THW3, min(fps, 50))
        image = Summary.Image(height=h, width=w, colorspace=3, encoded_image_string=gif)
        value = Summary.Value(tag=f"{stage}/{name}", image=image)
        self._event(stage, step=int(step), summary=Summary(value=[value]))

    def truncate(self, stage: str, step: int) -> None:
        """Removes the rows of `stage` after `step`, which a resumed run writes again."""
        if not self.active:
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog

        if (self.workdir / "tensorboard" / stage).exists():
            # TensorBoard hides events at or after the step of a restart.
            restart = SessionLog(status=SessionLog.START)
            self._event(stage, step=int(step) + 1, session_log=restart)
        self._close_rows()
        if self.path.exists():
            with atomic_path(self.path) as temporary, open(temporary, "wb") as kept:
                for line, row in _lines(self.path):
                    if row.get("stage") != stage or row.get("step", 0) <= step:
                        kept.write(line + b"\n")

    def close(self) -> None:
        """Closes the files; the next write reopens them."""
        self._close_rows()
        for writer in self._events.values():
            writer.close()
        self._events = {}

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _close_rows(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _scalars(self, stage: str, step: int, values: Mapping[str, Value]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        names = [v.replace("/", "-") for v in values.values() if isinstance(v, str) and len(v) < 33]
        prefix = "/".join([stage, *names])
        scalars = [
            Summary.Value(tag=f"{prefix}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, float | int)
        ]
        if scalars:
            self._event(stage, step=step, summary=Summary(value=scalars))

    def _event(self, stage: str, **fields: Any) -> None:
        """Writes one event; the first one of a stage opens its file.

        RecordWriter, since EventFileWriter imports tensorflow where that is installed and reports
        a full disk from a thread, one event late.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = self.workdir / "tensorboard" / stage
        with refusing(folder):
            if stage not in self._events:
                folder.mkdir(parents=True, exist_ok=True)
                one = os.urandom(3).hex()  # a clock may show a time twice
                name = f"events.out.tfevents.{time.time():017.6f}.{one}.vdit"
                self._events[stage] = RecordWriter(open(folder / name, "xb", buffering=0))
                header = Event(wall_time=time.time(), file_version="brain.Event:2")
                self._events[stage].write(header.SerializeToString())
            event = Event(wall_time=time.time(), **fields)
            self._events[stage].write(event.SerializeToString())


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl in order, without lines that are no JSON object (such as
    the last one of a killed run); an empty list where there is no file."""
    path = Path(workdir) / "metrics.jsonl"
    return [row for _, row in _lines(path)] if path.exists() else []


def environment() -> dict[str, str]:
    """Versions and device, for the row of stage "run" that the report shows."""
    import jax

    found = {"python": platform.python_version(), "vdit": vdit.__version__}
    for package in ("jax", "flax", "optax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def _rounded(value: Value) -> Value:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(raw line, row) of every line that is a JSON object."""
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # truncated, or not UTF-8
            row = json.loads(line)
            if isinstance(row, dict):
                yield line, row


def _end_last_line(path: Path) -> None:
    """Terminates a truncated last line, so that the next row starts a new one."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
