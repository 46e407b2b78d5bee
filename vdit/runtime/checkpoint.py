"""Checkpoints: orbax saves in the background, SHA-256 digests verify every file.

A step is a folder named by its number, with one item each for the state (parameters, moments, step,
key), the EMA, the data iterator and the metadata (JSON). After orbax has committed it, every array
is opened and one read back; then `digests.json`, the size and digest of every file, is written
inside, last and atomically: a folder without it is an unfinished save. A damaged or unfinished step
is named in a warning, and the step before it is used. Arrays that are not finite are not saved.
An imported EMA may be links to other files (`linked`), with their digests.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from vdit.errors import Diverged, UserError
from vdit.runtime import linked
from vdit.runtime.files import disk_reason, write_text
from vdit.runtime.processes import agreed
from vdit.runtime.progress import each

Folder = str | os.PathLike[str]  # of a stage; its steps are folders in it

FORMAT = 2  # of a step's folder and trees; raised when an old reader would misread it
DIGESTS = "digests.json"
ITEMS = ("state", "ema", "iterator", "meta")
TO_SAMPLE = ("ema", "meta")  # items that are enough to use a model
TEMPORARY = "*.orbax-checkpoint-tmp*"  # what an interrupted save leaves
# Wherever they stand in a path, orbax takes these for another path's or for a bucket's address.
UNREADABLE = re.compile(r"\\|(?<=/)(?:gs|s3|az|hf):(?=/)|[\ud800-\udfff]")
UNSAFE = re.compile(rf"[\[*?]|{UNREADABLE.pattern}")  # and these, when it saves, for a pattern's
ATTEMPTS = 10  # at a step that a run may prune while it is read
PATIENCE = 7 * 86400  # seconds that a save may take, or the clock may jump in it
PIECE = 2**20  # numbers looked through at a time, which caches hold
T = TypeVar("T")
log = logging.getLogger("vdit")


class Restored(NamedTuple):
    """A restored step. The state lacks the entries that were allowed to be missing and are."""

    step: int
    state: Any
    ema: Any
    meta: dict[str, Any]


# --------------------------------------------------------------------------------------------------
# Reading: functions of a stage's folder; they write nothing


def all_steps(directory: Folder) -> list[int]:
    """The numbers of all step folders, finished or not, in ascending order."""
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def is_finished(directory: Folder, step: int) -> bool:
    """Whether the save of `step` was completed; does not read the files."""
    return (Path(directory) / str(step) / DIGESTS).is_file()


def damage(directory: Folder, step: int, items: tuple[str, ...] = ITEMS) -> str | None:
    """`damaged` for the folder of a step."""
    return damaged(Path(directory) / str(step), items)


def damaged(folder: Path, items: tuple[str, ...] = ITEMS) -> str | None:
    """The first damaged file of `items`, as "FILE: REASON"; None if all are good.

    Reads every byte of the files in the digests, and no others.
    """
    try:
        if not any(folder.iterdir()):
            return f"{folder.name}: the folder is empty"
    except OSError:
        return f"{folder.name}: the folder is missing"
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))["files"]
        expected = [(name, int(size), str(sha)) for name, (size, sha) in digests.items()]
    except FileNotFoundError:
        return f"{DIGESTS}: missing, the save was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS}: unreadable"

    def read(name: str) -> bool:
        item = name.split("/")[0]
        return item in items or item not in ITEMS

    for name, size, sha in each("digests", [row for row in expected if read(row[0])], "files"):
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name}: {actual} bytes, {size} were saved"
            if _sha256(folder / name) != sha:
                return f"{name}: its bytes are not those that were saved (SHA-256)"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


IMPORTED = 0  # the step of weights that were imported: no training saves it


def newest_good_step(directory: Folder, items: tuple[str, ...] = TO_SAMPLE) -> int | None:
    """The newest step whose `items` are undamaged, None if there is no step at all, or one alone
    whose save was not finished: the first one, which was interrupted.

    Warns of each newer step that is damaged, naming the file. Raises `UserError` if all are. The
    steps are listed again after each, since a run may save and prune meanwhile.
    """
    refuse_pattern(directory, UNREADABLE)
    tried: dict[tuple[int, bool], str] = {}
    while True:
        there = [(step, is_finished(directory, step)) for step in all_steps(directory)]
        left = [step for step in there if step not in tried]
        if not left:
            break
        step = left[-1][0]
        reason = damage(directory, step, items)
        if reason is None:
            for line in tried.values():
                log.warning("%s; taking step %d", line, step)
            return step
        tried[left[-1]] = f"checkpoint {Path(directory) / str(step)} is damaged: {reason}"
    lines = "; ".join(tried.values())
    if len(tried) == 1 and not any(finished for _, finished in tried):
        log.warning("%s; there is none before it", lines)
    elif tried:
        raise UserError(f"{lines}; no good step is left")
    return None


def read_newest(directory: Folder, read: Callable[[int], T]) -> tuple[int, T]:
    """(step, read(step)) of the newest good step, or of a newer one that has replaced it
    meanwhile. Raises `UserError` where there is none, and what `read` raises."""
    for attempt in range(ATTEMPTS):
        step = newest_everywhere(directory)
        if step is None:
            break
        try:
            return step, read(step)
        except Exception:
            replaced = jax.process_count() == 1 and not is_finished(directory, step)
            if not replaced or attempt == ATTEMPTS - 1:
                raise
    raise UserError(f"{directory} holds no checkpoint; train or import it first")


def newest_everywhere(directory: Folder, items: tuple[str, ...] = TO_SAMPLE) -> int | None:
    """`newest_good_step` of process 0, in all processes; it alone reads the files."""
    step, error = -2, UserError(f"no checkpoint in {directory} is good")
    if jax.process_index() == 0:
        try:
            found = newest_good_step(directory, items)
            step = -1 if found is None else found
        except UserError as reason:
            error = reason
    step = agreed(step)  # -1: there is none, -2: all are damaged
    if step == -2:
        raise error
    return None if step == -1 else step


def load_meta(directory: Folder, step: int) -> dict[str, Any]:
    """The metadata of a step. Raises `UserError` for a missing step or another format."""
    return _read(directory, step, meta=ocp.args.JsonRestore())["meta"]


def saved_shapes(directory: Folder, step: int, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("a/b/c") -> shape and dtype of every array in the item "state" or "ema" of a step."""
    leaves = jax.tree_util.tree_leaves_with_path(_saved_shapes(directory, step, item))
    return {_name(path): leaf for path, leaf in leaves}


def restore_ema(directory: Folder, step: int, place: Callable[[Any], Any] | None = None) -> Any:
    """The EMA of a step, with the shardings that `place` returns for its tree of shapes; without
    `place`, on the first device. Does not verify the digests: see `newest_good_step`.
    """
    return _restore(directory, step, "ema", place)


def restore_raw(directory: Folder, step: int) -> Any:
    """The parameters of a step without EMA, on the first device; does not verify the digests.

    Raises `UserError` for a step that has none, as an imported one.
    """
    if not any(name.startswith("params/") for name in saved_shapes(directory, step, "state")):
        raise UserError(f"{Path(directory) / str(step)} was not trained here: it has an EMA alone")
    return restore_state(directory, step)["params"]


def restore_state(directory: Folder, step: int) -> Any:
    """The state of a step, on the first device; does not verify the digests."""
    return _restore(directory, step, "state")


def _restore(
    directory: Folder, step: int, item: str, place: Callable[[Any], Any] | None = None
) -> Any:
    """One item of a step; see `restore_ema`."""
    shapes = _saved_shapes(directory, step, item)
    if place is not None:
        shapes = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, place(shapes))
    abstract = _placed(shapes)
    read = _read(directory, step, **{item: ocp.args.StandardRestore(abstract)})[item]
    refuse_not_finite(directory, step, read)
    return read


def _read(directory: Folder, step: int, **items: Any) -> Any:
    """Items of a step, and always its metadata, whose format is checked first."""
    folder = (Path(directory) / str(step)).absolute()
    if not is_finished(directory, step):
        known = ", ".join(map(str, all_steps(directory))) or "none"
        raise UserError(f"{directory} holds no finished step {step}; steps there: {known}")
    with _reader() as reader:
        composite = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = reader.restore(folder, args=composite)["meta"]
        if meta["format"] != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {meta['format']}; this vdit reads format {FORMAT}"
            )
        items.pop("meta", None)
        there = [name for name in items if linked.table(folder / name)]
        read = {name: linked.load(folder / name, items.pop(name).item) for name in there}
        if items:
            read |= dict(reader.restore(folder, args=ocp.args.Composite(**items)))
    return read | {"meta": meta}


@jax.jit
def _finite(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jax.numpy.isfinite(x).all() for x in arrays]


def not_finite(tree: Any) -> list[str]:
    """The names of the arrays with a NaN or an infinity in them, wherever they are: those on
    accelerators, or on several devices, are looked at there, by all processes together."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(p, x) for p, x in leaves if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)]
    device = [x for _, x in named if _elsewhere(x)]
    found = iter(jax.device_get(_finite(device)) if device else ())

    def good(x: Any) -> bool:
        if _elsewhere(x):
            return bool(next(found))
        flat = np.asarray(x).reshape(-1)
        return all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, len(flat), PIECE))

    return [_name(path) for path, x in named if not good(x)]


def _elsewhere(x: Any) -> bool:
    """Whether an array is not simply in the host's memory, where pieces of it can be looked at (all
    at once, XLA would copy a bfloat16 array in float32)."""
    if not isinstance(x, jax.Array):
        return False
    return len(x.devices()) > 1 or next(iter(x.devices())).platform != "cpu"


def refuse_not_finite(directory: Folder, step: int, tree: Any) -> None:
    """Refuses (UserError) what an earlier version saved of a training that had diverged."""
    if names := not_finite(tree):
        raise UserError(
            f"checkpoint {Path(directory) / str(step)} holds numbers that are not finite, in"
            f" {len(names)} arrays ({names[0]}): delete its folder to go on from the step before"
        )


def refuse_pattern(path: Folder, unsafe: re.Pattern[str] = UNSAFE) -> None:
    """Refuses (UserError) a path in which orbax would lose its files, or not find them."""
    whole = f"{Path(path).absolute().as_posix()}/"
    if wrong := dict.fromkeys(unsafe.findall(whole)):
        raise UserError(
            f"{whole[:-1]}: checkpoints cannot be kept under a path with {' or '.join(wrong)} in"
            " it; choose another --workdir"
        )


def refuse_unreadable(folder: Path) -> None:
    """Opens every array of a step and reads the smallest back, or raises `UserError`."""
    try:
        _read_back(folder)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"cannot save checkpoint {folder}: it cannot be read back ({reason})"
        ) from error


def _read_back(folder: Path) -> None:
    """Without orbax's metadata, which convert what is opened to JSON: with tensorstore 0.1.86 each
    array of each save leaves objects behind."""
    import tensorstore

    for item in ("state", "ema"):
        rows = json.loads((folder / item / "_METADATA").read_text(encoding="utf-8"))
        names = [
            ".".join(str(key["key"]) for key in row["key_metadata"])
            for row in rows["tree_metadata"].values()
            if not row["value_metadata"]["skip_deserialize"]
        ]
        base = {"driver": "file", "path": f"{folder / item}/"}
        stores = [{"driver": "ocdbt", "base": base, "path": f"{name}/"} for name in names]
        opening = [tensorstore.open({"driver": "zarr", "kvstore": store}) for store in stores]
        arrays = [array.result() for array in opening]
        if arrays:
            min(arrays, key=lambda array: array.size).read().result()


def _alone() -> Any:
    """Orbax's options for this process alone: it does not wait for others."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _reader() -> Any:
    """Orbax's checkpointer for this process alone."""
    alone = _alone()
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _saved_tree(directory: Folder, step: int, item: str) -> Any:
    """The metadata of an item's arrays; each of them is opened."""
    folder = epath.Path(Path(directory).absolute()) / str(step) / item
    metadata = ocp.StandardCheckpointHandler().metadata(folder)
    return getattr(metadata, "tree", metadata)


def _saved_shapes(directory: Folder, step: int, item: str) -> Any:
    if found := linked.shapes(Path(directory) / str(step) / item):
        return found
    tree = _saved_tree(directory, step, item)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _check_shapes(directory: Folder, step: int, item: str, abstract: Any) -> None:
    """Refuses a checkpoint of another model; names the first array that differs."""
    saved = saved_shapes(directory, step, item)
    wanted = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    for name in sorted(saved.keys() | wanted.keys()):
        here = f"checkpoint {Path(directory) / str(step)}: {item}/{name}"
        if name not in saved or name not in wanted:
            raise UserError(f"{here} is only in {'it' if name in saved else 'this model'}")
        is_key = jax.dtypes.issubdtype(wanted[name].dtype, jax.dtypes.prng_key)
        if not is_key and saved[name].shape != wanted[name].shape:
            raise UserError(
                f"{here} has shape {saved[name].shape}, this model has {wanted[name].shape}"
            )


def _placed(abstract: Any) -> Any:
    """The abstract tree with a sharding at every leaf, as orbax demands."""
    here = SingleDeviceSharding(jax.local_devices()[0])

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)

    return jax.tree.map(place, abstract)


_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# Writing


class Checkpoints:
    """The checkpoints of one stage. The constructor touches neither the disk nor a thread.

    Keeps the newest `keep` finished steps. `in_flight` bounds the bytes of EMA arrays that are
    compressed and written at a time; it must be at least the largest array.
    """

    def __init__(self, directory: Folder, keep: int = 2, in_flight: int | None = None) -> None:
        if keep < 1:
            raise UserError(f"keep of {keep} checkpoints: at least 1 must stay")
        refuse_pattern(directory)
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._in_flight = in_flight
        self._saver: Any = None  # orbax's, from the first save on
        self._saving: tuple[int, threading.Thread] | None = None
        self._error: Exception | None = None  # of the thread that saves
        self._bad: set[int] = set()  # steps that restore passed over
        self._last: int | None = None  # saved; other processes may not see its digests yet

    def steps(self) -> list[int]:
        """The finished steps in ascending order."""
        return [step for step in all_steps(self.directory) if is_finished(self.directory, step)]

    def latest(self) -> int | None:
        """The newest finished step, not verified."""
        return max(self.steps(), default=None)

    def newest_meta(self) -> dict[str, Any] | None:
        """The metadata of the newest step in which it is undamaged; None if there is none."""
        for step in reversed(self.steps()):
            if damage(self.directory, step, ("meta",)) is None:
                return load_meta(self.directory, step)
        return None

    def save(self, step: int, state: Any, ema: Any, iterator: Any, meta: Mapping[str, Any]) -> None:
        """Saves in the background; the arguments may be donated or changed at once.

        `state` and `ema` are trees of arrays, `iterator` is grain's or None, `meta` is JSON. Waits
        for the previous save and raises its error. A finished step is saved again only if `restore`
        found it damaged; damaged and unfinished folders of that name become STEP.bad. Raises
        `UserError` if the folder cannot be written or lacks space, `Diverged` for arrays that are
        not finite.
        """
        self.wait()
        if step == self._last or (step in self.steps() and step not in self._bad):
            return
        self._make_way(step, (state, ema))
        if names := not_finite({"state": state, "ema": ema}):
            shown = f"stage {self.directory.name}: not finite after step {step}: {len(names)}"
            raise Diverged(f"{shown} arrays ({names[0]}); {self.kept()}")
        items = {
            "state": ocp.args.StandardSave(state),
            "ema": ocp.args.StandardSave(ema),
            "meta": ocp.args.JsonSave({**meta, "format": FORMAT}),
        }
        if iterator is not None:
            import grain

            items["iterator"] = grain.checkpoint.CheckpointSave(iterator)
        if self._saver is None:
            _quieten()
            # Orbax waits for folders and arrays by the wall clock, which may jump.
            patient = ocp.options.AsyncOptions(
                timeout_secs=PATIENCE, create_directories_asynchronously=False
            )
            options = ocp.CompositeOptions(async_options=patient)
            handler = ocp.CompositeCheckpointHandler(composite_options=options)
            if self._in_flight is not None:
                most: Any = (1.01 * self._in_flight + 2**20) / 1e9
                limited = ocp.StandardCheckpointHandler(save_concurrent_gb=most)
                others = [name for name in ITEMS if name != "ema"]
                handler = ocp.CompositeCheckpointHandler(
                    *others, ema=limited, composite_options=options
                )
            self._saver = ocp.AsyncCheckpointer(handler, async_options=patient)
        thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint {step}")
        try:
            self._saver.save(self.directory / str(step), args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            self._fail(step, error)
        thread.start()
        self._saving, self._last = (step, thread), step

    def wait(self) -> None:
        """Waits for the save in the background, if any, and raises its error."""
        if self._saving is None:
            return
        step, thread = self._saving
        thread.join()
        error, self._saving, self._error = self._error, None, None
        if error is not None:
            self._fail(step, error)

    def kept(self) -> str:
        """What a training that diverged can go on from, once the save in flight is finished."""
        self.wait()
        good = [step for step in reversed(self.steps()) if damage(self.directory, step) is None]
        saved = f"checkpoint {good[0]} is good" if good else "no checkpoint is saved"
        saved += f" (before it {good[1]})" if good[1:] else ""
        rate = f"config.{self.directory.name}.train.learning_rate or .adam_learning_rate"
        return f"{saved} in {self.directory}; run again with a smaller {rate}"

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes at the end; after an error too, unless other processes may not have it."""
        try:
            yield
        except Exception as error:
            if isinstance(error, Diverged) or jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.close()
            raise
        self.close()

    def close(self) -> None:
        """Waits for the save in the background, raises its error, and ends orbax's threads."""
        try:
            self.wait()
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None

    def restore(
        self,
        abstract_state: Any,
        abstract_ema: Any,
        iterator: Any = None,
        check: Callable[[dict[str, Any]], None] | None = None,
        spare: Collection[str] = (),
    ) -> Restored | None:
        """The newest good step, with the shardings of the abstract trees; None if there is no step.

        The topology may differ from that of the save. `check(meta)` is called before arrays are
        read and may raise. `iterator` (grain's, or None) is set to its saved position. Entries of
        the state named in `spare` may be missing; then so may the iterator. Raises `UserError` if
        every step is damaged, or the step holds another model's arrays.
        """
        self.wait()
        step = newest_everywhere(self.directory, ITEMS)
        if step is None:
            self._bad = set(all_steps(self.directory))
            return None
        self._bad = {other for other in all_steps(self.directory) if other > step}
        meta = load_meta(self.directory, step)
        if check is not None:
            check(meta)
        there = {name.split("/")[0] for name in saved_shapes(self.directory, step, "state")}
        lacking = set(spare) - there
        if lacking:
            abstract_state = {k: v for k, v in abstract_state.items() if k not in lacking}
        abstract = {"state": _placed(abstract_state), "ema": _placed(abstract_ema)}
        for item, tree in abstract.items():
            _check_shapes(self.directory, step, item, tree)
        items = {item: ocp.args.StandardRestore(tree) for item, tree in abstract.items()}
        if iterator is not None:
            # Positions are in the stream of all processes: each process's file is the same.
            folder = self.directory / str(step) / "iterator"
            files = sorted(folder.glob("process_*.json"))
            if not files and not lacking:
                raise UserError(f"{folder} has no process_*.json to resume from")
            if files:
                iterator.set_state(json.loads(files[0].read_text(encoding="utf-8")))
        read = _read(self.directory, step, **items)
        refuse_not_finite(self.directory, step, {item: read[item] for item in abstract})
        if not self._bad and jax.process_index() == 0:
            self._prune()  # as the save did, unless its process was killed
        return Restored(step, read["state"], read["ema"], meta)

    def _make_way(self, step: int, trees: Any) -> None:
        """On process 0: makes the folder, moves bad steps aside, checks the space."""
        if jax.process_index() != 0:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()
            for other in sorted(self._bad | {step}):
                folder, aside = self.directory / str(other), self.directory / f"{other}.bad"
                if folder.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
            self._bad.clear()
            with tempfile.TemporaryFile(dir=self.directory):  # orbax would fail later, and noisily
                free = shutil.disk_usage(self.directory).free
        except OSError as error:
            self._fail(step, error)
        needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trees))
        if free < needed:
            raise UserError(
                f"cannot save checkpoint {self.directory / str(step)}: it needs"
                f" {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            )

    def _finish(self, step: int) -> None:
        """In a thread: waits for orbax's commit, writes the digests, deletes old steps."""
        try:
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                refuse_unreadable(self.directory / str(step))
                write_digests(self.directory / str(step))
                self._prune()
        except Exception as error:  # raised again by `wait`
            self._error = error

    def _prune(self) -> None:
        oldest = self.steps()[-self.keep :][0]
        for path in self.directory.iterdir():
            number = path.name.removesuffix(".bad")
            if number.isdecimal() and int(number) < oldest:
                with contextlib.suppress(OSError):  # a reader may keep files: the next save's turn
                    (path / DIGESTS).unlink(missing_ok=True)  # half deleted must not look finished
                    shutil.rmtree(path)

    def _remove_temporary(self) -> None:
        for path in self.directory.glob(TEMPORARY):
            shutil.rmtree(path)

    def _fail(self, step: int, error: Exception) -> NoReturn:
        """Raises `error`, as a `UserError` if its cause is the disk."""
        self._last = None
        with contextlib.suppress(OSError):
            self._remove_temporary()
        if isinstance(error, UserError):
            raise error
        if (reason := disk_reason(error)) is None:
            raise error
        raise UserError(f"cannot save checkpoint {self.directory / str(step)}: {reason}") from error


def rewrite(
    directory: Folder, step: int, to: Path, place: Callable[[Any], Any] | None = None,
    drop: Collection[str] = (),
) -> None:  # fmt: skip
    """Copies a good step to `to`/STEP: the same values, with new digests.

    `place` gives the shardings of a tree, by which its arrays are split into files; without it they
    are not split. Entries of the state named in `drop` are omitted.
    """
    trees = {}
    for item in ("state", "ema"):
        trees[item] = _restore(directory, step, item, place)
        if item == "state":
            trees[item] = {name: v for name, v in trees[item].items() if name not in drop}
    checkpoints = Checkpoints(to)
    checkpoints.save(step, trees["state"], trees["ema"], None, load_meta(directory, step))
    checkpoints.close()
    position = Path(directory) / str(step) / "iterator"  # of the data: small files, as they are
    if position.is_dir():
        shutil.copytree(position, to / str(step) / "iterator")
        write_digests(to / str(step))


def write_digests(folder: Path) -> None:
    """Writes `DIGESTS` into a folder: size and SHA-256 of every other file."""
    files = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / DIGESTS
    }
    write_text(folder / DIGESTS, json.dumps({"format": FORMAT, "files": files}, indent=1))


@functools.cache
def _quieten() -> None:
    """Leaves out the tracebacks that a failed save prints beside the error that it raises: orbax's
    in its log, and tensorstore's for futures that end after orbax has closed their event loop."""
    logging.getLogger("absl").addFilter(_no_orbax_traceback)
    shown = sys.unraisablehook

    def hook(raised: Any) -> None:
        if "Event loop is closed" not in str(raised.exc_value):
            shown(raised)

    sys.unraisablehook = hook


def _no_orbax_traceback(record: logging.LogRecord) -> bool:
    """A log filter: orbax logs the tracebacks of errors that it also raises."""
    return not (record.exc_info and "orbax" in record.pathname)
