"""Hostile and broken folders, by the command: one line, exit status 2, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import base, folder
from tests.test_import_vivit import write_folder
from tools import import_weights
from vdit.errors import UserError
from vdit.published import weights
from vdit.run import run

GOLDEN = Path(__file__).parent / "golden"
# A folder to import, and the network in it that is damaged.
SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "denoiser": (lambda to: shutil.copytree(GOLDEN / "pipelines" / "dit", to), "transformer"),
    "its autoencoder": (lambda to: shutil.copytree(GOLDEN / "pipelines" / "dit", to), "vae"),
    "U-Net": (lambda to: shutil.copytree(GOLDEN / "unet" / "sd1", to), "."),
    "autoencoder": (lambda to: shutil.copytree(GOLDEN / "vae" / "wan21", to), "."),
    "classifier": (lambda to: write_folder(to, "vivit_plain"), "."),
    "text encoder": (
        lambda to: shutil.copytree(GOLDEN / "pipelines" / "latte", to), "text_encoder"
    ),
}  # fmt: skip


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def rewrite(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def gigabyte(path: Path) -> str:
    path.write_bytes((2**30).to_bytes(8, "little") + path.read_bytes()[8:])
    return "its header says 1073741824 bytes; allowed: 16777216"


def overlapping(path: Path) -> str:
    header, data = parts(path)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[last]["data_offsets"] = [n - 1 for n in header[last]["data_offsets"]]
    rewrite(path, header, data)
    return "invalid offset for tensor"


def truncated(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return "its header says"


def not_finite(path: Path) -> str:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].reshape(-1)[-1] = np.nan
    save_file(tensors, path)
    return f"tensor {name} has values that are not finite"


def without_a_tensor(path: Path) -> str:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    return "lacks the tensor"


def without_a_shard(path: Path) -> str:
    first, second = (path.with_name(f"{path.stem}-{i}-of-2.safetensors") for i in (1, 2))
    named = {name: first.name for name in load_file(path)}
    path.rename(first)
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": named | {"more": second.name}}))
    return f"{second.name}: No such file"


def pickled(path: Path) -> str:
    path.rename(path.with_suffix(".bin"))
    return "bin is a pickle, which is not read"


def of_another_model(path: Path) -> str:
    where = path.with_name("config.json")
    where.write_text(json.dumps({"_class_name": "MotionModel", "model_type": "bert"}))
    return "; allowed: "


def without_config(path: Path) -> str:
    path.with_name("config.json").unlink()
    return "config.json: No such file"


DAMAGES = (
    gigabyte, overlapping, truncated, not_finite, without_a_tensor, without_a_shard, pickled,
    of_another_model, without_config,
)  # fmt: skip


def refused(source: Path, words: str, place: Path, capsys: Any) -> None:
    work = place / "made" / "work"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2, words
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and len(line) < 1200, line
    left = work.parent.iterdir() if work.parent.exists() else ()
    assert not list(left), words


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_damaged_is_one_line_and_nothing_is_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, part = SOURCES[kind]
    for damage in DAMAGES:
        source = tmp_path / damage.__name__
        make(source)
        (path,) = (source / part).glob("*.safetensors")
        refused(source, damage(path), tmp_path, capsys)


def test_a_text_encoder_that_is_not_finite_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the number is: tensors are looked through in pieces, here of two or four numbers."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 8)
    make, part = SOURCES["text encoder"]
    make(tmp_path / "source")
    weights_of, work = tmp_path / "source" / part, tmp_path / "work"
    words = not_finite(next(weights_of.glob("*.safetensors")))
    config = base.get_config("smoke")
    config.text.encoder, config.text.path = "t5", str(weights_of)
    with pytest.raises(UserError, match=words):
        run(config, work)
    assert not work.exists()


def test_a_folder_without_films_leaves_no_run(tmp_path: Path) -> None:
    """Neither a configuration nor a row: the workdir is free for another."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "notes.txt").write_text("none yet")
    config, work = folder.get_config("smoke"), tmp_path / "work"
    config.data.path = str(tmp_path / "films")
    with pytest.raises(UserError, match="no clips in this folder"):
        run(config, work)
    assert [path.name for path in work.iterdir()] == [".lock"]


@pytest.mark.parametrize("token, words", [("</s>", "'</s>'"), ("<pad>", "'<pad>'")])
def test_a_tokenizer_without_a_token_is_one_line_and_nothing_is_written(
    token: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "latte"
    shutil.copytree(GOLDEN / "pipelines" / "latte", source)
    path = source / "tokenizer" / "tokenizer.json"
    said = path.read_text(encoding="utf-8").replace(token, "[none]")
    path.write_text(said, encoding="utf-8")
    refused(source, f"lacks the token {words}, which t5 needs", tmp_path, capsys)
