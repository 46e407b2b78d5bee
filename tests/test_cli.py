"""The command `vdit`: what it prints, what it calls, and that it works where vdit is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vdit
from tools import import_weights, parsers, restore_checkpoint
from tools.export_weights import STAGES
from tools.exporting import PLACES
from tools.importing.classifier import STARTS
from vdit import cli, doctor, main, shipped
from vdit.config import command

ROOT = Path(__file__).parents[1]
WRONG = (
    (["smaple"], "'smaple': is sample meant?"),
    ([], "no command"),
    (["sample", "--promt=x"], "'promt': is --prompt meant?"),
    (["eval", "--workdir=x", "--prompt=y"], "--prompt: not a flag of --mode=eval"),
    (["run"], "give --config="),
    (["run", "bose"], "--config=bose: there is no such file; experiments are base, "),
    (["run", "base", "more"], "'more' is no flag"),
    (["sample", "--mode=eval"], "the command is the mode"),
    (["plan", "--topologie=v5e:1x1"], "required: --config, --topology"),
    (["export", "--workdir=x", "--out=y", "--config.z=1"], "unrecognized arguments: --config.z=1"),
    (["restore", "mend", "x"], "invalid choice: 'mend'"),
    (["doctor", "x"], "takes no arguments"),
)


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_fits_a_screen_and_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call([*([name] if name else []), "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    assert "example" in text and "vdit" in text


@pytest.mark.parametrize("words, said", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_wrong_command_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(words) == 2
    finally:
        main.FLAGS.unparse_flags()
    err = capsys.readouterr().err
    assert said in err and err.startswith("vdit: ") and err.count("\n") == 1, err


def test_help_and_wrong_flags_do_without_jax() -> None:
    calls = [["--help"], ["--version"], ["completion"], *([name, "-h"] for name in cli.COMMANDS)]
    calls += [words for words, said in WRONG if "no flag" not in said]
    code = (
        "import sys\nfrom vdit import cli, main\n"
        f"for words in {calls!r}: cli.main(words)\n"
        "main.main(['vdit', '--help'])\n"
        "heavy = {'jax', 'flax', 'numpy', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def work(path: str, workdir: Path) -> None:
        seen.append((path, workdir, main.FLAGS.mode, main.CONFIG.value.seed))

    monkeypatch.setattr(main, "work", work)
    experiment = f"{ROOT}/experiments/base.py:smoke"
    for call in (
        lambda: cli.main(["run", "base:smoke", "--config.seed=3"]),
        lambda: main.main(["vdit", f"--config={experiment}", "--config.seed=3"]),
        lambda: main.main(["vdit", "--config", "base:smoke", "--config.seed=3"]),
    ):
        try:
            assert call() == 0
        finally:
            main.FLAGS.unparse_flags()
            for name in [name for name in main.FLAGS if name.startswith("config.")]:
                delattr(main.FLAGS, name)  # defined by its use
    assert seen == [(experiment, Path("runs/base-smoke"), "run", 3)] * 3


def test_a_tool_gets_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Tool:
        @staticmethod
        def main(words: list[str]) -> int:
            seen.append(words)
            return 1

    of = cli.tools
    monkeypatch.setattr(cli, "tools", lambda name: of(name) if name == "parsers" else Tool)
    words = ["--config=base", "--topology=v5e:1x1", "--config.seed=3", "--fast"]
    assert cli.main(["plan", *words]) == 1
    assert cli.main(["restore", "verify", "runs/base"]) == 1
    assert seen == [words, ["verify", "runs/base"]]


def test_choices_are_those_of_the_tools() -> None:
    def choices(parser: parsers.Parser, name: str) -> list[str]:
        return sorted(next(a.choices or () for a in parser._actions if a.dest == name))

    assert choices(parsers.import_weights(), "start") == sorted(STARTS)
    assert choices(parsers.export_weights(), "stage") == sorted(STAGES)
    assert choices(parsers.export_weights(), "pipeline") == sorted(PLACES)
    assert choices(parsers.restore_checkpoint(), "command") == sorted(restore_checkpoint.COMMANDS)
    assert choices(parsers.restore_checkpoint(), "drop") == sorted(restore_checkpoint.DROPPED)
    for row in cli.COMMANDS.values():
        if row.tool:
            assert hasattr(parsers, row.tool), row.tool
    assert import_weights.__doc__ in parsers.import_weights(import_weights.__doc__).format_help()


def offered(shell: str, folder: Path, *words: str) -> list[str]:
    """What a shell's completion offers for the last of the words."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    (folder / "complete.sh").write_text(cli.completion())
    listed = " ".join(f"'{word}'" for word in words)
    zero = "setopt localoptions ksharrays;" if shell == "zsh" else ""  # as bashcompinit has it
    code = (
        f"source {folder}/complete.sh\nask() {{ {zero} COMP_WORDS=({listed})\n"
        f"COMP_CWORD={len(words) - 1}; _vdit; echo ${{COMPREPLY[@]}}; }}; ask"
    )
    plain = ["-f"] if shell == "zsh" else ["--norc"]
    env = os.environ | {"HOME": str(folder)}
    done = subprocess.run([shell, *plain, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion_in_bash(tmp_path: Path) -> None:
    assert offered("bash", tmp_path, "vdit", "re") == ["restore"]
    assert offered("bash", tmp_path, "vdit", "sample", "--se") == ["--seconds=", "--seed="]
    assert offered("bash", tmp_path, "vdit", "run", "pl") == ["playground"]
    assert offered("bash", tmp_path, "vdit", "plan", "--top") == ["--topology"]
    assert offered("bash", tmp_path, "vdit", "sample", "runs/") == []  # files, then


def test_completion_in_zsh(tmp_path: Path) -> None:
    assert {"restore", "run"} <= {*offered("zsh", tmp_path, "vdit", "re")}
    assert "--seed=" in offered("zsh", tmp_path, "vdit", "sample", "--se")


def test_doctor_says_what_is_here_and_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "tiny"
    bad.mkdir()
    (bad / "vdit.json").write_text("{}")
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (
        f"vdit          {vdit.__version__}", "8 x cpu", "GB free in", "writes libx264",
        "auto is float32",  # on a simulated mesh
        "xla for 256 tokens, chunked for 2,048 tokens", "tiny: DAMAGED: ", "digests.json: missing",
    ):  # fmt: skip
        assert words in out, words
    assert dict(doctor.lines())["mesh"].startswith("data=8")


def test_the_version_is_one() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {vdit.__version__}" in changes
    assert "version = attr: vdit.__version__" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Where vdit is installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages as a wheel has them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("vdit", "tools", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = ["setup.py", "-q", "build", f"--build-lib={out}"]
    done = subprocess.run(
        [sys.executable, *build], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out


def outside(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`vdit` in a folder where there is no checkout."""
    env = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vdit", *words],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_packages_are_inside_of_vdit(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {"vdit"}
    for name in (
        "tools/plan.py",
        "tools/planning/step.py",
        "experiments/base.py",
        "page/style.css",
        "page/serve/page.js",
    ):
        assert (installed / "vdit" / name).is_file(), name
    assert not (installed / "vdit" / "tools" / "golden").exists()
    for path in (installed / "vdit" / "tools").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "from tools" not in text and "import tools" not in text, (
            f"{path}: imports among tools are relative, since they are installed as vdit.tools"
        )


@pytest.mark.slow
def test_it_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    plan = ["plan", "--topology=v5e:1x1", "--fast", "--best=1"]
    done = outside(installed, tmp_path, *plan, "--config=packed")  # which imports base
    # A plan of packed rows needs their size: it says so, from vdit's own experiment.
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    (tmp_path / "mine.py").write_text(
        "from experiments import base\n\n\ndef get_config(variant=''):\n"
        "    return base.get_config('smoke')\n"
    )
    done = outside(installed, tmp_path, *plan, "--config=mine.py")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    more = ["--workdir=work", "--config.data.path=nowhere"]
    done = outside(installed, tmp_path, "run", "folder", *more)
    assert done.returncode == 2 and "nowhere" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert command.experiments() == sorted(
        path.stem for path in (installed / "vdit/experiments").glob("[a-z]*.py")
    )
