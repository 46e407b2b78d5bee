"""Learning to denoise packed rows: clips of any length, size, aspect and rate side by side.

The same loss as `diffusion_objective`, over rows of `data.packing.pack`: what is random about a
sample comes from its own number and the numbers of its own tokens, so where it lies, and beside
what, changes neither its loss nor its gradient. What is given was chosen when the row was made.

Dimension key: B rows, L tokens, C token channels, M samples, S caption tokens of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vdit.diffusion.schedule import Process
from vdit.models.dit import DiT
from vdit.models.text import TextEncoder
from vdit.objectives.diffusion import choices, denoising, init_groups, text_features
from vdit.objectives.objective import Objective, sample_keys
from vdit.tokens import (
    Budget,
    Condition,
    Layout,
    drop_packed_text,
    join_segments,
    of_segment,
    packed_condition,
    packed_layout,
    segment_index,
    split_segments,
)


def token_noise(keys_BM: jax.Array, segment_BL: jax.Array, channels: int) -> jax.Array:
    """Gaussian noise (B, L, C), each token's from its sample's key and its number in the sample."""

    def row(keys_M: jax.Array, segment_L: jax.Array, index_L: jax.Array) -> jax.Array:
        keys_L = keys_M[jnp.maximum(segment_L - 1, 0)]
        keys_L = jax.vmap(jax.random.fold_in)(keys_L, index_L)
        return jax.vmap(lambda key: jax.random.normal(key, (channels,)))(keys_L)

    return jax.vmap(row)(keys_BM, segment_BL, segment_index(segment_BL, keys_BM.shape[1]))


def packed_objective(
    model: DiT,
    encoder: TextEncoder,
    process: Process,
    prediction: str,
    *,
    budget: Budget,
    text_drop: float,
    loss_weight: str = "uniform",
    sample_times: Callable[[jax.Array], jax.Array],
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Objective:
    """The mean squared error of the prediction over the wanted tokens of packed rows.

    A batch holds rows of `data.packing.pack`: "tokens" (B, L, C), "position" (B, L, 3), "segment"
    and "given" (B, L), "ordinal" (B, M), "text" (B, S) and "ids" (B, S) or "features" (B, S, E).
    `frozen` holds the latents' "mean" and "std" (Z,). What padding holds has no influence.
    """
    denoise = denoising(model, process, prediction, loss_weight, constrain)
    samples = budget.samples

    def captions(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Each sample's caption in a row of its own (B·M, caption), as encoders take them."""
        name = "features" if "features" in batch else "ids"
        own, mask = split_segments(batch[name], batch["text"], samples, budget.caption)
        return {name: own, "mask": mask}

    def told(
        features: jax.Array, mask: jax.Array, text_BS: jax.Array, level_BM2: jax.Array
    ) -> Condition:
        pooled = encoder.pool(features, mask).reshape(text_BS.shape[0], samples, -1)
        return packed_condition(
            join_segments(features, text_BS, samples), text_BS, pooled, level_BM2
        )

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        first = {name: value[:1] for name, value in batch.items()}
        own = captions(first)
        tokens, segment = first["tokens"].astype(jnp.float32), first["segment"]

        def inputs(features: jax.Array) -> tuple[jax.Array, Layout, Condition]:
            layout = packed_layout(first["position"], segment, segment < 0, samples)
            level = jnp.zeros((1, samples, 2))
            return tokens, layout, told(features, own["mask"], first["text"], level)

        return init_groups(model, encoder, key, own, inputs)

    def loss(
        params: Mapping[str, Any],
        frozen: Mapping[str, jax.Array],
        batch: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        segment = batch["segment"]
        real = segment > 0
        ordinal = batch["ordinal"].reshape(-1)
        time_u, chosen, noise_keys = jax.vmap(choices)(sample_keys(key, ordinal), ordinal)
        drop_u = chosen[:, 1].reshape(-1, samples)
        t_BM = sample_times(time_u.reshape(-1, samples))
        given = real & batch["given"]

        channels = batch["tokens"].shape[-1]
        mean, std = (
            jnp.tile(frozen[name], channels // frozen[name].size)[None, None]
            for name in ("mean", "std")
        )
        x0 = (batch["tokens"].astype(jnp.float32) - mean) / std
        x0 = jnp.where(real[..., None], x0, 0.0)  # whatever padding holds, NaN too, ends here
        eps = token_noise(noise_keys.reshape(-1, samples), segment, channels)

        layout = packed_layout(batch["position"], segment, given, samples)
        level = process.network_time(jnp.stack([t_BM, jnp.zeros_like(t_BM)], axis=-1))
        own = captions(batch)
        features = text_features(encoder, params, frozen, own)
        condition = told(features, own["mask"], batch["text"], level)
        condition = drop_packed_text(condition, drop_u < text_drop)
        wanted = real & ~given
        total, count = denoise(
            params["dit"], x0, eps, of_segment(t_BM, segment), wanted, layout, condition
        )
        return total, count, {}

    return Objective(init, loss)
