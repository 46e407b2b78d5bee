"""Decoding: the right pictures at the right times from every kind of file, and bad files."""

import collections
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
from PIL import Image, ImageCms

from vdit.data import colours, decode
from vdit.data.decode import DecodeError, Decoder, Limits
from vdit.errors import UserError

RED, GREEN, BLUE = (220, 30, 40), (30, 190, 70), (40, 60, 210)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(workers=2) as pool:
        yield pool


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame k is gray of level 12 k, so a decoded frame tells which one it is."""
    levels = (12 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def clip_times(start: float, count: int, fps: float) -> list[float]:
    """The times in seconds of `count` frames at `fps` from `start` on."""
    return [start + k / fps for k in range(count)]


def numbers(video: np.ndarray) -> list[int]:
    return [round(x) for x in video.mean((1, 2, 3)) / 12]


def encode(
    path: Path,
    video: np.ndarray,
    fps: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    ticks: Sequence[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    qp: str = "",
    coding: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Writes a file with PyAV; frame k is shown from `ticks`[k] / fps seconds on."""
    source = "rgba" if video.shape[-1] == 4 else "rgb24"
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=fps, options={"qp": qp} if qp else coding)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for k, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pix_fmt)
            frame.pts, frame.time_base = ticks[k] if ticks else k, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        for k in range(8):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def streamed(decoder: Decoder, path: Path, fps: float, **options: Any) -> np.ndarray:
    return np.concatenate(list(decoder.stream(path, fps, **options)))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("ten.mp4", "libx264", "yuv420p10le"),
        ("a.mov", "libx264", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("gray.mkv", "ffv1", "gray"),
        ("full.mp4", "libx264", "yuvj420p"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_every_format_gives_the_frame_that_is_shown(
    tmp_path: Path, decoder: Decoder, name: str, codec: str, pix_fmt: str
) -> None:
    video = numbered(17)
    path = encode(tmp_path / name, video, codec=codec, pix_fmt=pix_fmt)
    info = decoder.probe(path)
    assert (info.frames, info.width, info.height, info.rotation) == (17, 48, 32, 0)
    assert info.fps == pytest.approx(10) and info.seconds == pytest.approx(1.7)
    same = streamed(decoder, path, 10, size=(32, 48))
    assert same.shape == video.shape and same.dtype == np.uint8
    if name != "a.gif":  # its 256 colours hold few grays
        assert np.abs(same.astype(int) - video).max() <= 3
        assert numbers(streamed(decoder, path, 5)) == list(range(0, 17, 2))
        assert numbers(streamed(decoder, path, 20)) == [k // 2 for k in range(34)]
        assert numbers(decoder.frames(path, clip_times(0.3, 4, 10))) == [3, 4, 5, 6]
        assert numbers(decoder.frames(path, [0.0, 0.39, 0.41, 0.41, 1.69])) == [0, 3, 4, 4, 16]


@pytest.mark.parametrize("fps", [24, 25, 30, 60])
@pytest.mark.parametrize("name", ["a.webm", "a.mp4"])
def test_clocks_that_round_give_every_frame_once(
    tmp_path: Path, decoder: Decoder, name: str, fps: int
) -> None:
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    path = encode(tmp_path / name, numbered(20), fps, codec)
    assert numbers(streamed(decoder, path, fps)) == list(range(20))


def test_variable_frame_rate_goes_by_time(tmp_path: Path, decoder: Decoder) -> None:
    ticks = [50, 51, 53, 60, 61, 80]  # tenths of a second; the film does not start at 0
    path = encode(tmp_path / "a.mkv", numbered(6), 10, ticks=ticks)
    shown = [max(i for i, tick in enumerate(ticks) if tick - 50 <= k) for k in range(31)]
    assert numbers(streamed(decoder, path, 10))[:31] == shown
    assert numbers(streamed(decoder, path, 10, until=1.0)) == shown[:10]


@pytest.mark.parametrize("pyramid", ["none", "normal"])
def test_avi_with_b_frames_is_shown_in_order(
    tmp_path: Path, decoder: Decoder, pyramid: str
) -> None:
    params = f"b-adapt=0:scenecut=0:bframes=3:b-pyramid={pyramid}"
    path = encode(tmp_path / "a.avi", numbered(20), coding={"x264-params": params})
    with av.open(str(path)) as container:
        pts = [frame.pts for frame in container.decode(video=0)]
    assert pts != sorted(pts)  # FFmpeg's times are those of storage
    assert numbers(streamed(decoder, path, 10)) == list(range(20))
    assert numbers(decoder.frames(path, [0.0, 0.71, 1.3, 1.99])) == [0, 7, 13, 19]


def test_where_times_go_back_frames_are_counted(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "a.ts"
    halves = [numbered(20)[:8], numbered(20)[8:]]
    data = [encode(tmp_path / f"{k}.ts", half).read_bytes() for k, half in enumerate(halves)]
    joined, counters = bytearray(b"".join(data)), collections.Counter[int]()
    for at in range(0, len(joined), 188):  # the times begin again, the packets' counters do not
        pid = int.from_bytes(joined[at + 1 : at + 3], "big") & 0x1FFF
        joined[at + 3] = joined[at + 3] & 0xF0 | counters[pid] % 16
        counters[pid] += joined[at + 3] >> 4 & 1
    path.write_bytes(joined)
    info = decoder.probe(path)
    assert info.frames == 20 and info.seconds == pytest.approx(2.0)
    assert numbers(streamed(decoder, path, 10)) == list(range(20))


def test_where_times_never_rise_frames_are_counted(tmp_path: Path, decoder: Decoder) -> None:
    path = encode(tmp_path / "a.mp4", numbered(8), coding={"bf": "0"})
    with av.open(str(path)) as film, av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 0
            container.mux([packet] if packet.size else [])
    info = decoder.probe(tmp_path / "a.mkv")
    assert info.frames == 8 and info.seconds == pytest.approx(0.8)
    assert numbers(streamed(decoder, tmp_path / "a.mkv", 10)) == list(range(8))


def test_turned_films_are_shown_upright(tmp_path: Path, decoder: Decoder) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = RED, GREEN, BLUE
    for degrees in (90, 180, -90):
        path = encode(tmp_path / "a.mp4", np.stack([picture] * 3), rotation=degrees)
        info = decoder.probe(path)
        assert info.rotation == degrees % 360
        want = np.rot90(picture, degrees // 90)
        assert (info.height, info.width) == want.shape[:2]
        got = decoder.frames(path, [0.1])[0]
        assert np.abs(got[4::8, 4::8].astype(int) - want[4::8, 4::8]).max() < 12
        small = decoder.frames(path, [0.1], (want.shape[0] // 4, want.shape[1] // 4))[0]
        assert np.abs(small[2::4, 2::4].astype(int) - want[8::16, 8::16]).max() < 20


@pytest.mark.parametrize("a,b,c,d", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0),
                                     (-1, 0, 0, -1), (0, 1, -1, 0), (0, 0, 0, 0)])  # fmt: skip
def test_whole_display_matrices_are_applied(
    tmp_path: Path, decoder: Decoder, a: int, b: int, c: int, d: int
) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = RED, GREEN, BLUE
    data = bytearray(encode(tmp_path / "a.mp4", np.stack([picture] * 2)).read_bytes())
    at = data.index(b"tkhd") + 44
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "a.mp4").write_bytes(data)
    # The pixel at (x, y) is shown at (a x + c y, b x + d y), moved to where both are from 0 on.
    m = np.array([[a, c], [b, d]]) if a or b else np.eye(2, dtype=int)
    places = m @ np.indices((64, 32)).reshape(2, -1)
    x, y = places - places.min(1, keepdims=True)
    want = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    want[y, x] = picture.transpose(1, 0, 2).reshape(-1, 3)
    got = decoder.frames(tmp_path / "a.mp4", [0.0])[0]
    assert got.shape == want.shape
    assert np.abs(got[4::8, 4::8].astype(int) - want[4::8, 4::8]).max() < 12


def test_size_is_covered_and_the_centre_kept(tmp_path: Path, decoder: Decoder) -> None:
    wide = np.zeros((3, 32, 96, 3), np.uint8)
    wide[:, :, :32], wide[:, :, 32:64], wide[:, :, 64:] = RED, GREEN, BLUE
    path = encode(tmp_path / "wide.mp4", wide)
    for size in ((16, 16), (32, 32), (80, 80)):
        middle = decoder.frames(path, [0.0], size)[0]
        assert middle.shape == (*size, 3)
        assert np.abs(middle[:, 3:-3].astype(int) - GREEN).max() < 25
    tall = np.ascontiguousarray(wide.transpose(0, 2, 1, 3))
    middle = decoder.frames(encode(tmp_path / "tall.mp4", tall), [0.0], (16, 16))[0]
    assert np.abs(middle[3:-3].astype(int) - GREEN).max() < 25
    # Pixels three times as wide as high: the 32 x 32 middle is shown 32 high and 96 wide.
    stretched = encode(tmp_path / "stretched.mp4", wide[:, :, 32:64], aspect=Fraction(3))
    assert decoder.probe(stretched).width == 96
    assert decoder.frames(stretched, [0.0]).shape == (1, 32, 96, 3)


def test_odd_sizes_and_down_scaling_by_area(tmp_path: Path, decoder: Decoder) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 99, 131, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.mkv", video, codec="libx264rgb", pix_fmt="rgb24", qp="0")
    assert np.array_equal(decoder.frames(path, [0.0, 0.1]), video)
    small = decoder.frames(path, [0.0], (9, 11))[0].astype(float)
    exact = np.asarray(Image.fromarray(video[0]).resize((12, 9), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - exact[:, :11]).mean() < 3  # full of noise, so any other filter is far


def test_transparency_is_over_white(tmp_path: Path, decoder: Decoder) -> None:
    rgba = np.zeros((2, 32, 32, 4), np.uint8)
    rgba[:, :, 16:] = (*RED, 255)
    rgba[:, 16:, :16] = (0, 0, 0, 128)
    Image.fromarray(rgba[0]).save(tmp_path / "a.png")
    Image.fromarray(rgba[0]).save(tmp_path / "a.webp", lossless=True, exact=True)
    encode(tmp_path / "a.mkv", rgba, codec="ffv1", pix_fmt="bgra")
    encode(tmp_path / "a.mov", rgba, codec="qtrle", pix_fmt="argb")
    coded = {"prores.mov": "prores_ks", "8.webm": "libvpx", "9.webm": "libvpx-vp9"}
    for name, codec in coded.items():
        coding = {"auto-alt-ref": "0"} if "vpx" in codec else {}
        depth = "yuva420p" if coding else "yuva444p10le"
        encode(tmp_path / name, rgba, codec=codec, pix_fmt=depth, coding=coding)
    for name in ("a.png", "a.webp", "a.mkv", "a.mov", *coded):
        got = decoder.frames(tmp_path / name, [0.0])[0].astype(int)
        near = 4 if name in coded else 0
        for place, want in (((8, 8), 255), ((8, 24), RED), ((24, 8), 127)):
            assert np.abs(got[place] - want).max() <= near, name


def test_what_is_clear_without_an_alpha_channel_is_white(tmp_path: Path, decoder: Decoder) -> None:
    """An animated WebP whose frames cover a part of its canvas, and 16-bit gray with a level that
    stands for nothing."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16] = (*RED, 255)
    part = [Image.fromarray(rgba)] * 2
    part[0].save(tmp_path / "a.webp", save_all=True, append_images=part[1:], duration=100)
    assert Image.open(tmp_path / "a.webp").mode == "RGB"
    deep = np.repeat(np.array([[90 * 257, 7 * 257]], np.uint16), 16, 1).repeat(32, 0)
    Image.fromarray(deep).save(tmp_path / "a.png", transparency=7 * 257)
    for name, want in (("a.webp", RED), ("a.png", (90, 90, 90))):
        got = decoder.frames(tmp_path / name, [0.0])[0].astype(int)
        assert np.abs(got[8, 8] - want).max() <= 4 and (got[8, 24] == 255).all(), name


def test_pictures(tmp_path: Path, decoder: Decoder) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16], picture[16:, :32] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, exif=exif)
    Image.fromarray(picture).save(tmp_path / "misnamed.mp4", "PNG")
    deep = (np.arange(64, dtype=np.uint16) * 1024)[None].repeat(8, 0)
    Image.fromarray(deep).save(tmp_path / "deep.png")

    info = decoder.probe(tmp_path / "a.jpg")
    assert (info.frames, info.seconds, info.width, info.height) == (1, 0.0, 32, 64)
    turned = decoder.frames(tmp_path / "a.jpg", [0.0])[0].astype(int)
    assert np.abs(turned - np.rot90(picture, -1))[4::8, 4::8].max() < 8
    assert np.array_equal(decoder.frames(tmp_path / "misnamed.mp4", [0.0])[0], picture)
    gray = decoder.frames(tmp_path / "deep.png", [0.0])[0]
    assert gray[0, :, 0].tolist() == list(range(0, 256, 4))
    with pytest.raises(DecodeError, match="past the end"):
        decoder.frames(tmp_path / "a.jpg", [1.0])

    frames = [Image.fromarray(x) for x in numbered(4)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True,
        duration=[100, 300, 100, 100],
    )  # fmt: skip
    assert decoder.probe(tmp_path / "a.webp").seconds == pytest.approx(0.6)
    assert numbers(streamed(decoder, tmp_path / "a.webp", 10)) == [0, 1, 1, 1, 2, 3]


COLOURS = ((128, 128, 128), RED, GREEN, BLUE, (64, 64, 64), (200, 180, 150), (16, 16, 16))


def light(colours: Any) -> np.ndarray:
    """Linear light of sRGB's colours, 1 for white."""
    x = np.array(colours) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


# From BT.709's primaries to those of BT.2020 and P3 (BT.2087; SMPTE EG 432-1).
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.088, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084's inverse of the EOTF, with white at 203 cd/m2."""
    y = (light * 203 / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """BT.2100's OETF behind the inverse of its OOTF, for 1000 cd/m2."""
    shown = light * 203 / 1000
    scene = shown * (shown @ [0.2627, 0.678, 0.0593])[..., None] ** (-0.2 / 1.2)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("signal", "transfer", "primaries", "matrix", "treated"),
    [
        (pq(light(COLOURS) @ TO_2020.T), 16, 9, 9, "hdr"),
        (hlg(light(COLOURS) @ TO_2020.T), 18, 9, 9, "hdr"),
        (hlg(light(COLOURS) @ TO_2020.T), 18, 2, 2, "hdr"),
        (srgb(light(COLOURS) @ TO_2020.T), 14, 9, 9, "wide"),
        (srgb(light(COLOURS) @ TO_P3.T), 13, 12, 1, "wide"),
        (srgb(light(COLOURS)), 1, 1, 1, ""),
    ],
)
def test_hdr_and_wide_gamuts_are_shown_as_sdr(
    tmp_path: Path, decoder: Decoder, signal: np.ndarray, transfer: int, primaries: int,
    matrix: int, treated: str,
) -> None:  # fmt: skip
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16 * len(signal), "yuv444p10le"
        tags = {"colorspace": matrix, "color_trc": transfer, "color_primaries": primaries}
        picture = (signal * 65535 + 0.5).astype(np.uint16)[None].repeat(16, 0).repeat(16, 1)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(
            format="yuv444p10le", dst_colorspace=1 if matrix == 1 else 9, dst_color_range=1
        )
        for name, value in {**tags, "color_range": 1}.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert decoder.probe(tmp_path / "a.mkv").treated == treated
    for size in ((16, 16 * len(signal)), (4, 4 * len(signal))):
        got = decoder.frames(tmp_path / "a.mkv", [0.0], size)[0]
        middles = got[size[0] // 2, size[0] // 2 :: size[0]].astype(int)
        assert np.abs(middles - COLOURS).max() <= 3


def test_profiles_of_pictures_are_applied(tmp_path: Path, decoder: Decoder) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    p3 = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.292, 0.6922, 0.0419),
          b"bXYZ": (0.1571, 0.0666, 0.7841)}  # fmt: skip
    for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        tag, place, _ = struct.unpack(">4sII", profile[at : at + 12])
        if tag in p3:
            numbers = [round(x * 65536) for x in p3[tag]]
            profile[place + 8 : place + 20] = struct.pack(">3i", *numbers)
    named = bytes(profile).replace("sRGB".encode("utf-16-be"), "a P3".encode("utf-16-be"))
    signal = (255 * srgb(light(COLOURS) @ TO_P3.T) + 0.5).astype(np.uint8)
    picture = signal[None].repeat(16, 0).repeat(16, 1)
    rgba = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    rgba[:8, :, 3] = 0
    exact: dict[str, Any] = {"quality": 100, "subsampling": "4:4:4"}
    for name, pixels in (("a.jpg", picture), ("a.png", rgba), ("a.avif", picture)):
        Image.fromarray(pixels).save(tmp_path / name, icc_profile=named, **exact)
        got = decoder.frames(tmp_path / name, [0.0])[0].astype(int)
        # One level of AVIF's is eight where the profile's dark red is nearly taken away.
        assert np.abs(got[12, 8::16] - COLOURS).max() <= (8 if name == "a.avif" else 4), name
        assert name != "a.png" or (got[4] == 255).all()
    Image.fromarray(picture).save(tmp_path / "b.png", icc_profile=bytes(profile))  # named sRGB
    Image.fromarray(picture).save(tmp_path / "c.png", icc_profile=b"no profile")
    for name in ("b.png", "c.png"):
        assert np.array_equal(decoder.frames(tmp_path / name, [0.0])[0], picture)


@pytest.mark.parametrize(("primaries", "transfer", "treated"), [
    (12, 13, "wide"), (9, 13, "wide"), (9, 16, "hdr"), (9, 18, "hdr"), (1, 13, ""),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["PNG", "AVIF"])
def test_code_points_of_pictures_are_applied(
    tmp_path: Path, decoder: Decoder, kind: str, primaries: int, transfer: int, treated: str
) -> None:
    """Of a PNG in its chunk cICP, of an AVIF in its box colr."""
    linear = light(COLOURS) @ {12: TO_P3, 9: TO_2020, 1: np.eye(3)}[primaries].T
    signal = {13: srgb, 16: pq, 18: hlg}[transfer](linear)
    picture = (255 * signal + 0.5).astype(np.uint8)[None].repeat(16, 0).repeat(16, 1)
    exact: dict[str, Any] = {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    Image.fromarray(picture).save(tmp_path / "a.x", kind, **exact)
    data = bytearray((tmp_path / "a.x").read_bytes())
    if kind == "AVIF":
        at = data.index(b"colrnclx") + 8
        data[at : at + 4] = struct.pack(">HH", primaries, transfer)
    else:
        chunk = b"cICP" + bytes([primaries, transfer, 0, 1])
        data[33:33] = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.x").write_bytes(data)
    assert decoder.probe(tmp_path / "a.x").treated == treated
    got = decoder.frames(tmp_path / "a.x", [0.0])[0][8, 8::16].astype(int)
    # 8 bits of HDR are coarse, most of all in the dark channels of bright colours.
    assert np.abs(got - COLOURS).max() <= (32 if treated else 2)
    assert np.abs(got - COLOURS).mean() <= 3


def test_the_picture_before_an_animation_is_none_of_it(tmp_path: Path, decoder: Decoder) -> None:
    first, *frames = (Image.fromarray(x) for x in numbered(4))
    first.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True,
               duration=[100, 300, 100])  # fmt: skip
    assert decoder.probe(tmp_path / "a.png").frames == 3
    assert numbers(streamed(decoder, tmp_path / "a.png", 10)) == [1, 2, 2, 2, 3]


def test_tones_above_white_stay_in_order() -> None:
    tones = np.array([0.5, 0.8, 0.95, 1.0, 1.2, 1.5, 4.0, 40.0])[:, None].repeat(3, 1)
    signal = (pq(tones) * 65535 + 0.5).astype(np.uint16)[None]
    got = colours.to_sdr(signal, 16, 1)[0, :, 0].astype(int)
    assert np.abs(got - np.minimum(255 * srgb(tones[:, 0]), 255)).max() <= 5
    assert (np.diff(got) >= 0).all() and got[3] < got[4] <= got[-1] == 255
    red = colours.to_sdr((pq(np.array([[[3.0, 1.5, 0.3]]])) * 65535).astype(np.uint16), 16, 1)
    assert np.abs(light(red[0, 0])[1:] / light(red[0, 0])[0] - [0.5, 0.1]).max() < 0.02


@pytest.mark.parametrize(("height", "width", "hd"), [(16, 1280, True), (592, 32, True),
                                                     (16, 640, False)])  # fmt: skip
def test_untagged_films_are_read_by_the_matrix_of_their_size(
    tmp_path: Path, decoder: Decoder, height: int, width: int, hd: bool
) -> None:
    picture = np.broadcast_to(np.uint8(RED), (height, width, 3)).copy()
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    yuv = frame.reformat(format="yuv444p", dst_colorspace=1 if hd else 5)
    yuv.colorspace = 2
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    assert decoder.probe(tmp_path / "a.mp4").treated == ("untagged" if hd else "")
    assert np.abs(decoder.frames(tmp_path / "a.mp4", [0.0])[0].astype(int) - RED).max() <= 4


def test_colours_that_cannot_be_converted_are_named(tmp_path: Path, decoder: Decoder) -> None:
    coding = {"x264-params": "colormatrix=YCgCo"}
    path = encode(tmp_path / "a.mp4", numbered(2), pix_fmt="yuv444p", coding=coding)
    with pytest.raises(DecodeError, match="in colours of matrix 8, which FFmpeg cannot convert"):
        streamed(decoder, path, 10)


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_interlaced_films_lose_their_combs(tmp_path: Path, decoder: Decoder, order: str) -> None:
    def scene(field: int) -> np.ndarray:
        picture = np.full((96, 160, 3), 60, np.uint8)
        picture[:, 10 + 4 * field : 34 + 4 * field] = 220
        return picture

    graph = av.filter.Graph()
    source = graph.add_buffer(width=160, height=96, format="yuv420p", time_base=Fraction(1, 10))
    fields = graph.add("setfield", order)
    graph.link_nodes(source, fields, graph.add("buffersink")).configure()
    options = {"x264-params": f"{order}=1", "crf": "5"}
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for k in range(10):
            picture = scene(2 * k)
            later = slice(order == "tff", None, 2)
            picture[later] = scene(2 * k + 1)[later]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            graph.vpush(frame)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))
    assert decoder.probe(tmp_path / "a.mp4").treated == "interlaced"
    got = streamed(decoder, tmp_path / "a.mp4", 10).astype(int)
    assert len(got) == 10
    for k in range(1, 9):  # a comb is 4, a field too late 8
        assert np.abs(got[k] - scene(2 * k)).mean() < 2, k


def test_avif_is_read_as_a_picture(tmp_path: Path, decoder: Decoder) -> None:
    picture = np.zeros((32, 64, 4), np.uint8)
    picture[:16, :32], picture[16:, :32], picture[:, 32:] = (*RED, 255), (*BLUE, 128), (9, 9, 9, 0)
    flat = picture.astype(float)
    alpha = flat[..., 3:] / 255
    over = flat[..., :3] * alpha + 255 * (1 - alpha)
    turns = {1: over, 2: over[:, ::-1], 3: over[::-1, ::-1], 4: over[::-1], 5: over.swapaxes(0, 1),
             6: np.rot90(over, -1), 7: over[::-1, ::-1].swapaxes(0, 1),
             8: np.rot90(over)}  # fmt: skip
    for orientation, want in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation  # as boxes irot and imir
        Image.fromarray(picture).save(tmp_path / "a.avif", quality=95, subsampling="4:4:4",
                                      exif=exif)  # fmt: skip
        info = decoder.probe(tmp_path / "a.avif")
        assert (info.frames, info.seconds) == (1, 0.0)
        assert (info.height, info.width) == want.shape[:2]
        (got,) = streamed(decoder, tmp_path / "a.avif", 24)
        assert np.abs(got[4::8, 4::8] - want[4::8, 4::8]).max() < 8, orientation
    frames = [Image.fromarray(x) for x in numbered(4)]
    frames[0].save(tmp_path / "film.mp4", "AVIF", save_all=True, append_images=frames[1:],
                   duration=[100, 300, 100, 100], quality=95)  # fmt: skip
    assert numbers(streamed(decoder, tmp_path / "film.mp4", 10)) == [0, 1, 1, 1, 2, 3]


def test_one_picture_of_a_photo_is_shown_or_none(tmp_path: Path, decoder: Decoder) -> None:
    red, blue = (Image.new("RGB", (32, 24), colour) for colour in (RED, BLUE))
    red.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[blue], quality=95)
    assert decoder.probe(tmp_path / "a.jpg").frames == 1
    assert np.abs(streamed(decoder, tmp_path / "a.jpg", 24).astype(int) - RED).max() < 6
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"msf1\0\0\0\0hevc"):
        box = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands
        (tmp_path / "a.heic").write_bytes(box + struct.pack(">I4s", 108, b"mdat") + bytes(100))
        with pytest.raises(DecodeError, match="HEIC picture.* convert it to JPEG"):
            decoder.probe(tmp_path / "a.heic")


def test_a_gif_is_whole_when_its_blocks_are(tmp_path: Path, decoder: Decoder) -> None:
    path = encode(tmp_path / "a.gif", numbered(6), codec="gif", pix_fmt="rgb8")
    data = path.read_bytes()
    assert data.endswith(b"\0\x3b")
    want = decoder.frames(path, clip_times(0, 6, 10))
    for name, end in (("bare", b""), ("zeros", bytes(70)), ("text", b"\x3b;\n" + b"x!,\0" * 99),
                      ("another", data[-1:] + data)):  # fmt: skip
        path.write_bytes(data[:-1] + end)
        assert decoder.probe(path).frames == 6, name
        assert np.array_equal(decoder.frames(path, clip_times(0, 6, 10)), want), name
    for cut in (2, 5, 40, len(data) - 20):
        path.write_bytes(data[:-cut])
        with pytest.raises(DecodeError, match="ends inside a block"):
            decoder.probe(path)


def test_a_cover_picture_is_no_film(tmp_path: Path, decoder: Decoder) -> None:
    with pytest.raises(DecodeError, match="audio only"):
        decoder.probe(audio_only(tmp_path / "song.mp4"))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, words that its reason must have)."""
    video = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    mp4 = encode(folder / "late.mp4", video).read_bytes()
    fast = encode(folder / "fast.mp4", video, movflags="faststart").read_bytes()
    webm = encode(folder / "whole.webm", video, codec="libvpx-vp9").read_bytes()
    gif = encode(folder / "whole.gif", video, codec="gif", pix_fmt="rgb8").read_bytes()
    flipped = bytearray(fast)
    for at in range(len(fast) // 2, len(fast) - 100, 97):
        flipped[at] ^= 255
    liar = bytearray(fast)  # the table of sample sizes claims 4 thousand million frames
    at = liar.index(b"stsz") + 12
    liar[at : at + 4] = b"\xff\xff\xff\xf0"
    bomb = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    jpeg = folder / "whole.jpg"
    Image.fromarray(video[0]).save(jpeg)
    whole = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"this is no film at all\n" * 99, "not a video"),
        "zeros.mp4": (bytes(5000), "not a video"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\nfast.mp4\n", "not a video"),
        "concat.mp4": (b"ffconcat version 1.0\nfile fast.mp4\n", "not a video"),
        "flipped.mp4": (bytes(flipped), "damaged"),
        "liar.mp4": (bytes(liar), ""),
        "bomb.gif": (bomb, "damaged"),  # FFmpeg itself refuses this one
        "large.gif": (bomb.replace(b"\xff\xff\xff\xff", b"\xe0\x2e\xe0\x2e"), "12000x12000: over"),
        "half.jpg": (jpeg.read_bytes()[:1500], "damaged"),
    }
    for name, data in (("late.mp4", mp4), ("fast.mp4", fast), ("a.webm", webm), ("a.gif", gif)):
        for share in (0.02, 0.1, 0.5, 0.9, 0.999):
            whole[f"cut{share}-{name}"] = (data[: int(len(data) * share)], "")
    whole["cut-PyAV-2344.mp4"] = (fast[: fast.index(b"mdat") + 20], "cut short")
    files = {}
    for name, (data, words) in whole.items():
        (folder / name).write_bytes(data)
        files[name] = (folder / name, words)
    os.mkfifo(folder / "pipe.mp4")
    files["pipe.mp4"] = (folder / "pipe.mp4", "not a regular file")
    files["missing.mp4"] = (folder / "missing.mp4", "No such file")
    files["folder"] = (folder, "not a regular file")
    files["audio.mp4"] = (audio_only(folder / "audio.mp4"), "audio only")
    return files


def test_bad_files_are_refused_in_one_line_and_work_goes_on(
    tmp_path: Path, decoder: Decoder
) -> None:
    files = bad_files(tmp_path)
    good = encode(tmp_path / "good.mp4", numbered(5))
    for name, (path, words) in files.items():
        with pytest.raises(DecodeError) as raised:
            streamed(decoder, path, 10, size=(16, 16))
        assert isinstance(raised.value, UserError) and raised.value.path == str(path), name
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert words in raised.value.reason and len(raised.value.reason) > 5, raised.value.reason
        assert "crash" not in raised.value.reason and "hung" not in raised.value.reason
    assert numbers(decoder.frames(good, clip_times(0, 5, 10))) == list(range(5))


def test_a_name_need_not_be_text(tmp_path: Path, decoder: Decoder) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/line\nbreak \xff: 100%.mp4"))
    os.replace(encode(tmp_path / "a.mp4", numbered(3)), path)
    assert numbers(streamed(decoder, path, 10)) == [0, 1, 2]
    path.write_bytes(b"no film")
    with pytest.raises(DecodeError) as raised:
        decoder.probe(path)
    assert "\n" not in str(raised.value) and str(raised.value).encode()


def test_a_title_need_not_be_utf8(tmp_path: Path, decoder: Decoder) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "what a title"
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    data = (tmp_path / "a.mkv").read_bytes()
    assert b"what a title" in data
    (tmp_path / "a.mkv").write_bytes(data.replace(b"what a title", b"w\xe4s f\xfcr ein\xff"))
    assert decoder.probe(tmp_path / "a.mkv").frames == 1


def test_times_outside_and_out_of_order(tmp_path: Path, decoder: Decoder) -> None:
    path = encode(tmp_path / "a.mp4", numbered(5))
    for times, words in (
        ([0.5], "time 0.5 s is past the end"),
        ([-0.1], "before the start"),
        ([0.2, 0.1], "do not fall"),
        ([], "one or more"),
        ([float("nan")], "finite"),
    ):
        with pytest.raises(UserError, match=words):
            decoder.frames(path, times)


def test_limits(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(12))
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png", compress_level=1)
    with pytest.raises(UserError, match="limit frames=0"):
        Limits(frames=0)
    for limits, file, words in (
        (Limits(pixels=1000), path, "48x32: over the limit of 1000 pixels"),
        (Limits(frames=11), path, "over 11 frames"),
        (Limits(bytes=100), path, "over the limit of 100"),
        (Limits(), tmp_path / "large.png", "9000x9000: over the limit"),
        (Limits(pixels=2**27, memory=400 << 20), tmp_path / "large.png", "more than 400 MiB"),
        (Limits(seconds=0.001), path, "took over 0.001 s"),
        (Limits(silence=0.001), path, "hung"),
    ):
        with Decoder(limits) as decoder, pytest.raises(DecodeError, match=words):
            streamed(decoder, file, 10, size=(16, 16))
    with Decoder(Limits(frames=30)) as decoder, pytest.raises(DecodeError, match="over 30 frames"):
        streamed(decoder, path, 100, size=(16, 16))  # few frames in, many out


def test_a_hung_or_crashed_worker_is_replaced(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(3))

    def crash(pid: int) -> None:
        (live,) = decoder._live
        until, unread = time.monotonic() + 60, bytearray(4)
        while not any(unread) and time.monotonic() < until:  # it is stopped, and has been asked
            fcntl.ioctl(live._socket, termios.TIOCOUTQ, unread)
            time.sleep(0.01)
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)

    with Decoder() as decoder:

        def worker() -> int:
            decoder.probe(path)
            return next(iter(decoder._live)).process.pid

        hung = worker()
        next(iter(decoder._live)).limits = Limits(silence=0.3)
        os.kill(hung, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(DecodeError, match="hung .0.3 s"):
            decoder.probe(path)
        assert 0.25 < time.monotonic() - begin < 25  # not the 30 s of the default
        crashed = worker()
        assert crashed != hung and not os.path.exists(f"/proc/{hung}")
        os.kill(crashed, signal.SIGSTOP)
        thread = threading.Thread(target=crash, args=(crashed,))
        thread.start()
        with pytest.raises(DecodeError, match="crashed .signal 11"):
            decoder.probe(path)
        thread.join()
        idle = worker()
        os.kill(idle, signal.SIGKILL)
        next(iter(decoder._live)).process.wait()
        assert worker() not in (hung, crashed, idle)
        begun = decoder.stream(path, 1000.0, (16, 16))
        assert next(begun).shape[0] == decode.CHUNK
        begun.close()  # given up in the middle: the next answer is still the next question's
        assert numbers(streamed(decoder, path, 10)) == [0, 1, 2]
        last = worker()
    assert not os.path.exists(f"/proc/{last}")
    with pytest.raises(DecodeError, match="closed"):
        decoder.probe(path)


def test_a_worker_left_alone_ends_itself() -> None:
    code = "from vdit.data import media; import io, signal\n"
    code += "signal.signal(signal.SIGALRM, signal.SIG_DFL)\n"
    code += "w = media._Watch(io.BytesIO(), -4.9); w.rest()\nwhile True: pass"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(decode.__file__).parents[2])
    assert result.returncode == -signal.SIGALRM


def test_threads_share_a_decoder(tmp_path: Path, decoder: Decoder) -> None:
    path = encode(tmp_path / "a.mp4", numbered(20))
    found: dict[int, list[int]] = {}

    def work(k: int) -> None:
        found[k] = numbers(decoder.frames(path, [k / 10], (16, 16)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [k] for k in range(20)}


def test_workers_do_not_load_jax() -> None:
    settings = json.dumps({"threads": 1})
    code = "import sys; from vdit.data import media; media.serve(sys.argv[1]); "
    code += "print(sorted({'jax', 'flax', 'numpy', 'av'} & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code, settings],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=Path(decode.__file__).parents[2],
    )
    assert result.stderr.strip() == "['av', 'numpy']"
