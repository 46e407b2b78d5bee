"""Captions longer than a pretrained encoder's context, encoded in chunks of one row.

Such a caption is cut at ends of sentences, or else between words, into chunks that fit, each with
its special tokens. Chunks follow one another in the caption's row with one masked place between
them, so the mask alone delimits them, and a caption of one chunk is an ordinary row. Positions
count from each chunk's start and a token attends to its own chunk: features are those of every
chunk encoded alone.

Dimension key: N captions, S tokens of a caption.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

SENTENCE = re.compile(r"[.!?…][\"'’”)\]]*(?= )|[。！？]")


def cut_before(text: str, most: int) -> int:
    """Where to end a chunk of at most `most` characters of a longer text without runs of spaces:
    after the last sentence, else after the last word, else at `most`."""
    ends = [found.end() for found in SENTENCE.finditer(text, 0, most + 1) if found.end() <= most]
    space = text.rfind(" ", 0, most + 1)
    return ends[-1] if ends else space if space > 0 else most


def chunk_places(mask_NS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's chunk, from 1, and its position in it, from 0: both (N, S), 0 where masked."""
    at = jnp.arange(mask_NS.shape[1])
    begins = mask_NS & ~jnp.pad(mask_NS, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(begins, at[None], 0), axis=1)
    return (jnp.where(mask_NS, jnp.cumsum(begins, 1), 0), jnp.where(mask_NS, at[None] - first, 0))


def row_places(mask_NS: np.ndarray) -> np.ndarray:
    """Length (N,) of each row up to its last token, masked places between chunks included."""
    length = mask_NS.shape[-1]
    return np.where(mask_NS.any(-1), length - mask_NS[..., ::-1].argmax(-1), 0)
