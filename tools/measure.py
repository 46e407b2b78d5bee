"""Measures of videos as papers print them: FVD, KVD, PSNR, SSIM, LPIPS; with their protocol.

    python -m tools.measure --real=FOLDER --made=FOLDER [--metrics=fvd,kvd,psnr,ssim,lpips]
        [--frames=16] [--fps=8] [--size=HEIGHTxWIDTH] [--out=FILE.json]
    python -m tools.measure --workdir=DIR [--count=256] [...]
    python -m tools.measure --compare FILE.json ...

fvd and kvd compare two sets of videos by the logits of I3D (Kinetics-400, 224x224 pixels; pip
install 'vdit[measure]'); beside them stands the same of two halves of the real set, which is what
no model can beat at half the count. psnr, ssim and lpips compare pairs: files of the same name but
for the ending. With --workdir the real videos are a simulated source's held-out clips, and the made
ones what the model generates from their captions (reconstructs, for the measures of pairs).

The first --frames frames of each file are taken at --fps (that of the first real file) and --size
(that of the first real file). A number depends on all of this: its protocol (frames, rate, sizes,
count, digest of the features' weights) is written with it, and --compare refuses numbers of
different protocols. Intervals are of 95%, over videos: by a jackknife for sets, by a bootstrap for
pairs. Exit status 2 for wrong arguments or files.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdit.data import decode, sources
from vdit.data.captions import SUFFIXES
from vdit.errors import UserError
from vdit.evaluate import heldout, psnr, reconstruct, ssim
from vdit.models.i3d import I3D, LEAST, SIDE
from vdit.models.lpips import LPIPS
from vdit.published import i3d, lpips
from vdit.runtime.files import write_text
from vdit.runtime.progress import Progress, say

from . import parsers
from .measuring import distances

OF_SETS = {"fvd": distances.frechet, "kvd": distances.kernel}
OF_PAIRS = ("psnr", "ssim", "lpips")
BATCH = 4


class Sets(NamedTuple):
    """Videos uint8 (N, T, H, W, 3) of both sets, and those that are each other's pairs."""

    real: np.ndarray
    made: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray] | None
    fps: float


def files_of(folder: Path) -> list[Path]:
    """The videos of a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} videos ({', '.join(SUFFIXES)}): two at least")
    return found


def read(folders: Sequence[Path], options: Any) -> Sets:
    """The videos of two folders, all of one length, rate and size."""
    names = [files_of(folder) for folder in folders]
    with decode.Decoder(workers=2) as decoder:
        first = decoder.probe(names[0][0])
        fps = options.fps or first.fps
        if fps <= 0:
            raise UserError(f"{names[0][0]} is a still image: give --fps")
        size = options.size or (first.height, first.width)
        videos: list[np.ndarray] = []
        for paths in names:
            videos.append(np.stack([_clip(decoder, path, fps, size, options) for path in paths]))
    places = [{path.stem: i for i, path in enumerate(paths)} for paths in names]
    both = sorted(places[0].keys() & places[1].keys())
    pairs = tuple(v[[p[stem] for stem in both]] for v, p in zip(videos, places, strict=True))
    return Sets(videos[0], videos[1], (pairs[0], pairs[1]) if both else None, fps)


def _clip(
    decoder: decode.Decoder, path: Path, fps: float, size: tuple[int, int], options: Any
) -> np.ndarray:
    pieces = decoder.stream(path, fps, size, until=options.frames / fps)
    video = np.concatenate([*pieces])[: options.frames]
    if len(video) < options.frames:
        raise UserError(
            f"{path} has {len(video)} frames at {fps:g} a second: --frames={options.frames} needs"
            f" {options.frames}"
        )
    return video


def generate(options: Any) -> Sets:
    """A source's held-out clips, and what a model makes of their captions; as pairs what it
    reconstructs."""
    from vdit.sample import load
    from vdit.worlds.scores import generated

    model = load(options.workdir)
    if not sources.SOURCES[model.config.data.source].endless:
        raise UserError(f"--workdir={options.workdir}: only simulated sources have held-out clips")
    if options.fps or options.size:
        raise UserError("--fps and --size are for folders; a workdir's clips have their own")
    clips = heldout(model, options.workdir, options.count)
    shots = [clip["shots"] for clip in clips] if "shots" in clips[0] else ()
    real = np.stack([clip["video"] for clip in clips])
    made = generated(model, [clip["caption"] for clip in clips], 0, shots)
    again = reconstruct(model, real)
    real, made, again = (x[:, : options.frames] for x in (real, made, again))
    if real.shape[1] < options.frames:
        raise UserError(f"--frames={options.frames}: the clips have {real.shape[1]}")
    return Sets(real, made, (real, again), model.config.data.fps)


def features(videos: np.ndarray, params: Any) -> np.ndarray:
    """The logits of I3D, (N, 400)."""

    @jax.jit
    def logits(params: Any, video: jax.Array) -> jax.Array:
        x = video.astype(jnp.float32) / 127.5 - 1.0
        x = jax.image.resize(x, (*x.shape[:2], SIDE, SIDE, 3), "bilinear")
        out: Any = I3D().apply({"params": params}, x)
        return out

    rows = []
    with Progress("I3D", len(videos), passing=True) as bar:
        for start in range(0, len(videos), BATCH):
            part = videos[start : start + BATCH]
            full = np.resize(part, (BATCH, *part.shape[1:]))
            rows.append(np.asarray(logits(params, full))[: len(part)])
            bar.update(start + len(part))
    return np.concatenate(rows)


def perceptual(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """LPIPS (AlexNet) of each pair of videos, the mean over frames."""
    params = lpips.read_weights("alex")
    apply = jax.jit(LPIPS("alex").apply)
    scaled = (np.float32(x) / 127.5 - 1.0 for x in (first, second))
    return np.array([
        np.asarray(apply({"params": params}, a, b)).mean() for a, b in zip(*scaled, strict=True)
    ])  # fmt: skip


PAIRED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "psnr": psnr, "ssim": ssim, "lpips": perceptual,
}  # fmt: skip


def rows_of(sets: Sets, names: Sequence[str], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each measure: its value, interval, and protocol."""
    if wanted := [name for name in names if name in OF_SETS]:
        if sets.real.shape[1] < LEAST:
            raise UserError(f"--frames={sets.real.shape[1]}: I3D needs {LEAST} at least")
        params = i3d.read_weights()
        real, made = (features(x, params) for x in (sets.real, sets.made))
        own = common | {"resampling": f"bilinear to {SIDE}x{SIDE}", "features": i3d.SHA256[:16]}
        for name in wanted:
            value = OF_SETS[name]
            low, high = distances.jackknife(value, real, made)
            yield {
                "measure": name, "value": value(real, made), "low": low, "high": high,
                "halves_of_real": value(real[::2], real[1::2]),
                "protocol": own | {"count": [len(real), len(made)]},
            }  # fmt: skip
    for name in [name for name in names if name in OF_PAIRS]:
        if sets.pairs is None:
            raise UserError(f"{name} is of pairs: no two files have the same name")
        each = np.asarray(PAIRED[name](*sets.pairs))
        low, high = distances.interval(each)
        weights = {"features": lpips.FILES["alex"].sha256[:16]} if name == "lpips" else {}
        yield {
            "measure": name, "value": float(each.mean()), "low": low, "high": high,
            "protocol": common | {"pairs": len(each)} | weights,
        }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    """A row in words."""
    text = f"{row['measure']:>6} {row['value']:8.3f}  ({row['low']:.3f} to {row['high']:.3f})"
    if "halves_of_real" in row:
        text += f", halves of the real set {row['halves_of_real']:.3f}"
    return text


def digest(protocol: dict[str, Any]) -> str:
    """A short name of a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def compare(paths: Sequence[Path]) -> str:
    """A Markdown table of results side by side; refuses those of different protocols."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            found[str(path)] = {row["measure"]: row for row in rows}
            for row in rows:
                if not isinstance(row["protocol"], dict) or not np.isfinite(float(row["value"])):
                    raise ValueError("a value and its protocol")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no result of tools.measure ({error})") from None
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    lines = ["| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for name in names:
        kinds = {path: rows[name]["protocol"] for path, rows in found.items() if name in rows}
        (first, one), *others = kinds.items()
        for second, other in others:
            if differing := [k for k in sorted({*one, *other}) if one.get(k) != other.get(k)]:
                why = ", ".join(f"{k} {one.get(k)} and {other.get(k)}" for k in differing)
                raise UserError(f"{name} of {first} and {second} has two protocols: {why}")
    for place, held in found.items():
        cells = [f"{held[name]['value']:.3f}" if name in held else "–" for name in names]
        lines.append(f"| {place} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(options: Any) -> None:
    """Computes, prints and writes what is asked for."""
    names = options.metrics.split(",")
    if unknown := [name for name in names if name not in (*OF_SETS, *OF_PAIRS)]:
        known = ", ".join((*OF_SETS, *OF_PAIRS))
        raise UserError(f"--metrics={options.metrics}: no measure {unknown[0]}; known: {known}")
    if bool(options.workdir) == bool(options.real or options.made):
        raise UserError("give --real and --made, or --workdir")
    if not options.workdir and not (options.real and options.made):
        raise UserError("--real and --made: both are needed")
    if options.frames < 1 or options.count < 2 or not 0 <= options.fps <= 1000:
        raise UserError("--frames of 1 and --count of 2 are the least, --fps up to 1000 is allowed")
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out={options.out}: {options.out.parent} is no folder")
    sets = generate(options) if options.workdir else read((options.real, options.made), options)
    _, frames, height, width, _ = sets.real.shape
    common = {"frames": frames, "fps": round(sets.fps, 3), "size": [height, width]}
    rows = []
    for row in rows_of(sets, names, common):
        rows.append(row | {"digest": digest(row["protocol"])})
        say(shown(row))
    if options.out:
        write_text(options.out, json.dumps(rows, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        options = parsers.measure(__doc__).parse_args(arguments)
        if options.compare:
            say(compare(options.compare))
        else:
            measure(options)
    except (UserError, decode.DecodeError) as error:
        print(f"measure: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
