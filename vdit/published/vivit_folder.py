"""ViT and ViViT (Model 1) in transformers' folders, read and written.

Folders of the backbones alone (ViTModel, VivitModel) have no head and no prefix in their tensors'
names; their pooler is not read.

Source of the names: transformers 5.23; published folders have those of transformers 4.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from vdit.errors import UserError
from vdit.models.vivit import ViViT
from vdit.published import weights
from vdit.published.family import Classifier, layer
from vdit.published.weights import Row

STEM = "model"  # of the weights' files

# transformers' names of activations; the first that maps to one of vdit's is written.
ACTIVATIONS = {
    "gelu_fast": "gelu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf",
    "silu": "silu",
}  # fmt: skip
_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,
}  # fmt: skip
FAMILIES: dict[str, Classifier] = {
    "vit": Classifier(
        ("vit",), "ViTForImageClassification", ("patch_size", 2),
        _DEFAULTS | {"layer_norm_eps": 1e-12, "hidden_act": ("gelu", *ACTIVATIONS)},
    ),
    "vivit": Classifier(
        ("vivit",), "VivitForVideoClassification", ("tubelet_size", 3),
        _DEFAULTS | {"layer_norm_eps": 1e-6, "hidden_act": tuple(ACTIVATIONS), "num_frames": 32},
    ),
}  # fmt: skip
FIXED = {"num_channels": 3, "qkv_bias": True}
OTHERS = (r"(vi(vi)?t\.)?(pooler\..*|embeddings\.mask_token)",)

# A layer's tensors: names in published folders, and in transformers 5.
_STACKS = ("encoder.layer.{}", "layers.{}")
_LAYERS = {
    "attention_norm": ("layernorm_before", "layernorm_before"),
    "attention/q": ("attention.attention.query", "attention.q_proj"),
    "attention/k": ("attention.attention.key", "attention.k_proj"),
    "attention/v": ("attention.attention.value", "attention.v_proj"),
    "attention/o": ("attention.output.dense", "attention.o_proj"),
    "mlp_norm": ("layernorm_after", "layernorm_after"),
    "mlp/up": ("intermediate.dense", "mlp.fc1"),
    "mlp/down": ("output.dense", "mlp.fc2"),
}


def rows(kind: str) -> tuple[Row, ...]:
    """The key table of a family's `unfolded` parameters; the first names are written."""
    sizes = FAMILIES[kind].patch[1]
    kernel = (*range(2, 2 + sizes), 1, 0)  # (D, C, t, h, w) in torch
    table = list(layer("head", "classifier"))
    for base in (f"{kind}.", ""):
        embed = f"{base}embeddings"
        table += [
            ("embed_video/kernel", f"{embed}.patch_embeddings.projection.weight", kernel),
            ("embed_video/bias", f"{embed}.patch_embeddings.projection.bias", None),
            ("encoder/token", f"{embed}.cls_token", None),
            ("encoder/position", f"{embed}.position_embeddings", None),
            *layer("encoder/norm", f"{base}layernorm"),
        ]
        for number, stack in enumerate(_STACKS):
            for ours, names in _LAYERS.items():
                table += layer(f"encoder/blocks/{ours}", f"{base}{stack}.{names[number]}")
    return tuple(table)


def unfolded(params: Mapping[str, Any], patch: tuple[int, ...]) -> dict[str, Any]:
    """Parameters in transformers' shapes: the tubelets' kernel as a convolution's, batch axes.

    `patch` is the kernel's size: two numbers for a ViT.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    kernel = flat["embed_video/kernel"]
    flat["embed_video/kernel"] = kernel.reshape(*patch, -1, kernel.shape[-1])
    for name, axes in (("encoder/token", (0, 1)), ("encoder/position", (0,))):
        flat[name] = jnp.expand_dims(flat[name], axes)
    return traverse_util.unflatten_dict(flat, sep="/")


def folded(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unfolded`."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    for name in ("embed_video/kernel", "encoder/position"):
        flat[name] = flat[name].reshape(-1, flat[name].shape[-1])
    flat["encoder/token"] = flat["encoder/token"].reshape(-1)
    return traverse_util.unflatten_dict(flat, sep="/")


class Found(NamedTuple):
    """The network of a folder."""

    model: ViViT  # with 0 classes if the folder has no head
    frames: int  # of a clip: positions are learned for this number and size
    size: tuple[int, int]
    plan: weights.Plan  # of `unfolded` parameters, without a head if the folder has none
    classes: list[str]  # names of the classes, if the folder has them


def read_module(folder: str | Path) -> Found:
    """The network of a folder and the plan of its parameters; reads headers, no tensor data.

    `UserError` for another or an unsupported network, or tensors that do not fit.
    """
    folder = Path(folder)
    where = folder / "config.json"
    config = weights.read_config(folder, tuple(FAMILIES))
    kind = config["model_type"]
    family = FAMILIES[kind]
    weights.check_fixed(config, FIXED, where)
    numbers = weights.fields(config, family.defaults, folder)
    width, depth, heads = (
        numbers[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    field, count = family.patch
    sides = weights.numbers(config, field, 16, folder, count)
    size = weights.numbers(config, "image_size", 224, folder, 2)
    frames = numbers.get("num_frames", 1)
    time, height, across = (1, *sides)[-3:]
    if height != across:
        raise UserError(f"{where}: {field} is {sides}; allowed: square patches")
    weights.check_heads(width, heads, folder)
    tensors = weights.read_headers(folder, STEM)
    head = tensors.get("classifier.weight")
    classes = head.shape[0] if head is not None and len(head.shape) == 2 else 0
    model = ViViT(
        classes, width, depth, heads, patch=(time, height, across),
        mlp_ratio=numbers["intermediate_size"] / width, epsilon=float(numbers["layer_norm_eps"]),
        activation=ACTIVATIONS[numbers["hidden_act"]],
    )  # fmt: skip
    video = jax.ShapeDtypeStruct((1, frames, *size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), video)["params"]
    shapes = jax.eval_shape(functools.partial(unfolded, patch=sides), shapes)
    if not classes:
        del shapes["head"]
    plan = weights.plan(tensors, shapes, rows(kind), OTHERS, folder)
    labels = config.get("id2label")
    names = []
    if isinstance(labels, dict) and set(labels) == {str(i) for i in range(classes)}:
        names = [str(labels[str(i)]) for i in range(classes)]
    return Found(model, frames, (size[0], size[1]), plan, names)


def to_folder(
    model: ViViT, frames: int, size: tuple[int, int]
) -> tuple[dict[str, Any], tuple[Row, ...], tuple[int, ...]] | None:
    """The config.json of a model for clips of that size, its key table, and the kernel size for
    `unfolded`; None for a network that transformers does not have."""
    names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation]
    if (model.model, model.pool, model.samples) != ("joint", "token", 0) or not names:
        return None
    kind = "vit" if frames == model.patch[0] == 1 else "vivit"
    family = FAMILIES[kind]
    field, count = family.patch
    patch = model.patch[-count:]
    config = {
        "architectures": [family.architecture],
        "model_type": kind,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": names[0],
        "layer_norm_eps": model.epsilon,
        **FIXED,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    shape = {"patch_size": patch[0]} if kind == "vit" else {
        field: list(patch), "num_frames": frames
    }  # fmt: skip
    return config | shape, rows(kind), patch
