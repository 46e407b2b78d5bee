"""Published weights: safetensors files of a folder, validated, then read one tensor at a time.

A folder as Hugging Face writes it: config.json, and model.safetensors or shards of it listed by
model.safetensors.index.json. The package safetensors validates a file's header (dtypes, shapes,
offsets); sizes are limited before it does. Bytes are read by their offsets, not through the
package's memory map: so a file that shrinks is an error and no signal, what is read does not stay
in resident memory, and a digest or a scan needs no whole tensor. What does not fit is a `UserError`
that names the file or the tensor. Nothing is unpickled.

A key table maps parameters to tensors: a sequence of `Row`s for each layout.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from vdit.errors import UserError

CONFIG_BYTES = 2**20  # limit of a config.json
HEADER_BYTES = 2**24  # limit of a header or an index: 100,000 tensors fit
SAMPLE_BYTES = 4096  # of each tensor, for the digest
PIECE_BYTES = 2**24  # read at once by `look_through`
LARGEST = 2**24  # limit of a number in a config.json
PICKLES = (".pth", ".pt", ".ckpt", ".bin")  # files of torch, which hold code as well
AXES = 8  # limit of a tensor's axes

# dtypes that a parameter may have, by the format's names.
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}

# (regex for a parameter's path, the tensor's name, axes of the tensor in the order of the
# parameter's, or None for the same order). The name may use the regex's groups. `{}` in it is the
# layer: stacked parameters have the layers as their first axis. `{*}` is the layer of a tensor that
# the file repeats in every layer and the network has once. Of several rows that match, the one with
# most tensors in the file is taken. Each -1 at the end of the axes is a trailing axis of size 1
# that only the file has.
Row = tuple[str, str, tuple[int, ...] | None]
TRANSPOSED = (1, 0)  # a kernel is (in, out) here and (out, in) in torch


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is stored: file, dtype, shape, first byte and number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def printable(name: str, most: int = 120) -> str:
    """Text from a file as an error may print it: one line of about `most` characters."""
    cut = name if len(name) <= most else name[: most - 3] + "..."
    return cut if cut.isprintable() and cut == name else repr(cut)


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content; `UserError` if it is unreadable or larger than `most` bytes."""
    try:
        size = path.stat().st_size
        if size > most:
            raise UserError(f"cannot read {path}: it has {size} bytes; allowed: {most}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path, most: int) -> dict[str, Any]:
    """A file that holds one JSON object, of at most `most` bytes."""
    return parse_json(path, read_bytes(path, most))


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            key = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"duplicate key {printable(key)}")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: not a JSON object")
    return value


def read_config(folder: Path, types: Sequence[str], field: str = "model_type") -> dict[str, Any]:
    """A folder's config.json; `UserError` if its `field` is not one of `types`."""
    path = folder / "config.json"
    config = read_json(path, CONFIG_BYTES)
    if config.get(field) not in types:
        allowed, shown = " or ".join(types), printable(repr(config.get(field)))
        raise UserError(f"{path}: {field} is {shown}; allowed: {allowed}")
    return config


def fields(config: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a config.json that `defaults` names; absent and null ones get their default.

    The default also gives the type: a positive number up to `LARGEST`, a string, a bool, or, as a
    tuple, one of its strings (the first is the default). Any other value is a `UserError`.
    """
    values = {}
    for name, default in defaults.items():
        choices = default if isinstance(default, tuple) else ()
        value = config.get(name)
        if value is None:
            values[name] = choices[0] if choices else default
            continue
        if choices:
            fits, allowed = value in choices, " or ".join(dict.fromkeys(choices))
        elif isinstance(default, bool):
            fits, allowed = isinstance(value, bool), "true or false"
        elif isinstance(default, str):
            fits, allowed = isinstance(value, str), "text"
        else:
            kinds = (int, float) if isinstance(default, float) else int
            fits = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= LARGEST
            allowed = f"a number above 0, at most {LARGEST}"
        if not fits:
            shown = printable(json.dumps(value))
            raise UserError(f"{folder / 'config.json'}: {name} is {shown}; allowed: {allowed}")
        values[name] = value
    return values


def numbers(
    config: Mapping[str, Any], name: str, default: Any, folder: Path, count: int = 0
) -> tuple[int, ...]:
    """A field of a config.json that is a list of `count` positive integers (0: 1 to 16 of them).

    A single integer is repeated `count` times.
    """
    value = config.get(name)
    value = default if value is None else value
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * max(count, 1)
    fits = len(values) == count if count else 0 < len(values) <= 16
    if not fits or not all(type(n) is int and 0 < n <= 2**16 for n in values):
        raise UserError(
            f"{folder / 'config.json'}: {name} is {printable(str(value))}; allowed:"
            f" {count or '1 to 16'} numbers above 0, at most {2**16}"
        )
    return values


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    """Refuses a config.json in which a field of `fixed` is present with another value."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            shown = printable(repr(config[name]))
            raise UserError(f"{path}: {name} is {shown}; allowed: {value!r}")


def check_heads(width: int, heads: int, folder: Path) -> None:
    """Refuses a width that is not a multiple of the number of heads."""
    if width % heads:
        raise UserError(
            f"{folder / 'config.json'}: the width {width} is not a multiple of its {heads} heads"
        )


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; reads the header only.

    The format: 8 bytes for the header's length, the header as JSON, then the data without gaps
    (https://github.com/huggingface/safetensors#format).
    """
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total >= 8 and length > HEADER_BYTES:
                raise UserError(
                    f"cannot read {path}: its header says {length} bytes; allowed: {HEADER_BYTES}"
                )
            if total < 8 + length:
                raise UserError(f"cannot read {path}: cut short at {total} bytes, in its header")
            header = parse_json(path, file.read(length))  # refuses duplicate names
        header.pop("__metadata__", None)
        with safe_open(path, "numpy"):
            pass  # opening validates the header
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = str(error).rpartition("deserializing header: ")[2]
        if "not fully covered" in reason:  # the last of the package's checks: entries are valid
            end = max((value["data_offsets"][1] for value in header.values()), default=0)
            reason = f"it has {total} bytes; its header says {8 + length + end}"
        raise UserError(f"cannot read {path}: {printable(reason, 200)}") from error
    tensors = {}
    for name, value in header.items():
        if len(value["shape"]) > AXES:
            count = len(value["shape"])
            raise UserError(
                f"cannot read {path}: tensor {printable(name)} has {count} axes; allowed: {AXES}"
            )
        begin, end = value["data_offsets"]
        shape, start = tuple(value["shape"]), 8 + length + begin
        tensors[name] = Tensor(path, value["dtype"], shape, start, end - begin)
    return tensors


def pickled(name: str) -> str:
    """What is said of a file of torch."""
    return (
        f"{name} is a pickle, which is not read: where torch is installed, python -c 'import sys,"
        " torch, safetensors.torch as s; s.save_file(torch.load(sys.argv[1], weights_only=True),"
        " sys.argv[2])' FILE.pth FILE.safetensors converts it"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    read_header(path)  # refuses what is none
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return parse_json(path, file.read(length)).get("__metadata__", {})


def read_headers(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a folder: `stem`.safetensors, or the shards in its index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        line = f"{folder} holds neither {single.name} nor {index.name}"
        if pickles := sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES):
            raise UserError(f"{line}; {pickled(pickles[0])}")
        raise UserError(f"{line}; weights of other formats are not read")
    named = read_json(index, HEADER_BYTES).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"cannot read {index}: its weight_map does not map tensors to files")
    files = sorted(set(named.values()))
    # A shard is in the folder itself: a name that contains a path could point anywhere.
    if invalid := [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]:
        raise UserError(f"cannot read {index}: {printable(invalid[0])} is not a valid shard name")
    tensors: dict[str, Tensor] = {}
    for file in files:
        more = read_header(folder / file)
        if both := sorted(tensors.keys() & more.keys()):
            raise UserError(f"cannot read {folder}: tensor {printable(both[0])} is in two shards")
        tensors |= more
    if absent := sorted(named.keys() - tensors.keys()):
        raise UserError(f"cannot read {folder}: no shard holds the tensor {printable(absent[0])}")
    return tensors


def _read(tensor: Tensor, most: int | None = None, start: int = 0) -> bytes:
    """A tensor's bytes from `start` on, at most `most` of them."""
    size = tensor.size - start
    size = size if most is None else min(most, size)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin + start)
            data = file.read(size)
    except OSError as error:
        raise UserError(f"cannot read {tensor.file}: {error.strerror or error}") from error
    if len(data) < size:
        raise UserError(f"cannot read {tensor.file}: it was truncated while being read")
    return data


def digest(tensors: Mapping[str, Tensor], files: Iterable[bytes] = ()) -> str:
    """SHA-256 of the tensors' names, dtypes, shapes and first bytes, and of the contents `files`.

    It reads 4 KiB per tensor, so it is cheap for any model, and does not depend on the sharding.
    """
    total = hashlib.sha256()
    for data in files:
        total.update(hashlib.sha256(data).digest())
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        total.update(hashlib.sha256(_read(tensor, SAMPLE_BYTES)).digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Source:
    """The tensor that a parameter is read from, or one tensor per layer of a stacked parameter.

    Several tensors of a parameter that is not stacked must be equal.
    """

    tensors: tuple[tuple[str, Tensor], ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None
    stacked: bool


Plan = Mapping[tuple[str, ...], Source]


def plan(
    tensors: Mapping[str, Tensor], shapes: Any, rows: Sequence[Row], others: Sequence[str],
    folder: Path, layers: int = 1,
) -> Plan:  # fmt: skip
    """Maps the parameters of `shapes` (a tree of arrays, possibly abstract) to tensors.

    `others` are regexes for names of tensors that the network does not use; `layers` is the number
    of repeats of a tensor with `{*}` in its name. `UserError` names a tensor that is missing, has
    another shape or dtype, or is neither used nor among `others`.
    """
    plan, used = {}, set()
    for parts, leaf in traverse_util.flatten_dict(shapes).items():
        name, axes = _choose("/".join(parts), leaf.shape[0], rows, tensors)
        axes = axes and _order(axes)
        stacked = "{}" in name
        allowed = tuple(leaf.shape[1:] if stacked else leaf.shape)
        if axes is not None:
            allowed = tuple(allowed[axes.index(i)] for i in range(len(axes)))
        read = []
        for full in _names(name, leaf.shape[0] if stacked else layers):
            if full not in tensors:
                raise UserError(f"{folder} lacks the tensor {full}")
            tensor = tensors[full]
            # A 1x1 convolution's kernel, or a norm's scale, may have trailing axes of size 1.
            ones = (1,) * (len(tensor.shape) - len(allowed))
            if tensor.shape != allowed + ones:
                raise UserError(f"{folder}: tensor {full} is {tensor.shape}; allowed: {allowed}")
            if tensor.dtype not in FLOATS:
                known = ", ".join(FLOATS)
                raise UserError(f"{folder}: tensor {full} is {tensor.dtype}; allowed: {known}")
            read.append((full, tensor))
            used.add(full)
        plan[parts] = Source(tuple(read), tuple(leaf.shape), axes, stacked)
    unused = re.compile("|".join(f"(?:{other})" for other in others) or r"(?!)")
    extra = sorted(name for name in tensors.keys() - used if not unused.fullmatch(name))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(f"{folder} has an unexpected tensor: {printable(extra[0])}{more}")
    return plan


def _order(axes: tuple[int, ...]) -> tuple[int, ...]:
    """A row's axes without the trailing ones that only the file has."""
    return tuple(axis for axis in axes if axis >= 0)


def _names(name: str, layers: int) -> Iterator[str]:
    """The tensors of a row, lazily: a config.json may claim any number of layers."""
    one = name.replace("{*}", "{}")
    return (one.format(layer) for layer in range(layers if "{}" in one else 1))


def _choose(
    path: str, depth: int, rows: Sequence[Row], tensors: Mapping[str, Tensor]
) -> tuple[str, tuple[int, ...] | None]:
    """Name (with `{}` for the layer) and axes of the row that fits a parameter's path best."""
    matches = [
        (match.expand(name), axes)
        for pattern, name, axes in rows
        if (match := re.fullmatch(pattern, path))
    ]
    assert matches, f"no row for {path}"
    parts = {name.split(".")[0] for name in tensors}

    def score(row: tuple[str, Any]) -> tuple[int, bool]:
        present = sum(name in tensors for name in _names(row[0], min(depth, len(tensors))))
        return present, row[0].split(".")[0] in parts

    return max(matches, key=score)


@functools.cache
def _put(sharding: Any) -> Callable[[jax.Array, np.ndarray, int], jax.Array]:
    """put(stack, layer, index): writes a layer into the donated stack, with this sharding."""

    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _numbers(tensor: Tensor, name: str, data: bytes) -> np.ndarray:
    """A tensor's values from its bytes; `UserError` if one of them is not finite."""
    array = np.frombuffer(data, FLOATS[tensor.dtype])
    if not np.isfinite(array).all():
        raise UserError(f"{tensor.file}: tensor {printable(name)} has values that are not finite")
    return array


def read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor's values; `UserError` for another dtype, or a value that is not finite."""
    if tensor.dtype not in FLOATS:
        known = ", ".join(FLOATS)
        raise UserError(f"{tensor.file}: {printable(name)} is {tensor.dtype}; allowed: {known}")
    return _numbers(tensor, name, _read(tensor)).reshape(tensor.shape)


def look_through(plan: Plan) -> None:
    """Reads all tensors of a plan in pieces; `UserError` if a value is not finite."""
    for source in plan.values():
        for name, tensor in source.tensors:
            for start in range(0, tensor.size, PIECE_BYTES):
                _numbers(tensor, name, _read(tensor, PIECE_BYTES, start))


def load(
    plan: Plan, placed: Mapping[tuple[str, ...], Any] | None = None, dtype: Any = None,
    done: Callable[[int], None] = lambda count: None,
) -> Any:  # fmt: skip
    """Reads the parameters of a plan, as a tree, in the dtypes of the files or in `dtype`; tells
    `done` how many are read.

    `placed` has a sharding for each path of the plan; by default all go to the first device. The
    host holds one tensor at a time. `UserError` names a tensor with values that are not finite, or
    one that should equal another and does not.
    """
    leaves = {}
    for parts, source in plan.items():
        stored = jnp.result_type(*{FLOATS[tensor.dtype] for _, tensor in source.tensors})
        kind = stored if dtype is None else dtype
        where = placed[parts] if placed is not None else None
        leaf: Any = jnp.zeros(source.shape, kind, device=where) if source.stacked else None
        for layer, (name, tensor) in enumerate(source.tensors):
            array = _numbers(tensor, name, _read(tensor))
            array = array.reshape(tensor.shape[: len(source.shape) - source.stacked])
            value = (array if source.axes is None else array.transpose(source.axes)).astype(kind)
            if source.stacked:
                leaf = _put(where)(leaf, value, layer)
            elif leaf is None:
                leaf = jax.device_put(value, where)
            elif not np.array_equal(leaf, value):
                raise UserError(
                    f"{tensor.file}: tensor {printable(name)} differs from"
                    f" {source.tensors[0][0]}, with which this network shares it"
                )
        leaves[parts] = leaf
        done(len(leaves))
    return traverse_util.unflatten_dict(leaves)


# --------------------------------------------------------------------------------------------------
# Parameters to a safetensors file


def unload(
    params: Any, rows: Sequence[Row], layers: int = 1
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Names of the tensors that parameters become by `rows`, each with a function that gives it."""
    for parts, leaf in traverse_util.flatten_dict(params).items():
        name, axes = _choose("/".join(parts), leaf.shape[0], rows, {})
        stacked = "{}" in name
        for layer, full in enumerate(_names(name, leaf.shape[0] if stacked else layers)):
            yield full, functools.partial(_exported, leaf, layer if stacked else None, axes)


def _exported(leaf: Any, layer: int | None, axes: tuple[int, ...] | None) -> np.ndarray:
    """A parameter, or one of its layers, with the axes of the file."""
    array = np.asarray(leaf if layer is None else leaf[layer])
    if axes is None:
        return array
    array = array.transpose(np.argsort(_order(axes)))
    return array.reshape(array.shape + (1,) * axes.count(-1))
