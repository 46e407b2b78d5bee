"""Chunks: a caption of more tokens than a pretrained encoder has positions, in one row.

Such a caption is cut at the ends of sentences, or else between words, into chunks that each fit by
themselves, with special tokens of their own. Their tokens stand one after another in the caption's
row, one empty place between two chunks: so the mask alone tells them apart, and a caption of one
chunk is a row as ever. An encoder that knows chunks numbers places from each one's begin, and a
token sees its own chunk only: features are those of every chunk encoded alone.

Dimension key: N captions, S tokens of a caption.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

SENTENCE = re.compile(r"[.!?…][\"'’”)\]]*(?= )|[。！？]")


def cut_before(text: str, most: int) -> int:
    """Where to end a chunk of at most so many characters of a longer text without runs of spaces:
    behind the last sentence, else behind the last word, else (in a word that long) at `most`."""
    ends = [found.end() for found in SENTENCE.finditer(text, 0, most + 1) if found.end() <= most]
    space = text.rfind(" ", 0, most + 1)
    return ends[-1] if ends else space if space > 0 else most


def chunk_places(mask_NS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of each token's chunk, from 1, and its place there, from 0; (N, S) both.

    Both are 0 where the mask is false.
    """
    at = jnp.arange(mask_NS.shape[1])
    begins = mask_NS & ~jnp.pad(mask_NS, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(begins, at[None], 0), axis=1)
    return (
        jnp.where(mask_NS, jnp.cumsum(begins, 1), 0),
        jnp.where(mask_NS, at[None] - first, 0),
    )


def row_places(mask_NS: np.ndarray) -> np.ndarray:
    """Places (N,) up to a row's last token: its tokens, and the empty ones between chunks."""
    length = mask_NS.shape[-1]
    return np.where(mask_NS.any(-1), length - mask_NS[..., ::-1].argmax(-1), 0)
