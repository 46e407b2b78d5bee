"""Learning to denoise: DDPM's Algorithm 1 and its kin (flow matching, x0, v) over tokens.

`denoising_objective` serves `Dense` batches, and `Packed` rows (`packed.py`).

Dimension key: B batch, n latent frames, h w places, Z latent channels, L tokens, C token
channels, J captions of a clip, S text tokens of a caption, K shots.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vdit.denoiser import Denoiser
from vdit.models.wan import with_mask
from vdit.objectives.auxiliary import Drawn, Weighted, hidden_layers, target_names, variance_bound
from vdit.objectives.objective import Batch, Objective, Params, Sums, low_discrepancy, sample_keys
from vdit.tokens import Layout, Patterns, dense_tokens, fill, filled


class Rows(Protocol):
    """Dense or packed rows: how a batch becomes `Drawn`."""

    def captions(self, batch: Batch) -> dict[str, jax.Array]:
        """The "mask" (..., S) and "ids" (..., S) or "features" (..., S, E) of each caption."""

    def draw(
        self, denoiser: Denoiser, params: Any, frozen: Any, batch: Batch, key: jax.Array,
        targets: Sequence[str],
    ) -> Drawn:  # fmt: skip
        """The batch with its random choices; `targets` are entries that auxiliary losses read."""


def choices(
    key: jax.Array, ordinal: jax.Array, more: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A sample's uniform numbers: its time's; its pattern's, its text dropout's and `more`; and the
    key of its noise.

    One draw for all but the time: every call of the generator costs seconds of compilation on CPU.
    """
    choice_key, noise_key = jax.random.split(key)
    return low_discrepancy(ordinal), jax.random.uniform(choice_key, (2 + more,)), noise_key


def denoising_loss(
    denoiser: Denoiser, loss_weight: str = "uniform", auxiliary: Sequence[Weighted] = ()
) -> Callable[[Params, Drawn], Sums]:
    """loss(params, drawn): the weighted squared error of the prediction and the auxiliary losses,
    over wanted tokens; metrics are the auxiliary losses."""
    hidden = hidden_layers(auxiliary)

    def loss(params: Params, drawn: Drawn) -> Sums:
        # All that has tokens is split as they are: positions alone are as large as activations are.
        parts = jax.tree.map(denoiser.constrain, (drawn.x0, drawn.eps, drawn.layout, drawn.targets))
        x0, eps, layout, targets = parts
        drawn = drawn._replace(x0=x0, eps=eps, layout=layout, targets=targets)
        x_t = denoiser.add_noise(x0, eps, drawn.t, layout)
        denoised = denoiser(params["dit"], x_t, drawn.t, layout, drawn.condition, hidden)
        error, wanted = denoised.error(x0, eps, loss_weight), layout.wanted()[..., None]
        metrics = {}
        for name, row, weight in (*variance_bound(denoiser), *auxiliary):
            more = row.loss(params.get("auxiliary", {}).get(name), denoised, drawn)
            error = error + weight * more
            if row.metric:
                copies = x0.shape[-1] // more.shape[-1]  # of a token's error, one an element
                metrics[name] = jnp.where(wanted, more, 0.0).sum() * copies
        total = jnp.where(wanted, error, 0.0).sum()
        return total, (wanted.sum() * x0.shape[-1]).astype(jnp.float32), metrics

    return loss


def denoising_objective(
    denoiser: Denoiser, rows: Rows, loss_weight: str = "uniform", auxiliary: Sequence[Weighted] = ()
) -> Objective:
    """The mean squared error of the prediction over wanted tokens of dense or packed `rows`.

    Groups of parameters: "dit", a learned encoder's "text", and "auxiliary" by name of the loss.
    `frozen` holds the latents' "mean" and "std" (Z,), a pretrained encoder's "text" where features
    are not in the batch, and the "empty" text of `Denoiser.empty_text`, if there is one.
    """
    encoder, denoising = denoiser.encoder, denoising_loss(denoiser, loss_weight, auxiliary)
    targets = target_names(auxiliary)

    def init(key: jax.Array, batch: Batch) -> Params:
        text_key, dit_key = jax.random.split(key)
        first = {name: value[:1] for name, value in batch.items()}
        groups: Params = {}
        if not encoder.frozen:
            captions = rows.captions(first)
            flat = (x.reshape(-1, x.shape[-1])[:1] for x in (captions["ids"], captions["mask"]))
            groups["text"] = encoder.init(text_key, *flat)
        if "features" not in first:
            first["features"] = jnp.zeros((*first["ids"].shape, encoder.dim))
        statistics = {"mean": jnp.zeros(1), "std": jnp.ones(1)}  # only shapes matter
        drawn = rows.draw(denoiser, {}, statistics, first, key, targets)
        inputs = drawn.layout, drawn.condition
        groups["dit"] = denoiser.network.init(dit_key, drawn.x0, *inputs)["params"]
        heads = {name: row.init for name, row, _ in auxiliary if row.init is not None}
        if heads:
            hidden = hidden_layers(auxiliary)
            denoised = denoiser(groups["dit"], drawn.x0, drawn.t, *inputs, hidden)
            head_keys = jax.random.split(jax.random.fold_in(dit_key, 1), len(heads))
            keys = dict(zip(heads, head_keys, strict=True))
            groups["auxiliary"] = {
                name: make(keys[name], denoised, drawn) for name, make in heads.items()
            }
        return groups

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        return denoising(params, rows.draw(denoiser, params, frozen, batch, key, targets))

    return Objective(init, loss)


class Chosen(NamedTuple):
    """The random choices for each sample of a dense batch."""

    source_Bn: jax.Array  # indices of its latent frames among those stored
    given_Bn: jax.Array
    t_B: jax.Array
    noise_BnhwZ: jax.Array
    drop_B: jax.Array  # drops all captions
    drop_BJ: jax.Array  # drops single captions


@dataclass(frozen=True)
class Dense:
    """Clips of one shape, each with a pattern of given spans.

    A batch holds "latent" (B, stored, h, w, Z) as `tokens.Patterns` says, "ids" and "mask"
    (B, S) of the caption (or its "features"), and "ordinal" (B,). Clips of several shots have
    (B, J, S) captions, the clip's and each shot's, and the shots' "starts" (B, J - 1) in seconds.
    Single captions are dropped with probability `caption_drop`, all of a clip with `text_drop`, and
    with them the "label" (B,) of class-conditional models. `longest`: tokens of the longest caption
    of a clip and of a shot, if known; captions are cut to it, and padding behind costs nothing.
    Of image to video, "beside" (B, n, h, w, Z) are the latents of `wan.begun_with`, and "image"
    (B, S, E) the features of the image.
    """

    table: Patterns
    shares: np.ndarray
    sample_times: Callable[[jax.Array], jax.Array]
    text_drop: float
    caption_drop: float = 0.0
    longest: tuple[int, int] | None = None

    def captions(self, batch: Batch) -> dict[str, jax.Array]:
        """The captions as (B, J, S, ...), cut to the longest."""
        captions = {name: batch[name] for name in ("ids", "mask", "features") if name in batch}
        if batch["mask"].ndim == 2:
            captions = {name: value[:, None] for name, value in captions.items()}
        words = max(self.longest) if self.longest else None
        return {name: value[:, :, :words] for name, value in captions.items()}

    def choose(self, batch: Batch, key: jax.Array) -> Chosen:
        """Each sample's choices come from its own key and ordinal."""
        captions = batch["mask"].shape[1] if batch["mask"].ndim == 3 else 0
        source, given = jnp.asarray(self.table.source), jnp.asarray(self.table.given)
        shape = (source.shape[1], *batch["latent"].shape[2:])
        # The last edge is left open, so that rounding cannot choose a pattern that is not there.
        cumulative = jnp.asarray(np.cumsum(self.shares)[:-1], jnp.float32)

        def one(key: jax.Array, ordinal: jax.Array) -> Chosen:
            time_u, (pattern_u, drop_u, *each_u), noise_key = choices(key, ordinal, captions)
            pattern = jnp.searchsorted(cumulative, pattern_u, side="right")
            return Chosen(
                source[pattern],
                given[pattern],
                self.sample_times(time_u),
                jax.random.normal(noise_key, shape),
                drop_u < self.text_drop,
                jnp.stack(each_u) < self.caption_drop if each_u else jnp.zeros(1, bool),
            )

        return jax.vmap(one)(sample_keys(key, batch["ordinal"]), batch["ordinal"])

    def draw(
        self, denoiser: Denoiser, params: Any, frozen: Any, batch: Batch, key: jax.Array,
        targets: Sequence[str] = (),
    ) -> Drawn:  # fmt: skip
        """See `Rows`."""
        chosen = self.choose(batch, key)
        seconds = jnp.asarray(self.table.times, jnp.float32)[chosen.source_Bn]
        place = seconds, chosen.given_Bn, batch.get("starts")

        def tokens(value: jax.Array, patch: tuple[int, int]) -> tuple[jax.Array, Layout]:
            picked = jax.vmap(lambda stored, source: stored[source])(value, chosen.source_Bn)
            return dense_tokens(picked, patch, *place)

        mean, std = (frozen[name].reshape(1, 1, 1, 1, -1) for name in ("mean", "std"))
        latent = (batch["latent"].astype(jnp.float32) - mean) / std
        x0, layout = tokens(latent, denoiser.patch)
        eps, _ = dense_tokens(chosen.noise_BnhwZ, denoiser.patch, *place)

        def target(value: jax.Array) -> jax.Array:
            if value.ndim == 5:
                return tokens(value, (1, 1))[0]
            picked = jax.vmap(lambda stored, source: stored[source])(value, chosen.source_Bn)
            return jnp.repeat(picked, x0.shape[1] // picked.shape[1], axis=1)

        wanted = {name: target(batch[name].astype(jnp.float32)) for name in targets}
        x0, eps, wanted = jax.tree.map(lambda x: fill(x, denoiser.multiple), (x0, eps, wanted))
        captions, shot_length = self.captions(batch), self.longest[1] if self.longest else None
        features = denoiser.features(params, frozen, captions, shot_length)
        mask = captions["mask"] & ~chosen.drop_BJ[..., None]
        condition = denoiser.condition(
            features, mask, chosen.drop_B, batch.get("label"), frozen.get("empty"), shot_length
        )
        if "beside" in batch:
            begun = (batch["beside"].astype(jnp.float32) - mean) / std
            begun = with_mask(begun, denoiser.network.beside)
            beside = fill(dense_tokens(begun, denoiser.patch, *place)[0], denoiser.multiple)
            image = batch["image"].astype(jnp.float32) if "image" in batch else None
            condition = dataclasses.replace(condition, beside=beside, image=image)
        return Drawn(x0, eps, chosen.t_B, filled(layout, denoiser.multiple), condition, wanted)
