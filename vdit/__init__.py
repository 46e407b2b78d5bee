"""vdit: video diffusion transformers in JAX.

    import vdit
    model = vdit.load("runs/base")
    videos = model.generate("a large red ball falls next to a small blue box", num=4)
"""

from typing import Any


def load(workdir: Any) -> Any:
    """A trained workdir, ready to `generate`: a `vdit.sample.Model`."""
    from vdit.sample import load as load_model

    return load_model(workdir)


__all__ = ["load"]
