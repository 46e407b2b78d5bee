"""Learning to compress: reconstruction, KL, perceptual loss (LPIPS), PatchGAN discriminator.

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
from vdit.nn.patch import to_float
from vdit.objectives.objective import Batch, Objective, Params, Sums, sample_keys

AXES = (1, 2, 3, 4)  # all but the batch's


class Perceptual(NamedTuple):
    """LPIPS and its weight; its parameters are frozen["lpips"]."""

    model: LPIPS
    weight: float


class Adversary(NamedTuple):
    """A discriminator of reconstructions and videos: the parameter group "discriminator".

    The autoencoder's loss against it has `weight` times the adaptive weight. Both begin at sample
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
    """The autoencoder's loss (B,) by the logits of its reconstruction."""
    return -made_BThw.mean((1, 2, 3))


def adaptive_weight(to_last: Callable[[jax.Array], Any], *to_out: jax.Array) -> jax.Array:
    """How many times larger one loss's gradient is at the decoder's last layer than another's.

    Esser et al. 2021 (arXiv:2012.09841), equation 7, with the floor and the bounds of their code
    and of latent diffusion's. `to_out` are the gradients of both for the decoder's output, which
    `to_last` takes to the layer.
    """
    near, far = (jnp.linalg.norm(to_last(gradient)[0]) for gradient in to_out)
    return jax.lax.stop_gradient(jnp.clip(near / (far + 1e-4), 0.0, 1e4))


def distance(
    out: jax.Array, video: jax.Array, l1_weight: float, bodies: jax.Array | None,
    perceptual: Perceptual | None, frozen: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The reconstruction loss (B,) in pixels and features, and its parts; `bodies` (B, T, H, W):
    further weights of the squared errors."""
    squared = jnp.square(out - video)
    parts = {"mse": squared.mean(AXES)}
    total_B = parts["mse"] + l1_weight * jnp.abs(out - video).mean(AXES)
    if bodies is not None:
        total_B += (squared.mean(-1) * bodies).mean((1, 2, 3))
    if perceptual is not None:
        frames = (x.reshape(-1, *x.shape[2:]) for x in (out, video))
        apart: Any = perceptual.model.apply({"params": frozen["lpips"]}, *frames)
        parts["lpips"] = apart.reshape(video.shape[:2]).mean(1)
        total_B += perceptual.weight * parts["lpips"]
    return total_B, parts


def adversarial(
    adversary: Adversary, params: Any, out: jax.Array, video: jax.Array, on_B: jax.Array,
    to_last: Callable[[jax.Array], Any], error: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The losses of both players (B,) and their parts; each reaches its own group alone."""

    def logits(params: Any, video: jax.Array) -> jax.Array:
        out: Any = adversary.model.apply({"params": params}, video)
        return out

    def fooled(out: jax.Array) -> jax.Array:
        return fool(logits(jax.lax.stop_gradient(params), out))

    still = jax.lax.stop_gradient(out)
    to_out = (jax.grad(lambda x, f=f: f(x).mean())(still) for f in (error, fooled))
    adaptive = adaptive_weight(to_last, *to_out)
    parts = {"fool": fooled(out), "hinge": hinge(logits(params, video), logits(params, still))}
    total_B = on_B * (adversary.weight * adaptive * parts["fool"] + parts["hinge"])
    return total_B, parts | {"adaptive": jnp.full_like(on_B, adaptive)}


def vae_objective(
    model: Autoencoder, kl_weight: float, l1_weight: float, perceptual: Perceptual | None = None,
    adversary: Adversary | None = None, body_weight: float = 0.0,
) -> Objective:  # fmt: skip
    """Mean squared (and, by its weight, absolute) error of pixels plus weighted KL to N(0, 1).

    With `body_weight` the squared error of pixels of batch["bodies"] (B, T, H, W) counts 1 +
    `body_weight` times.

    The KL is a mean over latent elements (Kingma and Welling 2014, Appendix B), so its weight
    does not depend on the patch. LPIPS is a mean over frames. With an adversary the sum is of both
    players' losses, each cut off from the other's parameters.
    """

    def noise(video_BTHWC: jax.Array, key: jax.Array, ordinal_B: jax.Array) -> jax.Array:
        shape = model.latent_shape(*video_BTHWC.shape[1:4])
        return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, ordinal_B))

    def init(key: jax.Array, batch: Batch) -> Params:
        video = to_float(batch["video"][:1])
        params = {"vae": model.init(key, video, noise(video, key, batch["ordinal"][:1]))["params"]}
        if adversary is not None:
            first, _ = jax.random.split(key)
            params["discriminator"] = adversary.model.init(first, video)["params"]
        return params

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        video = to_float(batch["video"])
        noise_BthwZ = noise(video, key, batch["ordinal"])

        def run(last: jax.Array) -> Any:
            vae = {"params": replaced(params["vae"], model.LAST, last)}
            out, *posterior = model.apply(vae, video, noise_BthwZ)
            return out, posterior

        last = functools.reduce(lambda tree, name: tree[name], model.LAST, params["vae"])
        if adversary is None:
            out, (mean, log_variance) = run(last)
        else:  # from the output's gradient to the last layer's is a cheap step
            out, to_last, (mean, log_variance) = jax.vjp(run, last, has_aux=True)
        bodies = body_weight * batch["bodies"] if body_weight else None
        apart = functools.partial(
            distance, video=video, l1_weight=l1_weight, bodies=bodies, perceptual=perceptual,
            frozen=frozen,
        )  # fmt: skip
        total_B, parts = apart(out)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        parts["kl"] = kl.mean(AXES)
        total_B += kl_weight * parts["kl"]
        if adversary is not None:
            on_B = (batch["ordinal"] >= adversary.start).astype(jnp.float32)
            lost = out, video, on_B, to_last, lambda out: apart(out)[0]
            lost_B, more = adversarial(adversary, params["discriminator"], *lost)
            total_B, parts = total_B + lost_B, parts | more
        parts["psnr"] = -10.0 * jnp.log10(parts["mse"] / 4.0 + 1e-10)
        weight = jnp.float32(video.shape[0])
        return total_B.sum(), weight, {name: part.sum() for name, part in parts.items()}

    return Objective(init, loss)


TRIES = 3  # random places from which a crop is chosen by its bodies


def cropped(batch: Batch, key: jax.Array, side: int, count: int) -> dict[str, jax.Array]:
    """`count` random squares of `side` pixels from each clip, as a batch of their own.

    With batch["bodies"] each is the one of `TRIES` that shows most of them.
    """
    height, width = batch["video"].shape[2:4]
    has_bodies = "bodies" in batch

    def square(x: jax.Array, at: jax.Array) -> jax.Array:
        start: Any = (0, at[0], at[1], *[0] * (x.ndim - 3))
        return jax.lax.dynamic_slice(x, start, (len(x), side, side, *x.shape[3:]))

    def one(clip: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        room = jnp.array([height - side + 1, width - side + 1])
        tries = TRIES if has_bodies else 1
        places = (jax.random.uniform(key, (tries, count, 2)) * room[None, None]).astype(jnp.int32)
        at = places[0]
        if has_bodies:
            squares = jax.vmap(jax.vmap(functools.partial(square, clip["bodies"])))(places)
            fullest = squares.sum((2, 3, 4)).argmax(0)
            at = jax.vmap(lambda n, tried: tried[n], (0, 1))(fullest, places)
        return {name: jax.vmap(functools.partial(square, x))(at) for name, x in clip.items()}

    clips = {name: batch[name] for name in ("video", "bodies") if name in batch}
    keys = sample_keys(jax.random.fold_in(key, 1), batch["ordinal"])
    squares = {name: x.reshape(-1, *x.shape[2:]) for name, x in jax.vmap(one)(clips, keys).items()}
    ordinal = batch["ordinal"][:, None] * count + jnp.arange(count, dtype=jnp.uint32)[None]
    return {**squares, "ordinal": ordinal.reshape(-1)}


def on_crops(objective: Objective, side: int, count: int) -> Objective:
    """An autoencoder's objective on `cropped` clips instead of whole ones."""

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        return objective.loss(params, frozen, cropped(batch, key, side, count), key)

    return Objective(objective.init, loss)
