"""The denoiser: a network, its noise process and prediction, and its conditions, as one thing.

Training and sampling use it alike: `Denoiser(...)(params, x_t, t, layout, condition)`. Nothing else
knows how a network's output becomes x0 and eps, which noise levels it sees, or what stands for a
dropped caption; what networks differ in is `Network`.

Dimension key: B batch rows, L tokens, C token channels, M samples of a packed row, J captions of a
clip, S text tokens of a caption, E text width, K noise levels of a row, D width of a network.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vdit.diffusion.prediction import target, to_x0_eps, weight
from vdit.diffusion.schedule import Process, add_noise, like
from vdit.models.text import TextEncoder, Tokenizer, encode_features
from vdit.tokens import (
    Condition,
    Layout,
    drop_label,
    drop_packed_text,
    drop_text,
    fill,
    join_segments,
    of_segment,
    packed_condition,
    text_condition,
)


class Network(Protocol):
    """A Linen module (x_BLC, layout, condition) -> (B, L, C), and what networks differ in."""

    init: Callable[..., Any]
    apply: Callable[..., Any]

    @property
    def one_time(self) -> bool:
        """One noise level for all tokens of a row, and one caption: nothing can be given."""

    @property
    def from_start(self) -> bool:
        """Positions count latent frames: what is given must be the beginning of a clip."""

    @property
    def beside(self) -> int:
        """Channels of `Condition.beside` for each place of the latents, a mask's and an image's:
        such a network is given the image that a video begins with, and nothing else."""

    @property
    def null_key(self) -> bool:
        """A dropped caption leaves a learned null key; otherwise, with a pretrained encoder, the
        features of the empty text take its place, as in published models."""

    @property
    def learned_variance(self) -> bool:
        """The output is (B, L, 2 C): behind the prediction the share of the step's variance between
        the posterior's and beta (Nichol and Dhariwal 2021, Eq. 15)."""

    @property
    def layers(self) -> int:
        """Layers whose output tokens (B, L, D) can be read: called with `hidden`, a tuple of
        numbers from 1 to `layers`, the network returns them as a dict beside its output."""


@dataclass(frozen=True)
class Denoised:
    """A denoiser's output for x_t at times t; x0 and eps are computed where they are read."""

    denoiser: "Denoiser"
    x_t: jax.Array  # (B, L, C)
    t: jax.Array  # () or (B,), or (B, L) for packed rows
    raw: jax.Array  # (B, L, C) the network's prediction: eps, x0, v or flow
    share: jax.Array | None  # (B, L, C) of a learned variance (`step.between`)
    hidden: Mapping[int, jax.Array] = field(default_factory=dict)  # tokens after a layer (B, L, D)

    @functools.cached_property
    def _x0_eps(self) -> tuple[jax.Array, jax.Array]:
        prediction, process = self.denoiser.prediction, self.denoiser.process
        return to_x0_eps(prediction, process, self.t, self.x_t, self.raw)

    @property
    def x0(self) -> jax.Array:
        return self._x0_eps[0]

    @property
    def eps(self) -> jax.Array:
        return self._x0_eps[1]

    def error(self, x0: jax.Array, eps: jax.Array, loss_weight: str) -> jax.Array:
        """The weighted squared error (B, L, C) of the prediction; x_t is this x0 and eps mixed."""
        prediction, process = self.denoiser.prediction, self.denoiser.process
        error = jnp.square(self.raw - target(prediction, process, self.t, x0, eps))
        return error * like(weight(loss_weight, prediction, process, self.t), error)


@dataclass(frozen=True)
class Denoiser:
    """A network, its process and prediction, and the encoder of its captions.

    `constrain` places (B, L, ...) arrays on a mesh, whose number of token shards `multiple` is:
    rows are padded to a multiple of it (`tokens.filled`).
    """

    network: Network
    process: Process
    prediction: str
    encoder: TextEncoder
    patch: tuple[int, int] = (1, 1)  # rows, columns of latents in one token
    constrain: Callable[[Any], Any] = lambda x: x
    multiple: int = 1

    def __call__(
        self, params: Any, x_t: jax.Array, t: jax.Array, layout: Layout, condition: Condition,
        hidden: tuple[int, ...] = (),
    ) -> Denoised:  # fmt: skip
        """x_t (B, L, C) at times t: (), (B,), or (B, M) of the samples of packed rows.

        `condition` may have any levels: those of `t` replace them. A layout may have padding behind
        x_t's tokens. `hidden`: the layers whose output tokens are returned too.
        """
        rows, length = x_t.shape[:2]
        level = self.levels(t if t.ndim else t[None])
        shots = condition.level.shape[1] // level.shape[1]
        level = jnp.tile(level, (rows // level.shape[0], shots))
        condition = dataclasses.replace(condition, level=level)
        tokens = self.constrain(fill(x_t, layout.slot.shape[1]))
        more = {"hidden": hidden} if hidden else {}
        out: Any = self.network.apply({"params": params}, tokens, layout, condition, **more)
        out, found = out if hidden else (out, {})
        share = None
        if tokens.shape[1] != length:
            out, found = jax.tree.map(lambda x: x[:, :length], (out, found))
        if self.network.learned_variance:
            out, share = jnp.split(out, 2, axis=-1)
        return Denoised(self, x_t, self.token_times(t, layout), out, share, found)

    def levels(self, t: jax.Array) -> jax.Array:
        """Noise levels (B, K) as the network sees them, of samples at times t (B,) or (B, M): of
        their wanted tokens and, if there can be any, of their given ones."""
        slots = [t] if self.network.one_time else [t, jnp.zeros_like(t)]
        return self.process.network_time(jnp.stack(slots, axis=-1)).reshape(len(t), -1)

    def token_times(self, t: jax.Array, layout: Layout) -> jax.Array:
        """Times with the leading axes of tokens: (B, L) for packed rows."""
        if t.ndim < 2:
            return t
        assert layout.segment is not None
        return of_segment(t, layout.segment)

    def add_noise(self, x0: jax.Array, eps: jax.Array, t: jax.Array, layout: Layout) -> jax.Array:
        """x_t (B, L, C) of wanted tokens. Given ones stay clean: they are kept out of the algebra,
        whose gradient is not finite there."""
        noisy = add_noise(self.process, x0, eps, self.token_times(t, layout))
        return jnp.where(layout.wanted()[..., None], noisy, x0)

    # ---------------------------------------------------------------------------------------------
    # Conditions

    def features(
        self, params: Mapping[str, Any], frozen: Mapping[str, Any],
        captions: Mapping[str, jax.Array], shot_length: int | None = None,
    ) -> jax.Array:  # fmt: skip
        """Features (..., S, E): cached ones if the batch carries them, else encoded from token ids.

        A pretrained encoder's parameters are frozen["text"], a learned one's params["text"]. Of
        captions (B, J, S) all but the first are encoded at `shot_length` tokens, if it is given.
        """
        if "features" in captions:
            return captions["features"].astype(jnp.float32)
        weights = frozen["text"] if self.encoder.frozen else params["text"]

        def encode(ids: jax.Array, mask: jax.Array) -> jax.Array:
            flat = self.encoder.apply(weights, *(x.reshape(-1, x.shape[-1]) for x in (ids, mask)))
            return flat.reshape(*ids.shape, -1)

        ids, mask = captions["ids"], captions["mask"]
        if shot_length is None or ids.shape[1] == 1:
            return encode(ids, mask)
        shots = encode(ids[:, 1:, :shot_length], mask[:, 1:, :shot_length])
        shots = jnp.pad(shots, ((0, 0), (0, 0), (0, ids.shape[2] - shot_length), (0, 0)))
        return jnp.concatenate([encode(ids[:, :1], mask[:, :1]), shots], axis=1)

    def condition(
        self, features_BJSE: jax.Array, mask_BJS: jax.Array, drop_B: jax.Array,
        label_B: jax.Array | None = None, empty: Mapping[str, jax.Array] | None = None,
        shot_length: int | None = None,
    ) -> Condition:  # fmt: skip
        """The condition of a dense batch of captions and classes, dropped where `drop_B` is true.

        `empty`: "features" (S, E) and "mask" (S,) of the empty text, which then replaces dropped
        captions (see `Network.null_key`). `shot_length`: see `text_condition`.
        """
        if empty is not None:
            mask_BJS = mask_BJS & ~drop_B[:, None, None]
            wordless = ~mask_BJS.any(-1, keepdims=True)
            mask_BJS = jnp.where(wordless, empty["mask"][None, None], mask_BJS)
            features_BJSE = jnp.where(
                wordless[..., None], empty["features"][None, None], features_BJSE
            )
        flat = (x.reshape(-1, *x.shape[2:]) for x in (features_BJSE, mask_BJS))
        pooled = self.encoder.pool(*flat).reshape(*mask_BJS.shape[:2], -1)
        level = self.levels(jnp.zeros(len(drop_B)))
        condition = text_condition(features_BJSE, mask_BJS, pooled, level, shot_length)
        if label_B is not None:
            condition = drop_label(dataclasses.replace(condition, label=label_B), drop_B)
        return condition if empty is not None else drop_text(condition, drop_B)

    def empty_text(self, tokenizer: Tokenizer, params: Any = None) -> dict[str, np.ndarray]:
        """The "features" (S, E) and "mask" (S,) of the text without words where it stands for no
        text (see `Network.null_key`), else nothing. `params`: the encoder's, read if not given."""
        if self.network.null_key or not self.encoder.frozen:
            return {}
        ids, mask = tokenizer.empty()
        params = self.encoder.init(jax.random.key(0), ids, mask) if params is None else params
        return {"features": encode_features(self.encoder, params, ids, mask)[0], "mask": mask[0]}

    def packed_condition(
        self, features_NSE: jax.Array, mask_NS: jax.Array, text_BS: jax.Array, drop_BM: jax.Array
    ) -> Condition:
        """The condition of packed rows of captions (N = B·M, S), which lie in them as `text_BS`
        says, dropped where `drop_BM` is true."""
        samples = drop_BM.shape[1]
        pooled = self.encoder.pool(features_NSE, mask_NS).reshape(*drop_BM.shape, -1)
        features = join_segments(features_NSE, text_BS, samples)
        level = self.levels(jnp.zeros(drop_BM.shape))
        condition = packed_condition(features, text_BS, pooled, level)
        return drop_packed_text(condition, drop_BM)
