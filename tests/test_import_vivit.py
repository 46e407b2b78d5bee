"""ViT's and ViViT's folders: transformers' numbers, the way back to the bit, what starts from them,
and folders that do not fit. The folders have the weights of tests/golden/vivit.npz."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.vivit import get_config
from tools import export_weights, import_weights
from tools.importing.classifier import preset_name
from tools.importing.inflation import central_frame, fit_positions, inflate
from vdit import classify, main
from vdit import run as program
from vdit.config.classifier import answer_names, build_classifier
from vdit.config.identity import read_config
from vdit.models import vivit
from vdit.published import vivit_folder, weights
from vdit.runtime.checkpoint import restore_ema
from vdit.runtime.metrics import Metrics
from vdit.runtime.video import write_mp4

GOLDEN = np.load(Path(__file__).parent / "golden" / "vivit.npz")
CASES = ("vivit_plain", "vivit_left_over", "vit_plain")
NAMES = ["falls", "stays", "rolls", "flies", "hops"]


def published(name: str) -> str:
    """A tensor's name in transformers 5 as folders have it that were written before."""
    for old, new in vivit_folder._LAYERS.values():
        name = name.replace(f"{new}.", f"{old}.") if f"{old}." not in name else name
    return name.replace(".layers.", ".encoder.layer.")


def write_folder(folder: Path, case: str, **changes: Any) -> Path:
    """The folder that transformers would write of a case, with names as they are published."""
    t, h, w, width, depth, heads, mlp = GOLDEN[f"{case}/case"].tolist()
    shapes = [tuple(map(int, s.split(","))) for s in GOLDEN[f"{case}/shapes"]]
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(GOLDEN[f"{case}/values"], cuts)
    names = [published(str(name)) for name in GOLDEN[f"{case}/names"]]
    folder.mkdir(parents=True)
    tensors = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    kind, video = case.split("_")[0], GOLDEN[f"{case}/video"]
    said = {
        "architectures": [vivit_folder.FAMILIES[kind].architecture],
        "model_type": kind, "image_size": list(video.shape[2:4]), "hidden_size": width,
        "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp,
        "layer_norm_eps": 1e-6, "id2label": {str(i): name for i, name in enumerate(NAMES)},
    }  # fmt: skip
    video_fields = {"num_frames": video.shape[1], "tubelet_size": [t, h, w]}
    said |= {"patch_size": h} if kind == "vit" else video_fields
    (folder / "config.json").write_text(json.dumps(said | changes))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "vit", "vit_plain")


def run(source: Path, work: Path, *flags: str) -> int:
    return import_weights.main([f"--source={source}", f"--workdir={work}", *flags])


def model_of(work: Path) -> tuple[Any, Any]:
    config = read_config(work)
    config.run.dtype = "float32"
    return build_classifier(config), restore_ema(work / "checkpoints" / "classify", 0)["vivit"]


def near(a: Any, b: Any) -> None:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.abs(a - b).max() / np.abs(b).max() < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_it_is_transformers_model_and_goes_back_to_the_bit(case: str, tmp_path: Path) -> None:
    source, work, out = write_folder(tmp_path / "in", case), tmp_path / "work", tmp_path / "out"
    assert run(source, work) == 0
    model, params = model_of(work)
    apply: Any = jax.jit(model.apply)
    near(apply({"params": params}, GOLDEN[f"{case}/video"]), GOLDEN[f"{case}/logits"])
    assert answer_names(read_config(work), work) == {"class": NAMES}
    flags = [f"--workdir={work}", f"--out={out}", "--stage=classify"]
    assert export_weights.main(flags) == 0
    old, new = (load_file(path / "model.safetensors") for path in (source, out))
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.shape == new[name].shape and value.tobytes() == new[name].tobytes()
    theirs, mine = (json.loads((path / "config.json").read_text()) for path in (source, out))
    assert {name: mine[name] for name in theirs} == theirs


def test_a_network_without_head_and_prefix_is_read(folder: Path, tmp_path: Path) -> None:
    """As ViTModel is saved: what it pools by is left out, and the head is a new one."""
    path = folder / "model.safetensors"
    bare = {
        name.removeprefix("vit."): value
        for name, value in load_file(path).items() if not name.startswith("classifier")
    }  # fmt: skip
    save_file(bare | {"pooler.dense.bias": np.zeros(16, np.float32)}, path)
    assert run(folder, tmp_path / "work", "--mesh=fsdp:8") == 0
    model, params = model_of(tmp_path / "work")
    video = GOLDEN["vit_plain/video"]
    apply: Any = jax.jit(lambda p, v: model.apply({"params": p}, v, method="features"))
    near(apply(params, video).pooled, GOLDEN["vit_plain/hidden"][:, 0])
    assert params["head"]["kernel"].shape == (16, 10) and not np.any(params["head"]["kernel"])


def ask(*flags: str) -> int:
    """The program's exit status; its flags are as they were before."""
    try:
        return main.main(["vdit", *flags])
    finally:
        main.FLAGS.unparse_flags()


def test_features_and_answers_of_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, clip = tmp_path / "work", tmp_path / "clip.mp4"
    assert run(write_folder(tmp_path / "in", "vivit_plain"), work) == 0
    fps = read_config(work).data.fps
    write_mp4(clip, np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), np.uint8), fps)
    command = [f"--workdir={work}", "--mode=features"]
    assert ask(*command, f"--video={clip}") == 0
    out = capsys.readouterr().out
    assert "clip.mp4: 12x8" in out and "the last held for 1" in out and "clip: class: " in out
    video, _ = classify.read_video(str(clip), read_config(work))
    assert video.shape == (4, 8, 12, 3)
    np.testing.assert_array_equal(video[3], video[2])
    made, seen = np.load(work / "features" / "clip.npz"), classify.load(work).see(video[None])
    assert made["tokens"].shape == (2, 2, 3, 16) and abs(made["answers/class"].sum() - 1) < 1e-5
    for name, want in (
        ("tokens", seen.tokens), ("pooled", seen.pooled), ("answers/class", seen.answers["class"])
    ):  # fmt: skip
        np.testing.assert_array_equal(made[name], want[0])
    for more, words in (
        ([*command, f"--video={work / 'config.json'}"], "config.json"),
        (command, "needs --video=FILE"),
        ([f"--workdir={work}", "--mode=eval"], "of an imported head"),
    ):
        assert ask(*more) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# The start of another network

TARGET = {
    "classify.preset": "16x3x4/4x2", "classify.activation": "gelu_erf", "classify.mlp_ratio": 1.5,
    "data.frames": 5, "data.size": (8, 12), "classify.train.steps": 2,
    "classify.train.warmup": 1, "run.log_every": 2,
}  # fmt: skip


def flags(changes: dict[str, Any]) -> list[str]:
    made = [f"--config.{name}={value}" for name, value in changes.items()]
    return ["--config=experiments/vivit.py:smoke", *made]


@pytest.mark.parametrize("start, size", [("central", (8, 12)), ("inflate", (12, 16))])
def test_a_video_model_starts_from_an_image_model(
    start: str, size: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    """All that it has of the image model is that model's; the head and the rest are its own."""
    more: dict[str, Any] = {"classify.model": "factorised_self_attention", "classify.pool": "mean"}
    more["data.size"] = size
    work = tmp_path / "work"
    assert run(folder, work, f"--start={start}", *flags(TARGET | more)) == 0
    model, params = model_of(work)
    assert (model.model, model.patch) == ("factorised_self_attention", (2, 4, 4))
    found = vivit_folder.read_module(folder)
    image = vivit_folder.folded(weights.load(found.plan))
    made = {"central": central_frame, "inflate": inflate}[start](image["embed_video"]["kernel"], 2)
    np.testing.assert_array_equal(params["embed_video"]["kernel"], made)
    position = image["encoder"]["position"][1:]  # without the class token's
    wanted = fit_positions(position, (1, 2, 3), (2, size[0] // 4, size[1] // 4))
    np.testing.assert_allclose(params["encoder"]["position"], wanted, atol=1e-6)
    blocks, theirs = params["encoder"]["blocks"], image["encoder"]["blocks"]
    jax.tree.map(np.testing.assert_array_equal, {k: blocks[k] for k in theirs}, theirs)
    assert not np.any(blocks["time"]["o"]["kernel"]) and np.any(blocks["time"]["q"]["kernel"])
    assert not np.any(params["head"]["kernel"])


def test_it_is_trained_from_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert run(folder, work, *flags(TARGET)) == 0
    config = get_config("smoke")
    config.update_from_flattened_dict(TARGET)
    program.run(config, work)
    out = capsys.readouterr().out
    assert "classify: step 0 has weights alone: its optimizer begins anew" in out
    before = restore_ema(work / "checkpoints" / "classify", 0)["vivit"]
    after = restore_ema(work / "checkpoints" / "classify", 2)["vivit"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.5
    with Metrics(work) as metrics:
        row = classify.evaluate(work, metrics)
    assert row["heldout_clips"] == 16 and 0 <= row["heldout_accuracy_motion"] <= 1


def test_a_video_model_starts_from_a_video_model(tmp_path: Path) -> None:
    """Its tubelets and positions are kept; only the head is new."""
    source = write_folder(tmp_path / "in", "vivit_plain", num_frames=4)
    more = {
        "classify.preset": "16x2x2/4x2", "classify.activation": "gelu", "classify.mlp_ratio": 2.0,
    }  # fmt: skip
    assert run(source, tmp_path / "a") == 0
    assert run(source, tmp_path / "b", *flags(TARGET | more)) == 0
    old, new = model_of(tmp_path / "a")[1], model_of(tmp_path / "b")[1]
    assert new.pop("head")["kernel"].shape == (16, 10)
    old.pop("head")
    jax.tree.map(np.testing.assert_array_equal, old, new)
    frames = {"classify.model": "factorised_encoder"}  # whose first transformer sees one at a time
    assert run(source, tmp_path / "c", *flags(TARGET | more | frames)) == 0
    mean = old["encoder"]["position"][1:].reshape(2, 6, 16).mean(0)
    position = model_of(tmp_path / "c")[1]["encoder"]["position"]
    np.testing.assert_allclose(position[1:], mean, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "swin"}, "_class_name is 'None'; allowed: DiT"),
        ({"num_hidden_layers": 2}, "an unexpected tensor: vit.encoder.layer.2"),
        ({"num_hidden_layers": 4}, "lacks the tensor vit.encoder.layer.3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; allowed"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"; allowed: gelu or gelu_fast or'),
        ({"num_channels": 1}, "num_channels is 1; allowed: 3"),
        ({"qkv_bias": False}, "qkv_bias is False; allowed: True"),
        ({"patch_size": [4, 2]}, "patch_size is (4, 2); allowed: square patches"),
        ({"patch_size": [4]}, "patch_size is [4]; allowed: 2 numbers"),
        ({"image_size": "8"}, "image_size is 8; allowed: 2 numbers"),
        ({"image_size": [2, 12]}, "less than a tubelet"),
        ({"image_size": [8, 16]}, "position_embeddings is (1, 7, 16); allowed: (1, 9, 16)"),
        ({"num_attention_heads": 3}, "the width 16 is not a multiple of its 3 heads"),
        ({"intermediate_size": 32}, "output.dense.weight is (16, 24); allowed: (16, 32)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_folder_that_does_not_fit_is_one_line(
    change: dict[str, Any], words: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, tmp_path / "work", [], words, capsys)


def refused(source: Path, work: Path, more: list[str], words: str, capsys: Any) -> None:
    assert run(source, work, *more) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and not work.exists(), line


@pytest.mark.parametrize(
    "more, words",
    [
        (["--start=inflate"], "--start is allowed with --config=FILE"),
        (["--config.data.frames=5"], "is allowed with --config=FILE"),
        (["--start=half", *flags(TARGET)], "invalid choice: 'half'"),
        (flags(TARGET | {"classify.preset": "16x3x4/2x2"}), "tubelet is (2, 2); allowed by"),
        (flags(TARGET | {"classify.preset": "16x2x4/4x2"}), "depth of classify.preset is 2"),
        (
            flags(TARGET | {"classify.preset": "16x3x4/8x2", "data.size": (4, 16)}),
            "is less than a tubelet",
        ),
        (flags(TARGET | {"classify.activation": "gelu"}), "activation is gelu; allowed"),
        (flags(TARGET | {"classify.activation": "elu"}), "known are gelu"),
        (flags(TARGET | {"data.frame": 5}), "is frames meant?"),
        (["--config=experiments/none.py"], "there is no such file"),
        (["--parity=x.npz", *flags(TARGET)], "--parity with --config"),
        (["--vae=tests"], "only a denoiser takes them"),
    ],
)
def test_a_start_that_is_none_is_one_line(
    more: list[str], words: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    refused(folder, tmp_path / "work", more, words, capsys)


def test_the_names_of_sizes_are_read_back() -> None:
    for name in ("B/16x2", "S/8x1", "192x12x3/16x1"):
        row = vivit.preset(name)
        sizes = {n: row[n] for n in ("width", "depth", "heads", "patch")}
        assert preset_name(vivit.ViViT(1, **sizes)) == name
