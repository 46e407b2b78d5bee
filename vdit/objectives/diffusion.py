"""Learning to denoise: DDPM's Algorithm 1 and its kin (flow matching, x0, v) over tokens.

Dimension key: B batch, n latent frames, h w places, Z latent channels, L tokens, C token
channels, J captions of a clip, S text tokens of a caption, E text width, K shots.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.diffusion.bound import bound
from vdit.diffusion.prediction import target, to_x0_eps, weight
from vdit.diffusion.schedule import Process, add_noise, like
from vdit.models.dit import DiT
from vdit.models.dit_paper import DiTPaper
from vdit.models.text import TextEncoder
from vdit.models.unet import UNet
from vdit.nn.patch import patchify
from vdit.objectives.objective import Objective, low_discrepancy, sample_keys
from vdit.tokens import (
    GIVEN,
    RATE,
    Condition,
    Layout,
    Patterns,
    drop_label,
    drop_text,
    shot_of,
    text_condition,
)

Denoiser = DiT | DiTPaper | UNet


def text_features(
    encoder: TextEncoder,
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    own: int | None = None,
) -> jax.Array:
    """Features (..., S, E): cached ones if the batch carries them, else encoded from token ids.

    A pretrained encoder's parameters are frozen["text"], a learned one's params["text"]. Captions
    (B, J, S) of which all but the first have at most `own` tokens are encoded at those lengths.
    """
    if "features" in batch:
        return batch["features"].astype(jnp.float32)
    weights = frozen["text"] if encoder.frozen else params["text"]

    def encode(ids: jax.Array, mask: jax.Array) -> jax.Array:
        flat = encoder.apply(weights, *(x.reshape(-1, x.shape[-1]) for x in (ids, mask)))
        return flat.reshape(*ids.shape, -1)

    ids, mask = batch["ids"], batch["mask"]
    if own is None or ids.shape[1] == 1:
        return encode(ids, mask)
    shots = encode(ids[:, 1:, :own], mask[:, 1:, :own])
    shots = jnp.pad(shots, ((0, 0), (0, 0), (0, ids.shape[2] - own), (0, 0)))
    return jnp.concatenate([encode(ids[:, :1], mask[:, :1]), shots], axis=1)


def captions_of(
    batch: Mapping[str, jax.Array], longest: int | None = None
) -> dict[str, jax.Array]:
    """The captions of a dense batch as (B, J, S, ...), also where they come as (B, S, ...); of no
    more than `longest` tokens, where that is given."""
    captions = {name: batch[name] for name in ("ids", "mask", "features") if name in batch}
    if batch["mask"].ndim == 2:
        captions = {name: value[:, None] for name, value in captions.items()}
    return {name: value[:, :, :longest] for name, value in captions.items()}


def pool_captions(encoder: TextEncoder, features_BJSE: jax.Array, mask_BJS: jax.Array) -> jax.Array:
    """Each caption as one vector (B, J, E)."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (features_BJSE, mask_BJS))
    return encoder.pool(*flat).reshape(*mask_BJS.shape[:2], -1)


def conditioned(
    encoder: TextEncoder,
    features_BJSE: jax.Array,
    mask_BJS: jax.Array,
    level_BK: jax.Array,
    drop_B: jax.Array,
    label_B: jax.Array | None = None,
    empty: Mapping[str, jax.Array] | None = None,
    own: int | None = None,
) -> Condition:
    """The condition of a dense batch of captions and classes; nothing where `drop_B` is true.

    `empty`: "features" (S, E) and "mask" (S,) of the text without words, which then stands for
    nothing instead of a null key, as published models have it. `own`: see `text_condition`.
    """
    if empty is not None:
        mask_BJS = mask_BJS & ~drop_B[:, None, None]
        wordless = ~mask_BJS.any(-1, keepdims=True)
        mask_BJS = jnp.where(wordless, empty["mask"][None, None], mask_BJS)
        features_BJSE = jnp.where(
            wordless[..., None], empty["features"][None, None], features_BJSE
        )
    pooled = pool_captions(encoder, features_BJSE, mask_BJS)
    condition = text_condition(features_BJSE, mask_BJS, pooled, level_BK, own)
    if label_B is not None:
        condition = drop_label(dataclasses.replace(condition, label=label_B), drop_B)
    return condition if empty is not None else drop_text(condition, drop_B)


def levels(model: Any, process: Process, t_B: jax.Array) -> jax.Array:
    """Levels (B, K) as networks see them: of wanted tokens, and of given ones if there can be."""
    slots = [t_B] if model.one_time else [t_B, jnp.zeros_like(t_B)]
    return process.network_time(jnp.stack(slots, axis=1))


def choices(
    key: jax.Array, ordinal: jax.Array, more: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Uniform numbers: one that chooses a sample's time, and those for its pattern, its dropout and
    `more` that may be dropped; and a key for its noise.

    One draw for all but the time: every call of the generator costs seconds of compilation on CPU.
    """
    choice_key, noise_key = jax.random.split(key)
    return low_discrepancy(ordinal), jax.random.uniform(choice_key, (2 + more,)), noise_key


def init_groups(
    model: Denoiser,
    encoder: TextEncoder,
    key: jax.Array,
    captions: Mapping[str, jax.Array],
    inputs: Callable[[jax.Array], tuple[jax.Array, Layout, Condition]],
) -> dict[str, Any]:
    """The parameters of the denoiser and of a learned text encoder, by group.

    `inputs` makes the denoiser's inputs from the captions' features; only their shapes matter.
    """
    text_key, dit_key = jax.random.split(key)
    groups: dict[str, Any] = {}
    if not encoder.frozen:
        groups["text"] = encoder.init(text_key, captions["ids"], captions["mask"])
    features = jnp.zeros((*captions["mask"].shape, encoder.dim))
    groups["dit"] = model.init(dit_key, *inputs(features))["params"]
    return groups


def denoising(
    model: Denoiser,
    process: Process,
    prediction: str,
    loss_weight: str,
    constrain: Callable[[jax.Array], jax.Array],
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The weighted squared error of the prediction over wanted tokens, and their weight.

    The function takes the denoiser's parameters, x0 and eps (B, L, C), times (B,) or (B, L),
    wanted (B, L), layout and condition. Tokens that are not wanted are clean. A model with learned
    variance adds .001 L_vlb, estimated at the same times (Nichol and Dhariwal 2021, Eq. 16).
    """

    def loss(
        params: Any,
        x0: jax.Array,
        eps: jax.Array,
        t: jax.Array,
        wanted_BL: jax.Array,
        layout: Layout,
        condition: Condition,
    ) -> tuple[jax.Array, jax.Array]:
        # All that has tokens is split as they are: positions alone are as large as activations are.
        x0, eps, wanted_BL, layout = jax.tree.map(constrain, (x0, eps, wanted_BL, layout))
        wanted = wanted_BL[..., None]
        # Given tokens are kept out of the algebra: they are clean, and have no loss.
        x_t = constrain(jnp.where(wanted, add_noise(process, x0, eps, t), x0))
        out: Any = model.apply({"params": params}, x_t, layout, condition)
        out, share = split_variance(model, out)
        error = jnp.square(out - target(prediction, process, t, x0, eps))
        error = error * like(weight(loss_weight, prediction, process, t), error)
        if share is not None:
            guess, _ = to_x0_eps(prediction, process, t, x_t, out)
            error = error + 1e-3 * (process.points or 0) * bound(process, t, x0, guess, share)
        total = jnp.where(wanted, error, 0.0).sum()
        return total, (wanted.sum() * x0.shape[-1]).astype(jnp.float32)

    return loss


def split_variance(model: Denoiser, out: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """A denoiser's answer: the prediction (B, L, C), and the variance's share if it learns one."""
    if not model.learned_variance:
        return out, None
    prediction, share = jnp.split(out, 2, axis=-1)
    return prediction, share


def dense_tokens(
    latent_BnhwZ: jax.Array,
    patch: tuple[int, int],
    times_Bn: jax.Array,
    given_Bn: jax.Array,
    starts_BK: jax.Array | None = None,
) -> tuple[jax.Array, Layout]:
    """Token values (B, L, C) and layout of latent frames at `times_Bn` seconds, given or not.

    `starts_BK` are the starts of the clip's shots, in seconds; without them it is one shot.
    """
    batch, count = latent_BnhwZ.shape[:2]
    x = patchify(latent_BnhwZ, (1, *patch))
    _, _, height, width, channels = x.shape
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    shape = (batch, count, height, width)
    position = jnp.stack(
        [
            jnp.broadcast_to(times_Bn[:, :, None, None] * RATE, shape),
            jnp.broadcast_to(rows[None, None], shape),
            jnp.broadcast_to(columns[None, None], shape),
        ],
        axis=-1,
    ).astype(jnp.float32)
    shot_Bn = jnp.ones(times_Bn.shape, jnp.int32)
    if starts_BK is not None:
        shot_Bn = shot_of(times_Bn, starts_BK)
    length = count * height * width

    def each(x_Bn: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_Bn[:, :, None, None], shape).reshape(batch, length)

    layout = Layout(
        position=position.reshape(batch, length, 3),
        slot=each(2 * (shot_Bn - 1) + given_Bn),
        shot=each(shot_Bn),
        grid=(count, height, width),
    )
    return x.reshape(batch, length, channels), layout


def filled(layout: Layout, multiple: int) -> Layout:
    """The layout of as many tokens as `multiple` divides: behind the clip's own is padding, a
    segment by itself, which counts as given."""
    length = layout.slot.shape[1]
    if length % multiple == 0:
        return layout
    parts = (layout.position, layout.slot, layout.shot, jnp.ones_like(layout.slot))
    position, slot, shot, segment = (fill(x, multiple) for x in parts)
    clip = segment > 0
    return Layout(position, jnp.where(clip, slot, GIVEN), jnp.where(clip, shot, 1), segment)


def fill(x_BL: jax.Array, multiple: int) -> jax.Array:
    """x (B, L, ...) with zeros behind, up to the next multiple of tokens."""
    more = -x_BL.shape[1] % multiple
    return jnp.pad(x_BL, ((0, 0), (0, more), *((0, 0),) * (x_BL.ndim - 2))) if more else x_BL


def diffusion_objective(
    model: Denoiser,
    encoder: TextEncoder,
    process: Process,
    prediction: str,
    *,
    table: Patterns,
    shares: np.ndarray,
    patch: tuple[int, int],
    text_drop: float,
    caption_drop: float = 0.0,
    loss_weight: str = "uniform",
    sample_times: Callable[[jax.Array], jax.Array],
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
    multiple: int = 1,
    longest: tuple[int, int] | None = None,
) -> Objective:
    """The mean squared error of the prediction over wanted tokens.

    A batch holds "latent" (B, stored, h, w, Z) as `tokens.Patterns` says, "ids" and "mask"
    (B, S) of the caption (or its "features"), and "ordinal" (B,). Clips of several shots have
    (B, J, S) captions, the whole clip's and each shot's, and the shots' "starts" (B, J - 1) in
    seconds; of these captions each is dropped by itself with the share `caption_drop`, all with
    `text_drop`. A model of classes is given the clips' "label" (B,), dropped with their text.
    `frozen` holds the latents' "mean" and "std" (Z,), a pretrained encoder's "text" where features
    are not in the batch, and "empty" as in `conditioned`, if it is there. `constrain` places
    (B, L, ...) arrays on a mesh, whose shards of tokens `multiple` is: rows are filled up to it.
    `longest`, where it is known, are the most tokens of a clip's caption and of a shot's: what is
    behind them is padding, which then costs nothing.
    """
    source, given = jnp.asarray(table.source), jnp.asarray(table.given)
    times = jnp.asarray(table.times, jnp.float32)
    denoise = denoising(model, process, prediction, loss_weight, constrain)
    words, own = (max(longest), longest[1]) if longest else (None, None)  # all are cut to `words`
    # The last edge is left open, so that rounding cannot choose a pattern that is not there.
    cumulative = jnp.asarray(np.cumsum(shares)[:-1], jnp.float32)

    def draw(batch: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], key: jax.Array):
        """Everything random about each sample, from its own key and number."""
        captions = batch["mask"].shape[1] if batch["mask"].ndim == 3 else 0

        def one(key: jax.Array, ordinal: jax.Array, latent: jax.Array) -> tuple[jax.Array, ...]:
            time_u, (pattern_u, drop_u, *each_u), noise_key = choices(key, ordinal, captions)
            pattern = jnp.searchsorted(cumulative, pattern_u, side="right")
            clean = latent[source[pattern]]
            return (
                clean,
                times[source[pattern]],
                given[pattern],
                sample_times(time_u),
                jax.random.normal(noise_key, clean.shape),
                drop_u < text_drop,
                jnp.stack(each_u) < caption_drop if each_u else jnp.zeros(1, bool),
            )

        shape = (1, 1, 1, -1)
        latent = batch["latent"].astype(jnp.float32)
        latent = (latent - frozen["mean"].reshape(1, *shape)) / frozen["std"].reshape(1, *shape)
        return jax.vmap(one)(sample_keys(key, batch["ordinal"]), batch["ordinal"], latent)

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        first = {name: value[:1] for name, value in batch.items()}

        captions = captions_of(first)

        def inputs(features: jax.Array) -> tuple[jax.Array, Layout, Condition]:
            told = features[:, None], captions["mask"][:, :1], levels(model, process, jnp.ones(1))
            condition = conditioned(encoder, *told, jnp.zeros(1, bool), first.get("label"))
            count = source.shape[1]
            latent = first["latent"][:, :count].astype(jnp.float32)
            return *dense_tokens(latent, patch, jnp.zeros((1, count)), given[:1]), condition

        one = {name: value[:, 0] for name, value in captions.items()}
        return init_groups(model, encoder, key, one, inputs)

    def loss(
        params: Mapping[str, Any],
        frozen: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        clean, seconds, known, t_B, noise, drop, drop_BJ = draw(batch, frozen, key)
        x0, layout = dense_tokens(clean, patch, seconds, known, batch.get("starts"))
        eps, _ = dense_tokens(noise, patch, seconds, known)
        x0, eps, layout = fill(x0, multiple), fill(eps, multiple), filled(layout, multiple)
        captions = captions_of(batch, words)
        features = text_features(encoder, params, frozen, captions, own)
        mask, level = captions["mask"] & ~drop_BJ[..., None], levels(model, process, t_B)
        asked = batch.get("label"), frozen.get("empty")
        condition = conditioned(encoder, features, mask, level, drop, *asked, own)
        total, count = denoise(params["dit"], x0, eps, t_B, ~layout.given(), layout, condition)
        return total, count, {}

    return Objective(init, loss)
