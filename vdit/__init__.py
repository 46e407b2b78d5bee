"""vdit: video diffusion transformers in JAX.

import vdit
model = vdit.load("runs/base")
videos = model.generate("a large red ball falls next to a small blue box", num=4)
"""

from collections.abc import Sequence
from typing import Any

from vdit import errors as errors  # first: Ctrl-C is one line, also while the rest is imported

__version__ = "0.1.0"


def load(workdir: Any, mesh: Any = None, lora: Sequence[str] = ()) -> Any:
    """A trained workdir, or the weights of that name in the package, ready to `generate`: a
    `vdit.sample.Model`.

    With a mesh (`vdit.runtime.mesh.make_mesh({"fsdp": 4, "sequence": 2})`) its devices share the
    denoiser's parameters and a clip's tokens; without one it samples where that is fastest. `lora`:
    files of adapters that are merged, as FILE or FILE:WEIGHT.
    """
    from vdit.sample import load as load_model

    return load_model(workdir, mesh=mesh, lora=lora)


__all__ = ["load"]
