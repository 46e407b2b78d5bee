"""Learning to compress: reconstruction, KL, likeness to the eye, and a discriminator.

Dimension key: B batch, T frames, H height, W width, C colours, Z latent channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.models.autoencoder import Autoencoder
from vdit.models.discriminator import Discriminator
from vdit.models.lpips import LPIPS
from vdit.objectives.objective import Objective, sample_keys


def to_float(video: jax.Array) -> jax.Array:
    """uint8 pixels to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
    """[-1, 1] to uint8 pixels, rounded and clipped."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


class Perceptual(NamedTuple):
    """LPIPS beside the error of pixels, by its weight; its parameters are frozen["lpips"]."""

    model: LPIPS
    weight: float


class Adversary(NamedTuple):
    """A discriminator, the group "discriminator", that learns to tell reconstructions from videos.

    The autoencoder learns to fool it, by the weight times the adaptive one. Both begin at sample
    number `start` of the stream.
    """

    model: Discriminator
    weight: float
    start: int


def replaced(tree: Mapping[str, Any], path: Sequence[str], leaf: Any) -> dict[str, Any]:
    """A tree with another leaf at a path."""
    name, *rest = path
    return {**tree, name: replaced(tree[name], rest, leaf) if rest else leaf}


def hinge(real_BThw: jax.Array, made_BThw: jax.Array) -> jax.Array:
    """The discriminator's loss (B,) by its logits of both (Lim and Ye 2017)."""
    parts = jax.nn.relu(1.0 - real_BThw) + jax.nn.relu(1.0 + made_BThw)
    return 0.5 * parts.mean((1, 2, 3))


def fool(made_BThw: jax.Array) -> jax.Array:
    """The autoencoder's loss (B,) by the logits of what it made."""
    return -made_BThw.mean((1, 2, 3))


def adaptive_weight(to_last: Callable[[jax.Array], Any], *to_out: jax.Array) -> jax.Array:
    """How many times larger one loss's gradient is at the decoder's last layer than another's.

    Esser et al. 2021 (arXiv:2012.09841), equation 7, with the floor and the bounds of their code
    and of latent diffusion's. `to_out` are the gradients of both for the decoder's output, of
    which `to_last` makes those for the layer.
    """
    near, far = (jnp.linalg.norm(to_last(gradient)[0]) for gradient in to_out)
    return jax.lax.stop_gradient(jnp.clip(near / (far + 1e-4), 0.0, 1e4))


def vae_objective(
    model: Autoencoder,
    kl_weight: float,
    l1_weight: float,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
) -> Objective:
    """Mean squared (and, by its weight, absolute) error of pixels plus weighted KL to N(0, 1).

    The KL is a mean over latent elements (Kingma and Welling 2014, Appendix B), so its weight
    does not depend on the patch. LPIPS is a mean over frames. With an adversary the sum is of both
    players' losses, each cut off from the other's parameters.
    """
    axes = (1, 2, 3, 4)

    def noise(video_BTHWC: jax.Array, key: jax.Array, ordinal_B: jax.Array) -> jax.Array:
        shape = model.latent_shape(*video_BTHWC.shape[1:4])
        return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, ordinal_B))

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        video = to_float(batch["video"][:1])
        made = model.init(key, video, noise(video, key, batch["ordinal"][:1]))
        params: dict[str, Any] = {"vae": made["params"]}
        if adversary is not None:
            own, _ = jax.random.split(key)
            params["discriminator"] = adversary.model.init(own, video)["params"]
        return params

    def apart(
        out: jax.Array, video: jax.Array, frozen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """How far a reconstruction is from its video (B,), and that by parts."""
        parts = {"mse": jnp.square(out - video).mean(axes)}
        total_B = parts["mse"] + l1_weight * jnp.abs(out - video).mean(axes)
        if perceptual is not None:
            frames = (x.reshape(-1, *x.shape[2:]) for x in (out, video))
            made: Any = perceptual.model.apply({"params": frozen["lpips"]}, *frames)
            parts["lpips"] = made.reshape(video.shape[:2]).mean(1)
            total_B += perceptual.weight * parts["lpips"]
        return total_B, parts

    def against(
        out: jax.Array, video: jax.Array, params: Any, on_B: jax.Array, to_last: Any, error: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What both players lose (B,), and that by parts; each reaches its own group alone."""
        assert adversary is not None

        def judge(params: Any, video: jax.Array) -> jax.Array:
            logits: Any = adversary.model.apply({"params": params}, video)
            return logits

        def fooled(out: jax.Array) -> jax.Array:
            return fool(judge(jax.lax.stop_gradient(params), out))

        still = jax.lax.stop_gradient(out)
        to_out = (jax.grad(lambda x, f=f: f(x).mean())(still) for f in (error, fooled))
        adaptive = adaptive_weight(to_last, *to_out)
        parts = {"fool": fooled(out), "hinge": hinge(judge(params, video), judge(params, still))}
        total_B = on_B * (adversary.weight * adaptive * parts["fool"] + parts["hinge"])
        return total_B, parts | {"adaptive": jnp.full_like(on_B, adaptive)}

    def loss(
        params: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        video = to_float(batch["video"])
        noise_BthwZ = noise(video, key, batch["ordinal"])

        def run(last: jax.Array) -> Any:
            whole = replaced(params["vae"], model.LAST, last)
            made: Any = model.apply({"params": whole}, video, noise_BthwZ)
            return made[0], made[1:]

        last = functools.reduce(lambda tree, name: tree[name], model.LAST, params["vae"])
        if adversary is None:
            out, (mean, log_variance) = run(last)
        else:  # to go from the output's gradient to that of the last layer is cheap
            out, to_last, (mean, log_variance) = jax.vjp(run, last, has_aux=True)
        total_B, parts = apart(out, video, frozen)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        parts["kl"] = kl.mean(axes)
        total_B += kl_weight * parts["kl"]
        if adversary is not None:
            on_B = (batch["ordinal"] >= adversary.start).astype(jnp.float32)
            lost_B, told = against(
                out, video, params["discriminator"], on_B, to_last,
                lambda out: apart(out, video, frozen)[0],
            )  # fmt: skip
            total_B, parts = total_B + lost_B, parts | told
        parts["psnr"] = -10.0 * jnp.log10(parts["mse"] / 4.0 + 1e-10)
        weight = jnp.float32(video.shape[0])
        return total_B.sum(), weight, {name: part.sum() for name, part in parts.items()}

    return Objective(init, loss)
