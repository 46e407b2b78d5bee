# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # vdit: train a video diffusion transformer, then ask it for videos
#
# Choose a TPU under *Runtime → Change runtime type* (a GPU or a CPU works too), then *Run all*.
# Everything is written under `runs/`; run the notebook again and training goes on where it
# stopped. With `VDIT_SMOKE=1` in the environment it walks through every stage at a size at which
# nothing can be learned.
#
# ## Install
#
# Inside a checkout this finds its root; elsewhere, as in a fresh Colab runtime, it asks for the
# address to clone. Packages are installed only where some are missing.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if Path("../vdit/main.py").is_file():  # Jupyter starts in the notebook's folder
    os.chdir("..")
if not Path("vdit/main.py").is_file():
    if not Path("vdit-checkout").is_dir():
        address = input("git address of vdit: ")
        subprocess.run(["git", "clone", "--depth=1", address, "vdit-checkout"], check=True)
    os.chdir("vdit-checkout")
if not all(map(importlib.util.find_spec, ("vdit", "av", "grain", "ml_collections", "pymunk"))):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", "."]
    subprocess.run(install, check=True)
    importlib.invalidate_caches()

# %%
import jax
import numpy as np
from IPython.display import HTML, Markdown, display

import vdit
from experiments import base
from vdit.data import sources
from vdit.run import run
from vdit.runtime import metrics
from vdit.runtime.video import to_data_uri, webp_bytes
from vdit.sample import Given

print(f"jax {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Train
#
# The world is simulated: bodies of a colour, shape and size fall, are thrown or roll, and a caption
# says so. `vae` learns to compress clips, `latents` encodes the data set once, `dit` learns to
# denoise, `eval` scores held-out captions. (The terminal does the same with
# `python -m vdit.main --config=experiments/base.py`, and the stage `sample`, which the cells below
# stand for, besides.) Any field of `vdit/config.py` may be changed before the run.

# %%
variant = "smoke" if os.environ.get("VDIT_SMOKE") else ""
workdir = Path("runs", f"colab-{variant}" if variant else "colab").absolute()
config = base.get_config(variant)
config.stages = ("vae", "latents", "dit", "eval")
run(config, workdir)

# %% [markdown]
# ## Text to video
#
# `generate` takes one prompt or many. The same seed gives the same video. `seconds`, `fps`, `size`,
# `steps` and `guidance` are free; left out, they are those of the config.


# %%
def show(videos, fps, zoom=config.sample.zoom // 2):
    """Videos (T, H, W, 3) side by side, moving."""
    picture = webp_bytes(np.concatenate(videos, axis=2), fps, zoom)
    display(HTML(f'<img src="{to_data_uri(picture, "image/webp")}">'))


model = vdit.load(workdir)
fps = config.data.fps
results = model.generate("A large red ball falls next to a small blue box.", num=4, seed=0)
show([result.video for result in results], fps)

# %% [markdown]
# ## Image to video
#
# A given frame comes back exactly as it was given. Here it is the first frame of a held-out clip,
# which stands on the left of four ways in which it might go on.

# %%
clip = sources.source(config, "heldout", workdir)[0]
first = Given(clip["video"][:1], frame=0)
results = model.generate(clip["caption"], num=4, seed=1, given=[first])
assert all((result.video[0] == clip["video"][0]).all() for result in results)
print(clip["caption"])
show([clip["video"], *(result.video for result in results)], fps)

# %% [markdown]
# ## Scores
#
# An oracle that knows the renderer reads colours, shapes, sizes and motions from the frames. The
# same code scores real held-out clips and their reconstructions, which are the two ceilings.
# Gravity is the median relative error of a fit to the bodies' free flight: less is better.

# %%
names = ["colour", "shape", "size", "motion", "permanence", "every_attribute"]
names += ["gravity_error_median"]
rows = [row for row in metrics.read(workdir) if row["stage"] == "eval" and "split" in row]
lines = [["split", "objects", "clips", *(name.replace("_", " ") for name in names)]]
lines += [["---"] * len(lines[0])]
for row in rows:
    values = ["–" if row[name] is None else f"{row[name]:.2f}" for name in names]
    lines.append([row["split"], row["objects"], str(row["clips"]), *values])
display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))

# %% [markdown]
# `report.html` in the workdir is the whole run on one page; `metrics.jsonl` holds every number,
# and `%tensorboard --logdir runs` shows them as curves.
