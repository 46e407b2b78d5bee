"""The stage classify: the smoke experiment by the program's own walk, and its refusals."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.vivit import get_config
from vdit.config.classifier import build_classifier
from vdit.data import sources
from vdit.errors import UserError
from vdit.nn.patch import to_float
from vdit.run import run
from vdit.runtime.checkpoint import restore_ema
from vdit.runtime.metrics import read


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("vivit")
    run(get_config("smoke"), workdir)
    return workdir


def test_it_reports_its_accuracy_on_heldout_clips(walked: Path) -> None:
    rows = [row for row in read(walked) if row["stage"] == "classify"]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [4, 8]
    assert all(0 <= row["accuracy_motion"] <= 1 for row in trained)
    scored = [row for row in rows if "heldout_clips" in row]
    assert [row["step"] for row in scored] == [4, 8]
    assert (walked / "report.html").is_file()
    # The last row again, from the checkpoint, clip by clip.
    config = get_config("smoke")
    model = build_classifier(config)
    params = {"params": restore_ema(walked / "checkpoints" / "classify", 8)["vivit"]}
    clips = sources.labelled(config, "heldout", walked)
    apply = jax.jit(model.apply)
    right = np.zeros(2)
    labels = np.stack([clips[i]["label"] for i in range(16)])
    for i in range(16):
        logits: Any = np.asarray(apply(params, to_float(clips[i]["video"][None])))[0]
        right += np.array([logits[:6].argmax(), logits[6:].argmax()]) == labels[i]
    last = scored[-1]
    found = [last["heldout_accuracy_motion"], last["heldout_accuracy_impacts"]]
    np.testing.assert_allclose(found, right / 16, atol=1 / 16 + 1e-6)  # rounding may turn one
    assert last["heldout_commonest_motion"] == np.bincount(labels[:, 0]).max() / 16


def test_another_model_is_refused_and_more_heldout_clips_are_not(walked: Path) -> None:
    config = get_config("smoke")
    config.classify.heldout = 24
    run(config, walked)
    config.classify.smoothing = 0.2
    with pytest.raises(UserError, match=r"classify.smoothing was 0.1, now 0.2"):
        run(config, walked)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data.source": "folder"}, "needs labels"),
        ({"data.objects": (1, 2)}, "are of one body"),
        ({"classify.questions": ("mood",)}, "known are"),
        ({"classify.questions": ("motion", "motion")}, "different names"),
        ({"classify.preset": "B/16"}, "B/16x2"),
        ({"classify.preset": "nano/32x32"}, "known are"),
        ({"classify.model": "factorised"}, "factorised_encoder"),
        ({"classify.model": "factorised_dot_product"}, "no class token"),
        ({"classify.samples": 4}, "tubelets of one frame"),
        ({"classify.samples": 20, "classify.preset": "nano/8x1"}, "1 to 17"),
        ({"data.size": (4, 32)}, "less than a tubelet"),
        ({"classify.smoothing": 1.5}, "0 to less than 1"),
        ({"classify.train.batch": 0}, "classify.train.batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = get_config("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UserError, match="known variants are"):
        get_config("tiny")
