"""CLIP's image encoder: transformers' pixels and features; folders that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdit.errors import UserError
from vdit.published import image_folder

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_vision"
EXPECTED = np.load(GOLDEN / "expected.npz")


def test_transformers_pixels_and_features(near: Any) -> None:
    encoder = image_folder.read(str(GOLDEN))
    stored = [
        [EXPECTED[f"{i}/{part}"] for i in range(3)] for part in ("image", "pixels", "features")
    ]
    for image, pixels in zip(*stored[:2], strict=True):
        np.testing.assert_allclose(encoder.pixels(image), pixels, atol=1e-6)
    features = encoder.features(encoder.load(), stored[0])
    assert features.shape == (3, 1 + 3 * 3, 6)
    near("CLIP's image encoder", features, np.stack(stored[2]))


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", {"model_type": "siglip"}, "model_type is 'siglip'"),
        ("config.json", {"patch_size": 5}, "patch_size 5"),
        ("config.json", {"num_channels": 1}, "num_channels is 1; allowed: 3"),
        ("config.json", {"num_hidden_layers": 1}, "num_hidden_layers 1"),
        ("config.json", {"num_hidden_layers": 7}, "lacks the tensor"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2; allowed: 3"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 14}}, "size is {'shortest_edge"),
        ("preprocessor_config.json", {"image_mean": [0.5, "a"]}, "are not three numbers each"),
    ],
)
def test_what_is_refused(file: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        image_folder.read(str(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_encoder_has_another_digest(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(GOLDEN, folder)
    digest = image_folder.content(str(GOLDEN))
    assert image_folder.content(str(folder)) == digest
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48", "0.5"))
    assert image_folder.content(str(folder)) != digest
