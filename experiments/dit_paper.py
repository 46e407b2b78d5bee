"""The DiT of Peebles and Xie 2023, with Latte's blocks over space and time in turn.

python -m vdit.main --config=experiments/dit_paper.py             motion classes
python -m vdit.main --config=experiments/dit_paper.py:text        captions
python -m vdit.main --config=experiments/dit_paper.py:image       single frames, colour classes
python -m vdit.main --config=experiments/dit_paper.py:smoke       all stages, no quality

The paper's other conditionings are the variants in_context, cross_attention and adaln. Variants
combine, as in image+adaln+smoke. A prompt is the name or number of a class:
--mode=sample --workdir=runs/dit_paper --prompt=falls.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError
from vdit.published.dit import THETA
from vdit.worlds.bodies.source import QUESTIONS


def ask(config: ConfigDict, label: str) -> None:
    """Classes of clips with one body: the answers to one question about it."""
    config.data.label = label
    config.data.objects = (1, 1)
    config.dit.paper.classes = len(QUESTIONS[label].classes)
    config.text.encoder = "none"


def image(config: ConfigDict) -> None:
    """Single frames, with a network that diffusers also has (`tools.export_weights`)."""
    ask(config, "colour")
    config.dit.paper.level_theta = THETA
    if config.dit.preset == "nano":
        config.dit.preset = "128x4x4"  # with the paper's activation
    config.data.frames = 1
    config.vae.patch = (1, 8, 8)
    config.dit.axes = "joint"


def text(config: ConfigDict) -> None:
    """Captions in place of classes, by cross-attention in the blocks over space."""
    config.data.label = ""
    config.data.objects = (1, 2)
    config.dit.paper.classes = 0
    config.dit.paper.text = True
    config.text.encoder = "learned"


def in_context(config: ConfigDict) -> None:
    """Timestep and class as two more tokens, so attention has to be joint."""
    config.dit.paper.conditioning = "in_context"
    config.dit.axes = "joint"


def cross_attention(config: ConfigDict) -> None:
    """Timestep and class as two tokens for cross-attention in every block."""
    config.dit.paper.conditioning = "cross_attention"


def adaln(config: ConfigDict) -> None:
    """Adaptive layer norm without gates."""
    config.dit.paper.conditioning = "adaln"


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "image": image, "text": text, "in_context": in_context, "cross_attention": cross_attention,
    "adaln": adaln,
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment with the paper's network, process and learned variance."""
    names = variant.split("+") if variant else []
    if unknown := [name for name in names if name not in (*VARIANTS, "smoke")]:
        known = sorted([*VARIANTS, "smoke"])
        raise UserError(f"experiments/dit_paper.py:{unknown[0]}: known variants are {known}")
    config = base.get_config("smoke" if "smoke" in names else "")
    base.ddpm(config)
    config.dit.model = "paper"
    config.dit.auxiliary = ()
    config.dit.axes = "factorised"
    config.dit.learned_variance = True
    config.dit.train.accumulate = 1
    for name in config.dit.given:
        config.dit.given[name] = float(name == "text")
    config.sample.variance = "learned"
    config.sample.steps = 3 if "smoke" in names else 100
    ask(config, "motion")
    for name in names:
        VARIANTS.get(name, lambda config: None)(config)
    if "smoke" in names:
        config.sample.clips, config.eval.captions = 4, 8
    return config
