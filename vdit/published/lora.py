"""Files of low-rank adapters (LoRA), in the forms in which they are published.

A key is a module, behind a library's prefix, and a part of its adapter. PEFT and diffusers write
lora_A and lora_B, the original releases and ComfyUI lora_down, lora_up, alpha, and diff, diff_b and
diff_m for full updates of a weight, a bias and a modulation; kohya's trainers join the module's
name by underscores. Modules are named as in the network's family (`families.FAMILIES`), in all of
its layouts, or as in vdit: blocks.0.joint.attention.q.

Sources of the names: diffusers 0.42, loaders/lora_conversion_utils.py; PEFT 0.21.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from vdit.errors import UserError
from vdit.nn.lora import DOWN, UP, flat
from vdit.nn.stack import STACKED
from vdit.published import families, weights
from vdit.published.family import Denoiser
from vdit.published.weights import Row, Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' entry of a file's metadata

PREFIX = re.compile(r"(base_model\.model\.)?((transformer|unet|(model\.)?diffusion_model)\.)?")
JOINED = re.compile(r"lora_(unet|transformer)_")  # kohya
LOW = re.compile(r"(.+?)\.lora(?:_|\.)(A|B|down|up)(?:\.default)?\.(weight|bias)")
MORE = re.compile(r"(.+)\.(alpha|diff|diff_b|diff_m)")
PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
DIFFS = {"diff": (".weight", ""), "diff_b": (".bias",), "diff_m": (".modulation",)}
DORA = ("lora_magnitude_vector", "dora_scale")
LARGEST = 1e9  # limit of an alpha

Part = tuple[str, Tensor]  # a key of a file and its tensor


class Chosen(NamedTuple):
    """What --lora names."""

    path: Path
    weight: float = 1.0
    stage: str = "dit"  # or low, the second of two experts


def parse(text: str) -> Chosen:
    """The file, the weight and the network of FILE or FILE:WEIGHT, with low= before it or not."""
    given = text.removeprefix("low=")
    stage = "dit" if given == text else "low"
    file, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists():
        return Chosen(Path(given), stage=stage)
    try:
        if math.isfinite(value := float(weight)):
            return Chosen(Path(file), value, stage)
    except ValueError:
        pass
    raise UserError(f"--lora={text}: FILE or FILE:WEIGHT is allowed, WEIGHT a number such as 0.8")


# --------------------------------------------------------------------------------------------------
# The names of a network's parameters


class Place(NamedTuple):
    """A tensor's place in a network."""

    path: str
    layer: int | None  # of `depth` stacked parameters
    depth: int
    axes: tuple[int, ...]  # of the tensor, in the order of the parameter's
    shape: tuple[int, ...]  # of the tensor
    ones: int  # trailing axes of size 1 that only the file has


def _own(path: str, rank: int) -> Row:
    """vdit's name of a parameter of so many axes, in PyTorch's terms."""
    stacked = bool(STACKED.search(path))
    name = re.sub(r"/(kernel|scale)$", "/weight", path).replace("/", ".")
    name = re.sub(r"(^|\.)blocks\.", r"\1blocks.{}.", name, count=1) if stacked else name
    window = tuple(range(2, rank - stacked))
    return re.escape(path), name, (*window, 1, 0) if path.endswith("/kernel") else None


def places(params: Mapping[str, Any]) -> dict[str, Place]:
    """Names of tensors, in every layout, and where they belong in flat parameters."""
    tables: list[Sequence[Row]] = []
    for family in families.of(Denoiser).values():
        patterns = [re.compile(row[0]) for row in family.rows]
        if all(any(p.fullmatch(path) for p in patterns) for path in params):  # it is of the family
            tables.append(family.rows)
    tables.append([_own(path, len(leaf.shape)) for path, leaf in params.items()])
    found: dict[str, Place] = {}
    for rows in tables:
        for pattern, name, axes in rows:
            for path, leaf in params.items():
                if (match := re.fullmatch(pattern, path)) and "{*}" not in name:
                    for full, place in _layers(match.expand(name), path, axes, leaf.shape):
                        found.setdefault(full, place)
    return found


def _layers(
    name: str, path: str, axes: tuple[int, ...] | None, shape: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
    """The names and places of a row's tensors."""
    stacked = "{}" in name
    depth, inner = (shape[0], shape[1:]) if stacked else (1, shape)
    order = tuple(range(len(inner))) if axes is None else tuple(a for a in axes if a >= 0)
    there = tuple(inner[order.index(i)] for i in range(len(order)))
    for layer in range(depth):
        where = path, layer if stacked else None, depth, order, there
        yield name.format(layer), Place(*where, ones=axes.count(-1) if axes else 0)


# --------------------------------------------------------------------------------------------------
# Reading


class _File:
    """A file of adapters for the network with these flat parameters."""

    def __init__(self, path: Path, params: Mapping[str, Any]) -> None:
        self.path, self.places = path, places(params)
        self.joined = {name.replace(".", "_"): name for name in self.places}
        self.scale_of = _scales(path)
        self.noted: dict[str, dict[int | None, np.ndarray]] = defaultdict(dict)
        self.depth: dict[str, int] = {}

    def adapters(self) -> Any:
        """The tree of adapters, as `vdit.nn.lora.merged` takes it."""
        for module, parts in self._modules().items():
            self._module(module, parts)
        return unflatten_dict(dict(self._stacked()), sep="/")

    def _wrong(self, key: str, reason: str) -> UserError:
        return UserError(f"{self.path}: {weights.printable(key)} {reason}")

    def _modules(self) -> dict[str, dict[str, Part]]:
        """The parts of each module; refuses unknown keys."""
        modules: dict[str, dict[str, Part]] = defaultdict(dict)
        for key, tensor in weights.read_header(self.path).items():
            if any(name in key for name in DORA):
                raise self._wrong(key, "is DoRA's: it is not read")
            if low := LOW.fullmatch(key):
                module, part = low[1], "bias" if low[3] == "bias" else PARTS[low[2]]
            elif more := MORE.fullmatch(key):
                module, part = more[1], more[2]
            else:
                raise self._nowhere(key)
            module = self._name(module)
            if part in modules[module]:
                raise self._wrong(key, f"is {weights.printable(modules[module][part][0])} again")
            modules[module][part] = key, tensor
        if not modules:
            raise UserError(f"{self.path} holds no adapters")
        return modules

    def _name(self, module: str) -> str:
        """A module's name without its library's prefix."""
        if not JOINED.match(module):
            return PREFIX.sub("", module, count=1)
        joined = JOINED.sub("", module, count=1)
        for end in ("_weight", "_bias", "_modulation", ""):
            if joined + end in self.joined:
                return re.sub(r"\.(weight|bias|modulation)$", "", self.joined[joined + end])
        return module

    def _nowhere(self, key: str) -> UserError:
        names = [name for name, place in self.places.items() if place.path.endswith("kernel")]
        some = ", ".join(name.removesuffix(".weight") for name in names[:2])
        return self._wrong(
            key, f"matches no layer of this network, which has {some} and {len(names) - 2} more"
        )

    def _place(self, part: Part, module: str, ends: Sequence[str]) -> Place:
        for end in ends:
            if module + end in self.places:
                return self.places[module + end]
        raise self._nowhere(part[0])

    def _module(self, module: str, parts: dict[str, Part]) -> None:
        """Notes the updates of one module."""
        low = [parts[name] for name in ("down", "up", "bias", "alpha") if name in parts]
        scale = 1.0
        if low:
            place = self._place(low[0], module, DIFFS["diff"])
            if not place.path.endswith("/kernel"):
                raise self._nowhere(low[0][0])
            if not {"down", "up"} <= parts.keys():
                raise self._wrong(low[0][0], "lacks a factor")
            scale = self._low(module, place, parts)
        for name, ends in {**DIFFS, "bias": DIFFS["diff_b"]}.items():
            if name in parts:
                place = self._place(parts[name], module, ends)
                value = self._array(parts[name], place.shape, place.shape).transpose(place.axes)
                self._note(place, place.path, parts[name], value, scale if name == "bias" else 1.0)

    def _low(self, module: str, place: Place, parts: dict[str, Part]) -> float:
        """Notes a module's factors, and returns their scale."""
        (out, *rest), rank = place.shape, next(iter(parts["down"][1].shape), 0)
        down = self._array(parts["down"], ("R", *rest), (rank, *rest))
        up = self._array(parts["up"], (out, rank), (out, rank))
        scale = self.scale_of(module, rank)
        if "alpha" in parts:
            scale = self._array(parts["alpha"], (), ()).item() / rank
        layer = place.path.removesuffix("kernel")
        self._note(place, layer + DOWN, parts["down"], down.transpose(place.axes), 1.0)
        self._note(place, layer + UP, parts["up"], up.T, scale)
        return scale

    def _note(self, place: Place, path: str, part: Part, value: np.ndarray, scale: float) -> None:
        if place.layer in self.noted[path]:
            raise self._wrong(part[0], "is there by another name too")
        with np.errstate(over="ignore"):
            value = value * np.float32(scale)
        if not np.isfinite(value).all():
            raise self._wrong(part[0], f"times {scale:g} is not finite")
        self.noted[path][place.layer], self.depth[path] = value, place.depth

    def _array(self, part: Part, allowed: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of this shape, or with axes of size 1 behind it, in float32."""
        key, tensor = part
        behind = tensor.shape[len(shape) :]
        if tensor.shape[: len(shape)] != shape or 0 in tensor.shape or set(behind) - {1}:
            shown = f"({', '.join(map(str, allowed))}{',' * (len(allowed) == 1)})"
            raise self._wrong(key, f"is {tensor.shape}; allowed: {shown}")
        return weights.read_tensor(key, tensor).reshape(shape).astype(np.float32)

    def _stacked(self) -> Iterator[tuple[str, np.ndarray]]:
        """The updates by path, those of stacked layers as one array: zero where there is none,
        factors padded to one rank."""
        for path, layers in self.noted.items():
            if None in layers:
                yield path, layers[None]
                continue
            most = np.max([value.shape for value in layers.values()], axis=0)
            whole = np.zeros((self.depth[path], *most), np.float32)
            for layer, value in layers.items():
                whole[(layer, *map(slice, value.shape))] = value
            yield path, whole


def _scales(path: Path) -> Callable[[str, int], float]:
    """alpha / rank of a module of some rank by a file's metadata, or by PEFT's configuration beside
    it; 1 without either."""
    said: dict[str, Any] = {}
    where, metadata = path, weights.read_metadata(path)
    if path.name == PEFT and path.with_name(PEFT_CONFIG).exists():
        where = path.with_name(PEFT_CONFIG)
        said = weights.read_json(where, weights.CONFIG_BYTES)
    elif METADATA in metadata:
        named = weights.parse_json(path, metadata[METADATA].encode())
        said = {PREFIX.sub("", name, count=1): value for name, value in named.items()}
    if said.get("use_dora"):
        raise UserError(f"{where}: use_dora is set; allowed: false")
    patterns = said.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: alpha_pattern is no JSON object")
    for name, alpha in {"lora_alpha": said.get("lora_alpha", 1), **patterns}.items():
        if not re.fullmatch(r"[\w.-]+", name):  # PEFT also allows regexes
            shown = weights.printable(name)
            raise UserError(f"{where}: alpha_pattern {shown}: a module's name is allowed")
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not abs(alpha) < LARGEST
        ):
            shown = weights.printable(repr(alpha))
            raise UserError(f"{where}: {name} is {shown}; allowed: a number below {LARGEST:g}")

    def scale(module: str, rank: int) -> float:
        alpha = said.get("lora_alpha", rank)
        for name, value in patterns.items():
            alpha = value if f".{module}".endswith(f".{name}") else alpha
        return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)

    return scale


def read_adapters(path: Path, params: Any) -> Any:
    """The adapters in a safetensors file, or in a folder of diffusers or PEFT, as a tree for
    `vdit.nn.lora.merged`; `params` are the denoiser's (arrays or their shapes).

    `UserError` names a key that matches no layer, or a tensor of another shape.
    """
    if path.is_dir():
        files = [path / name for name in (WEIGHTS, PEFT) if (path / name).exists()]
        if not files:
            raise UserError(f"{path} holds neither {WEIGHTS} nor {PEFT}")
        path = files[0]
    return _File(path, flat(params)).adapters()


# --------------------------------------------------------------------------------------------------
# Writing


def to_peft(
    adapters: Any, params: Any, scale: float, prefix: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of PEFT and diffusers, and the file's metadata; the scale is in `lora_B`."""
    names: dict[tuple[str, int | None], tuple[str, Place]] = {}
    for name, place in places(flat(params)).items():
        names.setdefault((place.path, place.layer), (name.removesuffix(".weight"), place))
    low, tensors = flat(adapters), dict[str, np.ndarray]()
    layers = [path.removesuffix(UP) for path in low if path.endswith(UP)]
    for layer in layers:
        downs, ups = (np.asarray(low[layer + name], np.float32) for name in (DOWN, UP))
        for index in range(len(ups)) if ups.ndim == 3 else (None,):
            name, place = names[layer + "kernel", index]
            a, b = (x if index is None else x[index] for x in (downs, ups * scale))
            a, ones = a.transpose(np.argsort(place.axes)), (1,) * place.ones
            b = b.T.reshape(*b.T.shape, *(1,) * (a.ndim - 2), *ones)
            key = f"{prefix}.{name}"
            tensors[f"{key}.lora_A.weight"] = a.reshape(*a.shape, *ones).copy()
            tensors[f"{key}.lora_B.weight"] = b.copy()
    rank = low[layers[0] + UP].shape[-2]
    modules = sorted({key.removeprefix(f"{prefix}.").split(".lora_")[0] for key in tensors})
    said = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    text = json.dumps({f"{prefix}.{name}": value for name, value in said.items()}, sort_keys=True)
    return tensors, {"format": "pt", METADATA: text}
