"""The report of a synthetic run: complete, self-contained, and safe against hostile prompts."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vdit import report
from vdit.config.identity import VERSION
from vdit.errors import UserError

HOSTILE = '<script>alert("x")</script> & a </p> red ball'
PROMPTS = [
    "A large red ball is dropped and bounces on the floor.",
    HOSTILE,
    "A small blue square is thrown to the right while a yellow triangle falls beside it.",
    "A green ball rolls to the left and hits the wall, under weak gravity.",
    "Two bodies: a purple triangle above a small orange ball, both fall.",
    "A yellow square slides.",
]


def clip(seed: int, frames: int = 17, size: int = 32) -> list[Image.Image]:
    """A ball under gravity on a pale ground."""
    rng = np.random.default_rng(seed)
    colour, (x, speed) = rng.integers(40, 220, 3), rng.uniform((6, -0.6), (26, 0.6))
    rows, columns = np.mgrid[:size, :size] + 0.5
    pictures = []
    for t in range(frames):
        y = 25 - abs(18 * math.cos(t * 0.35))
        inside = np.hypot(rows - y, columns - x - speed * t)[..., None]
        alpha = np.clip(5.5 - inside, 0, 1)
        frame = (1 - alpha) * (236, 232, 224) + alpha * colour
        pictures.append(Image.fromarray(frame.astype(np.uint8)))
    return pictures


def save(path: Path, pictures: list[Image.Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)


def fake_workdir(workdir: Path, samples: int = 6, steps: int = 300) -> Path:
    """A workdir as a run writes it."""
    config = {
        "version": VERSION,
        "name": "base",
        "seed": 0,
        "data": {"name": "world", "frames": 17, "size": [32, 32], "fps": 10},
        "vae": {"steps": 2000, "patch": [4, 8, 8], "channels": 24, "width": 192, "kl": 1e-4},
        "dit": {"steps": 1416, "preset": "cpu", "width": 160, "layers": 6, "batch": 24},
        "diffusion": {"process": "flow", "prediction": "flow"},
        "sample": {"sampler": "euler", "steps": 25, "guidance": 4.0},
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    versions = {"python": "3.11.14", "jax": "0.10.2", "flax": "0.12.8", "device": "1 x cpu"}
    rows = [{"stage": "run", "step": 0, **versions}]
    for stage, total, seconds, floor in (("vae", 2000, 105.2, 2e-3), ("dit", 1416, 331.7, 0.11)):
        for step in np.linspace(total / steps, total, steps).round().astype(int).tolist():
            loss = (floor + 0.6 * math.exp(-9 * step / total)) * math.exp(rng.normal(0, 0.15))
            row = {"stage": stage, "step": step, "loss": loss, "grad_norm": 3 * loss}
            row["learning_rate"] = 0.03 * min(step / 100, (1 - step / total) * 1.1)
            if stage == "vae":
                row |= {"kl": 400 * loss**0.3, "psnr": -10 * math.log10(loss)}
            rows.append(row)
        rows[-1 - steps // 2]["loss"] = None
        rows.append({"stage": stage, "step": total, "seconds": seconds, "parameters": 4_012_345})
        if stage == "vae":
            rows.append({"stage": "latents", "step": 12_000, "seconds": 7.5})
    rows.append({"stage": "sample", "step": 1416, "seconds": 9.1})
    base = [("real", 0.995), ("reconstructed", 0.97), ("generated", 0.93)]
    for split, level in base:
        for objects, off, clips in (("all", 0.08, 256), ("one", 0.0, 128), ("two", 0.16, 128)):
            row = {"stage": "eval", "step": 1416, "split": split, "objects": objects}
            row |= {"clips": clips, "captions": clips - 36}
            for i, name in enumerate(report.SCORES[1:]):
                value = level - off * (1 - level) * 10 * (0.5 if i != 5 else 2) / 2
                row[name] = value
                row |= {f"{name}_low": value - 0.03, f"{name}_high": min(1, value + 0.025)}
            row["gravity_error_median"] = 0.02 + 2 * (1 - level) * (0.4 + off)
            rows.append(row)
    rows.append({"stage": "eval", "step": 1416, "psnr": 30.42, "ssim": 0.953, "seconds": 34.0})
    for task, error in (("image to video", 24.1), ("extension", 22.7)):
        row = {"stage": "eval", "step": 1416, "task": task, "clips": 64, "given_exact": 1.0}
        rows.append(row | {"psnr_next_four": error, "psnr_frozen": error - 3.4})
    lines = [json.dumps(row) for row in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "ev')
    for i in range(samples):
        prompt = PROMPTS[i % len(PROMPTS)]
        save(workdir / "samples" / f"{i}.webp", clip(i))
        about = {"prompt": prompt, "seed": i, "steps": 25, "given": ["0 s"] if i == 3 else []}
        (workdir / "samples" / f"{i}.json").write_text(json.dumps(about))
    (workdir / "samples" / "0.mp4").write_bytes(b"the same clip, shown once")
    pairs = []
    for frames in zip(*(clip(i) for i in range(8)), strict=True):
        pairs.append(Image.new("RGB", (8 * 33, 65), "white"))
        for i, frame in enumerate(frames):
            pairs[-1].paste(frame, (33 * i, 0))
            pairs[-1].paste(frame.reduce(2).resize((32, 32)), (33 * i, 33))
    save(workdir / "reconstructions.webp", pairs)
    return workdir


class Tags(HTMLParser):
    """Collects tags, sources and text of a page; unbalanced tags are an error."""

    VOID = {"meta", "img", "source"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.figures: list[str] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "poster")]
        if tag == "img" and self.open[-1] == "picture":
            self.figures.append(dict(attributes)["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_workdir(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(workdir):
    path = report.write_report(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_self_contained(page):
    tags = Tags(page)
    clips = [s for s in tags.sources if s.startswith("data:image/webp;base64,")]
    drawn = [s for s in tags.sources if s.startswith("data:image/svg+xml;base64,")]
    assert len(clips) == 7 and tags.seen.count("video") == 0
    assert len(drawn) == 2 * len(tags.figures) > 0 and set(clips + drawn) == set(tags.sources)
    assert not {"script", "link", "iframe", "object"} & set(tags.seen)
    bare = re.sub(r"base64,[\w+/=]+", "", page)
    assert "http:" not in bare and "https:" not in bare and "url(" not in bare


def test_foreign_text_is_escaped(page):
    tags = Tags(page)
    assert "<script" not in page and HOSTILE in tags.words


def test_the_page_shows_all_sections(page):
    tags, bare = Tags(page), re.sub(r"base64,[\w+/=]+", "", page)
    words = tags.words
    for heading in ("Samples", "Scores", "Reconstructions", "Curves", "Stages", "Settings"):
        assert heading in words
    for fact in ("30.4 dB", "image to video", "0.10.2", "17", "32 × 32", "seed 3", "given 0 s"):
        assert fact in words
    series = [name for alt in tags.figures[-8:] for name in alt.split(", ")]
    assert series == ["loss", "grad_norm", "learning_rate", "kl", "psnr", *series[:3]]
    assert "NaN" not in bare and "None" not in words
    for picture in re.findall(r"svg\+xml;base64,([\w+/=]+)", page):
        assert b"nan" not in base64.b64decode(picture).lower()


def test_each_figure_is_drawn_for_light_and_for_dark_screens(page):
    form = (
        r'<source media="\(prefers-color-scheme: dark\)" '
        r'srcset="data:image/svg\+xml;base64,([^"]+)">'
        r'<img src="data:image/svg\+xml;base64,([^"]+)"'
    )
    pairs = re.findall(form, page)
    assert len(pairs) == len(Tags(page).figures)
    for dark, light in ([base64.b64decode(data).decode() for data in pair] for pair in pairs):
        colours = set(re.findall(r"#[0-9a-f]{6}", light))
        assert colours <= report.DARK.keys() and report.LINE in colours
        assert set(re.findall(r"#[0-9a-f]{6}", dark)) == {report.DARK[c] for c in colours}


def test_figures_leave_matplotlib_as_it_was(workdir):
    """Settings and backend stay the user's, and matplotlib is imported only to write a report."""
    program = (
        "import sys, vdit, vdit.report as report\n"
        "assert not {'matplotlib', 'jinja2'} & sys.modules.keys()\n"
        "import matplotlib; matplotlib.rcParams['axes.facecolor'] = 'red'\n"
        "before = matplotlib.rcParams.copy()\n"
        f"report.write_report({str(workdir)!r})\n"
        "assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = str(Path(report.__file__).parents[1])
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_time_of_all_stages_leaves_out_the_row_of_the_whole_run(tmp_path):
    rows = [
        {"stage": "vae", "step": 5, "seconds": 400.0},
        {"stage": "vae", "step": 7, "seconds": 100.0},  # resumed
        {"stage": "vae", "step": 9, "seconds": 200.0},
        {"stage": "dit", "step": 9, "seconds": 300.0},
        {"stage": "eval", "step": 9, "task": "length", "seconds": 60.0},  # of a video
        {"stage": "run", "step": 0, "seconds": 907.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = Tags(report.write_report(tmp_path).read_text()).words
    assert "15:00minutes, all stages" in words and "30:07" not in words
    # It was killed early: the next part's first row is of a later second. Samples were made again.
    rows = [
        {"stage": "run", "step": 0},
        {"stage": "vae", "step": 5, "seconds": 10.0},
        {"stage": "run", "step": 0},
        {"stage": "vae", "step": 7, "seconds": 20.0},
        {"stage": "vae", "step": 9, "seconds": 30.0},
        {"stage": "sample", "step": 9, "seconds": 50.0},
        {"stage": "run", "step": 0, "seconds": 85.0},
        {"stage": "run", "step": 0},
        {"stage": "sample", "step": 9, "seconds": 40.0},
    ]
    assert {k: v["seconds"] for k, v in report.stage_values(rows).items()} == {
        "vae": 40.0, "sample": 40.0
    }  # fmt: skip


def test_scores_stand_beside_their_ceilings(page):
    two = page[page.index("Two objects</h3>") :]
    line = two[two.index("<th>every attribute<") :]
    cells = re.findall(r"<td>(\d\.\d\d)<small>(\d\.\d\d)–(\d\.\d\d)", line[: line.index("</tr>")])
    assert cells == [("0.82", "0.79", "0.84"), ("0.92", "0.89", "0.95"), ("0.99", "0.96", "1.00")]
    assert two.index("gen.</th>") < two.index("rec.</th>") < two.index("real</th>")


def test_losses_are_also_a_png(workdir, page):
    with Image.open(workdir / "plots" / "loss.png") as image:
        assert image.width > image.height > 300
    assert not list(workdir.glob("**/.*tmp*"))


@pytest.mark.parametrize(
    "gone", ["config.json", "metrics.jsonl", "samples", "reconstructions.webp", "all but config"]
)
def test_missing_pieces_leave_their_section_out(tmp_path, gone, monkeypatch):
    monkeypatch.setattr(report, "plot_losses", lambda curves, path: None)  # slow, and tested above
    workdir = fake_workdir(tmp_path / "a<b>", samples=2, steps=5)
    for path in sorted(workdir.glob("**/*"), reverse=True):
        keep = path == workdir / "config.json" if gone == "all but config" else None
        part = path.relative_to(workdir).parts[0]
        if not (part != gone if keep is None else keep):
            path.rmdir() if path.is_dir() else path.unlink()
    words = Tags(report.write_report(workdir).read_text()).words
    assert ("Samples" in words) == (gone not in ("samples", "all but config"))
    assert ("Scores" in words) == (gone not in ("metrics.jsonl", "all but config"))
    assert ("Settings" in words) == (gone != "config.json")
    assert "base" in words if gone != "config.json" else "a<b>" in words


def test_odd_contents_do_not_stop_the_page(tmp_path):
    rows = [
        {"stage": "vae", "step": 1, "loss": 0.5},
        {"stage": "vae", "step": 2, "loss": 0.5, "seconds": 0.0},  # a flat line, no time
        {"stage": "dit", "step": 5, "loss": -1.0},
        {"stage": "dit", "step": 9, "loss": -1e9, "grad_norm": None},
        {"stage": "eval", "step": 9, "split": "generated", "objects": "one", "colour": None},
        {"stage": "eval", "step": 9, "split": "<odd>", "objects": "one", "colour": 0.5},
        {"unknown": True},
        [1],
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text("{half")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.webp").write_bytes(b"no picture")
    (tmp_path / "samples" / "a.json").write_bytes(b"\xff")
    (tmp_path / "samples" / "b.mp4").write_bytes(b"")
    tags = Tags(report.write_report(tmp_path).read_text())
    assert "<odd>" in tags.words and tags.seen.count("img") - len(tags.figures) == 1


def test_an_mp4_is_shown_in_its_shape(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "config.json").write_text(json.dumps({"version": VERSION}))
    (tmp_path / "samples").mkdir()
    with av.open(str(tmp_path / "samples" / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in np.zeros((3, 32, 48, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    page = report.write_report(tmp_path).read_text()
    assert 'src="data:video/mp4;base64,' in page and "aspect-ratio:48/32" in page


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1416), (1e-6, 3e-6), (-5, 5), (299, 301)])
def test_ticks_are_few_round_numbers_inside(low, high):
    axes = Figure().add_subplot()
    report.draw_curves(axes, {"rate": [(low, low), (high, high)]})  # both axes run from low to high
    for ticks, (first, last) in (
        (axes.get_xticks(), axes.get_xlim()),
        (axes.get_yticks(), axes.get_ylim()),
    ):
        ticks = [tick for tick in ticks if first <= tick <= last]
        assert 2 <= len(ticks) <= 6
        step = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
        assert min(abs(step - m) for m in (1, 2, 5)) < 1e-6


def test_bins_keep_the_range():
    points = [(float(i), math.sin(i)) for i in range(1000)]
    bins = report._bins(points, 50)
    assert len(bins) == 50
    assert min(b[1] for b in bins) == min(v for _, v in points)
    assert max(b[3] for b in bins) == max(v for _, v in points)
    assert all(low <= mean <= high for _, low, mean, high in bins)


def test_a_wrong_workdir_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        report.write_report(tmp_path / "nowhere")
    command = [sys.executable, "-m", "vdit.report", str(tmp_path)]
    root = Path(report.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr and "config.json" in done.stderr
