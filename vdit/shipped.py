"""Weights that come with the package: `--workdir=NAME`, `vdit.load(NAME)`, `--config.init=NAME`.

vdit/weights/NAME is a folder of `tools.export_weights --own` in bfloat16 (config.json,
tokenizer.json, STAGE.safetensors, vdit.json) with a card (card.json: scores, training time, commit)
and the digests of all files (digests.json), written by `tools.ship`. Any such folder with digests
can be sampled from like a workdir. Nothing is ever written into the package.

What reads tensors is imported late: names and cards need no JAX.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vdit.errors import UserError
from vdit.runtime.progress import say

ROOT = Path(__file__).parent / "weights"
OWN = "vdit.json"  # metadata of the stages of an exported workdir
CARD = "card.json"


class Stage(NamedTuple):
    """A trained stage: step, EMA parameters by group, and its checkpoint's metadata."""

    step: int
    params: dict[str, Any]
    meta: dict[str, Any]


def names() -> list[str]:
    """The names of the weights in the package."""
    return sorted(path.parent.name for path in ROOT.glob(f"[!.]*/{OWN}"))


def is_name(workdir: str | Path) -> bool:
    """Whether it names weights in the package; a folder of that name wins."""
    return str(workdir) in names() and not Path(workdir).is_dir()


def find(workdir: str | Path) -> Path:
    """The folder of a workdir, or of the weights in the package that it names.

    Raises `UserError` for a single word that is neither, and for weights with a damaged file.
    """
    path, known = Path(workdir), names()
    if is_name(workdir):
        verify(ROOT / str(workdir))
        return ROOT / str(workdir)
    if str(path) in known:
        _folder_wins(str(path))
    elif known and len(path.parts) == 1 and not path.is_absolute() and not path.exists():
        raise UserError(f"{path} is no folder, and not in the package: {', '.join(known)} are")
    return path


@functools.cache
def _folder_wins(name: str) -> None:
    say(f"{name}: the folder here is taken, not the weights of that name in the package")


def refuse_training(workdir: str | Path) -> None:
    """Refuses (UserError) the name of weights in the package for a run."""
    if is_name(workdir):
        raise UserError(
            f"--workdir={workdir}: weights in the package are never written to; give another"
            f" --workdir, with --config.init={workdir} to begin from them"
        )


def outputs(workdir: str | Path) -> Path:
    """Where what is computed from a workdir is written: into it, or into ./samples/NAME."""
    return Path("samples") / str(workdir) if is_name(workdir) else Path(workdir)


def card(name: str) -> dict[str, Any]:
    """Scores, training time and commit of weights in the package."""
    path = ROOT / name / CARD
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def is_exported(folder: Path) -> bool:
    """Whether it is a folder of `tools.export_weights --own`."""
    return (folder / OWN).is_file()


def verify(folder: Path) -> None:
    """Raises `UserError` that names the first file of an exported folder that is not as written."""
    states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    _verify(folder, tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in states))


@functools.cache  # several readers ask
def _verify(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> None:
    from vdit.runtime.checkpoint import damaged

    if wrong := damaged(folder):
        raise UserError(f"{folder}/{wrong}")


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    from vdit.published.weights import CONFIG_BYTES, read_json

    verify(folder)
    stages: dict[str, dict[str, Any]] = read_json(folder / OWN, CONFIG_BYTES)["stages"]
    return stages


def stages_of(folder: Path) -> list[str]:
    """The exported stages."""
    return [*_stages(folder)]


def read_meta(folder: Path, stage: str) -> dict[str, Any]:
    """What an exported stage's checkpoint says of itself; `UserError` if there is no such stage, or
    a file is damaged."""
    stages = _stages(folder)
    if stage not in stages:
        raise UserError(f"{folder} has no stage {stage}; there are {', '.join(stages)}")
    return stages[stage]


def shapes(folder: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """Path ("vae/encoder/...") -> shape of every parameter of a stage."""
    from vdit.published.weights import read_headers

    return {name: tensor.shape for name, tensor in read_headers(folder, stage).items()}


def read(folder: Path, stage: str, place: Callable[[Any], Any] | None = None) -> Stage:
    """A stage of an exported folder whose files are as written, in float32.

    With the shardings that `place` returns for its tree of shapes; by default on the first device.
    """
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict

    from vdit.published import weights

    meta = read_meta(folder, stage)
    tensors = weights.read_headers(folder, stage)
    tree = unflatten_dict(
        {
            tuple(k.split("/")): jax.ShapeDtypeStruct(t.shape, jnp.float32)
            for k, t in tensors.items()
        }
    )
    plan = weights.plan(tensors, tree, [(r"(.*)", r"\1", None)], (), folder)
    placed = None if place is None else flatten_dict(place(tree))
    return Stage(meta.get("step", 0), weights.load(plan, placed, jnp.float32), meta)
