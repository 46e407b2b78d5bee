"""Text: captions to token ids, token ids to features.

The encoder here is a small transformer over byte pairs, trained with the denoiser. Pretrained,
frozen ones are in `vdit.published`, with the table of all (`text_folder.ENCODERS`). An empty or
blank caption is the null text: no token at all. What attends to text needs a null key of its own.

Dimension key: N captions, S tokens of a caption, D width, H heads, K head dim.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vdit.errors import UserError
from vdit.models.chunks import cut_before, row_places
from vdit.nn import dot_product
from vdit.nn.attention import Attention
from vdit.nn.linear import MLP, RMSNorm, zeros
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles
from vdit.nn.stack import Gather, stack

PAD = "[PAD]"  # id 0 of a learned tokenizer
ECHO = 60  # characters of a prompt that an error repeats


def _one_line(caption: str) -> str:
    """The caption with runs of white space collapsed, and none at the ends."""
    return " ".join(caption.split())


def _shortened(text: str) -> str:
    """At most `ECHO` characters of a text, quoted and escaped."""
    return repr(text if len(text) <= ECHO else text[: ECHO - 3] + "...")


class Tokenizer:
    """Captions to padded token ids of one static length.

    `json` is the text of a tokenizer.json of the library `tokenizers`; `length` is the budget S in
    tokens, special ones included. With `padding`, padding counts as tokens of the text. `chunk` is
    the number of the encoder's positions: a text of more tokens is split into chunks (`chunks.py`).
    """

    def __init__(
        self, json: str, length: int, padding: bool = False, chunk: int | None = None
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"the tokenizer's JSON is not readable: {error}") from error
        self._tokenizer.encode_special_tokens = True  # a prompt that says "[PAD]" is only text
        self._pad = (self._tokenizer.padding or {"pad_id": 0})["pad_id"]
        self._tokenizer.no_padding()
        self.length, self.padding, self.chunk = length, padding, chunk
        self.vocab: int = 1 + max(self._tokenizer.get_vocab().values())

    def encode(
        self, captions: Sequence[str], where: str = "prompt"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (N, S), padded (with 0, or as the JSON says), and their mask, True for tokens.

        A null text has an empty mask; one empty place separates two chunks. A caption over the
        budget, or one that is not Unicode text, is a `UserError` that says `where` (with its number
        among several).
        """
        ids_NS = np.full((len(captions), self.length), self._pad, np.int32)
        mask_NS = np.zeros((len(captions), self.length), bool)
        for row, caption in enumerate(captions):
            text = _one_line(caption)
            name = f"{where} {row + 1} of {len(captions)}" if len(captions) > 1 else where
            try:
                tokens = self._tokenizer.encode(text)
            except TypeError:
                line = f"{name} {_shortened(text)} is not Unicode text; allowed: UTF-8"
                raise UserError(line) from None
            if all(tokens.special_tokens_mask):
                continue
            count, chunks = len(tokens.ids), [tokens.ids]
            if self.chunk is not None and self.chunk < count <= self.length:
                chunks = self._chunks(text, name, self.chunk)
                count = sum(map(len, chunks)) + len(chunks) - 1
            if count > self.length:
                cut = f" in {len(chunks)} chunks" if len(chunks) > 1 else ""
                line = f"is {count} tokens long{cut}; allowed: {self.length}"
                raise UserError(f"{name} {_shortened(text)} {line}")
            at = 0
            for ids in chunks:
                ids_NS[row, at : at + len(ids)] = ids
                mask_NS[row, at : at + len(ids)] = True
                at += len(ids) + 1
            mask_NS[row] |= self.padding
        return ids_NS, mask_NS

    def count(self, caption: str) -> int:
        """The tokens of a caption, as `encode` counts them."""
        text = _one_line(caption)
        count = len(self._tokenizer.encode(text).ids)
        if self.chunk is not None and self.chunk < count <= self.length:
            chunks = self._chunks(text, "caption", self.chunk)
            count = sum(map(len, chunks)) + len(chunks) - 1
        return count

    def _chunks(self, text: str, name: str, most: int) -> list[list[int]]:
        """The ids of a text's chunks, of at most `most` tokens each."""
        chunks = []
        while text:
            tokens = self._tokenizer.encode(text)
            places = zip(tokens.offsets, tokens.special_tokens_mask, strict=True)
            begins = [begin for (begin, _), special in places if not special]
            fit = most - (len(tokens.ids) - len(begins))
            cut = len(text) if len(begins) <= fit else cut_before(text, begins[max(fit, 0)])
            ids = self._tokenizer.encode(text[:cut]).ids
            while len(ids) > most and cut:  # a word that is split may become more tokens
                cut -= 1
                ids = self._tokenizer.encode(text[:cut]).ids
            if not cut:
                line = f"has a character of more tokens than the encoder's {most} positions hold"
                raise UserError(f"{name} {_shortened(text)} {line}")
            chunks.append(ids)
            text = text[cut:].strip()
        return chunks

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (1, S) of the empty text, special tokens alone, and their mask."""
        ids = self._tokenizer.encode("").ids[: self.length]
        ids_1S = np.full((1, self.length), self._pad, np.int32)
        ids_1S[0, : len(ids)] = ids
        return ids_1S, np.arange(self.length)[None] < (self.length if self.padding else len(ids))

    def decode(self, ids_S: Sequence[int] | np.ndarray) -> str:
        """The text of one row's ids, without padding and other special tokens."""
        return self._tokenizer.decode([int(i) for i in ids_S]).removeprefix(" ")


def learned_tokenizer(captions: Iterable[str], vocab: int) -> str:
    """Byte-level BPE (Sennrich et al. 2016) of the captions, as the text of a tokenizer.json.

    Any text encodes, for every byte is a token; case does not matter. The same captions in any
    order give the same tokenizer. It has at most `vocab` tokens: [PAD], 256 bytes, and merged
    pairs that occur at least twice.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab <= len(alphabet):
        raise UserError(f"text vocabulary {vocab} given; allowed: {len(alphabet) + 1} or more")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=[PAD], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((_one_line(caption) for caption in captions), trainer)
    return tokenizer.to_str()


def no_tokenizer() -> str:
    """The text of a tokenizer.json that encodes every caption as the null text."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({PAD: 0}, unk_token=PAD))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    return tokenizer.to_str()


class NoText(nn.Module):
    """Zeros (N, S, 1) for any caption."""

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        return jnp.zeros((*ids_NS.shape, 1))


class Block(nn.Module):
    """Pre-norm self-attention and MLP; tokens see tokens, padding sees padding."""

    heads: int
    matmul: Matmul

    @nn.compact
    def __call__(
        self, x_NSD: jax.Array, mask_NS: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        attend = partial(dot_product.attend, on_cpu=self.matmul.on_cpu)
        attention = Attention(
            self.heads, attend, out_init=zeros, matmul=self.matmul, name="attention"
        )
        mlp = MLP(4 * x_NSD.shape[-1], down_init=zeros, matmul=self.matmul, name="mlp")
        normed = RMSNorm(name="attention_norm")(x_NSD)
        x_NSD = x_NSD + attention(normed, angles=angles, q_id_BL=mask_NS, k_id_BS=mask_NS)
        return x_NSD + mlp(RMSNorm(name="mlp_norm")(x_NSD)), None


class LearnedText(nn.Module):
    """Token ids (N, S) and their mask to features (N, S, D), zero where masked."""

    vocab: int
    width: int
    depth: int
    heads: int
    unroll: int
    matmul: Matmul
    gather: Gather = None

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        position_1S1 = jnp.arange(ids_NS.shape[1], dtype=jnp.float32)[None, :, None]
        angles = rotary_angles(position_1S1, self.width // self.heads, (1000.0,))
        blocks = stack(Block, self.depth, shared=2, unroll=self.unroll, gather=self.gather)
        # Features begin as the tokens themselves; the blocks, zero at the start, add to them.
        init = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocab, self.width, embedding_init=init, name="tokens")(ids_NS)
        x, _ = blocks(self.heads, self.matmul, name="blocks")(x, mask_NS, angles)
        return jnp.where(mask_NS[..., None], RMSNorm(name="norm")(x), 0.0)


def pool_mean(features_NSD: jax.Array, mask_NS: jax.Array) -> jax.Array:
    """The mean over each caption's tokens (N, D); zero for a null text."""
    weight_NS1 = mask_NS[..., None].astype(features_NSD.dtype)
    total_ND = (features_NSD * weight_NS1).sum(1)
    return total_ND / jnp.maximum(weight_NS1.sum(1), 1)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder: its network, and the source of its parameters.

    A `frozen` one is pretrained: `init` reads its parameters (call it outside of jit), they are not
    trained, and its features may be cached. `pool` reduces the features and mask of each caption to
    one vector (N, D), zero for a null text.
    """

    name: str
    dim: int
    frozen: bool
    module: nn.Module
    load: Callable[[], Any] | None = None
    pool: Callable[[jax.Array, jax.Array], jax.Array] = pool_mean

    def init(self, key: jax.Array, ids_NS: Any, mask_NS: Any) -> Any:
        """Parameters: pretrained ones, or else random ones by `key`."""
        if self.load:
            return self.load()
        return self.module.init(key, ids_NS, mask_NS)["params"]

    def apply(self, params: Any, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        """Features float32 (N, S, D) of each token, zero where masked."""
        return jnp.asarray(self.module.apply({"params": params}, ids_NS, mask_NS))


def abstract(module: nn.Module) -> Any:
    """The abstract parameters of an encoder's network."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    return jax.eval_shape(module.init, jax.random.key(0), ids, mask)["params"]


@partial(jax.jit, static_argnums=0)
def _apply(encoder: TextEncoder, params: Any, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
    return encoder.apply(params, ids_NS, mask_NS)


def encode_features(
    encoder: TextEncoder, params: Any, ids_NS: np.ndarray, mask_NS: np.ndarray, batch: int = 64
) -> np.ndarray:
    """`encoder.apply` over any number of captions, in batches: float32 (N, S, D).

    Repeated captions are encoded once; a batch holds captions of similar length and is cut to a
    multiple of 8 tokens, which does not change the features and is up to S / 8 times faster.
    """
    _, first, again = np.unique(
        np.where(mask_NS, ids_NS, -1), axis=0, return_index=True, return_inverse=True
    )
    lengths = row_places(mask_NS[first])
    order = np.argsort(lengths, kind="stable")
    batch = max(1, min(batch, len(first)))
    features = np.zeros((len(first), ids_NS.shape[1], encoder.dim), np.float32)
    for start in range(0, len(first), batch):
        rows = order[start : start + batch]
        padded = first[np.resize(rows, batch)]  # the last batch repeats rows: one shape to compile
        longest = min(-(-int(lengths[rows[-1]]) // 8) * 8, ids_NS.shape[1])
        cut = slice(0, max(longest, 1))
        found = _apply(encoder, params, ids_NS[padded, cut], mask_NS[padded, cut])
        features[rows, cut] = np.asarray(found)[: len(rows)]
    return features[again.reshape(-1)]


def learned(
    vocab: int, width: int = 128, depth: int = 2, heads: int = 4, unroll: int = 1,
    matmul: Matmul = Matmul(), gather: Gather = None,
) -> TextEncoder:  # fmt: skip
    """`vocab` is the tokenizer's; `matmul` and `gather`: see `DiT`."""
    if width % heads or (width // heads) % 2:
        raise UserError(f"text width {width}, heads {heads} given; allowed: heads of an even size")
    module = LearnedText(vocab, width, depth, heads, unroll, matmul, gather)
    return TextEncoder("learned", width, frozen=False, module=module)


def no_text() -> TextEncoder:
    return TextEncoder("none", 1, frozen=True, module=NoText(), load=dict)
