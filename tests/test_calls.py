"""How many calls of vdit's own lie between a command and the work that it is for: five at most."""

import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vdit.model
from experiments.base import get_config
from tools.planning.step import training
from vdit import main, train
from vdit.config.text import build_text_encoder
from vdit.denoiser import Denoiser
from vdit.models.text import Tokenizer, learned_tokenizer
from vdit.sample import Model

PACKAGE = Path(main.__file__).parent


class Reached(Exception):
    """Raised in the place of the work."""


def reach(*arguments: Any, **options: Any) -> Any:
    raise Reached


def calls(error: BaseException, *apart: str) -> list[str]:
    """Functions of the package on the way to an error, but for those of the rooms `apart`."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = [PACKAGE / room for room in apart]
    return [
        frame.name
        for frame in frames
        if PACKAGE in Path(frame.filename).parents
        and not any(room in Path(frame.filename).parents for room in rooms)
    ]


def test_from_the_command_to_the_jitted_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "compiled_step", lambda *arguments: reach)
    monkeypatch.setattr(train, "products_of", lambda *arguments: 1)
    command = ["vdit", "--config=experiments/base.py:smoke", f"--workdir={tmp_path}"]
    with pytest.raises(Reached) as caught:
        try:
            main.main(command)
        finally:
            main.FLAGS.unparse_flags()
            for name in [name for name in main.FLAGS if name.startswith("config.")]:
                delattr(main.FLAGS, name)  # defined by its use
    assert calls(caught.value) == ["main", "work", "run", "train_vae", "fit"]  # and the step


def test_from_generate_to_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers and guidance, between the scan and the denoiser, know nothing else."""
    config = get_config("smoke")
    tokenizer = Tokenizer(learned_tokenizer(["a red ball falls"], 300), config.text.length)
    encoder = build_text_encoder(config, tokenizer)
    made = training(config, "dit", None)
    shapes = jax.eval_shape(made.objective.init, jax.random.key(0), made.batch)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    ids = np.zeros((1, tokenizer.length), np.int32)
    params["text"] = encoder.init(jax.random.key(0), ids, ids > 0)
    channels = config.vae.channels
    statistics = {"mean": np.zeros(channels), "std": np.ones(channels)}
    model = Model(config, tokenizer, encoder, params, statistics)
    monkeypatch.setattr(vdit.model, "operand_dtypes", lambda *arguments, **options: {})
    monkeypatch.setattr(Denoiser, "__call__", reach)
    with pytest.raises(Reached) as caught:
        model.generate("a red ball falls")
    found = calls(caught.value, "diffusion")
    assert found[0] == "generate"
    assert len(found) <= 5, found  # and the denoiser
