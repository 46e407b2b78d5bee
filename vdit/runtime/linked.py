"""Arrays that a checkpoint does not hold: links to the safetensors files of others, and a table.

An item's folder has the links and `TABLE`: for each array "dtype" and "shape", and "tensors", each
its file, dtype, first byte and shape, in "axes" order; one for each layer of a "stacked" array.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

TABLE = "linked.json"


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """The arrays of an item by path ("a/b/c"); empty for one that orbax has saved."""
    path = folder / TABLE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def shapes(folder: Path) -> Any:
    """The tree of shapes and dtypes of an item's arrays."""
    found = table(folder).items()
    tree = {k: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"])) for k, x in found}
    return unflatten_dict(tree, sep="/")


def load(folder: Path, abstract: Any) -> Any:
    """The arrays of an item, with dtypes and shardings of an abstract tree; each process reads what
    its devices hold."""
    rows, wanted = table(folder), flatten_dict(abstract, sep="/")
    return unflatten_dict({k: _array(folder, rows[k], x) for k, x in wanted.items()}, sep="/")


def _array(folder: Path, row: dict[str, Any], like: jax.ShapeDtypeStruct) -> jax.Array:
    def tensor(file: str, dtype: str, begin: int, shape: list[int]) -> np.ndarray:
        x = np.memmap(folder / file, jnp.dtype(dtype), "r", begin, tuple(shape))
        return x if row["axes"] is None else x.transpose(row["axes"])

    def part(index: Any) -> np.ndarray:
        if not row["stacked"]:
            return np.array(tensor(*row["tensors"][0])[index], like.dtype)
        layers = [tensor(*x)[index[1:]] for x in row["tensors"][index[0]]]
        return np.stack(layers, dtype=like.dtype, casting="unsafe")

    return jax.make_array_from_callback(like.shape, like.sharding, part)
