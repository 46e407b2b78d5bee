"""Writes tests/golden/i3d.npz: logits of the network of i3d-jax with random weights.

    pip install i3d-jax==0.0.1; PYTHONPATH=tests python -m tools.golden.i3d

Its batch norms want their arrays without the leading axes with which the package stores them.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from i3d_jax.i3d import InceptionI3d

OUT = Path(__file__).parents[2] / "tests" / "golden" / "i3d.npz"


def shapes() -> dict[str, tuple[list[int], bool]]:
    """Path ("a|b|c") -> the kernel's shape, and whether a batch norm follows."""
    made = jax.eval_shape(
        InceptionI3d().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 9, 224, 224, 3), "float32")
    )
    found = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if "Conv_0" in tree:
            found["|".join(path)] = [*tree["Conv_0"]["kernel"].shape], "BatchNorm_0" in tree
            return
        for name, part in tree.items():
            walk(part, (*path, name))

    walk(made["params"], ())
    return found


def main() -> None:
    """Writes the file: the shapes first, from which the test's weights are drawn."""
    np.savez_compressed(OUT, shapes=json.dumps(shapes()))
    from test_measure import clip, random_tree

    tree = random_tree()
    flat = jax.tree.map(
        lambda x: x.reshape(-1) if x.shape[:4] == (1,) * 4 else x, tree["batch_stats"]
    )
    logits, _ = jax.jit(InceptionI3d().apply)({**tree, "batch_stats": flat}, clip())
    np.savez_compressed(OUT, shapes=json.dumps(shapes()), logits=np.asarray(logits[0]))


if __name__ == "__main__":
    main()
