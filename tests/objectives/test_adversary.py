"""The autoencoder against a discriminator: PyTorch's numbers, two groups apart, resume, at use."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stopping import StopAt

from experiments.base import get_config
from tools.golden.adversary import CASES, LEVELS, WIDTH, weights
from vdit import stages
from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.data.loader import batches
from vdit.errors import UserError
from vdit.models.discriminator import Discriminator
from vdit.models.vae import VAE
from vdit.nn.patch import to_float
from vdit.objectives.objective import sample_keys
from vdit.objectives.vae import Adversary, adaptive_weight, fool, hinge, replaced, vae_objective
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Interrupted, Runtime, fit, optimizers

GOLDEN = Path(__file__).parents[1] / "golden" / "adversary.npz"
WEIGHT, START = 0.7, 4


def close(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", range(len(CASES)))
def test_losses_and_the_adaptive_weight_are_those_of_torch(case: int) -> None:
    expected = np.load(GOLDEN)
    names = ("real", "made", "features", "kernel")
    real, made, features, kernel = (jnp.asarray(expected[f"{case}/{name}"]) for name in names)

    @jax.jit
    def run(made: jax.Array) -> dict[str, jax.Array]:
        def judge(video: jax.Array) -> jax.Array:
            logits: Any = Discriminator(WIDTH, LEVELS).apply({"params": weights()}, video)
            return logits

        _, to_last = jax.vjp(lambda kernel: features @ kernel, kernel)
        to_made = jax.grad(lambda x: fool(judge(x)).mean())(made)
        to_error = jax.grad(lambda x: jnp.square(x - real).mean())(made)
        return {
            "logits": judge(real), "hinge": hinge(judge(real), judge(made)),
            "fool": fool(judge(made)), "to_made": to_made,
            "adaptive": adaptive_weight(to_last, to_error, to_made),
        }  # fmt: skip

    for name, found in run(made).items():
        close(found, expected[f"{case}/{name}"])


@functools.cache
def parts() -> tuple[VAE, Discriminator, Any, Any]:
    model = VAE((2, 4, 4), channels=3, width=16, encoder_depth=1, decoder_depth=1, heads=2)
    judge = Discriminator(8, 2)
    objective = vae_objective(model, 0.1, 0.5, adversary=Adversary(judge, WEIGHT, START))
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (2, 3, 8, 8, 3)).astype(np.uint8)
    data = {"video": video, "ordinal": np.arange(START, START + 2, dtype=np.uint32)}
    return model, judge, objective, data


@functools.cache
def measured() -> tuple[Any, Any]:
    """Parameters; then, before the start and after it, gradients and metrics."""
    _, _, objective, data = parts()
    params = jax.jit(objective.init)(jax.random.key(0), data)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params: Any, data: Any) -> Any:
        loss, _, metrics = objective.loss(params, {}, data, jax.random.key(1))
        return loss, metrics

    early = data | {"ordinal": data["ordinal"] - START}
    return params, (gradient(params, early), gradient(params, data))


def alike(found: Any, wanted: Any) -> None:
    def leaf(a: Any, b: Any) -> None:
        assert np.linalg.norm(a - b) < 1e-4 * (np.linalg.norm(b) + 1e-6)

    jax.tree.map(leaf, found, wanted)


def test_each_loss_reaches_its_own_group_alone_and_the_weight_is_its_definition() -> None:
    model, judge, _, data = parts()
    params, (_, (gradient, metrics)) = measured()
    video = to_float(jnp.asarray(data["video"]))
    keys = sample_keys(jax.random.key(1), data["ordinal"])
    noise = jax.vmap(lambda k: jax.random.normal(k, model.latent_shape(3, 8, 8)))(keys)

    def make(vae: Any) -> Any:
        return model.apply({"params": vae}, video, noise)

    def error(vae: Any) -> jax.Array:
        apart = make(vae)[0] - video
        return (jnp.square(apart) + 0.5 * jnp.abs(apart)).mean()

    def fooled(vae: Any) -> jax.Array:
        return fool(judge.apply({"params": params["discriminator"]}, make(vae)[0])).mean()

    def kl(vae: Any) -> jax.Array:
        _, mean, log_variance = make(vae)
        return 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()

    def told(discriminator: Any) -> jax.Array:
        out = make(params["vae"])[0]
        return hinge(*(judge.apply({"params": discriminator}, x) for x in (video, out))).sum()

    apart, wrong, far = jax.jit(lambda vae: [jax.grad(loss)(vae) for loss in (error, fooled, kl)])(
        params["vae"]
    )
    norms = (np.linalg.norm(tree["pixels"]["kernel"]) for tree in (apart, wrong))
    adaptive = next(norms) / (next(norms) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive"], 2 * adaptive, rtol=1e-4)
    wanted = jax.tree.map(
        lambda a, b, c: 2 * (a + WEIGHT * adaptive * b + 0.1 * c), apart, wrong, far
    )
    alike(gradient["vae"], wanted)
    alike(gradient["discriminator"], jax.jit(jax.grad(told))(params["discriminator"]))


def test_nothing_of_it_counts_before_its_start() -> None:
    model, _, _, data = parts()
    params, ((gradient, _), _) = measured()
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient["discriminator"]))
    plain = vae_objective(model, 0.1, 0.5)
    early = data | {"ordinal": data["ordinal"] - START}
    wanted = jax.jit(
        jax.grad(lambda vae: plain.loss({"vae": vae}, {}, early, jax.random.key(1))[0])
    )(params["vae"])
    alike(gradient["vae"], wanted)


def config_of(kind: str = "vivit") -> Any:
    config = get_config("smoke")
    config.data.frames, config.data.size = 5, (16, 16)
    config.vae.model = kind
    config.vae.patch = (1 if kind == "kl" else 4, 8, 8)
    config.vae.multipliers, config.vae.blocks, config.vae.groups = (1, 1, 1, 1), 1, 8
    config.vae.width, config.vae.channels = 8, 2
    config.vae.adversarial_weight, config.vae.adversarial_start = 0.5, 2
    config.vae.adversarial_width, config.vae.adversarial_levels = 8, 2
    config.vae.train.batch, config.run.save_every, config.run.log_every = 2, 2, 2
    config.vae.train.steps, config.vae.train.warmup = 5, 1
    return config


@pytest.mark.parametrize("kind", ["vivit", "kl", "causal"])
def test_every_autoencoder_has_a_last_layer_and_an_opponent(kind: str) -> None:
    config = config_of(kind)
    if kind == "causal":  # as in Wan 2.2
        config.vae.residual, config.vae.decoder_width = True, 12
    joined.check(config)
    objective, model = stages.compression(config), build_vae(config)
    data = {
        "video": jax.ShapeDtypeStruct((2, 5, 16, 16, 3), jnp.uint8),
        "ordinal": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    params = jax.eval_shape(objective.init, jax.random.key(0), data)
    assert set(params) == {"vae", "discriminator"}
    lost = jax.eval_shape(objective.loss, params, {}, data, jax.random.key(0))
    assert {"fool", "hinge", "adaptive"} <= set(lost[2])
    # What is called the last layer is: the output is linear in it.
    video = jnp.zeros((1, 1, 8, 8, 3))
    noise = jnp.ones((1, *model.latent_shape(1, 8, 8)))
    own = jax.jit(model.init)(jax.random.key(0), video, noise)["params"]
    nothing = functools.reduce(lambda tree, name: tree[name], model.LAST, own) * 0.0
    still = {"params": replaced(own, model.LAST, nothing)}
    flat, _, _ = jax.jit(model.apply)(still, video, noise)
    assert float(jnp.ptp(flat)) == 0.0  # but for a bias, which begins at 0


class Clips:
    """Moving gradients, as a source."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        at = np.arange(5)[:, None, None, None] * 10 + np.arange(16)[None, :, None, None]
        video = (at + 3 * int(index) + np.zeros((5, 16, 16, 3))) % 256
        return {"video": video.astype(np.uint8)}


def train(folder: Path, preemption: Any = None) -> Any:
    config = config_of()
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    place = Runtime(folder, mesh, Metrics(folder), preemption or Preemption(), config.run)
    stream = batches(Clips(), config.vae.train.batch, 3, ("video",))
    return fit(
        "vae", stages.compression(config), stream, config.vae.train, place, seed=1, frozen={},
        meta={"digest": "x"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits_of_both_groups(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted, match="step 3"):
        train(tmp_path / "cut", StopAt(3))
    again = train(tmp_path / "cut")
    assert set(whole) == {"vae", "discriminator"}
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_the_discriminator_has_an_optimizer_of_its_own() -> None:
    options = config_of().vae.train
    options.adam_learning_rate, options.discriminator.adam_learning_rate = 1e-2, 1e-4
    tree = {"norm": jnp.ones(3)}
    moved = {}
    for group, made in optimizers(options, {"vae": tree, "discriminator": tree}).items():
        state = made.init(tree)
        updates, _ = made.update(tree, state, tree)
        moved[group] = float(jnp.abs(updates["norm"]).max())
    np.testing.assert_allclose(moved["vae"] / moved["discriminator"], 100.0, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"adversarial_width": 12}, "multiple of 8"),
        ({"adversarial_weight": 1.0, "adversarial_levels": 6}, "halved"),
        ({"crop": (20, 1)}, "a multiple of 8"),
        ({"crop": (64, 1)}, "up to 32"),
        ({"crop": (16, 0)}, "1 or more"),
    ],
)
def test_what_is_no_discriminator_is_refused(changes: dict[str, Any], words: str) -> None:
    config = get_config("smoke")
    config.vae.update(changes)
    with pytest.raises(UserError, match=words):
        joined.check(config)
