"""The interface of video autoencoders, and streaming of clips and frames of any size.

A clip is encoded and decoded in chunks of latent frames, with a state carried between them; large
frames are decoded in tiles, each with a state of its own. So memory grows neither with the length
of a clip nor with the size of its frames.

Dimension key: B batch, T frames, H height, W width, C channels; t h w latent frames and places,
Z latent channels.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.nn.tiles import tiled

State = Any  # a pytree of arrays; None at the start of a clip
Half = Callable[[Any, State], tuple[jax.Array, State]]  # the encoder, or the decoder


class Autoencoder(nn.Module):
    """Video (B, T, H, W, 3) in [-1, 1] to latents (B, t, h, w, Z) and back, causal in time.

    1 + k·p frames become 1 + k latent frames. Without a state a clip begins; with one it continues
    (by k·p frames).
    """

    LAST: ClassVar[tuple[str, ...]] = ()  # path of the decoder's last kernel

    patch: tuple[int, int, int]  # downsampling factors p, q, r in (t, h, w)
    channels: int

    def encode(
        self, video_BTHWC: jax.Array, state: State = None
    ) -> tuple[jax.Array, jax.Array, State]:
        """Mean and log-variance (B, t, h, w, Z) of a clip's latents, and the new state."""
        raise NotImplementedError

    def decode(self, latent_BthwZ: jax.Array, state: State = None) -> tuple[jax.Array, State]:
        """Video (B, T, h·q, w·r, 3) of latents, and the new state; crop to size."""
        raise NotImplementedError

    def __call__(
        self, video_BTHWC: jax.Array, noise_BthwZ: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reconstruction, mean and log-variance; the latents are mean + deviation · noise."""
        mean, log_variance, _ = self.encode(video_BTHWC)
        latent = mean + jnp.exp(0.5 * log_variance) * noise_BthwZ
        video, _ = self.decode(latent)
        return video[:, :, : video_BTHWC.shape[2], : video_BTHWC.shape[3]], mean, log_variance

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, Z) of a clip of 1 + k·p frames."""
        p, q, r = self.patch
        return 1 + (frames - 1) // p, -(-height // q), -(-width // r), self.channels


def encode_in_chunks(encode: Half, video_BTHWC: Any, p: int, chunk: int) -> jax.Array:
    """Latents (B, t, h, w, Z) of clips of 1 + k·p frames, `chunk` latent frames at a time."""
    frames = video_BTHWC.shape[1]
    cuts = [0, *range(1 + (chunk - 1) * p, frames, chunk * p), frames]
    state, parts = None, []
    for start, stop in itertools.pairwise(cuts):
        part, state = encode(video_BTHWC[:, start:stop], state)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def decode_in_chunks(
    decode: Half, latent_BthwZ: Any, patch: tuple[int, int, int], chunk: int, tile: int
) -> Iterator[jax.Array]:
    """Video of latents in parts (B, T, h·q, w·r, 3) of `chunk` latent frames each.

    Frames of more than `tile` pixels a side are decoded in tiles of about that size, which overlap
    by a quarter and are blended there (0: never).
    """
    _, q, r = patch
    _, count, h, w, _ = latent_BthwZ.shape
    places = tile // max(q, r)
    stride = places - places // 4
    states: dict[int, State] = {}
    for start in range(0, count, chunk):
        numbers = itertools.count()

        def run(part: jax.Array, numbers: Any = numbers) -> jax.Array:
            number = next(numbers)
            video, states[number] = decode(part, states.get(number))
            return video

        part = latent_BthwZ[:, start : start + chunk]
        if tile and max(h * q, w * r) > tile:
            output = (places * q, stride * q), (places * r, stride * r)
            yield tiled(run, part, places, stride, output)
        else:
            yield run(part)
