"""The DiT of Peebles and Xie 2023, with Latte's blocks over space and over time in turn.

python -m vdit.main --config=experiments/dit_paper.py                    clips by their motion
python -m vdit.main --config=experiments/dit_paper.py:text               by their captions
python -m vdit.main --config=experiments/dit_paper.py:image              pictures by their colour
python -m vdit.main --config=experiments/dit_paper.py:smoke              every stage, no quality

The paper's other conditionings are the variants in_context, cross_attention and adaln. A class is
asked for by its name or number: --mode=sample --workdir=runs/dit_paper --prompt=falls. Variants go
together, as image+adaln+smoke.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError
from vdit.published.dit import THETA
from vdit.worlds.bodies.questions import QUESTIONS


def ask(config: ConfigDict, label: str) -> None:
    """Clips of one body, and of it one question of the world."""
    config.data.label = label
    config.data.objects = (1, 1)
    config.dit.paper.classes = len(QUESTIONS[label].classes)
    config.text.encoder = "none"


def image(config: ConfigDict) -> None:
    """Single pictures, by a network that diffusers knows too (`tools.export_weights`)."""
    ask(config, "colour")
    config.dit.paper.level_theta = THETA
    if config.dit.preset == "nano":
        config.dit.preset = "128x4x4"  # with the paper's activation
    config.data.frames = 1
    config.vae.patch = (1, 8, 8)
    config.dit.axes = "joint"


def text(config: ConfigDict) -> None:
    """Captions in place of classes, attended to in the blocks over space."""
    config.data.label = ""
    config.data.objects = (1, 2)
    config.dit.paper.classes = 0
    config.dit.paper.text = True
    config.text.encoder = "learned"


def in_context(config: ConfigDict) -> None:
    """Time and class as two more tokens, which all blocks have to see: joint attention."""
    config.dit.paper.conditioning = "in_context"
    config.dit.axes = "joint"


def cross_attention(config: ConfigDict) -> None:
    """Time and class as two tokens that every block attends to."""
    config.dit.paper.conditioning = "cross_attention"


def adaln(config: ConfigDict) -> None:
    """Shifts and scales without gates."""
    config.dit.paper.conditioning = "adaln"


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "image": image, "text": text, "in_context": in_context, "cross_attention": cross_attention,
    "adaln": adaln,
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment with the paper's model, its process and its learned variance."""
    names = variant.split("+") if variant else []
    if unknown := [name for name in names if name not in (*VARIANTS, "smoke")]:
        known = sorted([*VARIANTS, "smoke"])
        raise UserError(f"experiments/dit_paper.py:{unknown[0]}: known variants are {known}")
    config = base.get_config("smoke" if "smoke" in names else "")
    base.ddpm(config)
    config.dit.model = "paper"
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
