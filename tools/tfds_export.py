"""Writes clips of any source as a TensorFlow Datasets set of ArrayRecord files.

    python -m tools.tfds_export --config=experiments/base.py --out=DIR --clips=N [--heldout=M]
                                [--config.field=value]

DIR/vdit_clips/1.0.0 gets N of the source's training clips as the split train, and M (default N/10)
held-out clips as the split test: the video (zlib), its caption and, for a world, its ground truth.
vdit reads it with data.source=tfds, other code with tfds.builder_from_directory(...)
.as_data_source(...). The folder appears only once it is complete. Exit status 2 for bad arguments.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vdit.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiments/NAME.py[:ARGUMENT]", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "folder of TFDS sets", flag_values=FLAGS)
_CLIPS = flags.DEFINE_integer("clips", None, "clips to train on", flag_values=FLAGS)
_HELDOUT = flags.DEFINE_integer("heldout", None, "held-out clips", flag_values=FLAGS)


def export(config: ConfigDict, out: Path, clips: int, heldout: int) -> Path:
    """Writes the set; returns its folder. `UserError` if it exists, or clips are too few."""
    from vdit.config import joined

    from .vdit_clips.vdit_clips_dataset_builder import Builder

    joined.check(config)
    if config.data.shapes:
        raise UserError("data.shapes: a set has clips of one shape")
    folder = out / "vdit_clips" / str(Builder.VERSION)
    if folder.exists():
        raise UserError(f"{folder} is there already: delete it or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as work:
            _write(config, out, Path(work), {"train": clips, "test": heldout})
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _write(config: ConfigDict, out: Path, work: Path, counts: Mapping[str, int]) -> None:
    """Writes the set by TFDS, which renames its folder at the end."""
    import tensorflow_datasets as tfds

    from vdit.data import sources
    from vdit.runtime.progress import Progress

    from .vdit_clips.vdit_clips_dataset_builder import Builder

    clips: dict[str, Any] = {}
    for name, count in counts.items():
        split = "train" if name == "train" else "heldout"
        clips[name] = sources.source(config, split, work)
        if not 0 < count <= len(clips[name]):
            raise UserError(
                f"{count} clips for the split {name}: 1 to {len(clips[name])} can be written"
            )
    done = 0
    with Progress("export", sum(counts.values())) as progress:

        def reader(name: str) -> Any:
            def read(index: int) -> Mapping[str, Any]:
                nonlocal done
                done += 1
                progress.update(min(done, progress.total))
                return clips[name][index]

            return read

        tfds.disable_progress_bar()
        builder = Builder(
            splits={name: (count, reader(name)) for name, count in counts.items()},
            fps=float(config.data.fps),
            data_dir=os.fspath(out.absolute()),
            file_format="array_record",
        )
        options = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=os.fspath(work), download_config=options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    argv = sys.argv if argv is None else argv
    if any(arg in ("--help", "-h") for arg in argv):
        print(__doc__)
        return 0
    try:
        path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
        if not Path(path.partition(":")[0]).is_file():
            raise UserError(f"--config={path}: give an experiment's file")
        try:
            rest = FLAGS(list(argv))
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(" ".join(str(error).split())) from error
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; flags are --name=value")
        if _OUT.value is None or _CLIPS.value is None:
            raise UserError("give --out=DIR and --clips=N")
        heldout = max(1, _CLIPS.value // 10) if _HELDOUT.value is None else _HELDOUT.value
        print(export(CONFIG.value, Path(_OUT.value), _CLIPS.value, heldout))
        return 0
    except UserError as error:
        print(f"tfds_export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
