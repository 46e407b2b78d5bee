"""config.classify: the ViViT classifier."""

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.config.classes import CLASSES, read_names
from vdit.config.run import machine
from vdit.data import sources
from vdit.errors import UserError
from vdit.models.vivit import ViViT, preset
from vdit.nn.linear import ACTIVATIONS


def fields() -> ConfigDict:
    """config.classify."""
    classify = ConfigDict()
    # SIZE/TUBELET: nano, S, B, L, H or WIDTHxDEPTHxHEADS; side x frames, as 16x2
    classify.preset = "nano/8x4"
    classify.model = "joint"  # or factorised_: encoder, self_attention, dot_product
    classify.pool = "token"  # what the head reads: token or mean
    classify.samples = 0  # 0: tubelets; else so many frames, sampled uniformly (tubelets of x1)
    classify.activation = "gelu"  # gelu (by tanh), gelu_erf, silu or relu2
    classify.mlp_ratio = 4.0
    classify.epsilon = 1e-6  # of the norms
    classify.classes = 0  # of an imported head (classes.json names them); 0: the questions' answers
    classify.questions = ("motion", "impacts")  # also shape, colour and size
    classify.smoothing = 0.1  # share of the target that is spread over all answers
    classify.heldout = 512  # clips that the accuracy is of
    classify.train = shared.training(steps=600, batch=32, learning_rate=0.02)
    return classify


def check(config: ConfigDict) -> None:
    """Refuses unknown names and numbers out of range."""
    classify = config.classify
    shared.check_names(config, {"classify.activation": ACTIVATIONS})
    preset(classify.preset)
    shared.check_training(config, "classify")
    shared.check_positive(config, "classify.heldout")
    if "classify" not in config.stages:
        return
    names = tuple(classify.questions)
    if not names or len(set(names)) < len(names):
        raise UserError(f"classify.questions is {names}: different names, at least one")
    if not 0.0 <= classify.smoothing < 1.0:
        raise UserError(f"classify.smoothing is {classify.smoothing}: 0 to less than 1 is allowed")


SECTION = shared.Section(fields, check, free=("heldout", *shared.FREE_OF_TRAINING))


def answer_counts(config: ConfigDict) -> dict[str, int]:
    """What the classifier is asked, and how many answers there are to each."""
    if config.classify.classes:
        return {"class": config.classify.classes}
    known = sources.questions(config)
    return {
        name: len(shared.choose(known, "classify.questions", name).classes)
        for name in config.classify.questions
    }


def answer_names(config: ConfigDict, workdir: Path) -> dict[str, list[str]]:
    """The names of the answers to each question of the classifier in a workdir."""
    if config.classify.classes:
        return {"class": read_names(config.classify.classes, workdir / CLASSES)}
    known = sources.questions(config)
    return {name: list(known[name].classes) for name in answer_counts(config)}


def build_classifier(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> ViViT:
    """The ViViT that answers all questions by one head, for one device or for steps on a mesh."""
    names = ("model", "pool", "activation", "mlp_ratio", "epsilon", "samples")
    return ViViT(
        sum(answer_counts(config).values()),
        **preset(config.classify.preset),
        **{name: config.classify[name] for name in names},
        remat=config.run.remat,
        **machine(config, mesh, platform)._asdict(),
    )
