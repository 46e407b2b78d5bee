"""Safetensors folders: what is read, how little of it at once, and every kind of damage refused."""

import json
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tools import exporting
from vdit.errors import UserError
from vdit.published import weights
from vdit.published.weights import Row

ROWS: tuple[Row, ...] = (
    ("blocks/(up|down)/kernel", r"layer.{}.\1.weight", (1, 0)),
    ("blocks/conv/kernel", "layer.{}.conv.weight", (2, 1, 0)),
    ("out/bias", "last.bias", None),
    ("out/bias", "first.bias", None),
)
OTHERS = (r"vision\..*", r"position_ids")
SHAPES: dict[str, Any] = {
    "blocks": {
        "up": {"kernel": np.zeros((2, 3, 4))},
        "down": {"kernel": np.zeros((2, 4, 3))},
        "conv": {"kernel": np.zeros((2, 5, 2, 3))},
    },
    "out": {"bias": np.zeros(3)},
}


def tensors() -> dict[str, np.ndarray]:
    """A file of the layout above."""
    draw = np.random.default_rng(0).normal
    made: dict[str, np.ndarray] = {"last.bias": draw(size=3).astype(np.float32)}
    for layer in range(2):
        for name, shape in (("up", (4, 3)), ("down", (3, 4)), ("conv", (3, 2, 5))):
            made[f"layer.{layer}.{name}.weight"] = draw(size=shape).astype(np.float32)
    return made


def read(folder: Path) -> Any:
    headers = weights.read_headers(folder)
    return weights.load(weights.plan(headers, SHAPES, ROWS, OTHERS, folder))


def save(folder: Path, made: dict[str, np.ndarray]) -> None:
    save_file(made, folder / "model.safetensors", {"format": "pt"})


def raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + data)


def refused(folder: Path) -> str:
    """The one printable line of a refusal."""
    with pytest.raises(UserError) as caught:
        read(folder)
    line = str(caught.value)
    assert str(folder) in line and line.isprintable() and len(line) < 600
    return line.replace(str(folder), "")


def test_layers_are_stacked_and_axes_are_ours(tmp_path: Path) -> None:
    made = tensors()
    others = {"vision.patch": np.zeros(2, np.float32), "position_ids": np.arange(5)}
    save(tmp_path, made | others)
    found = read(tmp_path)
    for layer in range(2):
        for name in ("up", "down"):
            want = made[f"layer.{layer}.{name}.weight"].T
            np.testing.assert_array_equal(found["blocks"][name]["kernel"][layer], want)
        want = np.einsum("oit->tio", made[f"layer.{layer}.conv.weight"])
        np.testing.assert_array_equal(found["blocks"]["conv"]["kernel"][layer], want)
    np.testing.assert_array_equal(found["out"]["bias"], made["last.bias"])


def test_a_second_name_is_taken_where_the_first_is_absent(tmp_path: Path) -> None:
    made = tensors()
    made["first.bias"] = made.pop("last.bias")
    save(tmp_path, made)
    np.testing.assert_array_equal(read(tmp_path)["out"]["bias"], made["first.bias"])
    del made["first.bias"]
    save(tmp_path, made)
    assert "lacks the tensor last.bias" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_narrow_tensors_stay_as_they_are(tmp_path: Path, dtype: Any) -> None:
    made = {name: value.astype(dtype) for name, value in tensors().items()}
    save(tmp_path, made)
    found = read(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(found["blocks"]["up"]["kernel"][1], made["layer.1.up.weight"].T)


def test_layers_of_different_dtypes_are_stacked_without_loss(tmp_path: Path) -> None:
    made = tensors()
    made["layer.0.up.weight"] = made["layer.0.up.weight"].astype(jnp.bfloat16)
    made["layer.1.up.weight"] = made["layer.1.up.weight"].astype(np.float16)
    save(tmp_path, made)
    kernel = read(tmp_path)["blocks"]["up"]["kernel"]
    assert kernel.dtype == np.float32
    for layer in range(2):
        want = made[f"layer.{layer}.up.weight"].astype(np.float32).T
        np.testing.assert_array_equal(kernel[layer], want)


def test_the_host_holds_about_one_tensor_at_a_time(tmp_path: Path) -> None:
    """And nothing of a tensor that the model does without."""
    layers, side = 24, 128
    size = side * side * 4
    made = {f"layer.{i}.up.weight": np.ones((side, side), np.float32) for i in range(layers)}
    save(tmp_path, made | {"vision.large": np.ones(layers * side * side, np.float32)})
    shapes = {"blocks": {"up": {"kernel": np.zeros((layers, side, side))}}}
    plan = weights.plan(weights.read_headers(tmp_path), shapes, ROWS, OTHERS, tmp_path)
    weights.load(plan)  # compiles
    tracemalloc.start()
    weights.load(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < 4 * size, peak / size


def shards(folder: Path) -> dict[str, str]:
    """The tensors in two shards and their index; returns the map from tensor to shard."""
    made = tensors()
    names = sorted(made)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: made[name] for name in part}, folder / file)
    named = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return named


def test_shards_are_one_model(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save(tmp_path / "one", tensors())
    shards(tmp_path / "two")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    jax.tree.map(np.testing.assert_array_equal, one, two)
    digests = {weights.digest(weights.read_headers(tmp_path / name)) for name in ("one", "two")}
    assert len(digests) == 1


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    named = shards(tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    assert "/b.safetensors: No such file" in refused(tmp_path)
    for hostile in ("../a.safetensors", "/etc/passwd", "a.bin", "x/../a.safetensors"):
        index.write_text(json.dumps({"weight_map": named | {"last.bias": hostile}}))
        assert "is not a valid shard name" in refused(tmp_path)
    (tmp_path / "c.safetensors").rename(tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": named | {"more": "a.safetensors"}}))
    assert "no shard holds the tensor more" in refused(tmp_path)
    save_file({"last.bias": np.zeros(3, np.float32)}, tmp_path / "c.safetensors")
    index.write_text(json.dumps({"weight_map": named | {"x": "c.safetensors"}}))
    assert "tensor last.bias is in two shards" in refused(tmp_path)
    for text in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert "cannot read /model.safetensors.index.json" in refused(tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    made = tensors()
    name = "layer.1.up.weight"
    save(tmp_path, {key: value for key, value in made.items() if key != name})
    assert refused(tmp_path).endswith(f"lacks the tensor {name}")
    save(tmp_path, made | {name: np.zeros((3, 4), np.float32)})
    assert f"tensor {name} is (3, 4); allowed: (4, 3)" in refused(tmp_path)
    save(tmp_path, made | {"layer.0.conv.weight": np.zeros((5, 2, 3), np.float32)})
    assert "(5, 2, 3); allowed: (3, 2, 5)" in refused(tmp_path)
    save(tmp_path, made | {name: np.zeros((4, 3), np.int32)})
    assert f"tensor {name} is I32; allowed: F32, F16, BF16" in refused(tmp_path)
    save(tmp_path, made | {"layer.2.up.weight": made[name], "visions": made[name]})
    assert "an unexpected tensor: layer.2.up.weight (and 1 more)" in refused(tmp_path)
    for bad in (np.nan, np.inf):
        broken = made[name].copy()
        broken[2, 1] = bad
        save(tmp_path, made | {name: broken})
        assert f"tensor {name} has values that are not finite" in refused(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "neither model.safetensors nor" in refused(tmp_path)


def test_every_way_of_cutting_a_file_short_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (*range(0, 40), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cannot read /model.safetensors" in refused(tmp_path)
    path.write_bytes(whole + b"\0")
    assert f"it has {len(whole) + 1} bytes; its header says {len(whole)}" in refused(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data, why",
    [
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "invalid offset for tensor `b`"),
        ({"a": ENTRY, "b": ENTRY}, 8, "invalid offset for tensor"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, 12, "invalid offset for tensor `a`"),
        ({"a": ENTRY}, 4, "bytes; its header says"),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, 4, "invalid shape, data type, or offset"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "invalid offset for tensor `a`"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, 8, "integer `-8`, expected usize"),
        ({"a": ENTRY | {"data_offsets": [0, 2**63]}}, 8, "invalid shape, data type, or offset"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 8]}}, 8, "length 3, expected 2 elements"),
        ({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}, 8, "point `0.0`, expected usize"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, 8, "integer `-1`, expected usize"),
        ({"a": ENTRY | {"shape": [True, 2]}}, 8, "boolean `true`, expected usize"),
        ({"a": ENTRY | {"shape": [1] * 99 + [2]}}, 8, "tensor a has 100 axes; allowed: 8"),
        ({"a": ENTRY | {"shape": "22"}}, 8, 'string "22", expected a sequence'),
        ({"a": ENTRY | {"dtype": "F33"}}, 8, "unknown variant `F33`, expected one of `BOOL`"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, 8, "invalid type: sequence, expected string"),
        ({"a": 3}, 8, "integer `3`, expected struct TensorInfo"),
        ({"a\n" * 500: ENTRY | {"data_offsets": [4, 12]}}, 12, r"offset for tensor `a\na\n"),
        (b'{"a": 1, "a": 2}', 8, "duplicate key a"),
        (b'{"a": %b, "a": %b}' % (2 * (json.dumps(ENTRY).encode(),)), 8, "duplicate key a"),
        ({"a": ENTRY | {"shape": [2**40, 2**40]}}, 8, "overflow computing buffer size"),
        ({"a": ENTRY, "__metadata__": 3}, 8, "integer `3`, expected a map"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[1, 2]", 0, "not a JSON object"),
        (b"", 0, "not JSON"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: Any, data: int, why: str) -> None:
    raw(tmp_path, header, bytes(data))
    assert why in refused(tmp_path)


@pytest.mark.parametrize("length", [2**30, 2**63, 2**64 - 1])
def test_a_header_that_says_a_gigabyte_is_not_read(tmp_path: Path, length: int) -> None:
    raw(tmp_path, {}, length=length)
    assert f"its header says {length} bytes; allowed: 16777216" in refused(tmp_path)


def test_the_digest_sees_values_names_and_shapes(tmp_path: Path) -> None:
    made = tensors()

    def digest(files: tuple[bytes, ...] = (), **changes: np.ndarray) -> str:
        save(tmp_path, made | changes)
        return weights.digest(weights.read_headers(tmp_path), files)

    first = digest()
    assert digest() == first
    other = {"last.bias": made["last.bias"] + np.float32(1e-3)}
    reshaped = {"layer.0.up.weight": made["layer.0.up.weight"].reshape(3, 4)}
    narrow = {"last.bias": made["last.bias"].view(np.int32)}
    found = [digest(**other), digest(**reshaped), digest(**narrow), digest((b"a",)),
             digest((b"", b"a")), digest(more=made["last.bias"])]  # fmt: skip
    assert len({first, *found}) == 7


def test_fields_have_their_types_and_bounds(tmp_path: Path) -> None:
    defaults = {"width": 8, "epsilon": 1e-6, "kind": "relu"}
    assert weights.fields({}, defaults, tmp_path) == defaults
    given = {"width": 4, "epsilon": 1, "kind": "gelu", "more": [3]}
    assert weights.fields(given, defaults, tmp_path) == {"width": 4, "epsilon": 1, "kind": "gelu"}
    bad: list[tuple[str, Any]] = [
        ("width", 0), ("width", -3), ("width", 2.5), ("width", 2**40), ("width", True),
        ("width", "8"), ("epsilon", float("nan")), ("epsilon", [1]), ("kind", 3),
    ]  # fmt: skip
    for name, value in bad:
        line = re.escape(f"config.json: {name} is {json.dumps(value)}; allowed: ")
        with pytest.raises(UserError, match=line):
            weights.fields({name: value}, defaults, tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="cannot read .*config.json: No such file"):
        weights.read_config(tmp_path, ("t5",))
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type is 'bert'; allowed: t5 or clip"):
        weights.read_config(tmp_path, ("t5", "clip"))
    path.write_text("{}" + " " * 2**20)
    with pytest.raises(UserError, match="it has 1048578 bytes; allowed: 1048576"):
        weights.read_config(tmp_path, ("t5",))


def test_what_is_written_is_read_back_from_one_file_or_from_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other libraries write it; a shard holds as many tensors as fit into `SHARD_BYTES`."""
    for folder, most in (("one", 10**9), ("many", 120)):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(exporting, "SHARD_BYTES", most)
        made = tensors() | {"vision.scalar": np.array(2.0, np.float16)}
        file = tmp_path / folder / "model.safetensors"
        exporting.write(file, [(name, lambda v=v: v) for name, v in made.items()])
    save_file(made, tmp_path / "theirs", metadata={"format": "pt"})
    names = {path.name for path in (tmp_path / "many").iterdir()}
    assert (tmp_path / "one" / file.name).read_bytes() == (tmp_path / "theirs").read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [file.name]
    count = len(names) - 1
    shards = {f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)}
    assert names == {*shards, "model.safetensors.index.json"} and count > 2
    assert all((tmp_path / "many" / name).stat().st_size < 500 for name in shards)
    jax.tree.map(np.testing.assert_array_equal, *(read(tmp_path / n) for n in ("one", "many")))
