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
from collections.abc import Iterator, Mapping, Sequence
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


def parse(text: str) -> tuple[Path, float]:
    """The file and the weight of FILE or FILE:WEIGHT."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        if math.isfinite(value := float(weight)):
            return Path(file), value
    except ValueError:
        pass
    raise UserError(f"--lora={text}: FILE or FILE:WEIGHT is allowed, WEIGHT a number such as 0.8")


# --------------------------------------------------------------------------------------------------
# The names of a network's parameters


class Place(NamedTuple):
    """A tensor's place in a network."""

    path: str
    layer: int | None  # of stacked parameters
    axes: tuple[int, ...] | None  # of the tensor, in the order of the parameter's
    shape: tuple[int, ...]  # of the tensor
    ones: int = 0  # trailing axes of size 1 that only the file has


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
    ones = axes.count(-1) if axes else 0
    order = axes and axes[: len(axes) - ones]
    there = shape[1:] if stacked else shape
    if order is not None:
        there = tuple(there[order.index(i)] for i in range(len(order)))
    for layer in range(shape[0] if stacked else 1):
        yield name.format(layer), Place(path, layer if stacked else None, order, there, ones)


# --------------------------------------------------------------------------------------------------
# Reading


class _Part(NamedTuple):
    """A key of a file and its tensor."""

    key: str
    tensor: Tensor


class _File:
    """A file of adapters for the network with these flat parameters."""

    def __init__(self, path: Path, params: Mapping[str, Any]) -> None:
        self.path, self.params, self.places = path, params, places(params)
        self.joined = {name.replace(".", "_"): name for name in self.places}
        self.scales = _Scales(path)
        self.layers: dict[str, dict[int | None, tuple[Any, ...]]] = defaultdict(dict)

    def adapters(self) -> Any:
        """The tree of adapters, as `vdit.nn.lora.merged` takes it."""
        for module, parts in self._modules().items():
            self._module(module, parts)
        return unflatten_dict(dict(self._stacked()), sep="/")

    def _modules(self) -> dict[str, dict[str, _Part]]:
        """The parts of each module; refuses unknown keys."""
        modules: dict[str, dict[str, _Part]] = defaultdict(dict)
        for key, tensor in weights.read_header(self.path).items():
            low, more = LOW.fullmatch(key), MORE.fullmatch(key)
            if any(name in key for name in DORA):
                raise UserError(f"{self.path}: {weights.printable(key)} is DoRA's: it is not read")
            if low:
                module, part = low[1], "bias" if low[3] == "bias" else PARTS[low[2]]
            elif more:
                module, part = more[1], more[2]
            else:
                raise self._nowhere(key)
            module = self._name(module)
            if part in modules[module]:
                both = modules[module][part].key
                raise UserError(
                    f"{self.path}: {weights.printable(key)} is {weights.printable(both)} again"
                )
            modules[module][part] = _Part(key, tensor)
        if not modules:
            raise UserError(f"{self.path} holds no adapters")
        return modules

    def _name(self, module: str) -> str:
        """A module's name without its library's prefix."""
        if not JOINED.match(module):
            return PREFIX.sub("", module, count=1)
        joined = JOINED.sub("", module, count=1)
        ends = ("_weight", "_bias", "_modulation", "")
        named = next((self.joined[joined + e] for e in ends if joined + e in self.joined), None)
        return module if named is None else re.sub(r"\.(weight|bias|modulation)$", "", named)

    def _nowhere(self, key: str) -> UserError:
        names = [name for name, place in self.places.items() if place.path.endswith("kernel")]
        some = ", ".join(name.removesuffix(".weight") for name in names[:2])
        return UserError(
            f"{self.path}: {weights.printable(key)} matches no layer of this network, which has"
            f" {some} and {len(names) - 2} more"
        )

    def _place(self, part: _Part, module: str, ends: Sequence[str]) -> Place:
        for end in ends:
            if module + end in self.places:
                return self.places[module + end]
        raise self._nowhere(part.key)

    def _module(self, module: str, parts: dict[str, _Part]) -> None:
        """Notes the updates of one module."""
        low = [parts[name] for name in ("down", "up") if name in parts]
        scale = 1.0
        if low:
            place = self._place(low[0], module, DIFFS["diff"])
            if not place.path.endswith("/kernel"):
                raise self._nowhere(low[0].key)
            if len(low) == 1:
                raise UserError(
                    f"{self.path}: {weights.printable(low[0].key)} lacks its other factor"
                )
            scale = self._low(module, place, parts)
        for name in ("alpha", "bias"):
            if name in parts and not low:
                self._place(parts[name], module, DIFFS["diff"])
                raise UserError(f"{self.path}: {weights.printable(parts[name].key)} has no factors")
        if "bias" in parts:  # of the second factor
            self._diff(parts["bias"], self._place(parts["bias"], module, (".bias",)), scale)
        for name, ends in DIFFS.items():
            if name in parts:
                self._diff(parts[name], self._place(parts[name], module, ends), 1.0)

    def _low(self, module: str, place: Place, parts: dict[str, _Part]) -> float:
        """Notes a module's factors, and returns their scale."""
        rank = parts["down"].tensor.shape[:1]
        count = rank[0] if rank else 0
        down = self._array(parts["down"], ("R", *place.shape[1:]), (count, *place.shape[1:]))
        up = self._array(parts["up"], (place.shape[0], count), (place.shape[0], count))
        scale = self.scales(module, count)
        if "alpha" in parts:
            scale = self._array(parts["alpha"], (), ()).item() / count
        assert place.axes is not None and place.axes[-1] == 0
        self._note(place.path, place.layer, parts["down"], down.transpose(place.axes), up.T * scale)
        return scale

    def _diff(self, part: _Part, place: Place, scale: float) -> None:
        value = self._array(part, place.shape, place.shape)
        value = value if place.axes is None else value.transpose(place.axes)
        self._note(place.path, place.layer, part, value * np.float32(scale))

    def _note(self, path: str, layer: int | None, part: _Part, *values: Any) -> None:
        path = path if len(values) == 1 else path.removesuffix("kernel")
        if layer in self.layers[path]:
            raise UserError(
                f"{self.path}: {weights.printable(part.key)} is there by another name too"
            )
        self.layers[path][layer] = values

    def _array(self, part: _Part, allowed: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of this shape, or with axes of size 1 behind it, in float32."""
        key, tensor = part
        behind = tensor.shape[len(shape) :]
        if tensor.shape[: len(shape)] != shape or 0 in tensor.shape or set(behind) - {1}:
            shown = f"({', '.join(map(str, allowed))}{',' * (len(allowed) == 1)})"
            raise UserError(
                f"{self.path}: {weights.printable(key)} is {tensor.shape}; allowed: {shown}"
            )
        return weights.read_tensor(key, tensor).reshape(shape).astype(np.float32)

    def _stacked(self) -> Iterator[tuple[str, np.ndarray]]:
        """The updates by path, those of stacked layers as one array: zero where there is none,
        factors padded to one rank."""
        for path, layers in self.layers.items():
            if None in layers:
                ends = ("",) if len(layers[None]) == 1 else (DOWN, UP)
                yield from ((path + end, x) for end, x in zip(ends, layers[None], strict=True))
                continue
            first = next(iter(layers.values()))
            depth = self.params[path if len(first) == 1 else path + "kernel"].shape[0]
            if len(first) == 1:
                whole = np.zeros((depth, *first[0].shape), np.float32)
                for layer, (value,) in layers.items():
                    whole[layer] = value
                yield path, whole
                continue
            rank = max(up.shape[0] for _, up in layers.values())
            downs = np.zeros((depth, *first[0].shape[:-1], rank), np.float32)
            ups = np.zeros((depth, rank, first[1].shape[-1]), np.float32)
            for layer, (down, up) in layers.items():
                downs[layer, ..., : down.shape[-1]], ups[layer, : len(up)] = down, up
            yield from ((path + DOWN, downs), (path + UP, ups))


class _Scales:
    """alpha / rank of each module by a file's metadata, or by PEFT's configuration beside it; 1
    without either."""

    def __init__(self, path: Path) -> None:
        self.said: dict[str, Any] = {}
        beside = path.with_name(PEFT_CONFIG)
        if path.name == PEFT and beside.exists():
            self.where, self.said = beside, weights.read_json(beside, weights.CONFIG_BYTES)
        elif METADATA in (found := weights.read_metadata(path)):
            self.where, said = path, weights.parse_json(path, found[METADATA].encode())
            self.said = {PREFIX.sub("", name, count=1): value for name, value in said.items()}
        if self.said.get("use_dora"):
            raise UserError(f"{self.where}: use_dora is set; allowed: false")

    def __call__(self, module: str, rank: int) -> float:
        if not self.said:
            return 1.0
        alpha = self.said.get("lora_alpha", rank)
        patterns = self.said.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.where}: alpha_pattern is no JSON object")
        for name, value in patterns.items():
            try:
                alpha = value if re.fullmatch(rf"(.*\.)?({name})", module) else alpha
            except re.error as error:
                raise UserError(f"{self.where}: alpha_pattern: {error}") from error
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise UserError(f"{self.where}: lora_alpha is {alpha!r:.60}; allowed: a number")
        return alpha / (math.sqrt(rank) if self.said.get("use_rslora") else rank)


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
        names.setdefault((place.path, place.layer), (name, place))
    low, modules, rank = flat(adapters), list[str](), 0
    tensors: dict[str, np.ndarray] = {}
    for path, down in low.items():
        if not path.endswith(DOWN):
            continue
        layer, rank = path.removesuffix(DOWN), down.shape[-1]
        downs, ups = np.asarray(down, np.float32), np.asarray(low[layer + UP], np.float32) * scale
        for index in range(len(ups)) if ups.ndim == 3 else (None,):
            name, place = names[layer + "kernel", index]
            assert place.axes is not None
            a, b = (downs, ups) if index is None else (downs[index], ups[index])
            ones = (1,) * (len(place.axes) - 2 + place.ones)
            a = a.transpose(np.argsort(place.axes))
            modules.append(name.removesuffix(".weight"))
            key = f"{prefix}.{modules[-1]}"
            a, b = a.reshape(a.shape + (1,) * place.ones), b.T.reshape(*b.T.shape, *ones)
            tensors |= {f"{key}.lora_{n}.weight": x.copy() for n, x in (("A", a), ("B", b))}
    said = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    text = json.dumps({f"{prefix}.{name}": value for name, value in said.items()}, sort_keys=True)
    return tensors, {"format": "pt", METADATA: text}
