"""The command `vdit`: `vdit.main` by modes, the tools, `vdit doctor`, and completion for shells.

What works imports JAX, and is imported once its flags are known to be right: help, completion and
wrong flags are answered at once. `python -m vdit` is the same.
"""

import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import vdit
from vdit.config import command
from vdit.errors import EXPECTED, UserError
from vdit.shipped import names

ROOT = Path(__file__).parents[1]  # of a checkout


class Command(NamedTuple):
    """A subcommand: what it does, an example, and the tool that it is, if it is one."""

    what: str
    example: str = ""
    tool: str = ""


COMMANDS = {
    "run": Command(
        "train: the stages of an experiment, in turn; resumes",
        "vdit run base:smoke --workdir=runs/try --config.seed=1",
    ),
    "sample": Command(
        "videos from a trained workdir, or from weights in the package",
        'vdit sample --workdir=runs/base --prompt="a small red ball falls" --num=4',
    ),
    "eval": Command("scores of a workdir on held-out clips", "vdit eval --workdir=runs/base"),
    "features": Command(
        "a classifier's features of videos", "vdit features --workdir=runs/vivit --video=clip.mp4"
    ),
    "serve": Command("a page to play with, and the same as JSON", "vdit serve --workdir=base"),
    "plan": Command("what a run needs on TPUs, without a TPU", tool="plan"),
    "import": Command("a workdir from published weights", tool="import_weights"),
    "export": Command("networks as safetensors", tool="export_weights"),
    "restore": Command("list, verify, inspect, copy checkpoints", tool="restore_checkpoint"),
    "curate": Command("a folder of films: shots, filters, a table", tool="curate"),
    "measure": Command("FVD, KVD, PSNR, SSIM, LPIPS of videos", tool="measure"),
    "bench": Command("speed on this machine", tool="bench"),
    "doctor": Command("this machine, and what vdit chooses on it", "vdit doctor"),
    "completion": Command(
        "completion for bash and zsh", 'eval "$(vdit completion)"    # in ~/.bashrc or ~/.zshrc'
    ),
}
HELP = ("--help", "-h", "--helpfull")


def tools(name: str) -> ModuleType:
    """A module of tools, which are vdit.tools where vdit is installed, and lie beside it in a
    checkout."""
    try:
        return importlib.import_module(f"vdit.tools.{name}")
    except ModuleNotFoundError as error:
        if error.name != "vdit.tools":
            raise
    sys.path.append(str(ROOT))
    return importlib.import_module(f"tools.{name}")


def overview() -> str:
    """The help of `vdit`."""
    wide = max(map(len, COMMANDS))
    lines = [f"  {name:{wide}}  {row.what}" for name, row in COMMANDS.items()]
    weights = ", ".join(names()) or "none"
    return "\n".join([
        f"vdit {vdit.__version__}: video diffusion transformers in JAX", "",
        "usage: vdit COMMAND [flags]; vdit COMMAND --help", "", *lines, "",
        "examples:",
        "  vdit run base                 train the default model: runs/base/report.html",
        '  vdit sample --workdir=runs/base --prompt="a small red ball falls"', "",
        *textwrap.wrap(f"experiments: {', '.join(command.experiments())}", 80),
        f"weights in the package: {weights}",
    ])  # fmt: skip


def flags_of(name: str) -> list[tuple[str, str]]:
    """The flags of a command and their help."""
    row = COMMANDS[name]
    if row.tool:
        parser: Any = getattr(tools("parsers"), row.tool)()
        return [
            (action.option_strings[-1], action.help or "")
            for action in parser._actions if action.option_strings
        ]  # fmt: skip
    if name in ("doctor", "completion"):
        return []
    from vdit.flags import flags_of

    return [(f"--{flag}=", text) for flag, text in flags_of(name).items()]


def usage(name: str) -> str:
    """The help of a command."""
    row = COMMANDS[name]
    if row.tool:
        text: str = getattr(tools("parsers"), row.tool)().format_help()
        return text.rstrip("\n")
    first = " EXPERIMENT[:ARGUMENT]" if name == "run" else ""
    flags = [*flags_of(name)]
    if name == "run":
        flags.append(("--config.FIELD=", "any field of the configuration (docs, config.json)"))
    wide = max((len(flag) for flag, _ in flags), default=0)
    lines = [f"  {flag:{wide}}  {text}" for flag, text in flags]
    return "\n".join([
        f"usage: vdit {name}{first}{' [flags]' if flags else ''}", "", row.what, "", *lines,
        *([""] if lines else []), "example:", f"  {row.example}",
    ])  # fmt: skip


COMPLETION = """\
if [ -n "$ZSH_VERSION" ]; then autoload -Uz compinit bashcompinit; compinit; bashcompinit; fi
_vdit() {{
  local words="{commands}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
      *) words="" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o default -F _vdit vdit"""


def completion() -> str:
    """A script for bash and zsh, with the commands, their flags, and the experiments."""
    cases = []
    for name in COMMANDS:
        words = [flag for flag, _ in flags_of(name)]
        words += command.experiments() if name == "run" else ()
        cases.append(f'      {name}) words="{" ".join(words)}" ;;')
    return COMPLETION.format(commands=" ".join(COMMANDS), cases="\n".join(cases))


def tool(name: str, words: Sequence[str]) -> int:
    """A tool, once its flags are known to be right."""
    row = COMMANDS[name]
    parser: Any = getattr(tools("parsers"), row.tool)()
    options, others = parser.parse_known_args(words)
    changes = [word for word in others if word.startswith("--config.")]
    if others and (changes != others or not hasattr(options, "config")):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    status: int = tools(row.tool).main(words)
    return status


def mode(name: str, words: Sequence[str]) -> int:
    """A mode of `vdit.main`."""
    from vdit import main

    words = [*words]
    if name == "run" and words and not words[0].startswith("-"):
        words[0] = f"--config={words[0]}"
    if mine := [word for word in words if word.lstrip("-").partition("=")[0] == "mode"]:
        raise UserError(f"{mine[0]}: the command is the mode")
    return main.main(["vdit", f"--mode={name}", *words])


def call(words: Sequence[str]) -> int:
    """A command line, without the program's name; returns the exit status."""
    name, *rest = words or ("",)
    if name in HELP or (name == "help" and not rest):
        print(overview())
    elif name in ("--version", "version"):
        print(vdit.__version__)
    elif name not in COMMANDS:
        near = command.nearest(name, COMMANDS)
        raise UserError(f"{name or 'no command'!r}: {near}; see vdit --help")
    elif any(word in HELP for word in rest):
        print(usage(name))
    elif name in ("doctor", "completion"):
        if rest:
            raise UserError(f"{rest[0]!r}: vdit {name} takes no arguments")
        print(completion()) if name == "completion" else _doctor()
    else:
        return (tool if COMMANDS[name].tool else mode)(name, rest)
    return 0


def _doctor() -> None:
    from vdit import doctor

    doctor.report()


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status."""
    try:
        return call(sys.argv[1:] if argv is None else argv)
    except EXPECTED as error:
        return command.failed(error)
    except KeyboardInterrupt:
        return command.stopped()
    except BrokenPipeError:  # a reader such as head has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def script() -> None:
    """The console script."""
    command.leave(main())
