"""Fuzzes the readers of media, tables, shards and weights with mutated files.

    python -m tools.fuzz [--mutations=10000] [--seed=0] [--only=KIND,...]

A mutation is a valid file of a kind with one to four changes: flipped bits, other bytes or numbers,
parts that are deleted, doubled or moved, tokens that trip parsers, other numbers in a container's
boxes (matrices, edits, colours, tiles, alpha). It is read as the program reads it: media by the
decoding processes under limits, tables, text files and names as a folder's captions, shot lists as
--shots, flags as a request, shards and manifests as the latent cache and as a TensorFlow Datasets
set, weights as an imported autoencoder, adapters as --lora. It must be read, with each caption at
its own film, or refused in one line. Anything else is a failure: another exception, a refusal of
several lines, a process that ends or is silent for a minute. (Decoding processes may end, which is
what they are for; those are counted separately.)

Prints a table, and the kind and number of each failure: `--only=KIND --seed=S --at=NUMBER` repeats
one. Exit status 1 after a failure, 2 for wrong arguments.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vdit.data.decode import DecodeError, Decoder, Limits, one_line
from vdit.errors import UserError
from vdit.runtime.files import write_text
from vdit.runtime.video import gif_bytes, webp_bytes, write_mp4

from .parsers import Parser
from .table import markdown

MUTATIONS = 10_000
HANG = 60.0  # seconds without an answer: a hang
LIMITS = Limits(pixels=2**20, frames=4096, memory=2**31, silence=10.0, seconds=20.0)
WORDS = (
    b"\n", b"\r", b"\0", b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"../", b"/", b",", b"{", b"}",
    b"[" * 3000, b"1e999", b"-1", b"0", b"NaN", b"null", b"true", b"9" * 400, b"\xff\xfe", b"[]",
    b"{}", b'""', b'"\\ud800"', b'"a\\nb"', b'"x"', b"99999999999", b"1.5", b"",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xf0\x9f\x8e\x88", b"<b>&amp;</b>", b"%s", b"=1+1",
    b"[1]", b"[!a]", b"*", b"?", b"#", b"@", b":", b"~", b"-", b" ", b"nan", b"-inf", b"1e400",
    b"-0", b"A", "é".encode(), b"e\xcc\x81", "ẞ".encode(), "ﬁ".encode(), "𠮷".encode() * 60,
    b"x" * 255,
)  # fmt: skip
BOXES = re.compile(
    rb"tkhd|mvhd|mdhd|elst|stts|ctts|stsd|colr|pasp|clap|irot|imir|ispe|pixi|auxC|iloc|iprp|ipma|iref"
    rb"|pitm|av1C|avcC"
)
TOKEN = re.compile(rb'-?\d+(\.\d+)?|"[^"]*"|[^\W\d]+|\S')
EXTREME = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Kind(NamedTuple):
    """`make(folder)` writes valid files and lists those to mutate; `read(folder)` reads them;
    `change(data, rng)` mutates one, by default as bytes or text."""

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], None]
    change: Callable[[bytes, np.random.Generator], bytes] | None = None


# --------------------------------------------------------------------------------------------------
# Mutations


def mutate(data: bytes, rng: np.random.Generator, text: bool) -> bytes:
    """Data with one to four changes."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 5)) if rng.integers(0, 2) else 1):
        size = len(mutated)
        tokens = list(TOKEN.finditer(mutated)) if text and rng.integers(0, 2) else []
        if tokens:
            token = tokens[rng.integers(0, len(tokens))]
            mutated[token.start() : token.end()] = WORDS[rng.integers(0, len(WORDS))]
            continue
        at = int(rng.integers(0, size + 1))
        length = int(min(rng.integers(1, 1 + max(1, size // 4)), 2 ** rng.integers(0, 12)))
        part = bytes(mutated[at : at + length])
        change = int(rng.integers(0, 8))
        if change == 0 and at < size:
            mutated[at] ^= 1 << int(rng.integers(0, 8))
        elif change == 1:
            mutated[at : at + length] = rng.bytes(len(part))
        elif change == 2 and not text:
            value, width = EXTREME[rng.integers(0, len(EXTREME))], 2 ** int(rng.integers(0, 4))
            order: Any = ("big", "little")[rng.integers(0, 2)]
            mutated[at : at + width] = (value % 256**width).to_bytes(width, order)
        elif change == 3:
            del mutated[at : at + length]
        elif change == 4:
            mutated[at:at] = part
        elif change == 5:
            other = int(rng.integers(0, size + 1))
            mutated[other:other] = part
        elif change == 6 and rng.integers(0, 4) == 0:
            del mutated[at:]
        else:
            mutated[at:at] = WORDS[rng.integers(0, len(WORDS))] if text else rng.bytes(length)
    return bytes(mutated)


def mutate_boxes(data: bytes, rng: np.random.Generator) -> bytes:
    """Data with one to four other numbers in the boxes of an MP4, MOV or AVIF."""
    mutated, places = bytearray(data), [found.end() for found in BOXES.finditer(data)]
    for _ in range(int(rng.integers(1, 5))):
        at = places[rng.integers(0, len(places))] + int(rng.integers(0, 24)) * 2
        width = 2 ** int(rng.integers(0, 3))
        value = (*EXTREME, 0x10000, 0xFFFF0000, 9, 16, 18, int(rng.integers(0, 2**32)))
        number = value[rng.integers(0, len(value))] % 256**width
        mutated[at : at + width] = number.to_bytes(width, "big")
    return bytes(mutated)


def mend_png(data: bytes) -> bytes:
    """A PNG file with correct checksums, as far as its chunks can be followed."""
    mutated, at = bytearray(data), 8
    while at + 12 <= len(mutated):
        end = at + 8 + int.from_bytes(mutated[at : at + 4], "big")
        if end + 4 > len(mutated):
            break
        mutated[end : end + 4] = zlib.crc32(mutated[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mutated)


# --------------------------------------------------------------------------------------------------
# Kinds


def _video() -> np.ndarray:
    """Nine small frames that differ."""
    ramp = np.arange(9 * 24 * 32 * 3, dtype=np.uint32).reshape(9, 24, 32, 3)
    return (ramp * 2654435761 >> 13 & 255).astype(np.uint8)


def _media(suffix: str, write: Callable[[Path], Any], change: Any = None) -> Kind:
    """A media file, probed and decoded like the films of a folder."""
    decoder: list[Decoder] = []

    def make(folder: Path) -> list[Path]:
        path = folder / f"film.{suffix}"
        write(path)
        return [path]

    def read(folder: Path) -> None:
        if not decoder:
            decoder.append(Decoder(LIMITS))
        path = folder / f"film.{suffix}"
        decoder[0].probe(path)
        for piece in decoder[0].stream(path, 10.0, (16, 16), until=60.0):
            assert piece.dtype == np.uint8 and piece.shape[1:] == (16, 16, 3)

    return Kind(make, read, change)


def _by_av(
    codec: str, pixels: str, options: dict[str, str] | None = None, rotation: int = 0,
    colour: tuple[int, int, int] = (2, 2, 2),
) -> Callable[[Path], None]:  # fmt: skip
    """`colour`: numbers of primaries, transfer function and matrix."""

    def write(path: Path) -> None:
        import av

        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=10, options=options)
            stream.height, stream.width, stream.pix_fmt = 24, 32, pixels
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace = colour
            if rotation:
                stream.set_display_rotation(rotation)
            for picture in _video():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pixels)))
            container.mux(stream.encode(None))

    return write


def _image(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from PIL import Image, ImageCms

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        profile = profile.replace(b"\0s\0R\0G\0B", b"\0o\0t\0h\0r")  # sRGB's own are not applied
        exif = Image.Exif()
        exif[0x0112] = 5  # of an AVIF boxes irot and imir
        picture = Image.fromarray(_video()[0])
        if kind != "JPEG":
            picture.putalpha(128)
        picture.save(path, kind, icc_profile=profile, exif=exif)

    return write


def _table(name: str, text: str) -> Kind:
    """A folder's table of captions."""

    def make(folder: Path) -> list[Path]:
        (folder / "films").mkdir()
        for film in ("one.mp4", "films/two.webm"):
            (folder / film).touch()
        (folder / name).write_text(text, encoding="utf-8")
        return [folder / name]

    def read(folder: Path) -> None:
        from vdit.data.captions import rows

        for row in rows(folder, strict=False):
            _plain(row.caption)
            assert row.file in ("one.mp4", "films/two.webm")
            assert 0 <= row.start < (np.inf if row.end is None else row.end)

    return Kind(make, read)


def _lines(name: str, text: str, read: Callable[[Path, list[str]], None]) -> Kind:
    """A file of lines, as UTF-8 with what is none replaced by surrogates, as in names of files."""

    def make(folder: Path) -> list[Path]:
        (folder / name).write_text(text, encoding="utf-8")
        return [folder / name]

    def lines(folder: Path) -> None:
        read(folder, os.fsdecode((folder / name).read_bytes()).split("\n"))

    return Kind(make, lines)


def _read_names(folder: Path, names: list[str]) -> None:
    """Films of these names, each with a text beside it or a row in other spellings; and samples."""
    from vdit.data.captions import rows
    from vdit.show import slug, unused

    root = folder / "clips"
    root.mkdir()
    try:
        films: list[str] = []
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # no name of a file
                path = root / f"{name}.mp4"
                if path.parent == root and not path.exists():
                    path.touch()
                    films.append(path.name)
        known = {name: f"caption {k}" for k, name in enumerate(films)}
        for name, caption in known.items():
            with contextlib.suppress(OSError):
                (root / name).with_suffix(".txt").write_text(caption)
        for row in rows(root, strict=False) if films else ():
            assert known[row.file] == row.caption, f"{row.file!a} has {row.caption}"
        for path in root.glob("*.txt"):
            path.unlink()
        form: Literal["NFC", "NFD"] = "NFD" if len(names) % 2 else "NFC"
        listed = [
            json.dumps({"file": unicodedata.normalize(form, name), "caption": caption})
            for name, caption in known.items()
        ]
        (root / "captions.jsonl").write_text("\n".join(listed))
        same = Counter(unicodedata.normalize(form, name) for name in films)
        for row in rows(root, strict=False) if films else ():
            alone = same[unicodedata.normalize(form, row.file)] == 1
            assert known[row.file] == row.caption or not alone, f"{row.file!a} has {row.caption}"
        for name in names:
            path = unused(root / "samples", f"{slug(name)}-{2**32 - 1}")
            assert path.parent == root / "samples" and not path.exists()
            write_text(path, "")
    finally:
        shutil.rmtree(root)


def _read_flags(folder: Path, lines: list[str]) -> None:
    """A request's flags, one a line, up to the work of the model."""
    from types import SimpleNamespace

    from vdit import main
    from vdit.config import default
    from vdit.config.command import plain
    from vdit.config.denoiser import build_dit
    from vdit.sample import Model
    from vdit.show import parse_size, read_given

    values: dict[str, Any] = {"seconds": None, "fps": None, "size": None, "num": 1, "seed": 0}
    given: list[str] = []
    for line in plain(lines):
        name, _, text = line.removeprefix("--").partition("=")
        if name == "given":
            given.append(text)
        elif name in values:
            try:
                values[name] = main.FLAGS[name].parser.parse(text)
            except (TypeError, ValueError) as error:  # absl's own line
                raise UserError(" ".join(str(error).split())) from None
    config = default()
    asked: Any = SimpleNamespace(
        config=config, classes=(), tokenizer=SimpleNamespace(encode=lambda *given: None),
        check_parts=lambda *given: None, dit=build_dit(config),
    )  # fmt: skip
    clip = Model.clip(asked, values["seconds"], values["fps"], parse_size(values["size"]))
    assert 0 < clip.frames and 0 < clip.fps <= 240
    num = min(values["num"], 4) if values["num"] > 0 and values["num"] < 2**16 else values["num"]
    rows = Model.asks(asked, ["a"], clip, num, values["seed"], [], [])
    assert all(0 <= row.seed < 2**32 for row in rows)
    for text in given:
        with contextlib.suppress(DecodeError):  # there is no such file
            read_given(str(folder / text.replace("\0", "")), clip.fps, (8, 8), 9)


def _plain(caption: str) -> None:
    """Asserts that a caption is one line of encodable text."""
    assert caption.strip() and "\n" not in caption
    caption.encode("utf-8")


def _beside() -> Kind:
    """A film with a text file beside it."""

    def make(folder: Path) -> list[Path]:
        (folder / "one.mp4").touch()
        (folder / "one.txt").write_text("a “red” ball\r\nfalls, 球 🎈\n", encoding="utf-8")
        return [folder / "one.txt"]

    def read(folder: Path) -> None:
        from vdit.data.captions import rows

        for row in rows(folder, strict=False):
            _plain(row.caption)

    return Kind(make, read)


def _make_shots(folder: Path) -> list[Path]:
    shots = [{"start": 0, "caption": "a wide shot"}, {"start": 1.7, "caption": "a “close” one"}]
    (folder / "shots.json").write_text(json.dumps(shots, ensure_ascii=False), encoding="utf-8")
    return [folder / "shots.json"]


def _read_shots(folder: Path) -> None:
    from vdit.sample import check_shots
    from vdit.show import read_shots

    shots = read_shots(str(folder / "shots.json"))
    check_shots(shots, 4.0)
    for _, caption in shots:
        caption.encode("utf-8")


def _make_cache(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    from vdit.data.latents import write_cache

    def encode(indices: range) -> Iterator[dict[str, np.ndarray]]:
        for index in indices:
            latent = np.full((3, 2, 2, 4), index, np.float16)
            yield {"latent": latent, "ids": np.arange(6), "mask": np.arange(6) < index}

    write_cache(folder, "0" * 64, 6, 3, encode)
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings))


def _read_cache(folder: Path) -> None:
    from vdit.data.latents import Latents

    cache = Latents(folder)
    cache.sizes((1, 1))
    cache.statistics()
    for index in range(len(cache)):
        cache[index]
    cache.verify()


def _make_set(folder: Path, names: tuple[str, ...]) -> list[Path]:
    from experiments.base import get_config

    from .tfds_export import export

    written = export(get_config("smoke"), folder, 3, 2)
    return sorted(path for path in written.iterdir() if any(name in path.name for name in names))


def _read_set(folder: Path) -> None:
    from vdit.data.tfds import VideoSet

    clips = VideoSet(folder, frames=5, size=(16, 16), fps=5.0)
    for index in range(min(len(clips), 4)):
        clip = clips[index]
        assert clip["video"].shape == (5, 16, 16, 3)
        _plain(clip["caption"])


def _make_tar(folder: Path) -> list[Path]:
    import io
    import tarfile

    path = folder / "films.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.mp4", b"film"), ("a.txt", b"one"), ("b.gif", b"film"),
                           ("b.json", b'{"caption": "two"}'), ("c" * 120 + ".png", b""),
                           ("c" * 120 + ".txt", "\u00fc".encode())):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [path]


def _make_parquet(folder: Path) -> list[Path]:
    import pyarrow
    from pyarrow import parquet

    films = {"video": [b"one", b"two", None], "caption": ["a", "b", "c"], "n": [1.0, 2.0, 3.0]}
    parquet.write_table(pyarrow.table(films), folder / "films.parquet")
    return [folder / "films.parquet"]


def _read_store(store: Any) -> None:
    """The captions and bytes of films in a shard; they are not decoded."""
    for row in store.rows(False, []):
        _plain(row.caption)
        with store.file(row.file) as path:
            path.stat()


def _read_tar(folder: Path) -> None:
    from vdit.data.tars import Tars

    _read_store(Tars(str(folder / "films.tar"), folder / "cache"))


def _read_parquet(folder: Path) -> None:
    from vdit.data.tables import Parquet

    path = str(folder / "films.parquet")
    _read_store(Parquet(path, folder / "cache", filter="[('n', '<', 9)]"))


def _make_weights(folder: Path, name: str) -> list[Path]:
    from vdit.models.vae_conv import ConvVAE
    from vdit.published import vae_folder, weights

    from . import exporting

    sizes = 2, (4, 4), (4, 4)  # channels, and the levels' widths
    model = ConvVAE((1, 2, 2), *sizes, blocks=1, causal=False, groups=2)
    video, latent = (jax.ShapeDtypeStruct((1, 1, n, n, c), "float32") for n, c in ((4, 3), (2, 2)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), video, latent)["params"]
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    layout = exporting.autoencoder_folder(model, None)
    assert layout is not None
    exporting.write(folder / f"{vae_folder.STEM}.safetensors", weights.unload(params, layout[1]))
    (folder / "config.json").write_text(json.dumps(layout[0]), encoding="utf-8")
    return [folder / name]


def _read_weights(folder: Path) -> None:
    from vdit.published import vae_folder, weights

    _, plan = vae_folder.read_module(folder)
    vae_folder.read_statistics(folder)
    weights.load(plan)


def _csv() -> str:
    rows = ["file,caption,start,end", 'one.mp4,"a red ball, small",0,1.5', "one.mp4,it rolls,1.5,3"]
    return "\n".join([*rows, "films/two.webm,“snow” falls,,"]) + "\n"


def _jsonl() -> str:
    rows: list[dict[str, Any]] = [
        {"file": "one.mp4", "caption": "a red ball, small", "start": 0, "end": 1.5},
        {"file": "films/two.webm", "caption": "“snow” falls"},
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _make_lora(folder: Path, name: str) -> list[Path]:
    """Adapters as PEFT and the original releases write them, of two layers and a convolution."""
    from safetensors.numpy import save_file

    shapes = {
        "base_model.model.blocks.0.attention.q.lora_A.weight": (2, 4),
        "base_model.model.blocks.0.attention.q.lora_B.weight": (6, 2),
        "diffusion_model.blocks.1.attention.q.lora_down.weight": (3, 4),
        "diffusion_model.blocks.1.attention.q.lora_up.weight": (6, 3),
        "diffusion_model.blocks.1.attention.q.alpha": (),
        "lora_unet_stem.lora_down.weight": (1, 3, 3, 3), "lora_unet_stem.lora_up.weight": (5, 1),
        "blocks.1.attention.q.diff_b": (6,),
    }  # fmt: skip
    tensors = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    said = json.dumps({"r": 2, "lora_alpha": 4, "alpha_pattern": {"attention.q": 3}})
    save_file(tensors, folder / "adapter_model.safetensors", {"lora_adapter_metadata": said})
    (folder / "adapter_config.json").write_text(said)
    return [folder / name]


def _read_lora(folder: Path) -> None:
    from vdit.nn.lora import flat, merged
    from vdit.published.lora import read_adapters

    q = {"kernel": np.zeros((2, 4, 6), np.float32), "bias": np.zeros((2, 6), np.float32)}
    stem = {"kernel": np.zeros((3, 3, 3, 5), np.float32)}
    params = {"blocks": {"attention": {"q": q}}, "stem": stem}
    adapters = read_adapters(folder / "adapter_model.safetensors", params)
    assert all(np.isfinite(x).all() for x in flat(adapters).values())
    shapes = [jax.tree.map(np.shape, tree) for tree in (params, merged(params, adapters))]
    assert shapes[0] == shapes[1]


KINDS = {
    "mp4": _media("mp4", lambda path: write_mp4(path, _video(), 10.0)),
    "webm": _media("webm", _by_av("libvpx-vp9", "yuv420p")),
    "gif": _media("gif", lambda path: path.write_bytes(gif_bytes(_video(), 10.0))),
    "webp": _media("webp", lambda path: path.write_bytes(webp_bytes(_video(), 10.0))),
    "png": _media("png", _image("PNG")),
    "avif": _media("avif", _image("AVIF")),
    "hdr": _media("mkv", _by_av("ffv1", "yuva444p10le", colour=(9, 16, 9))),
    "alpha": _media("webm", _by_av("libvpx", "yuva420p", options={"auto-alt-ref": "0"})),
    "interlaced": _media("ts", _by_av("libx264", "yuv420p", options={"x264-params": "tff=1"})),
    "avi": _media("avi", _by_av("libx264", "yuv420p", options={"x264-params": "bframes=3"})),
    "turned": _media("mov", _by_av("libx264", "yuv420p", rotation=90)),
    "jpeg": _media("jpeg", _image("JPEG")),
    "jsonl": _table("captions.jsonl", _jsonl()),
    "csv": _table("captions.csv", _csv()),
    "shots": Kind(_make_shots, _read_shots),
    "cache": Kind(lambda folder: _make_cache(folder, (".array_record",)), _read_cache),
    "cache_json": Kind(lambda folder: _make_cache(folder, (".json",)), _read_cache),
    "tfds": Kind(lambda folder: _make_set(folder, (".array_record-",)), _read_set),
    "tfds_json": Kind(lambda folder: _make_set(folder, (".json",)), _read_set),
    "weights": Kind(
        lambda folder: _make_weights(folder, "diffusion_pytorch_model.safetensors"), _read_weights
    ),
    "weights_json": Kind(lambda folder: _make_weights(folder, "config.json"), _read_weights),
    "lora": Kind(lambda folder: _make_lora(folder, "adapter_model.safetensors"), _read_lora),
    "lora_json": Kind(lambda folder: _make_lora(folder, "adapter_config.json"), _read_lora),
    "turned_boxes": _media(
        "mov", _by_av("libx264", "yuv420p", rotation=90, colour=(9, 18, 9)), mutate_boxes
    ),
    "avif_boxes": _media("avif", _image("AVIF"), mutate_boxes),
    "caption": _beside(),
    "names": _lines("names", "one\nÜber größe\na b [1]\n-x @ 2.5\n🎬 50% #1\n", _read_names),
    "flags": _lines(
        "flags", "--seconds=2.5\n--fps=12\n--size=32x48\n--num=2\n--seed=7\n--given=a@b.png@0.5\n",
        _read_flags,
    ),
    "tar": Kind(_make_tar, _read_tar),
    "parquet": Kind(_make_parquet, _read_parquet),
}  # fmt: skip
TEXT = (
    "jsonl", "csv", "shots", "cache_json", "tfds_json", "weights_json", "lora_json", "caption",
    "names", "flags",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Runs


class Outcome(NamedTuple):
    """`what` is "read", "refused", "decoder lost" or "failed"; `why` of the last two."""

    what: str
    why: str = ""


def attempt(kind: Kind, folder: Path) -> Outcome:
    """The outcome of reading a folder."""
    try:
        kind.read(folder)
        return Outcome("read")
    except UserError as error:
        if len(str(error).splitlines()) != 1:
            return Outcome("failed", f"a refusal of several lines: {ascii(str(error))[:200]}")
        if isinstance(error, DecodeError) and error.reason.startswith("the decoder "):
            return Outcome("decoder lost", error.reason)
        return Outcome("refused")
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Outcome("failed", one_line(f"{type(error).__name__} at {where}: {error}", 200))


class Case:
    """The valid files of a kind; a mutation changes one of them."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.name, self.kind, self.folder = name, KINDS[name], folder
        self.good = {path: path.read_bytes() for path in self.kind.make(folder)}
        if (sound := attempt(self.kind, folder)).what != "read":
            raise AssertionError(f"the valid {name} is {sound}")

    def run(self, seed: int, number: int) -> Outcome:
        """Mutation `number` of a seed."""
        rng = np.random.default_rng((seed, list(KINDS).index(self.name), number))
        path = sorted(self.good)[int(rng.integers(0, len(self.good)))]
        change = self.kind.change or functools.partial(mutate, text=self.name in TEXT)
        data = change(self.good[path], rng)
        if self.name == "png" and rng.integers(0, 2):
            data = mend_png(data)
        path.write_bytes(data)
        outcome = attempt(self.kind, self.folder)
        path.write_bytes(self.good[path])
        return outcome


def serve(pipe: Any, root: str, seed: int) -> None:
    """The main loop of a fuzzing process: receives kinds and numbers, sends outcomes."""
    cases: dict[str, Case] = {}
    for descriptor in (1, 2):  # readers report their progress
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    while (request := pipe.recv()) is not None:
        name, number = request
        if name not in cases:
            cases[name] = Case(name, Path(root) / name)
        pipe.send(tuple(cases[name].run(seed, number)))


class Trier:
    """Runs mutations in a process, which is replaced if one ends it or hangs."""

    def __init__(self, seed: int, patience: float = HANG) -> None:
        self.seed, self.patience = seed, patience
        self.process: Any = None

    def run(self, name: str, number: int) -> Outcome:
        """The outcome of a mutation."""
        first = self.process is None or not self.process.is_alive()
        if first:
            self._start()
        try:
            self.pipe.send((name, number))
            # A new process first imports, and writes its files.
            if not self.pipe.poll(self.patience + (120 if first or name not in self.ready else 0)):
                self.close()
                return Outcome("failed", f"no answer in {self.patience:g} s")
            self.ready.add(name)
            return Outcome(*self.pipe.recv())
        except (EOFError, OSError):
            self.process.join()
            return Outcome("failed", f"the process ended with status {self.process.exitcode}")

    def _start(self) -> None:
        self.close()
        self.ready: set[str] = set()
        self.root = tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.root.name, self.seed), daemon=True
        )
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """Ends the process, and deletes its files."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.root.cleanup()
            self.process = None


def fuzz(
    names: Sequence[str], mutations: int, seed: int, progress: Callable[[str], None]
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts of outcomes by kind, of `mutations` in all kinds together, and a line a failure."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures, began = [], time.monotonic()
    trier = Trier(seed)
    try:
        for order, name in enumerate(names):
            for number in range(len(range(order, mutations, len(names)))):
                outcome = trier.run(name, number)
                counts[name][outcome.what] += 1
                if outcome.what == "failed":
                    failures.append(f"--only={name} --seed={seed} --at={number}: {outcome.why}")
                    progress(failures[-1])
            progress(f"{name}: {dict(counts[name])}, {time.monotonic() - began:.0f} s")
    finally:
        trier.close()
    return counts, failures


def table(counts: dict[str, Counter[str]]) -> str:
    """Outcomes by kind, as Markdown."""
    heads = ("read", "refused", "decoder lost", "failed")
    total = sum(counts.values(), Counter())
    lines = [
        [name, str(sum(row.values())), *(str(row[head]) for head in heads)]
        for name, row in {**counts, "all": total}.items()
    ]
    return markdown(["kind", "mutations", *heads], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    parser = Parser(prog="fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("--mutations", type=int, default=MUTATIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--at", type=int)
    try:
        options = parser.parse_args(arguments)
        names = options.only.split(",")
        if unknown := [name for name in names if name not in KINDS]:
            raise UserError(f"--only={one_line(unknown[0])}: known are {', '.join(KINDS)}")
        if options.mutations < 1 or options.seed < 0 or (options.at or 0) < 0:
            raise UserError("--mutations of 1 and more, --seed and --at of 0 and more are allowed")
        if options.at is not None:
            with tempfile.TemporaryDirectory() as folder:
                outcome = Case(names[0], Path(folder) / names[0]).run(options.seed, options.at)
            print(*outcome)
            return int(outcome.what == "failed")
        counts, failures = fuzz(
            names, options.mutations, options.seed,
            lambda line: print(f"fuzz: {line}", file=sys.stderr, flush=True),
        )  # fmt: skip
        print(table(counts))
        return int(bool(failures))
    except UserError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
