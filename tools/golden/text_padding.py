"""Makes tests/golden/text_padding.npz: CLIP's features of padded texts as in Stable Diffusion: ids
padded to the maximum length, without a mask.

Run where torch and transformers are installed:

    python tools/golden/text_padding.py tests/golden/text_encoders tests/golden/text_padding.npz
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPTextModel

FOLDERS, LENGTH = ("clip_quick", "clip_gelu"), 20
TEXTS = ("a small red ball falls", "ball", "")


def main(folders: str, target: str) -> None:
    """Writes F/ids and F/features for each folder F."""
    found: dict[str, Any] = {}
    for name in FOLDERS:
        folder = Path(folders) / name
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = {"local_files_only": True, "dtype": torch.float32}
        model = CLIPTextModel.from_pretrained(folder, **kind).eval()
        padding = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
        ids = tokenizer(list(TEXTS), **padding).input_ids
        with torch.no_grad():
            features = model(ids, attention_mask=None).last_hidden_state
        found |= {f"{name}/ids": ids.numpy().astype(np.int32), f"{name}/features": features.numpy()}
    np.savez_compressed(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
