"""config.classify: the ViViT classifier."""

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.config.classes import CLASSES, read_names
from vdit.config.run import machine
from vdit.data import sources
from vdit.models.vivit import ViViT, preset
from vdit.nn.linear import ACTIVATIONS


def fields() -> ConfigDict:
    """config.classify."""
    classify = ConfigDict()
    # SIZE/TUBELET. SIZE: nano, S, B, L, H or WIDTHxDEPTHxHEADS; TUBELET: SIDExFRAMES, as 16x2
    classify.preset = "nano/8x4"
    # joint, factorised_encoder, factorised_self_attention or factorised_dot_product
    classify.model = "joint"
    classify.pool = "token"  # input of the head: class token (token) or mean of all tokens (mean)
    classify.samples = 0  # frames sampled uniformly, for tubelets of one frame; 0: all frames
    classify.activation = "gelu"  # gelu (tanh approximation), gelu_erf, silu or relu2
    classify.mlp_ratio = 4.0  # hidden width of the MLPs, in units of the width
    classify.epsilon = 1e-6  # of the norms
    classify.classes = 0  # classes of an imported head (classes.json); 0: classify.questions
    classify.questions = ("motion", "impacts")  # what to classify; also shape, colour and size
    classify.smoothing = 0.1  # label smoothing
    classify.heldout = 512  # held-out clips for the accuracy
    classify.train = shared.training(steps=600, batch=32, learning_rate=0.02)
    return classify


def check(config: ConfigDict) -> None:
    """Checks the network, its training and, if it is trained, its questions."""
    classify = config.classify
    shared.check_names(config, {"classify.activation": ACTIVATIONS})
    preset(classify.preset)
    shared.check_training(config, "classify")
    shared.check_positive(config, "classify.heldout")
    if "classify" not in config.stages:
        return
    names = tuple(classify.questions)
    if not names or len(set(names)) < len(names):
        raise shared.refusal(config, "classify.questions", "different names, at least one")
    if not 0.0 <= classify.smoothing < 1.0:
        raise shared.refusal(config, "classify.smoothing", "0 to less than 1 is allowed")


SECTION = shared.Section(fields, check, free=("heldout", *shared.FREE_OF_TRAINING))


def answer_counts(config: ConfigDict) -> dict[str, int]:
    """The classifier's questions, with the number of answers to each."""
    if config.classify.classes:
        return {"class": config.classify.classes}
    known = sources.questions(config)
    return {
        name: len(shared.choose(known, "classify.questions", name).classes)
        for name in config.classify.questions
    }


def answer_names(config: ConfigDict, workdir: Path) -> dict[str, list[str]]:
    """The questions of a workdir's classifier, with the names of the answers."""
    if config.classify.classes:
        return {"class": read_names(config.classify.classes, workdir / CLASSES)}
    known = sources.questions(config)
    return {name: list(known[name].classes) for name in answer_counts(config)}


def build_classifier(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> ViViT:
    """The ViViT with one head for all questions, on one device or on a mesh."""
    names = ("model", "pool", "activation", "mlp_ratio", "epsilon", "samples")
    return ViViT(
        sum(answer_counts(config).values()),
        **preset(config.classify.preset),
        **{name: config.classify[name] for name in names},
        remat=config.run.remat,
        **machine(config, mesh, platform)._asdict(),
    )
