"""CONTRIBUTING's published family, as written: one module and one row of the table."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.config.test_contributing import add, python

USE = """
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from experiments import base
from vdit.config import joined
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.published import text_folder, weights

config, folder = base.get_config("smoke"), Path(sys.argv[1])
config.text.encoder, config.text.path = "bert", str(folder)
joined.check(config)
tokenizer = build_tokenizer(config, folder)
encoder = build_text_encoder(config, tokenizer)
ids, mask = tokenizer.encode(["a red ball", ""])
assert tokenizer.decode(ids[0]) == "a red ball" and mask.sum() == 5, (ids, mask)
params = encoder.init(jax.random.key(0), ids, mask)
theirs = load_file(folder / "model.safetensors")
kernel = theirs["bert.encoder.layer.1.attention.self.key.weight"].T
np.testing.assert_array_equal(params["blocks"]["k"]["kernel"][1], kernel)
features = jax.jit(encoder.apply)(params, ids, mask)
assert features.shape == (2, config.text.length, 8) and np.isfinite(features).all()
# The key table goes both ways.
rows = text_folder.FAMILIES["bert"].rows
back = dict(weights.unload(params, rows[len(rows) // 2 :]))
for name, make in back.items():
    np.testing.assert_array_equal(make(), theirs[name])
"""


def synthetic(folder: Path) -> None:
    """A BERT of two layers as transformers would write it."""
    draw, width = np.random.default_rng(0), 8
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "ball"]
    shapes = {f"embeddings.{kind}_embeddings.weight": (count, width) for kind, count in (
        ("word", len(names)), ("position", 32), ("token_type", 2)
    )}  # fmt: skip
    linear = {
        "attention.self.query": (8, 8), "attention.self.key": (8, 8), "output.dense": (8, 32),
        "attention.self.value": (8, 8), "attention.output.dense": (8, 8),
        "intermediate.dense": (32, 8),
    }  # fmt: skip
    norms = ["embeddings.LayerNorm"]
    for layer in range(2):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        norms += [f"encoder.layer.{layer}.{n}LayerNorm" for n in ("attention.output.", "output.")]
    shapes |= {f"{name}.{leaf}": (width,) for name in norms for leaf in ("weight", "bias")}
    shapes["pooler.dense.bias"] = (width,)
    tensors = {f"bert.{n}": draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "bert", "vocab_size": len(names), "hidden_size": width,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "intermediate_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(names[:4])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_family_is_one_module_and_one_row(tmp_path: Path) -> None:
    synthetic(tmp_path / "bert")
    add("A published family", tmp_path)
    done = python(tmp_path, "-c", USE, str(tmp_path / "bert"))
    assert done.returncode == 0, done.stderr
