"""The command: `python -m vdit.main --config=FILE[:ARG] [--workdir=DIR] [--config.field=value]`.

--mode=run walks the config's stages, --mode=sample makes videos from a trained workdir, --mode=eval
scores it, --mode=features says what a classifier sees in videos. What a user gave wrong is one line
and exit status 2; a run that a signal stopped exits with 143 and the same command goes on; a loss
that is not finite exits with 1, and so does a run of several processes (docs/pods.md) of which one
is gone or stuck.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vdit.config import STAGES, default
from vdit.errors import UserError
from vdit.runtime.processes import (
    Told,
    Watch,
    check,
    connect,
    disconnect,
    supervised,
    together,
    told,
    zero_alone,
    zero_first,
)

FLAGS = flags.FLAGS
MODES = ("run", "sample", "eval", "features")

CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/NAME.py[:ARGUMENT]")
_WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written (runs/NAME)")
_MODE = flags.DEFINE_string("mode", "run", f"one of {', '.join(MODES)}")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "sample: a caption; may be given again")
_SECONDS = flags.DEFINE_float("seconds", None, "sample: length of the video")
_FPS = flags.DEFINE_float("fps", None, "sample: frames a second")
_SIZE = flags.DEFINE_string("size", None, "sample: HEIGHTxWIDTH in pixels")
_NUM = flags.DEFINE_integer("num", 1, "sample: videos a prompt")
_SEED = flags.DEFINE_integer("seed", 0, "sample: seed of the first video")
_GIVEN = flags.DEFINE_multi_string("given", [], "sample: FILE@SECONDS, frames that it must contain")
_SHOTS = flags.DEFINE_string("shots", None, "sample: JSON file, captions with the times they start")
_VIDEO = flags.DEFINE_multi_string("video", [], "features: a video's file; may be given again")
_OUT = flags.DEFINE_string(
    "out", None, "sample, features: folder for what is made (WORKDIR/samples, WORKDIR/features)"
)
# Of several processes, where JAX does not find them itself (a TPU pod, Slurm, Open MPI).
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 listens")
_PROCESSES = flags.DEFINE_integer("processes", None, "how many; 1: alone, whatever JAX finds")
_PROCESS = flags.DEFINE_integer("process", None, "which this is, from 0")


def workdir_of(config_path: str | None) -> Path:
    """The workdir of the flags, or runs/NAME[-ARGUMENT] after the config's file."""
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    if config_path is None:
        raise UserError("give --workdir=DIR, or --config=FILE for runs/NAME")
    file, _, argument = config_path.partition(":")
    return Path("runs") / "-".join(filter(None, [Path(file).stem, argument]))


def write_config(config: ConfigDict, workdir: Path) -> None:
    """config.json: every field, overrides included."""
    from vdit.runtime.files import write_text

    write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")


def run(config: ConfigDict, workdir: Path, watch: Watch | None = None) -> None:
    """Walks the stages; a finished one is skipped, an interrupted one goes on where it stopped."""
    import jax

    from vdit import build, checks, report, stages
    from vdit.runtime.files import alone, appears
    from vdit.runtime.machine import operand_dtype
    from vdit.runtime.mesh import make_mesh
    from vdit.runtime.metrics import Metrics, environment
    from vdit.runtime.preemption import Preemption
    from vdit.runtime.progress import clock, say
    from vdit.train import Interrupted, Runtime

    checks.check(config)
    build.look_through_text(config)
    mesh = make_mesh(dict(config.mesh))
    checks.check_mesh(config, mesh.shape)
    began = time.monotonic()
    zero = jax.process_index() == 0
    held = alone(workdir) if zero else contextlib.nullcontext()
    with held, Preemption() as preemption, Metrics(workdir, zero) as metrics:
        runtime = Runtime(workdir, mesh, metrics, preemption, config.run, watch or Watch())
        for stage in ("vae", "dit", "classify"):
            stages.refuse_other(config, stage, runtime)
        if stages.reads_clips(config):
            with zero_first("clips"):
                build.source(config, "train", workdir)  # what it refuses leaves no configuration
        with zero_first("config"):
            if zero:
                write_config(config, workdir)
            elif not appears(workdir / "config.json"):
                raise UserError(
                    f"{workdir} of process {jax.process_index()} is not that of process 0: the"
                    " workdir must be a folder that all processes share"
                )
        operands = jax.numpy.dtype(operand_dtype(config.run.dtype)).name
        devices = f"{mesh.size} {jax.devices()[0].platform}, {operands} operands"
        if jax.process_count() > 1:
            devices += f", {jax.process_count()} processes"
        say(f"{workdir}: {', '.join(config.stages)} on {devices}")
        machine = environment() | {"operands": operands}
        metrics.write("run", 0, machine)
        results: dict[str, Any] = {}
        for stage in config.stages:
            started = time.monotonic()
            if preemption.reached(0):
                raise Interrupted(f"stopped before stage {stage}; run again")
            WALKS[stage](config, runtime, results)
            seconds = time.monotonic() - started
            say(f"{stage}: done in {clock(seconds)}")
        metrics.write("run", 0, machine | {"seconds": time.monotonic() - began})
    if zero:
        say(f"all done in {clock(time.monotonic() - began)}: open {report.write_report(workdir)}")


def _vae(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit import stages

    results["vae"] = stages.train_vae(config, runtime)


def _latents(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit import stages

    if "vae" not in results:
        results["vae"] = stages.train_vae(config, runtime)
    results["latents"] = stages.cache_latents(config, runtime, results["vae"])


def _dit(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit import stages

    if "latents" not in results:
        _latents(config, runtime, results)
    stages.train_dit(config, runtime, results["latents"])


def loaded(config: ConfigDict, workdir: Path, mesh: Any, watch: Watch) -> Any:
    """A trained workdir: on the mesh, where it is of several processes or splits what one sample
    needs; else as is fastest."""
    import jax

    from vdit.sample import load

    split = mesh is not None and mesh.size > mesh.shape["data"]
    more = (mesh, watch) if split or jax.process_count() > 1 else ()
    return load(workdir, config, *more)


def _sample(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit import show

    model = results["model"] = loaded(config, runtime.workdir, runtime.mesh, runtime.watch)
    show.sample_stage(model, runtime.workdir, runtime.metrics)


def _eval(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit.evaluate import evaluate

    model = results.get("model") or loaded(
        config, runtime.workdir, runtime.mesh, runtime.watch
    )
    evaluate(model, runtime.workdir, runtime.metrics)


def _classify(config: ConfigDict, runtime: Any, results: dict[str, Any]) -> None:
    from vdit import stages

    results["vivit"] = stages.train_classifier(config, runtime)


WALKS = dict(zip(STAGES, (_vae, _latents, _dit, _sample, _eval, _classify), strict=True))


def trained(workdir: Path, watch: Watch) -> Any:
    """The model of a workdir. The mesh is that of --config; without it several processes take that
    of the workdir's own configuration, and one process, which may be another machine, none."""
    import jax

    from vdit import checks
    from vdit.runtime.mesh import make_mesh
    from vdit.sample import read_config

    config, mesh = read_config(workdir), None
    if CONFIG.value or jax.process_count() > 1:
        mesh = make_mesh(dict((CONFIG.value or config).mesh))
        checks.check_mesh(config, mesh.shape)
    return loaded(config, workdir, mesh, watch)


def sample(workdir: Path, watch: Watch) -> None:
    """--mode=sample."""
    from vdit import show

    if not _PROMPT.value and not _SHOTS.value:
        raise UserError('--mode=sample needs --prompt="what to show", or --shots=FILE')
    show.sample_request(
        trained(workdir, watch),
        Path(_OUT.value) if _OUT.value else workdir / "samples",
        prompts=_PROMPT.value or [""],
        seconds=_SECONDS.value,
        fps=_FPS.value,
        size=_SIZE.value,
        num=_NUM.value,
        seed=_SEED.value,
        given=_GIVEN.value,
        shots=_SHOTS.value,
    )


def evaluate(workdir: Path, watch: Watch) -> None:
    """--mode=eval."""
    import jax

    from vdit import classify, report
    from vdit.evaluate import evaluate as score
    from vdit.runtime.metrics import Metrics
    from vdit.runtime.progress import say
    from vdit.sample import read_config

    with Metrics(workdir, jax.process_index() == 0) as metrics:
        if read_config(workdir).stages == ("classify",):
            with zero_alone("classify") as zero:
                rows = [classify.evaluate(workdir, metrics)] if zero else []
        else:
            rows = score(trained(workdir, watch), workdir, metrics)
    for row in rows:
        say(json.dumps(row))
    with zero_alone("report") as zero:
        if zero:
            say(f"open {report.write_report(workdir)}")


def features(workdir: Path) -> None:
    """--mode=features, by one process."""
    from vdit import classify

    if not _VIDEO.value:
        raise UserError("--mode=features needs --video=FILE")
    out = Path(_OUT.value) if _OUT.value else workdir / "features"
    with zero_alone("features") as zero:
        if zero:
            classify.write_features(workdir, out, _VIDEO.value)


ASKED: dict[str, Callable[[Path, Watch], None]] = {
    "sample": sample, "eval": evaluate, "features": lambda workdir, watch: features(workdir),
}  # fmt: skip


def work(path: str | None, workdir: Path, who: Told | None) -> int:
    """What comes after the flags, in one process of several or the only one; its exit status."""
    import jax

    from vdit.runtime.machine import keep_freed_memory
    from vdit.train import Diverged, Interrupted

    config = default() if path is None else CONFIG.value
    if who is not None:
        connect(who, config.run.lost)
    check()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    stopped: Interrupted | None = None  # as all processes are, at the same step
    with Watch(workdir, config.run.lost, config.run.stuck) as watch:
        try:
            if _MODE.value == "run":
                run(config, workdir, watch)
            else:
                ASKED[_MODE.value](workdir, watch)
        except Interrupted as error:
            stopped = error
        except (UserError, Diverged) as error:
            watch.failed(error)
            raise
        except Exception as error:
            if isinstance(error, RuntimeError | ValueError | OSError):
                watch.wait()  # for it may come of another process's end: a collective that broke
            watch.failed(error)
            raise
        together("end")
    disconnect()
    if stopped is not None:
        raise stopped
    return 0


def parse(argv: Sequence[str]) -> str | None:
    """Reads the flags; returns the config's path as it was given."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is not None and not Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        rest = FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; flags are --name=value")
    if _MODE.value not in MODES:
        raise UserError(f"--mode={_MODE.value}: known are {', '.join(MODES)}")
    return path


def start(argv: Sequence[str]) -> int:
    """The whole program, but for errors."""
    if any(arg in ("--help", "-h", "--helpfull") for arg in argv):
        print(__doc__ + "\n" + FLAGS.module_help(sys.modules[__name__]))
        return 0
    path = parse(argv)
    workdir = workdir_of(path)
    if _MODE.value == "run" and path is None:
        raise UserError("give --config=experiments/base.py, or another experiment")
    who = told(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, os.environ)
    job = functools.partial(work, path, workdir, who)
    return job() if who is None else supervised(functools.partial(ended, job), workdir)


def ended(job: Callable[[], int]) -> int:
    """The exit status of `job`; what a user has to know of its end is one line."""
    try:
        return job()
    except UserError as error:
        print(f"vdit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from vdit.train import Diverged, Interrupted

        if not isinstance(error, Diverged | Interrupted):
            raise
        print(f"vdit: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 143


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns the exit status."""
    return ended(functools.partial(start, sys.argv if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
