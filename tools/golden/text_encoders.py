"""Makes tests/golden/text_encoders/: tiny T5, UMT5 and CLIP folders and outputs of transformers.

Folders as `save_pretrained` writes them: random weights, a tokenizer trained on a few sentences.
Together they cover both MLPs, both activations, three dtypes, shards, a decoder, a vision tower,
and names with and without a prefix. expected.npz has, for each folder F and length S: F/S/ids and
F/S/mask from the tokenizer, F/S/features of all tokens (for S = 512, every STRIDE-th) from the
encoder, and F/S/pooled for CLIP. Run where torch and transformers are installed:

    python tools/golden/text_encoders.py tests/golden/text_encoders
"""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

STRIDE = 37  # between stored tokens of a long text, for a small file
CAPTIONS = (
    "A small red ball falls to the floor.",
    "ball",
    "It's 3.5 m/s²; the CAFÉ's   naïve \N{SNOWMAN} robot won't\tstop?",
    "a large yellow square rolls away to the left and bounces off a tiny green hexagon",
    "",  # only the end token; to vdit an empty caption is no text
)
LONG = 512
WORDS = ("small large tiny red green blue yellow ball square hexagon falls rolls bounces floor left"
         " right away off to the and a it is robot stop won't").split()  # fmt: skip


def sentences() -> list[str]:
    """Text to train the tokenizers on."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(200)]


def unigram(folder: Path, pieces: int) -> None:
    """A tokenizer like that of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    split = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocab = [(piece, round(score, 4)) for piece, score in learned]  # reproducible
    T5Tokenizer(vocab=vocab, extra_ids=4).save_pretrained(folder)


def pairs(folder: Path, merges: int, pad: str) -> tuple[int, int]:
    """A tokenizer like that of CLIP; returns its size and the id of the end token."""
    blank = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", min_frequency=30, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"][:merges]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(m) for m in learned)]
    names = list(dict.fromkeys([*names, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {name: i for i, name in enumerate(names)}
    made = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in learned], pad_token=pad)
    made.save_pretrained(folder)
    return len(names), vocab["<|endoftext|>"]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Randomises all parameters, norms and biases too, at scales where all parts matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn_like(parameter)
            if name.endswith("norm.weight") or "layer_norm1.w" in name or "layer_norm2.w" in name:
                parameter.copy_(1.0 + 0.3 * draw)
            elif parameter.ndim == 2 and "embed" not in name and "shared" not in name:
                parameter.copy_(draw * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.5 * draw)
    return model.eval()


def long_caption(folder: Path) -> str:
    """A text of at most `LONG` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = " ".join(sentences()).split()
    count = next(n for n in range(1, LONG) if len(tokenizer(" ".join(words[:n])).input_ids) > LONG)
    return " ".join(words[: count - 1])


def expect(folder: Path, encoder: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Outputs of transformers for the captions (a long one for `LONG`), in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = encoder.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    for length in lengths:
        captions = [long_caption(folder)] if length == LONG else list(CAPTIONS)
        batch = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask)
        kept = mask.bool()
        if length == LONG:
            kept = kept & (torch.arange(length) % STRIDE == 0)[None]
        made = {"ids": ids.int(), "mask": mask.bool(), "features": out.last_hidden_state[kept]}
        if "pooler_output" in out:
            made["pooled"] = out.pooler_output
        found |= {f"{folder.name}/{length}/{name}": value.numpy() for name, value in made.items()}
    return found


def main(target: str) -> None:
    """Writes the folders and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    torch.manual_seed(0)
    t5 = {"vocab_size": 160, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_heads": 2, "num_layers": 2}
    expected: dict[str, Any] = {}

    # The full T5; the encoder ignores the decoder's tensors.
    unigram(root / "t5_relu", 150)
    model = randomise(T5ForConditionalGeneration(T5Config(**t5, num_decoder_layers=1)))
    model.half().save_pretrained(root / "t5_relu")
    expected |= expect(root / "t5_relu", T5EncoderModel, (80, LONG))

    unigram(root / "t5_gated", 150)
    model = randomise(T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")))
    model.bfloat16().save_pretrained(root / "t5_gated")
    expected |= expect(root / "t5_gated", T5EncoderModel, (80, LONG))

    unigram(root / "umt5", 150)
    sizes = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 50}
    model = randomise(UMT5EncoderModel(UMT5Config(**t5, **sizes)))
    model.save_pretrained(root / "umt5", max_shard_size="9KB")
    expected |= expect(root / "umt5", UMT5EncoderModel, (80, LONG))

    size, _ = pairs(root / "clip_quick", 40, "<|endoftext|>")
    clip = {"vocab_size": size, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 77}  # fmt: skip
    # As in old configurations: transformers then takes the largest id as the end token.
    model = randomise(CLIPTextModel(CLIPTextConfig(**clip, eos_token_id=2)))
    model.half().save_pretrained(root / "clip_quick")
    expected |= expect(root / "clip_quick", CLIPTextModel, (77,))

    size, end = pairs(root / "clip_gelu", 40, "!")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 4, "patch_size": 2}  # fmt: skip
    text = {**clip, "eos_token_id": end, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    model = randomise(CLIPModel(config))
    model.half().save_pretrained(root / "clip_gelu")
    expected |= expect(root / "clip_gelu", CLIPTextModel, (77,))

    expected["captions"] = np.array(CAPTIONS)
    expected["long"] = np.array(long_caption(root / "umt5"))
    expected["stride"] = np.array(STRIDE)
    expected["versions"] = np.array([f"torch {torch.__version__}",
                                     f"transformers {transformers.__version__}"])  # fmt: skip
    np.savez_compressed(root / "expected.npz", **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
