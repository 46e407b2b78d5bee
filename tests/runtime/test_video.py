"""Video and picture files: what is written can be read back as it was."""

import base64
import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vdit.errors import UserError
from vdit.runtime import video as files


def clip(frames: int = 9, height: int = 16, width: int = 24) -> np.ndarray:
    """Flat shapes in a few colours that move."""
    t, y, x = np.mgrid[:frames, :height, :width]
    video = np.full((frames, height, width, 3), (240, 240, 255), np.uint8)
    video[(x - t) % width < 8] = (220, 30, 40)
    video[(y + t) % height < 4] = (20, 90, 200)
    return video


def read_mp4(path: Path) -> tuple[np.ndarray, list[float], av.VideoFrame]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    options = {"format": "rgb24", "interpolation": 0x2000 | 0x40000 | 4}  # full chroma, exact
    video = np.stack([frame.reformat(**options).to_ndarray() for frame in frames])
    return video, [frame.time for frame in frames], frames[0]


def read_pillow(data: bytes) -> tuple[np.ndarray, list[int]]:
    image = Image.open(io.BytesIO(data))
    video, durations = [], []
    for k in range(image.n_frames):
        image.seek(k)
        video.append(np.asarray(image.convert("RGB")))
        durations.append(image.info["duration"])
    assert image.info["loop"] == 0
    return np.stack(video), durations


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_mp4_keeps_frames_times_and_colours(tmp_path: Path) -> None:
    video = clip(17)
    files.write_mp4(tmp_path / "a.mp4", video, fps=10, scale=4)
    read, times, frame = read_mp4(tmp_path / "a.mp4")
    large = video.repeat(4, 1).repeat(4, 2)
    assert read.shape == large.shape and np.allclose(times, np.arange(17) / 10)
    assert psnr(read[:, 2::4, 2::4], video) > 32
    assert frame.format.name == "yuv420p" and frame.colorspace == 1 and frame.color_range == 1
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 60), (40, 60, 220)])
def test_mp4_colours_are_not_shifted(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    files.write_mp4(tmp_path / "a.mp4", np.full((2, 32, 32, 3), colour, np.uint8), fps=8)
    read, _, _ = read_mp4(tmp_path / "a.mp4")
    assert np.abs(read.astype(int) - colour).max() <= 2


def test_mp4_pads_odd_sizes_and_takes_one_frame_and_any_rate(tmp_path: Path) -> None:
    for fps in (0.5, 10.0, 23.976, 24, 30000 / 1001):
        files.write_mp4(tmp_path / "a.mp4", clip(1, 15, 23), fps)
        assert read_mp4(tmp_path / "a.mp4")[0].shape == (1, 16, 24, 3)
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)


def test_webp_is_lossless_and_gif_nearly(tmp_path: Path) -> None:
    video = clip()
    for fps in (10, 24, 30):
        read, durations = read_pillow(files.webp_bytes(video, fps, scale=2))
        assert np.array_equal(read, video.repeat(2, 1).repeat(2, 2))
        assert abs(sum(durations) - 9000 / fps) <= 0.5
        read, durations = read_pillow(files.gif_bytes(video, fps))
        assert np.array_equal(read, video)  # it has fewer than 256 colours
        assert abs(sum(durations) - 9000 / fps) <= 5 and all(d % 10 == 0 for d in durations)
    smooth = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    smooth = np.stack([Image.fromarray(x).resize((32, 32)) for x in smooth])
    assert psnr(read_pillow(files.gif_bytes(smooth, 10))[0], smooth) > 28
    with pytest.raises(UserError, match="at most 50"):
        files.gif_bytes(video, 60)


def test_the_same_pixels_give_the_same_file() -> None:
    video = clip()
    for make in (files.gif_bytes, files.webp_bytes):
        assert make(video, 10) == make(video.copy(), 10) != make(video[::-1], 10)
    assert files.png_bytes(video[0]) == files.png_bytes(video[0].copy())


def test_equal_frames_keep_their_time() -> None:
    video = np.repeat(clip(2), 4, axis=0)
    for data in (files.gif_bytes(video, 10), files.webp_bytes(video, 10)):
        assert sum(read_pillow(data)[1]) == 800


def test_png_and_data_uri(tmp_path: Path) -> None:
    picture = clip()[0]
    files.write_png(tmp_path / "a.png", picture, scale=3)
    read = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(read, picture.repeat(3, 0).repeat(3, 1))
    uri = files.to_data_uri((tmp_path / "a.png").read_bytes(), "image/png")
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()


def test_a_wall_holds_every_video_in_its_place() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 255, (3, 2, 4, 5, 3), dtype=np.uint8) for _ in range(2)]
    wall = files.tile(np.concatenate(rows), columns=3, gap=2, edge=1, colour=255)
    assert wall.shape == (2, 2 * 6, 3 * 7, 3)
    for row, column in np.ndindex(2, 3):
        cell = wall[:, 6 * row : 6 * row + 6, 7 * column : 7 * column + 7]
        np.testing.assert_array_equal(cell[:, 1:-1, 1:-1], rows[row][column])
        assert (cell[:, 0] == 255).all() and (cell[:, :, -1] == 255).all()


def test_tile_keeps_every_clip() -> None:
    video = np.arange(3, dtype=np.uint8)[:, None, None, None, None] + np.zeros(
        (3, 2, 4, 6, 3), np.uint8
    )
    tiled = files.tile(video, gap=2)
    assert tiled.shape == (2, 16, 6, 3)  # wide clips go below each other
    assert (tiled[:, 6:10] == 1).all() and (tiled[:, 4:6] == 128).all()
    with pytest.raises(ValueError, match="float32"):
        files.tile(video.astype(np.float32))


def test_contact_sheet_shows_every_frame_and_caption(tmp_path: Path) -> None:
    videos = np.stack([clip(9) for _ in range(5)])
    for k, video in enumerate(videos):
        video[:, 0, 0] = (k, 200, 100)
    captions = ["a red ball falls", "ein Würfel, 立方体", "", "word " * 200, "x" * 500]
    files.contact_sheet(tmp_path / "a.png", videos, captions, columns=2, every=4, scale=3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    for k in range(5):  # three frames of each, left to right
        marks = np.argwhere((sheet == (k, 200, 100)).all(-1))
        assert len(marks) == 3 * 3 * 3
        left = np.unique(marks[:, 1])
        top = marks[0, 0]
        frame = sheet[top : top + 48, left[3] : left[3] + 72]
        assert np.array_equal(frame, videos[k, 4].repeat(3, 0).repeat(3, 1))
    first = np.argwhere((sheet == (0, 200, 100)).all(-1))[0]
    caption = sheet[: first[0], : 3 * 74]
    assert (caption.min(-1) < 100).sum() > 30  # there is dark text above
    files.contact_sheet(tmp_path / "b.png", list(videos[:1]), columns=4)
    with pytest.raises(UserError, match="5 videos and 1 captions"):
        files.contact_sheet(tmp_path / "c.png", videos, ["one"])
    with pytest.raises(UserError, match="columns=0"):
        files.contact_sheet(tmp_path / "c.png", videos, columns=0)


def test_wrong_arrays_and_places_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    good, target = clip(), tmp_path / "a"
    for write in (files.write_mp4, files.write_gif, files.write_webp):
        for bad in (good.astype(np.float32), good[0], good[..., :1], good[:0]):
            with pytest.raises(UserError, match="uint8"):
                write(target, bad, 10)
        with pytest.raises(UserError, match="scale=0"):
            write(target, good, 10, scale=0)
        for fps in (0, -1, float("nan"), 1e6):
            with pytest.raises(UserError, match="fps"):
                write(target, good, fps)
    target.mkdir()
    for write in (files.write_mp4, files.write_gif, files.write_webp):
        with pytest.raises(UserError, match="cannot write"):
            write(target, good, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
