"""Packed rows for `denoising_objective`: clips of any length, size, aspect and rate side by side.

What is random about a sample comes from its own number and the numbers of its own tokens, so its
place in the row and its neighbours change neither its loss nor its gradient. What is given was
chosen when the row was packed.

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
    """Gaussian noise (B, L, C), each token's from its sample's key and its number in the sample."""

    def row(keys_M: jax.Array, segment_L: jax.Array, index_L: jax.Array) -> jax.Array:
        keys_L = keys_M[jnp.maximum(segment_L - 1, 0)]
        keys_L = jax.vmap(jax.random.fold_in)(keys_L, index_L)
        return jax.vmap(lambda key: jax.random.normal(key, (channels,)))(keys_L)

    return jax.vmap(row)(keys_BM, segment_BL, segment_index(segment_BL, keys_BM.shape[1]))


@dataclass(frozen=True)
class Packed:
    """Rows of `data.packing.pack`.

    A batch holds "tokens" (B, L, C), "position" (B, L, 3), "segment" and "given" (B, L), "ordinal"
    (B, M), "text" (B, S) and "ids" (B, S) or "features" (B, S, E). What padding holds has no
    influence.
    """

    budget: Budget
    sample_times: Callable[[jax.Array], jax.Array]
    text_drop: float

    def captions(self, batch: Batch) -> dict[str, jax.Array]:
        """Each sample's caption in a row of its own (B·M, caption), as encoders take them."""
        name, budget = "features" if "features" in batch else "ids", self.budget
        own, mask = split_segments(batch[name], batch["text"], budget.samples, budget.caption)
        return {name: own, "mask": mask}

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

        def clean(x: jax.Array) -> jax.Array:  # whatever padding holds, NaN too, ends here
            return jnp.where(real[..., None], x, 0.0)

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
        told = features, captions["mask"], batch["text"]
        condition = denoiser.packed_condition(*told, drop_u < self.text_drop)
        return Drawn(x0, eps, t_BM, layout, condition, wanted)
