"""The planner: exact bytes, FLOPs against hand counts, collectives it reads, wrong flags."""

import functools
import re
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from experiments import base, shots
from tools import plan
from tools.planning import gpus, wan
from tools.planning.chips import Topology, topology
from tools.planning.compiler import devices_of
from tools.planning.estimate import (
    Options,
    abstract_mesh,
    device_bytes,
    estimate,
    insides,
    model_of,
    nbytes,
)
from tools.planning.hlo import collectives, kernels
from tools.planning.step import lower_sampling, lower_training, training
from vdit.initial import denoiser_shapes
from vdit.runtime.mesh import make_mesh, mesh_sizes
from vdit.runtime.products import flops
from vdit.train import init_state

MESH = {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
HLO = """
%body (p: f32[8]) -> f32[8] {
  %g = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}
%cond (p: f32[8]) -> pred[] {
  %c = s32[] constant(5)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%cond, body=%body
  %r = f32[16]{0} all-reduce(%w), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %a = f32[8]{0} all-to-all(%r), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
}
"""


def test_collectives_are_read_with_their_loops_and_axes() -> None:
    rows = {(row.kind, row.axes): row for row in collectives(HLO, MESH)}
    gather = rows["all-gather", "fsdp"]
    assert gather.times == 5 and gather.sent == 5 * 32 * 3 / 4 and gather.reason
    assert rows["all-reduce", "data"].sent == 2 * 64 / 2
    assert rows["all-to-all", "fsdp"].reason == ""


def test_what_guidance_sends_is_explained_in_sampling_alone() -> None:
    line = "  ROOT %a = f32[8]{0} collective-permute(%r), source_target_pairs={{0,4},{4,0}}"
    module = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    (trained,), (sampled,) = (collectives(module, MESH, mode) for mode in ("train", "sample"))
    assert trained.axes == sampled.axes == "data"
    assert not trained.reason and "predictions" in sampled.reason


def test_kernels_are_read_with_their_loops() -> None:
    splash = '  %splash_mha_fwd.3 = bf16[8] custom-call(%p), custom_call_target="tpu_custom_call"\n'
    cudnn = '  %c.1 = (f32[8], u8[0]) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"\n'
    text = HLO.replace("  %g = ", f"{splash}{cudnn}  %g = ").replace("  %w = ", f"{splash}  %w = ")
    assert kernels(text) == {"splash_mha_fwd": 6, "__cudnn$fmhaSoftmax": 5}


def test_of_branches_the_costliest_is_counted_once() -> None:
    """As of attention, which goes row by row on a CPU and at once elsewhere."""
    x = jnp.zeros((3, 4, 4))

    def once(x: jax.Array) -> jax.Array:
        return x @ x

    def rows(x: jax.Array) -> jax.Array:
        return jax.lax.map(once, x)

    def either(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, cpu=rows, default=once)

    def some(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, once, lambda x: once(once(x)), x)

    counted = [flops(jax.make_jaxpr(run)(x).jaxpr) for run in (once, rows, either, some)]
    assert counted == [3 * 2 * 4**3] * 3 + [2 * 3 * 2 * 4**3]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--topology=v9:2x2",), "KIND:AxB"),
        (("--topology=h300:8",), "l4, rtx4090"),
        (
            ("--topology=h100:12",),
            "several hosts are h100:HOSTSxDEVICES, as h100:4x8",
        ),
        (("--topology=h100:2x2x8",), "a host has 1, 2, 4, 8 GPUs"),
        (("--topology=l4:8", "--config.run.attention=splash"), "needs a tpu, this machine has gpu"),
        (("--topology=v5e:2x2x2",), "v5e has 2 dimensions"),
        (("--topology=v5e:2x2", "--mesh=fsdp:3"), "multiply to 3, but there are 4"),
        (("--topology=v5e:2x2", "--mesh=model:4"), "AXIS:SIZE"),
        (("--topology=v5e:5x5", "--mesh=data:25"), "must be a multiple of the 25 data shards"),
        (("--topology=v5e:4x8", "--mesh=tensor:32"), "16 heads"),
        (("--topology=v5e:2x2", "--config.dit.train.bach=4"), "is batch meant?"),
        (("--topology=v5e:2x2", "--config.dit.train.batch=few"), "is a int"),
        (("--topology=v5e:2x2", "--mash=fsdp:4"), "flags of --help"),
        (("--topology=v5e:4x4", "--mode=sample", "--mesh=fsdp:32"), "multiply to 32"),
        (
            ("--topology=v5e:4x8", "--mode=sample", "--mesh=fsdp:32"),
            "must divide its 16 rows (two for a guided video)",
        ),
    ],
)
def test_wrong_input_is_one_line(
    flags: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config=experiments/xl.py", "--fast", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said


def test_shards_that_split_no_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Wan's rows are not padded: 21 x 30 x 52 tokens on 16 shards."""
    flags = ["--config=tools/planning/wan.py:1.3b-480p", "--topology=v5p:2x2x4", "--mode=sample"]
    assert plan.main([*flags, "--mesh=sequence:16", "--fast"]) == 2
    assert "must divide the 32,760 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, count",  # of the published files
    [("1.3b-480p", 1_418_996_800), ("14b-720p", 14_288_491_584), ("5b", 4_999_787_712)],
)
def test_published_sizes(name: str, count: int) -> None:
    shapes = denoiser_shapes(wan.get_config(name), 4096)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_an_mlp_s_width_is_its_own() -> None:
    """Wan's is no multiple of the width: what tensor splits counts it."""
    assert (8960,) in insides(wan.get_config("1.3b-480p"))


def test_links_of_hosts() -> None:
    """A ring sends a part between hosts, an all-to-all what is for other hosts; within one, links
    alone count, as everywhere on a TPU."""
    sizes = {"data": 2, "fsdp": 4, "tensor": 2, "sequence": 1}
    two, chip = topology("h100:2x8"), topology("h100:2x8").chip
    assert (two.devices, two.host, two.platform) == (16, 8, "gpu")
    for axes in ("fsdp", "tensor", "fsdp+tensor"):
        assert two.seconds("all-gather", axes, 9e9, sizes) == 9e9 / chip.ici
    assert two.seconds("all-reduce", "data", 9e9, sizes) == 9e9 / chip.network
    # Four of the eight on each host: a ring crosses once for four sends.
    ring = two.seconds("all-gather", "data+fsdp", 9e9, sizes)
    assert ring == max(9e9 / chip.ici, 9e9 / 4 / chip.network)
    crossed = two.seconds("all-to-all", "data+fsdp", 7e9, sizes)
    assert crossed == pytest.approx(4e9 / chip.network)
    slice_ = topology("v5p:2x2x4")
    assert slice_.seconds("all-to-all", "data", 7e9, sizes) == 7e9 / slice_.chip.ici


@pytest.mark.parametrize("kind", gpus.GPUS)
def test_a_target_is_what_the_table_says(kind: str) -> None:
    gpu = gpus.GPUS[kind]
    text = gpus.target(gpu)
    said = dict(re.findall(r"(\w+): ([\d.]+)", text))
    assert int(said["device_memory_size"]) == gpu.memory == topology(f"{kind}:1").chip.hbm
    assert float(said["memory_bandwidth"]) == gpu.memory_rate
    assert f'device_description_str: "{gpu.name}"' in text
    assert text.count("{") == text.count("}")
    # A multiprocessor's tensor cores, in products and sums a clock.
    assert 250 <= gpu.flops / gpu.cores / gpu.clock / 1e9 / 2 <= 2**12


def test_state_falls_with_the_chips() -> None:
    """The whole of XL's state, from 4 to 128: by 1/N within 5%, what is too small to split too."""
    made = training(plan.read_config("experiments/xl.py"), "dit", None, "tpu")
    begin = functools.partial(init_state, made.objective, made.options, seed=0)
    state, ema = jax.eval_shape(begin, made.batch)
    kept = {
        count: device_bytes(
            abstract_mesh(mesh_sizes({"fsdp": count}, count)), (state["params"], state["opt"], ema)
        )
        for count in (4, 32, 128)
    }
    for count, size in kept.items():
        assert 1.0 <= size * count / (kept[4] * 4) < 1.05


def test_what_the_search_finds_is_a_plan_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags give the same row again."""
    flags = ["--config=experiments/base.py:smoke", "--topology=v5e:2x2", "--fast", "--row"]
    flags.append("--mode=sample")
    assert plan.main(flags) == 0
    said = capsys.readouterr().out
    assert said.count("--mesh=") == 6 and said.rstrip().endswith("|")
    again = re.search(r"^dit on v5e:2x2, (.*)$", said, re.M)
    assert again and plan.main([*flags, *again[1].split()]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == said.rstrip().splitlines()[-1]


@pytest.mark.slow
def test_a_search_tries_remats_batches_and_parts() -> None:
    config = base.get_config("smoke")
    found = plan.search(config, "train", "dit", Topology("v5e", 4))
    for field in ("batch", "accumulate"):
        assert len({one.config.dit.train[field] for one in found}) > 2
    assert {one.config.run.remat for one in found} == {"none", "dots", "full"}
    per_sample = [one.made.seconds / one.config.dit.train.batch for one in found]
    assert per_sample[0] <= 1.02 * min(per_sample)


@pytest.mark.parametrize("experiment", [base, shots])
def test_the_steps_trace_from_shapes_alone(experiment: ModuleType) -> None:
    """What training and sampling compile, with the captions of one shot or of several."""
    config = experiment.get_config("smoke")
    mesh = make_mesh({}, jax.devices()[:1])
    for stage in ("vae", "dit"):
        assert "stablehlo" in lower_training(config, stage, mesh).as_text()
    assert "stablehlo" in lower_sampling(config, mesh).as_text()


def test_gpus_by_estimate_need_no_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of XL, whose attention would be cuDNN's."""
    flags = ["--config=experiments/xl.py", "--config.dit.preset=1152x2x16", "--topology=h100:2x8"]
    for mode in ("train", "sample"):
        assert plan.main([*flags, f"--mode={mode}", "--mesh=fsdp:16", "--fast", "--row"]) == 0
        assert "h100:2x8 | fsdp:16" in capsys.readouterr().out


def test_a_plan_of_adapters() -> None:
    """Their base is frozen: counted, split, without moments and gradients of its kernels."""
    config = base.get_config("smoke")
    whole = model_of(config, "dit")
    config.dit.auxiliary = ()
    config.dit.lora.rank, config.dit.lora.base_dtype = 4, "bfloat16"
    model = model_of(config, "dit")
    trained, kept = model.state[0]["params"], nbytes(model.frozen)
    assert trained.keys() == {"lora"} and nbytes(trained) < kept
    assert nbytes(model.frozen["dit"]) < nbytes(whole.state[0]["params"]["dit"])  # bfloat16
    assert nbytes(model.state[0]["opt"]) < nbytes(whole.state[0]["opt"]) / 2
    assert 2 / 3 * 0.9 < model.model_flops / whole.model_flops < 0.95
    sizes = mesh_sizes({"fsdp": 4}, 4)
    made = estimate(model, Options(8), sizes, Topology("v5e", 4))
    assert kept / 4 <= made.frozen < kept and made.params < made.frozen
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    assert "stablehlo" in lower_training(config, "dit", mesh).as_text()


def test_a_torus_is_cut_as_a_mesh_asks() -> None:
    """2 x 8 of 4 x 4 chips, which JAX refuses at first."""
    pytest.importorskip("libtpu")
    mesh = make_mesh({"fsdp": 2, "sequence": 8}, devices_of("v6e:4x4", Topology("v6e", 16)))
    assert mesh.shape["sequence"] == 8 and len({d.id for d in mesh.devices.flat}) == 16


@pytest.mark.parametrize(
    "where, words",
    [("v5e:2x2", "pip install libtpu"), ("h200:4", "pip install -e '.[plan-gpu]' (3 GB")],
)
def test_without_a_compiler_it_says_what_to_install(
    where: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--config=experiments/xl.py", f"--topology={where}", "--mesh=fsdp:4"]
    assert plan.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


def test_gpus_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The smoke experiment's step for two H200, compiled by JAX's CUDA plugin without a GPU."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    flags = ["--config=experiments/base.py:smoke", "--topology=h200:2", "--mesh=fsdp:2"]
    assert plan.main(flags) == 0
    said = capsys.readouterr().out
    assert "NVLink" in said and "FLAGGED" not in said
    assert re.search(r"all-gather +fsdp ", said)
