"""Weights in the package: written from a workdir, taken for one everywhere, begun from."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_export_weights import same, trained

import vdit
from experiments import base
from tools import export_weights, import_weights, restore_checkpoint, ship
from vdit import initial, main, run, shipped
from vdit.config import default
from vdit.config.identity import USED, read_config
from vdit.errors import UserError
from vdit.loading import read_stage
from vdit.runtime.checkpoint import Checkpoints, load_meta, restore_ema
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics

HERE = Path(__file__).parents[1]
ONE = jax.devices()[0]
PROMPT = "--prompt=a small red ball falls"


def rounded(tree: Any) -> Any:
    """float32 numbers as bfloat16 keeps them."""
    return jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), tree)


def smoke() -> Any:
    """The smallest configuration of the default model."""
    config = base.get_config("smoke")
    config.data.frames, config.latents.batch = 5, 8
    return config


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """A workdir, the folder of weights in which it is "tiny", and its parameters by stage."""
    config, place = smoke(), tmp_path_factory.mktemp("ship")
    config.vae.adversarial_weight = 0.5  # whose discriminator stays behind
    config.dit.auxiliary = (("truth", 0.5),)  # and so do these heads
    made = trained(config, place / "work", "vae", "dit")
    with Metrics(place / "work") as metrics:
        metrics.write("dit", 3, {"loss": 1.0, "seconds": 61.2})
        metrics.write("eval", 3, {"split": "generated", "colour": 0.5})
    flags = [f"--workdir={place / 'work'}", "--name=tiny", f"--into={place / 'weights'}"]
    assert ship.main(flags) == 0
    yield place / "work", place / "weights", {stage: both["ema"] for stage, both in made.items()}


@pytest.fixture
def tiny(
    work: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The weights "tiny" in a package of the test's own; commands are given in an empty folder."""
    shutil.copytree(work[1], tmp_path / "package")
    monkeypatch.setattr(shipped, "ROOT", tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shipped._folder_wins.cache_clear()
    return tmp_path / "package" / "tiny"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """vdit.main with these flags."""

    def call(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vdit", *flags])
        try:
            return main.main()
        finally:
            main.FLAGS.unparse_flags()
            for name in [name for name in main.FLAGS if name.startswith("config.")]:
                delattr(main.FLAGS, name)  # defined by its use

    return call


def one_line(err: str) -> str:
    assert err.count("\n") == 1, err
    return err


def test_the_files_are_half_the_ema_and_a_card(work: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, made = work[1] / "tiny", work[2]
    for stage in ("vae", "dit"):
        on_disk = load_file(folder / f"{stage}.safetensors")
        assert {x.dtype.name for x in on_disk.values()} == {"bfloat16"}
        kept = {name: made[stage][name] for name in USED[stage]}
        same(read_stage(folder, stage).params, rounded(kept))
    about = json.loads((folder / "card.json").read_text())
    assert about["trained"]["seconds"] == {"dit": 61}
    assert about["scores"] == [{"split": "generated", "colour": 0.5}]
    count = sum(x.size for name in USED["dit"] for x in jax.tree.leaves(made["dit"][name]))
    assert about["parameters"]["dit"] == count
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_they_sample_like_the_workdir_with_rounded_weights(
    work: tuple[Path, Path, dict[str, Any]], tiny: Path
) -> None:
    whole, model = vdit.load(work[0]), vdit.load("tiny")
    np.testing.assert_array_equal(model.codec.statistics["std"], whole.codec.statistics["std"])
    assert model.config.to_dict() == whole.config.to_dict()
    for group in ("vae", "dit", "text"):
        whole.params[group] = rounded(whole.params[group])
    for ours, theirs in zip(
        model.generate("a red ball", num=2), whole.generate("a red ball", num=2), strict=True
    ):
        np.testing.assert_array_equal(ours.video, theirs.video)
        assert ours.settings == theirs.settings


def test_the_command_takes_the_name_and_writes_outside_of_the_package(
    tiny: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    tiny.chmod(0o555)
    assert command("--mode=sample", "--workdir=tiny", PROMPT) == 0
    assert Path("samples/tiny/a-small-red-ball-falls-0.mp4").is_file()
    assert command("--mode=sample", "--workdir=tiny", PROMPT, "--out=else") == 0
    assert Path("else/a-small-red-ball-falls-0.json").is_file()
    assert {path.name for path in Path().iterdir()} == {"samples", "else"}
    assert {path: path.read_bytes() for path in tiny.iterdir()} == before
    capsys.readouterr()
    assert command("--mode=sample", "--workdir=tinny", PROMPT) == 2
    assert "not in the package: tiny are" in one_line(capsys.readouterr().err)
    assert command(f"--config={HERE}/experiments/base.py:smoke", "--workdir=tiny") == 2
    assert "--config.init=tiny to begin from them" in one_line(capsys.readouterr().err)
    Path("tiny").mkdir()
    assert command("--mode=sample", "--workdir=tiny", PROMPT) == 2
    shown = capsys.readouterr()
    assert "tiny: the folder here is taken" in shown.out
    assert "tiny/config.json: No such file" in one_line(shown.err)


def test_eval_writes_into_a_folder_of_the_user(
    tiny: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(model: Any, out: Path, metrics: Metrics) -> list[dict[str, Any]]:
        metrics.write("eval", 1, {"split": "generated", "objects": "all", "clips": 1})
        return []

    monkeypatch.setattr(run.evaluate, "evaluate", scores)
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    assert command("--mode=eval", "--workdir=tiny") == 0
    assert Path("samples/tiny/report.html").is_file()
    assert command("--mode=eval", "--workdir=tiny", "--out=scores") == 0
    assert Path("scores/report.html").is_file()
    assert {path: path.read_bytes() for path in tiny.iterdir()} == before


def test_a_flipped_bit_is_one_line_that_names_the_file(tiny: Path) -> None:
    for path in sorted(tiny.iterdir()):
        good = path.read_bytes()
        for at in sorted({0, 9, len(good) // 3, len(good) // 2, len(good) - 2}):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            try:
                vdit.load("tiny")
            except UserError as error:
                line = str(error)
                assert line.startswith(f"{tiny}/") and "\n" not in line, (path, at, line)
                assert path.name in line or path.name == "digests.json", (at, line)
            else:  # what is no digest is read by nobody
                assert path.name == "digests.json", (path, at)
        path.write_bytes(good)
        path.unlink()
        with pytest.raises(UserError):
            vdit.load("tiny")
        path.write_bytes(good)
    vdit.load("tiny")


def test_tools_take_the_name(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = Path("out"), Path("again")
    assert export_weights.main(["--workdir=tiny", f"--out={out}", "--own"]) == 0
    assert import_weights.main([f"--source={out}", f"--workdir={again}"]) == 0
    for stage in ("vae", "dit"):
        same(restore_ema(again / "checkpoints" / stage, 0), read_stage(tiny, stage).params)
    assert export_weights.main(["--workdir=tiny", "--out=raw", "--own", "--raw"]) == 2
    assert "it has an EMA alone" in one_line(capsys.readouterr().err)
    assert restore_checkpoint.main(["verify", "tiny"]) == 0
    assert capsys.readouterr().out.count("good") == 2
    assert restore_checkpoint.main(["inspect", "tiny", "--stage=vae"]) == 0
    assert "vae/embed_latent/kernel" in capsys.readouterr().out
    assert restore_checkpoint.main(["copy", "tiny", "--to=new"]) == 2
    assert "tools.import_weights --source=" in one_line(capsys.readouterr().err)
    (tiny / "tokenizer.json").write_text("{}")
    assert restore_checkpoint.main(["verify", "tiny"]) == 1
    assert "tokenizer.json: 2 bytes" in capsys.readouterr().out


def test_what_is_not_shipped(
    work: tuple[Path, Path, dict[str, Any]], tiny: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = [f"--workdir={work[0]}", f"--into={tiny.parent}"]

    def refused(words: str, *more: str) -> None:
        there = sorted(tiny.parent.rglob("*"))
        assert ship.main([*flags, *more]) == 2
        assert words in one_line(capsys.readouterr().err)
        assert sorted(tiny.parent.rglob("*")) == there

    refused("already exists; --replace replaces it", "--name=tiny")
    refused("small letters", "--name=../tiny")
    refused("no trained stage vae", "--name=none", "--workdir=nowhere")
    monkeypatch.setattr(ship, "MOST", 2 * ship.size(tiny) - 1)
    refused("together are allowed", "--name=two")
    assert ship.main([*flags, "--name=tiny", "--replace"]) == 0
    capsys.readouterr()
    kept = [path.read_bytes() for path in sorted(tiny.iterdir())]
    again = [path.read_bytes() for path in sorted((work[1] / "tiny").iterdir())]
    assert kept == again  # remade from the workdir, to the byte


@pytest.mark.parametrize("name", shipped.names())
def test_all_weights_in_the_package_are_whole(name: str) -> None:
    shipped.verify(shipped.ROOT / name)
    stages = shipped.stages_of(shipped.ROOT / name)
    if "dit" in stages:
        assert vdit.load(name).config.dit.model in ("vdit", "paper", "unet", "wan")
    else:
        assert stages == ["vae"]
    assert shipped.card(name).keys() >= {"scores", "trained", "commit", "parameters"}


def test_all_weights_in_the_package_are_small() -> None:
    assert ship.size(shipped.ROOT) <= ship.MOST


# --------------------------------------------------------------------------------------------------
# config.init


def begun(init: str) -> Any:
    """One step of stage dit, so small that the weights stay where they began."""
    config = smoke()
    config.init, config.stages = init, ("vae", "latents", "dit")
    config.latents.clips, config.dit.train.steps, config.dit.train.warmup = 8, 1, 0
    config.dit.train.learning_rate = config.dit.train.adam_learning_rate = 1e-9
    return config


@pytest.mark.slow
def test_a_run_begins_from_weights(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(run, "make_mesh", lambda axes: one)
    config, out = begun("tiny"), Path("mine")
    config.seed = 5
    config.dit.auxiliary = (("truth", 0.5),)  # whose heads nobody shipped
    run.run(config, out)
    assert "dit: begins from the weights of tiny" in capsys.readouterr().out
    vae, dit = restore_ema(out / "checkpoints/vae", 12), restore_ema(out / "checkpoints/dit", 1)
    same(vae, read_stage(tiny, "vae").params)
    theirs = read_stage(tiny, "dit").params
    assert dit.keys() == theirs.keys() | {"auxiliary"}
    for name, group in theirs.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dit[name], group)
    kept = load_meta(out / "checkpoints/dit", 1)["latents"]
    assert kept == shipped.read_meta(tiny, "dit")["latents"]
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    shutil.rmtree(tiny)  # once it has begun, it goes on by itself
    run.run(config, out)
    assert initial.statistics(config, Checkpoints(out / "checkpoints/dit"))["mean"].shape == (8,)
    with pytest.raises(UserError, match="init was 'tiny', now ''"):
        config.init = ""
        run.run(config, out)


def test_an_autoencoder_alone_is_shipped_and_begun_with(
    tiny: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = smoke()
    made = trained(config, Path("alone"), "vae")
    flags = ["--workdir=alone", "--name=eyes", f"--into={tiny.parent}"]
    assert ship.main(flags) == 0
    assert shipped.card("eyes")["parameters"].keys() == {"vae"}
    config = begun("eyes")
    initial.check(config, Path("mine"))
    place = functools.partial(jax.tree.map, lambda _: jax.sharding.SingleDeviceSharding(ONE))
    step, groups = initial.begin(config, "vae")(place)
    assert step == 12
    same(groups, rounded(made["vae"]["ema"]))
    assert initial.begin(config, "dit")(place) == (0, {})
    assert "eyes has an autoencoder alone" in capsys.readouterr().out
    assert initial.statistics(config, Checkpoints(Path("mine/checkpoints/dit"))) is None
    assert command("--mode=sample", "--workdir=eyes", PROMPT) == 2
    assert "eyes has an autoencoder alone: --config.init=eyes trains" in one_line(
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"embed_latent/kernel is \(8, 32\) there, \(16, 32\)"):
        config.vae.channels = 16
        initial.check(config, Path("mine"))


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    tiny: Path, work: tuple[Path, Path, dict[str, Any]]
) -> None:
    def refused(words: str, **fields: Any) -> None:
        config = begun(str(fields.pop("init", "tiny")))
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        with pytest.raises(UserError, match=words):
            run.run(config, Path("mine"))
        assert not Path("mine").exists()

    refused("not in the package: tiny are", init="tinny")
    refused("nowhere/at/config.json: No such file", init="nowhere/at")
    refused(r"embed_latent/kernel is \(8, 32\) there, \(16, 32\) in this", vae__channels=16)
    refused("dit/.* in this run; the fields of config.dit", dit__preset="nano")
    refused("has text.encoder=learned, this run has minilm", text__encoder="minilm")
    refused("another workdir is allowed", stages=("classify",), data__objects=(1, 1))
    refused("vae/.*", init=work[0], vae__width=64)
    assert default().init == ""
    assert read_config(tiny).init == ""
