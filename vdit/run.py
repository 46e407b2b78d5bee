"""The modes of the program: run a configuration's stages; sample from a workdir, score it."""

import contextlib
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit import classify, evaluate, initial, report, shipped, show, stages
from vdit.config import joined
from vdit.config.identity import inherit, read_config, write_config
from vdit.config.text import look_through_text
from vdit.data import sources
from vdit.encode import check_captions
from vdit.errors import Interrupted, UserError
from vdit.runtime.checkpoint import Checkpoints, refuse_pattern
from vdit.runtime.files import alone, sweep
from vdit.runtime.machine import operand_dtype
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, environment
from vdit.runtime.preemption import Preemption
from vdit.runtime.processes import Watch, refuse_unshared, zero_alone, zero_first
from vdit.runtime.progress import clock, say
from vdit.sample import load
from vdit.serve import check_installed
from vdit.train import Runtime

Request = Mapping[str, Any]  # the flags of --mode=sample and --mode=features by name


def run(config: ConfigDict, workdir: Path, watch: Watch | None = None) -> None:
    """--mode=run: the stages in turn. A finished one is skipped, an interrupted one resumes."""
    refuse_pattern(workdir)
    inherit(config, workdir)
    joined.check(config)
    look_through_text(config)
    initial.check(config, workdir)
    mesh = make_mesh(dict(config.mesh))
    joined.check_mesh(config, mesh.shape)
    began = time.monotonic()
    zero = jax.process_index() == 0
    held = alone(workdir) if zero else contextlib.nullcontext()
    with held, Preemption() as preemption, Metrics(workdir, zero) as metrics:
        if zero:
            sweep(workdir)
        runtime = Runtime(workdir, mesh, metrics, preemption, config.run, watch or Watch())
        runtime = dataclasses.replace(runtime, content=_claim(config, runtime))
        machine = _machine(config, runtime)
        metrics.write("run", 0, machine)
        results: dict[str, Any] = {}
        started = time.monotonic()
        names = _with_needs(config.stages)
        for name in names:
            if name in config.stages and preemption.reached(0):
                raise Interrupted(f"stopped before stage {name}; run again")
            preemption.rest()
            stage = STAGES[name]
            needed = (results[stage.needs],) if stage.needs else ()
            result = stage.run(config, runtime, *needed)
            if name in [STAGES[other].needs for other in names]:  # else its memory is free again
                results[name] = result
            del result
            if name in config.stages:
                say(f"{name}: done in {clock(time.monotonic() - started)}")
                started = time.monotonic()
        metrics.write("run", 0, machine | {"seconds": time.monotonic() - began})
    if zero:
        say(f"all done in {clock(time.monotonic() - began)}: open {report.write_report(workdir)}")


def _claim(config: ConfigDict, runtime: Runtime) -> dict[str, str]:
    """Writes config.json, unless the workdir is another run's or the source refuses its options;
    returns the data set's identity."""
    workdir, zero = runtime.workdir, jax.process_index() == 0
    content: dict[str, str] = {}

    def refuse_other() -> None:
        for stage in ("vae", "dit", "low", "classify"):
            stages.refuse_other(config, stage, dataclasses.replace(runtime, content=content))

    refuse_other()  # before films are decoded
    if stages.reads_clips(config) or sources.has_files(config):
        with zero_first("clips"):
            clips = sources.source(config, "train", workdir)
            content = sources.identity(config, clips)
            refuse_other()
            if not {"latents", "dit", "low"}.isdisjoint(config.stages):
                check_captions(config, workdir, clips)
    with zero_first("config"):
        if zero:
            initial.take_tokenizer(config, workdir)
            write_config(config, workdir)
    refuse_unshared(workdir / "config.json")
    return content


def _machine(config: ConfigDict, runtime: Runtime) -> dict[str, str]:
    """Versions, device and operand dtype, for metrics.jsonl; prints the run's first line."""
    operands = jax.numpy.dtype(operand_dtype(config.run.dtype, runtime.mesh)).name
    devices = f"{runtime.mesh.size} {jax.devices()[0].platform}, {operands} operands"
    if jax.process_count() > 1:
        devices += f", {jax.process_count()} processes"
    say(f"{runtime.workdir}: {', '.join(config.stages)} on {devices}")
    return environment() | {"operands": operands}


def _loaded(
    config: ConfigDict, workdir: Path, mesh: Mesh | None, watch: Watch, lora: Sequence[str] = ()
) -> Any:
    """A trained model, on the mesh where that spans processes or splits one sample's work."""
    split = mesh is not None and mesh.size > mesh.shape["data"]
    if not split and jax.process_count() == 1:
        return load(workdir, config, lora=lora)
    return load(workdir, config, mesh, watch, lora)


def _trained(
    given: ConfigDict | None, workdir: Path, watch: Watch, lora: Sequence[str] = ()
) -> Any:
    """A workdir's model, with the adapters of files. The mesh is that of --config; without it
    several processes use that of the workdir's configuration, and one process, which may be another
    machine, none."""
    workdir = shipped.find(workdir)
    config, mesh = read_config(workdir), None
    if given is not None and given.data.source == config.data.source:  # which may have moved
        config.data.path = given.data.path or config.data.path
        config.data.mixture = given.data.mixture or config.data.mixture
    if given is not None or jax.process_count() > 1:
        mesh = make_mesh(dict((given or config).mesh))
        joined.check_mesh(config, mesh.shape)
    return _loaded(config, workdir, mesh, watch, lora)


def _refuse_other_data(config: ConfigDict, workdir: Path) -> None:
    """Refuses (UserError) to score on files other than those of the training: they are split
    anew, and what is held out of them may have been trained on."""
    meta = Checkpoints(workdir / "checkpoints" / "dit").newest_meta()
    if sources.has_files(config) and meta is not None:
        with zero_first("clips"):
            clips = sources.source(config, "train", workdir)
        stages.refuse_other_data(config, "dit", meta, sources.identity(config, clips))


def _model(config: ConfigDict, runtime: Runtime) -> Any:
    return _loaded(config, runtime.workdir, runtime.mesh, runtime.watch)


def _sample_stage(config: ConfigDict, runtime: Runtime, model: Any) -> None:
    show.sample_stage(model, runtime.workdir, runtime.metrics)


def _eval_stage(config: ConfigDict, runtime: Runtime, model: Any) -> None:
    evaluate.evaluate(model, runtime.workdir, runtime.metrics)


class Stage(NamedTuple):
    """One stage of a run: a function of (config, runtime) and of what another stage returns."""

    run: Callable[..., Any]
    needs: str = ""


STAGES = {
    "vae": Stage(stages.train_vae),
    "latents": Stage(stages.cache_latents, needs="vae"),
    "dit": Stage(stages.train_dit, needs="latents"),
    "low": Stage(stages.train_low, needs="latents"),
    "model": Stage(_model),  # the trained workdir, loaded; not listed in a configuration
    "sample": Stage(_sample_stage, needs="model"),
    "eval": Stage(_eval_stage, needs="model"),
    "classify": Stage(stages.train_classifier),
}


def _with_needs(names: Sequence[str]) -> list[str]:
    """Stage names, each after the one that it needs."""
    order: list[str] = []
    for name in names:
        need = STAGES[name].needs
        order += [n for n in (*_with_needs([need] if need else []), name) if n not in order]
    return order


def sample(given: ConfigDict | None, workdir: Path, watch: Watch, request: Request) -> None:
    """--mode=sample."""
    if not request["prompt"] and not request["shots"]:
        raise UserError('--mode=sample needs --prompt="what to show", or --shots=FILE')
    names = ("seconds", "fps", "size", "num", "seed", "given", "shots", "negative")
    out = shipped.outputs(workdir) if shipped.is_name(workdir) else workdir / "samples"
    show.sample_request(
        _trained(given, workdir, watch, request["lora"]),
        Path(request["out"] or out),
        prompts=request["prompt"] or [""],
        **{name: request[name] for name in names},
    )


def score(given: ConfigDict | None, workdir: Path, watch: Watch, request: Request) -> None:
    """--mode=eval; everything is written into --out, or into the workdir."""
    if request["lora"]:
        raise UserError("--lora is for --mode=sample; a workdir of adapters is scored with its own")
    out = Path(request["out"] or shipped.outputs(workdir))
    with Metrics(out, jax.process_index() == 0) as metrics:
        if read_config(shipped.find(workdir)).stages == ("classify",):
            with zero_alone("classify") as zero:
                rows = [classify.evaluate(workdir, metrics)] if zero else []
        else:
            model = _trained(given, workdir, watch)
            _refuse_other_data(model.config, workdir)
            rows = evaluate.evaluate(model, out, metrics)
    for row in rows:
        say(json.dumps(row))
    with zero_alone("report") as zero:
        if zero:
            say(f"open {report.write_report(out)}")


def features(given: ConfigDict | None, workdir: Path, watch: Watch, request: Request) -> None:
    """--mode=features, in one process."""
    if not request["video"]:
        raise UserError("--mode=features needs --video=FILE")
    out = Path(request["out"] or shipped.outputs(workdir) / "features")
    with zero_alone("features") as zero:
        if zero:
            classify.write_features(shipped.find(workdir), out, request["video"])


def serve(given: ConfigDict | None, workdir: Path, watch: Watch, request: Request) -> None:
    """--mode=serve, in one process."""
    check_installed()
    if jax.process_count() > 1:
        raise UserError("--mode=serve runs in one process")
    start: Any = importlib.import_module("vdit.serve.start")  # which needs the extra web
    load = functools.partial(_trained, given, workdir, watch)
    out = Path(request["out"] or shipped.outputs(workdir) / "served")
    start.serve(load, str(workdir), out, request)


MODES: dict[str, Callable[[ConfigDict | None, Path, Watch, Request], None]] = {
    "sample": sample, "eval": score, "features": features, "serve": serve
}  # fmt: skip
