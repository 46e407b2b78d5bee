"""What the tests beside torch share: random weights there and here, and an answer's layout."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from tools import parity
from vdit.models.unet import UNet
from vdit.nn.patch import unpatchify


def drawn(model: Any, scale: float = 0.02) -> Any:
    """A model of torch with weights of which every part matters."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
        for block in getattr(model, "transformer_blocks", []):
            if hasattr(block.norm1, "emb"):  # a DiT's blocks have copies of one embedder
                first = model.transformer_blocks[0].norm1.emb.state_dict()
                block.norm1.emb.load_state_dict(first)
    return model.eval()


def random(shapes: Any, seed: int) -> Any:
    """Parameters of ours: kernels that keep the size of what they are given, no bias of 0."""
    made = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        draw = made.standard_normal(leaf.shape, np.float32)
        if name.endswith("scale"):
            return (1 + 0.1 * draw).astype(np.float32)
        if not name.endswith("kernel"):
            return (0.1 * draw).astype(np.float32)
        fan = np.prod(leaf.shape[1 if "blocks/" in name else 0 : -1])
        return (draw / np.sqrt(fan)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def called(model: Any, params: Any, given: Mapping[str, np.ndarray]) -> list[Any]:
    """The outputs of the calls that a parity report makes of a network."""
    made = []
    for method, arguments in parity.CALLS[type(model)](model, given):
        apply: Any = functools.partial(model.apply, method=method)
        made.append(jax.jit(apply)({"params": params}, *arguments))
    return made


def answer(model: Any, params: Any, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """A denoiser's answer as latents (B, T, h, w, kinds Z), for x (B, T, h, w, Z)."""
    (out,), (_, frames, height, width, _) = called(model, params, given), given["x"].shape
    sizes = {"T": frames, "h": height, "w": width}
    if isinstance(model, UNet):
        return np.asarray(rearrange(out, "B (T h w) Z -> B T h w Z", **sizes))
    q, r = model.patch
    parts = jax.numpy.split(out, 1 + model.learned_variance, axis=-1)
    grid = frames, height // q, width // r
    back = [unpatchify(part.reshape(len(out), *grid, -1), (1, q, r)) for part in parts]
    return np.concatenate(back, axis=-1)
