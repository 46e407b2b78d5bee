"""Makes tests/golden/lora: adapters of tests/golden/wan/t2v by diffusers and by PEFT.

Each is a folder as its library writes it, with ranks and alphas that differ between modules;
expected.npz holds the outputs of diffusers for the inputs t2v/1x4x4 of tests/golden/wan, with each
adapter and with both, at the weights 0.5 and -2. Run where torch, diffusers and peft are installed:

    python tools/golden/lora.py tests/golden/lora
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model

WAN = Path("tests/golden/wan")
LENGTH = 512
COMMON: dict[str, Any] = {"r": 2, "init_lora_weights": False}
CONFIGS = {
    "diffusers": COMMON
    | {
        "lora_alpha": 3, "target_modules": ["to_q", "to_v", "to_out.0", "proj_out"],
        "rank_pattern": {"attn2.to_v": 3}, "alpha_pattern": {"attn1.to_q": 5},
    },
    "peft": COMMON
    | {"lora_alpha": 4, "target_modules": ["attn1.to_k", "ffn.net.2"], "use_rslora": True},
}  # fmt: skip


def base() -> Any:
    kind = WanTransformer3DModel
    return kind.from_pretrained(WAN / "t2v", torch_dtype=torch.float32).eval()


def answer(model: Any) -> np.ndarray:
    """The output (B, T, H, W, C) for the stored inputs."""
    stored = np.load(WAN / "expected.npz")
    x, text = (torch.from_numpy(stored[f"t2v/1x4x4/{name}"]) for name in ("x", "text"))
    text = torch.nn.functional.pad(text, (0, 0, 0, LENGTH - text.shape[1]))
    time = torch.from_numpy(stored["times"]).float()
    with torch.no_grad():
        out = model(x.permute(0, 4, 1, 2, 3), time, text).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def main(target: str) -> None:
    """Writes the folders and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    expected: dict[str, Any] = {}
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    both = base()
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        model = base()
        if name == "diffusers":
            model.add_adapter(LoraConfig(**config))
            model.save_lora_adapter(root / name)
        else:
            model = get_peft_model(model, LoraConfig(**config))
            model.save_pretrained(root / name)
        expected[name] = answer(model)
        plain, weight = dict(base().named_parameters()), (0.5, -2.0)[number]
        whole = model.merge_and_unload() if name == "peft" else model
        if name == "diffusers":
            whole.fuse_lora()
        with torch.no_grad():
            for key, value in whole.named_parameters():
                key = key.replace(".base_layer", "")
                if key in plain:
                    both.get_parameter(key).add_(weight * (value - plain[key]))
    for extra in (root / "peft").glob("README*"):
        extra.unlink()
    np.savez_compressed(root / "expected.npz", **expected, both=answer(both))


if __name__ == "__main__":
    main(*sys.argv[1:])
