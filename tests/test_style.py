"""The house's rules, checked: lint, types, layering, clean imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports only from rooms of a smaller number (or its own room).
LAYERS = {
    "errors": 0,
    "diffusion": 1,
    "nn": 2,
    "kernels": 2,
    "tokens": 3,
    "models": 4,
    "published": 5,
    "objectives": 5,
    "runtime": 6,
    "data": 7,
    "config": 8,
    "train": 9,
    "encode": 10,
    "stages": 10,
    "sample": 10,
    "show": 11,
    "classify": 11,
    "evaluate": 11,
    "worlds": 12,
    "report": 11,
    "run": 12,
    "main": 13,
}
BLIND = ("models", "published", "objectives")  # what the runtime must not know


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


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("mypy", "vdit", "experiments", "tools")],
    ids=["ruff", "mypy"],
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
