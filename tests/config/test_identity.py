"""A workdir's identity: digests of fields, and config.json with its version."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.base import get_config
from vdit import stages
from vdit.config import default
from vdit.config.identity import (
    VERSION,
    differences,
    read_config,
    stage_fields,
    stored_fields,
    write_config,
)
from vdit.config.joined import SECTIONS
from vdit.errors import UserError
from vdit.report import write_report
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Runtime


def test_a_field_at_its_default_is_in_no_digest() -> None:
    """So that a new field leaves the workdirs alone that were trained before it."""
    config = default()
    assert all(stage_fields(config, stage) == {} for stage in ("vae", "latents", "dit", "classify"))
    config.vae.window, config.dit.unet.widths = 3, (16, 16)
    assert stage_fields(config, "vae") == {"vae.window": 3}
    assert stage_fields(config, "dit") == {"vae.window": 3, "dit.unet.widths": [16, 16]}
    assert stage_fields(config, "classify") == {}
    assert differences(stage_fields(config, "vae"), {}) == "vae.window was 3, now 4"


def test_a_section_s_free_fields_are_in_no_digest() -> None:
    config = default()
    for name, section in SECTIONS.items():
        for field in section.free:
            *above, last = f"{name}.{field}".split(".")
            part = config
            for step in above:
                part = part[step]
            more = {str: "x", tuple: ("x",)}.get(type(part[last]), 1)
            part[last] = part[last] + more
    config.vae.train.schedule = config.dit.train.schedule = "constant"
    assert all(stage_fields(config, stage) == {} for stage in ("vae", "latents", "dit", "classify"))


def test_a_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = get_config("smoke")
    config.data.shapes = ((17, 32, 32, 10.0), (1, 32, 32, 10.0))
    write_config(config, tmp_path)
    assert read_config(tmp_path).to_dict() == config.to_dict()
    saved = json.loads(json.dumps(stage_fields(config, "dit")))
    config.dit.pack = (1, 2, 3)
    changed = differences(saved, stage_fields(config, "dit"))
    assert changed == "dit.pack was [0, 0, 0], now [1, 2, 3]"
    assert "version" not in config and "version" not in stored_fields(tmp_path)


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION + 1, "2"])
def test_another_version_is_refused_in_one_line(version: object, tmp_path: Path) -> None:
    write_config(default(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if version is None:
        del saved["version"]
    else:
        saved["version"] = version
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with Metrics(tmp_path) as metrics, Preemption() as preemption:
        mesh = make_mesh({"data": -1})
        runtime = Runtime(tmp_path, mesh, metrics, preemption, default().run)
        for refuse in (
            lambda: read_config(tmp_path),
            lambda: stages.refuse_other(default(), "vae", runtime),
            lambda: write_report(tmp_path),
        ):
            with pytest.raises(UserError, match="another version of vdit.*another --workdir") as e:
                refuse()
            assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"), [("{half", "is not JSON"), ("[]", "an object"), ("", "is not JSON")]
)
def test_a_damaged_configuration_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)
    assert stored_fields(tmp_path, lenient=True) == {}
    with pytest.raises(UserError, match="is .* a vdit workdir"):
        read_config(tmp_path / "none")


def test_no_user_sets_the_version() -> None:
    with pytest.raises((AttributeError, KeyError)):
        default().update_from_flattened_dict({"version": 3})


def test_config_json_is_read_without_jax() -> None:
    code = "import sys, vdit.config.identity, vdit.report; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
