"""Packed rows for `denoising_objective`: clips of any length, size, aspect and rate side by side.

A sample's random choices come from its ordinal and the indices of its tokens, so neither its place
in the row nor its neighbours change its loss or gradient. Given tokens were chosen when the row was
packed.

Dimension key: B rows, L tokens, C token channels, M samples, S caption tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vdit.denoiser import Denoiser
from vdit.objectives.auxiliary import Drawn
from vdit.objectives.diffusion import choices
from vdit.objectives.objective import Batch, sample_keys
from vdit.tokens import Budget, packed_layout, segment_index, split_segments


def token_noise(keys_BM: jax.Array, segment_BL: jax.Array, channels: int) -> jax.Array:
    """Gaussian noise (B, L, C), each token's from its sample's key and its index in the sample."""

    def row(keys_M: jax.Array, segment_L: jax.Array, index_L: jax.Array) -> jax.Array:
        keys_L = keys_M[jnp.maximum(segment_L - 1, 0)]
        keys_L = jax.vmap(jax.random.fold_in)(keys_L, index_L)
        return jax.vmap(lambda key: jax.random.normal(key, (channels,)))(keys_L)

    return jax.vmap(row)(keys_BM, segment_BL, segment_index(segment_BL, keys_BM.shape[1]))


@dataclass(frozen=True)
class Packed:
    """Rows of `data.packing.pack`.

    A batch holds "tokens" (B, L, C), "position" (B, L, 3), "segment" and "given" (B, L), "ordinal"
    (B, M), "text" (B, S) and "ids" (B, S) or "features" (B, S, E). The content of padding has no
    influence.
    """

    budget: Budget
    sample_times: Callable[[jax.Array], jax.Array]
    text_drop: float

    def captions(self, batch: Batch) -> dict[str, jax.Array]:
        """One row for each sample's caption (B·M, caption)."""
        name, budget = "features" if "features" in batch else "ids", self.budget
        words, mask = split_segments(batch[name], batch["text"], budget.samples, budget.caption)
        return {name: words, "mask": mask}

    def draw(
        self, denoiser: Denoiser, params: Any, frozen: Any, batch: Batch, key: jax.Array,
        targets: Sequence[str] = (),
    ) -> Drawn:  # fmt: skip
        """See `Rows`."""
        samples, segment = self.budget.samples, batch["segment"]
        real, ordinal = segment > 0, batch["ordinal"].reshape(-1)
        time_u, chosen, noise_keys = jax.vmap(choices)(sample_keys(key, ordinal), ordinal)
        drop_u = chosen[:, 1].reshape(-1, samples)
        t_BM = self.sample_times(time_u.reshape(-1, samples))

        def clean(x: jax.Array) -> jax.Array:  # drops the content of padding, NaN included
            return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0.0)

        channels = batch["tokens"].shape[-1]
        mean, std = (
            jnp.tile(frozen[name], channels // frozen[name].size)[None, None]
            for name in ("mean", "std")
        )
        x0 = clean((batch["tokens"].astype(jnp.float32) - mean) / std)
        eps = token_noise(noise_keys.reshape(-1, samples), segment, channels)
        wanted = {name: clean(batch[name].astype(jnp.float32)) for name in targets}
        layout = packed_layout(batch["position"], segment, real & batch["given"], samples)
        captions = self.captions(batch)
        features = denoiser.features(params, frozen, captions)
        dropped = drop_u < self.text_drop
        condition = denoiser.packed_condition(features, captions["mask"], batch["text"], dropped)
        return Drawn(x0, eps, t_BM, layout, condition, wanted)
