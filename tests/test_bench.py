"""The benchmark: its table at a tiny size without PyTorch, its list of matmuls, its bad flags."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.base import get_config
from tools import bench, bench_gpu
from tools.benching import cases, runs

TINY = ("--width=32", "--depth=1", "--tokens=16", "--batch=2", "--repeats=1", "--steps=2")
NO_TORCH = f"--torch-python={shutil.which('false')}"


def test_prints_its_tables_and_says_that_torch_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "DTYPES", ("float32",))  # half the compilation
    path = tmp_path / "bench.jsonl"
    assert bench.main([*TINY, NO_TORCH, "--only=dit,sampling", f"--json={path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("no PyTorch") == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    timed = {(row["part"], row["task"]) for row in rows if "task" in row}
    assert timed == {("dit", "forward"), ("dit", "train"), ("sampling", "2 steps")}
    assert all(row["median"] > 0 for row in rows if "task" in row)
    (target,) = [row for row in rows if "target" in row]  # the others are against PyTorch
    assert target["part"] == "sampling"


def test_the_autoencoder_and_the_scanned_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tables above leave out, without compiling it."""
    case = cases.vae_case(get_config("smoke"))
    assert jax.eval_shape(case.loss("bfloat16"), case.params, case.inputs).shape == ()
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: None)
    assert runs.compile_run(bench.parse(TINY), bench.DEEP)() > 0


def test_a_save_is_timed_as_the_trainer_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.jsonl"
    assert bench.main([*TINY, NO_TORCH, "--only=checkpoint", f"--json={path}"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = {row["name"] for row in rows if "median" in row}
    assert names == {"synchronous", "asynchronous"}
    (target,) = [row for row in rows if "target" in row]
    assert target["part"] == "checkpoint" and 0 < target["value"] < 2


@pytest.mark.slow
def test_attention_s_slopes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (256, 512))
    path = tmp_path / "bench.jsonl"
    flags = ["--only=attention", "--repeats=1", NO_TORCH, f"--json={path}"]
    assert bench.main(flags) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    timed = {row["task"]: row for row in rows if "task" in row}
    assert set(timed) == {"joint", "factorised", "windowed"}
    assert sum("target" in row for row in rows) == 7  # three slopes of two, and memory
    assert "temporaries of the gradient at 512 tokens" in capsys.readouterr().out


def test_the_loader_s_table_and_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"MEASURED": 0.05, "FLAT": 400, "WORKERS": (1, 2), "FILMS": 2, "SECONDS": 3, "BATCH": 2}
    for name, value in small.items():
        monkeypatch.setattr(bench.loader, name, value)
    path = tmp_path / "bench.jsonl"
    assert bench.main(["--only=loader", NO_TORCH, f"--json={path}"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch's DataLoader with PyAV is not available" in out
    assert "| vdit folder | 17x64x64 |" in out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rates = {(row["source"], row["size"], row["workers"]): row["rate"]
             for row in rows if "workers" in row}  # fmt: skip
    assert len(rates) == 2 * (4 * 2 + 2) and min(rates.values()) > 0
    (target,) = [row for row in rows if "target" in row]
    assert target["part"] == "loader" and target["reached"]


def test_counts_every_matrix_product() -> None:
    """Against the formula, for the forward pass; the train step has two more of each."""
    options = bench.parse(["--width=32", "--depth=2", "--tokens=16", "--batch=2"])
    case = cases.dit_case(options)
    width, depth, rows, length, batch = 32, 2, 2 * 16, 16, 2
    keys = cases.TEXT_TOKENS + 1
    block = (
        rows * width * width * (4 + 2 + 8)  # self-attention, q and o of cross, mlp
        + batch * keys * width * width * 2  # k and v of cross
        + 2 * batch * length * (length + keys) * width  # attention
        + batch * 2 * width * 6 * width  # modulation of two levels; its choice is no product
    )
    ends = (
        2 * rows * cases.CHANNELS * width  # embed, out
        + rows * 3 * 64 * width  # positions
        + batch * 2 * (256 + width + cases.TEXT_WIDTH) * width  # levels, pooled text
        + batch * keys * cases.TEXT_WIDTH * width  # text
        + batch * 2 * width * 2 * width  # last modulation
    )  # fmt: skip
    forward = runs.products_of(case, "forward", "float32")
    flops = sum(count * product.flops() for product, count in forward.items())
    assert flops == 2 * (depth * block + ends)
    train = runs.products_of(case, "train", "float32")
    assert 2.7 < sum(count * product.flops() for product, count in train.items()) / flops <= 3.0
    assert sum(runs.plain(train).values()) == sum(train.values())


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("--only=unet", "known are dit, wan, vae"),
        ("--depth=0", "1 or more"),
        ("--width=40", "a multiple of 16"),
        ("--levels=3", "1 or 2"),
        ("--repeats=x", "invalid int value"),
        ("--fast", "unrecognized arguments"),
        ("--torch-python=/no/such/python", "No such file"),
    ],
)
def test_wrong_flags_are_one_line(
    flag: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([flag]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and allowed in said


def test_the_gpu_s_programs_run_dry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_gpu.main([]) == bench_gpu.main(["--dry", "--only=dit"]) == 2
    assert "no GPU: this machine has cpu" in capsys.readouterr().err
    monkeypatch.setattr(bench_gpu, "kernels", lambda: ["chunked"])
    path = tmp_path / "gpu.jsonl"
    assert bench_gpu.main(["--dry", "--repeats=1", f"--json={path}"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["train"] * 3 + ["attention"] * 2 + ["denoise"]
    assert all(row["seconds"] > 0 for row in rows)


def test_the_gpu_s_bench_needs_no_more_than_jax_flax_optax_and_einops() -> None:
    code = "import sys, tools.bench_gpu; print({name.split('.')[0] for name in sys.modules})"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {"ml_collections", "orbax", "grain", "tokenizers", "av", "pymunk", "scipy", "PIL"}
    assert not foreign & set(ast.literal_eval(made.stdout))
