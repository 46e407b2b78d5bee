"""config.dit.lora: low-rank adapters of another workdir's denoiser, in place of a training."""

import re
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.errors import UserError

BASE_DTYPES: dict[str, Any] = {"stored": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


def fields() -> ConfigDict:
    """config.dit.lora."""
    lora = ConfigDict()
    lora.rank = 0  # of the adapters; 0: none, the denoiser itself is trained
    lora.base = ""  # workdir of the frozen autoencoder, denoiser and text encoder
    lora.alpha = 0.0  # updates are scaled by alpha / rank; 0: by 1
    lora.dropout = 0.0  # share of an adapter's input features that a step leaves out
    # Regex of the kernels that have adapters, here those of attention
    lora.paths = r"^dit/(.*/)?(q|k|v|o)/kernel$"
    # Of the frozen kernels: as in the base's checkpoint, bfloat16, or int8 in the blocks
    lora.base_dtype = "stored"
    return lora


def check(config: ConfigDict) -> None:
    """Checks the numbers, and that the base is a workdir of the same networks."""
    lora, usual = config.dit.lora, fields()
    shared.check_names(config, {"dit.lora.base_dtype": BASE_DTYPES})
    if lora.rank < 0 or lora.alpha < 0:
        raise shared.refusal(config, "dit.lora.rank dit.lora.alpha", "0 or more are allowed")
    if not lora.rank:
        if changed := [name for name in lora if lora[name] != usual[name]]:
            fields_ = f"dit.lora.{changed[0]} dit.lora.rank"
            raise shared.refusal(config, fields_, "a rank above 0 is needed")
        return
    if not 0 <= lora.dropout < 1:
        raise shared.refusal(config, "dit.lora.dropout", "0 to less than 1 is allowed")
    try:
        re.compile(lora.paths)
    except re.error as error:
        raise UserError(f"dit.lora.paths is {lora.paths!r}: no regex ({error})") from error
    if tuple(config.dit.auxiliary) not in ((), ("auto",)):
        raise shared.refusal(config, "dit.auxiliary dit.lora.rank", "none is allowed with adapters")
    if not lora.base:
        raise shared.refusal(config, "dit.lora.rank dit.lora.base", "a trained workdir is needed")
