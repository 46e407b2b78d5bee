"""Image encoders in transformers' folders, read by their family (`families.FAMILIES`).

A folder holds config.json and safetensors; preprocessor_config.json is in it or in the folder
"image_processor" beside it.

Dimension key: H W rows and columns of pixels, B images, S tokens of an image, E their width.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vdit.errors import UserError
from vdit.nn.product import Matmul
from vdit.published import families, weights
from vdit.published.family import ImageEncoder

FAMILIES = {
    name: family for family in families.of(ImageEncoder).values() for name in family.classes
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Fields of preprocessor_config.json with the values that are read.
FIXED = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """An image encoder, the reader of its parameters, and how images are made its pixels."""

    module: Any
    plan: weights.Plan
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self) -> Any:
        """The parameters, in the dtypes of the files; no value may be infinite."""
        return weights.load(self.plan)

    def pixels(self, image_HW3: np.ndarray) -> np.ndarray:
        """uint8 pixels of any size as the network's: resized (bicubic) so that the shorter side
        fits, its middle cut out, normalised."""
        size, (height, width) = self.module.size, image_HW3.shape[:2]
        short = min(height, width)
        image = resized(image_HW3, (size * height // short, size * width // short), "BICUBIC")
        top, left = ((side - size) // 2 for side in image.shape[:2])
        cut = image[top : top + size, left : left + size].astype(np.float32) / 255
        return (cut - np.array([[self.mean]], np.float32)) / np.array([[self.std]], np.float32)

    def features(self, params: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """float32 (B, S, E) of uint8 images (H, W, 3)."""
        return _apply(self.module, params, np.stack([self.pixels(image) for image in images]))


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Any, params: Any, pixels_BHW3: jax.Array) -> jax.Array:
    return module.apply({"params": params}, pixels_BHW3)


def resized(image_HW3: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """uint8 pixels at another height and width, as Pillow's method of that name gives them."""
    if image_HW3.shape[:2] == size:
        return image_HW3
    where = Image.Resampling[method]
    return np.asarray(Image.fromarray(image_HW3).resize(size[::-1], where))


def read(path: str, matmul: Matmul = Matmul()) -> Encoder:
    """The encoder of a folder; reads headers, no tensor data. `UserError` if it does not fit."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"dit.wan.image_path={path}: there is no such folder")
    config = weights.read_config(folder, tuple(FAMILIES))
    family = FAMILIES[config["model_type"]]
    module = family.module(config, folder)
    pixels = jax.ShapeDtypeStruct((1, module.size, module.size, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    tensors = weights.read_headers(folder)
    plan = weights.plan(tensors, shapes, family.rows, family.others, folder)
    return Encoder(module.clone(matmul=matmul.float32), plan, *_preprocessor(folder, module.size))


def _preprocessor_path(folder: Path) -> Path:
    inside = folder / "preprocessor_config.json"
    beside = folder.absolute().parent / "image_processor" / inside.name
    return inside if inside.exists() or not beside.exists() else beside


def _preprocessor(folder: Path, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a folder's preprocessor_config.json, CLIP's without one;
    `UserError` unless images are resized and cut to `size`."""
    path = _preprocessor_path(folder)
    config = weights.read_json(path, weights.CONFIG_BYTES) if path.exists() else {}
    weights.check_fixed(config, FIXED, path)
    for name, sides in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        said = config.get(name, size)
        if said not in (size, dict.fromkeys(sides, size)):
            raise UserError(f"{path}: {name} is {str(said)[:60]}; allowed: {size}")
    found = config.get("image_mean", MEAN), config.get("image_std", STD)
    try:
        mean, std = (tuple(float(x) for x in values) for values in found)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{path}: image_mean and image_std are not three numbers each") from None
    return mean, std


def content(path: str) -> str:
    """A digest of everything that the features depend on; cheap (see `weights.digest`)."""
    folder, tensors = Path(path), weights.read_headers(Path(path))
    files = [file for file in (folder / "config.json", _preprocessor_path(folder)) if file.exists()]
    return weights.digest(tensors, [weights.read_bytes(f, weights.CONFIG_BYTES) for f in files])
