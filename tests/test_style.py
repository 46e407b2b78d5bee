"""The house's rules, checked: lint, types, layering, clean imports."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports only from rooms of a smaller number (or its own room).
LAYERS = {
    "errors": 0,
    "diffusion": 1,
    "nn": 2,
    "kernels": 3,
    "tokens": 3,
    "models": 4,
    "denoiser": 5,
    "published": 6,
    "objectives": 6,
    "runtime": 7,
    "data": 8,
    "config": 9,
    "shipped": 10,
    "train": 10,
    "encode": 12,
    "loading": 11,
    "initial": 12,
    "stages": 12,
    "model": 11,
    "sample": 12,
    "show": 13,
    "classify": 13,
    "evaluate": 13,
    "report": 13,
    "serve": 14,
    "run": 14,
    "doctor": 14,
    "flags": 14,
    "main": 15,
    "cli": 15,
    "__main__": 15,
    "worlds": 16,  # no other room imports it
}
BLIND = ("models", "published", "objectives")  # what the runtime must not know
REQUESTS = ("loading", "model", "sample")  # for which nothing is trained


def imports(path: Path) -> set[str]:
    """The rooms of vdit that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "vdit":
            names = [f"vdit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vdit.")}
    return found


FILES = sorted((ROOT / "vdit").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    room = path.relative_to(ROOT / "vdit").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imports(path):
        assert LAYERS[other] <= LAYERS[room], f"{path} imports from {other}"
        assert not (room == "runtime" and other in BLIND), f"{path} knows {other}"
        assert not (room in REQUESTS and other == "objectives"), f"{path} knows {other}"
        # Models are given their attention kernel by the runtime.
        assert other != "kernels" or room in ("kernels", "runtime"), f"{path} imports kernels"


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "vdit", "experiments", "tools", "tests"),
        ("mypy", "vdit", "experiments", "tools"),
    ],
    ids=["ruff", "format", "mypy"],
)
def test_lint_and_types(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_neither_torch_nor_tensorflow_is_imported() -> None:
    """Everything that a run imports, in a process of its own."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "bad = {'torch', 'tensorflow'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------
# What a reader has to hold at once


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_package_stays_small() -> None:
    beside = [path for path in FILES if {"worlds", "serve"} & set(path.parts)]
    core = [path for path in FILES if path not in beside]
    assert lines(core) <= 24_400
    assert lines(FILES) <= 31_350
    assert lines([ROOT / "vdit" / "main.py"]) <= 150
    assert lines([ROOT / "README.md"]) <= 200


def is_table(function: ast.FunctionDef) -> bool:
    """Whether nine of ten statements are assignments: fields with their defaults."""
    plain = [isinstance(part, ast.Assign | ast.AnnAssign) for part in function.body[1:-1]]
    return len(plain) > 10 and sum(plain) >= 0.9 * len(plain)


def test_functions_fit_a_screen() -> None:
    """60 lines at most, signature and docstring included; tables are free."""
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in [*FILES, *(ROOT / "tools").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
        and not is_table(node)
    ]
    assert not long, "\n".join(long)
