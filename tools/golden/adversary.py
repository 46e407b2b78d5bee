"""Makes tests/golden/adversary.npz: a patch discriminator and its losses in PyTorch.

The discriminator is Conv3d, GroupNorm and LeakyReLU on channels-first frames, with weights of
`weights`. For each case I: I/real and I/made, videos (B, T, H, W, 3); I/logits of the first;
I/hinge, half of the sum of both hinge losses (B,); I/fool, the generator's loss (B,), and
I/to_made, the gradient of its mean with respect to I/made. With I/features (B, T, H, W, 5) and
I/kernel (5, 3) as the decoder's last layer, I/adaptive is VQGAN's weight (arXiv:2012.09841,
equation 7, with the floor of its code) for the mean squared error. Run where torch is installed:

    python tools/golden/adversary.py tests/golden/adversary.npz
"""

import sys
from typing import Any

import numpy as np

WIDTH, LEVELS, GROUPS = 8, 2, 8
CASES = ((2, 3, 8, 12), (1, 1, 9, 7))


def weights() -> dict[str, dict[str, np.ndarray]]:
    """Parameters by layer, kernels as (frames, rows, columns, in, out)."""
    rng, before = np.random.default_rng(0), 3
    params: dict[str, dict[str, np.ndarray]] = {}
    for i in range(LEVELS + 1):
        width = WIDTH * 2**i
        kernel = rng.normal(size=(3, 3, 3, before, width)) * (2 / (27 * before)) ** 0.5
        params[f"conv{i}"] = {"kernel": kernel, "bias": 0.2 * rng.normal(size=width)}
        if i:
            scale, bias = 1.0 + 0.3 * rng.normal(size=width), 0.2 * rng.normal(size=width)
            params[f"norm{i}"] = {"scale": scale, "bias": bias}
        before = width
    kernel = rng.normal(size=(3, 3, before, 1)) * 0.2
    params["logits"] = {"kernel": kernel, "bias": rng.normal(size=1)}
    return {n: {k: v.astype(np.float32) for k, v in part.items()} for n, part in params.items()}


def main(target: str) -> None:
    """Writes the file."""
    import torch
    import torch.nn.functional as F

    tensors: Any = {n: {k: torch.tensor(v) for k, v in p.items()} for n, p in weights().items()}

    def judge(video: torch.Tensor) -> torch.Tensor:
        x = video.permute(0, 4, 1, 2, 3)
        for i in range(LEVELS + 1):
            # Two zero frames before; strided layers pad only right and bottom.
            margins = (0, 1, 0, 1, 2, 0) if i < LEVELS else (1, 1, 1, 1, 2, 0)
            layer, stride = tensors[f"conv{i}"], 2 if i < LEVELS else 1
            kernel = layer["kernel"].permute(4, 3, 0, 1, 2)
            x = F.conv3d(F.pad(x, margins), kernel, layer["bias"], (1, stride, stride))
            if i:
                norm = tensors[f"norm{i}"]
                frames = x.transpose(1, 2).flatten(0, 1)
                frames = F.group_norm(frames, GROUPS, norm["scale"], norm["bias"], 1e-6)
                x = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
            x = F.leaky_relu(x, 0.2)
        kernel = tensors["logits"]["kernel"].permute(3, 2, 0, 1)[:, :, None]
        return F.conv3d(x, kernel, tensors["logits"]["bias"], padding=(0, 1, 1))[:, 0]

    expected: dict[str, Any] = {}
    for case, shape in enumerate(CASES):
        torch.manual_seed(case)
        real, features = torch.rand(*shape, 3) * 2 - 1, torch.randn(*shape, 5)
        kernel = (0.3 * torch.randn(5, 3)).requires_grad_()
        made = features @ kernel
        logits, judged = judge(real), judge(made)
        axes = (1, 2, 3)
        hinge = 0.5 * (F.relu(1.0 - logits).mean(axes) + F.relu(1.0 + judged).mean(axes))
        fool = -judged.mean(axes)
        (to_made,) = torch.autograd.grad(fool.mean(), made, retain_graph=True)
        error = (made - real).square().mean()
        near, far = (
            torch.autograd.grad(x, kernel, retain_graph=True)[0].norm()
            for x in (error, fool.mean())
        )
        adaptive = torch.clamp(near / (far + 1e-4), 0.0, 1e4)
        parts = {
            "real": real, "made": made, "logits": logits, "hinge": hinge, "fool": fool,
            "to_made": to_made, "features": features, "kernel": kernel, "adaptive": adaptive,
        }  # fmt: skip
        expected |= {f"{case}/{name}": x.detach().numpy() for name, x in parts.items()}
    expected["versions"] = np.array([f"torch {torch.__version__}"])
    np.savez_compressed(target, **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
