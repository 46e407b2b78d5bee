"""The loss with which a finetuning of Wan begins, beside diffusers' and transformers' own parts,
and the way of trained weights back to them: `pytest -m reference`.

Times and noise are those that were drawn here; all else is computed in torch from the pixels and
the caption.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import wan
from tests.test_reference_wan import PIPELINES, parts, unipc
from tools import export_weights, import_weights
from vdit import run
from vdit.config.denoiser import build_denoiser, training_times
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.data import sources
from vdit.data.latents import Latents
from vdit.nn.patch import unpatchify
from vdit.objectives.auxiliary import Drawn
from vdit.objectives.diffusion import Dense, denoising_loss
from vdit.runtime.checkpoint import all_steps, load_meta, restore_ema, restore_raw
from vdit.runtime.video import write_mp4
from vdit.stages import pattern_table
from vdit.tokens import pattern_shares

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

PROMPT, FRAMES, SIZE = "a small red ball falls", 9, (32, 64)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0).integers(0, 256, (2, FRAMES, 4, 8, 3), np.uint8)
    for i, video in enumerate(noise.repeat(8, 2).repeat(8, 3)):
        write_mp4(root / f"{i}.mp4", video, 16)
        (root / f"{i}.txt").write_text(PROMPT)
    return root


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ftfy, which mends broken Unicode, the pipeline does not run."""
    where, made = diffusers.pipelines.wan.pipeline_wan_i2v, types.SimpleNamespace(fix_text=str)
    monkeypatch.setattr(where, "ftfy", made, raising=False)


def imported(name: str, place: Path, clips: Path) -> tuple[Any, Path, ConfigDict]:
    """A pipeline of diffusers, a workdir that was imported from it, and how it is finetuned."""
    beside, image, fields = PIPELINES[name]
    made = parts(beside, image, "a14b" in name, "wan22" if name == "ti2v" else "wan21")
    kind = diffusers.WanImageToVideoPipeline if "i2v" in name else diffusers.WanPipeline
    theirs, work = kind(**made, scheduler=unipc(), **fields), place / "work"
    theirs.save_pretrained(place / "source")
    assert import_weights.main([f"--source={place / 'source'}", f"--workdir={work}"]) == 0
    config = wan.get_config("smoke")
    config.update_from_flattened_dict({
        "data.path": str(clips), "data.size": SIZE, "run.dtype": "float32", "dit.text_drop": 0.0,
        "dit.train.batch": 8, "dit.train.steps": 1, "dit.train.warmup": 0,
    })  # fmt: skip
    if name == "ti2v":
        config.dit.given.text, config.dit.given.image = 0.0, 1.0
    return theirs, work, config


@dataclasses.dataclass
class Ours:
    """The first clips of a workdir as a stage learns from them."""

    config: ConfigDict
    work: Path
    stage: str

    @functools.cached_property
    def drawn(self) -> Drawn:
        config, tokenizer = self.config, build_tokenizer(self.config, self.work)
        encoder, table = build_text_encoder(config, tokenizer), pattern_table(config)
        shares, times = dict(config.dit.given), training_times(config, self.stage)
        self.denoiser = build_denoiser(config, encoder)
        rows = Dense(table, pattern_shares(table, shares), times, 0.0)
        stored = [Latents(self.work / "latents")[i] for i in range(2)]
        batch = {name: np.stack([row[name] for row in stored]) for name in stored[0]}
        batch["ordinal"] = np.array([3, 8], np.uint32)
        frozen = {name: jnp.asarray(x) for name, x in self.statistics.items()}
        frozen["empty"] = self.denoiser.empty_text(tokenizer)
        return rows.draw(self.denoiser, {}, frozen, batch, jax.random.key(1))

    @property
    def statistics(self) -> dict[str, Any]:
        return self.read(load_meta, max(all_steps(self.work / "checkpoints" / self.stage)))[
            "latents"
        ]

    def read(self, reader: Any, step: int) -> Any:
        return reader(self.work / "checkpoints" / self.stage, step)

    def loss(self, params: Mapping[str, Any]) -> jax.Array:
        drawn = self.drawn
        total, weight, _ = jax.jit(denoising_loss(self.denoiser))(dict(params), drawn)
        return total / weight

    @property
    def noise(self) -> Any:
        """eps (B, Z, n, h, w) of torch."""
        t, h, w = self.drawn.layout.grid or (1, 1, 1)
        eps = unpatchify(self.drawn.eps.reshape(2, t, h, w, -1), (1, 2, 2))
        return torch.from_numpy(np.moveaxis(np.asarray(eps), -1, 1).copy())

    def expected(self, theirs: Any, name: str) -> float:
        clips = sources.training_clips(self.config, self.work)
        pixels = np.stack([clips[i]["video"] for i in range(2)])
        network = theirs.transformer_2 if self.stage == "low" else theirs.transformer
        return expected(theirs, network, name, pixels, np.array(self.drawn.t), self.noise)


@torch.no_grad()
def expected(
    theirs: Any, network: Any, name: str, pixels: np.ndarray, t: np.ndarray, noise: Any
) -> float:
    """Flow matching: the network's flow at (1 - t) x0 + t eps beside eps - x0."""
    video = torch.from_numpy(pixels).float().permute(0, 4, 1, 2, 3) / 127.5 - 1
    mean, std = (
        torch.tensor(getattr(theirs.vae.config, f"latents_{which}")).view(1, -1, 1, 1, 1)
        for which in ("mean", "std")
    )
    x0 = (theirs.vae.encode(video).latent_dist.mode() - mean) / std
    text, _ = theirs.encode_prompt(
        [PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512
    )
    level = torch.from_numpy(t).view(-1, 1, 1, 1, 1)
    x_t, time, wanted, more = (1 - level) * x0 + level * noise, 1000 * torch.from_numpy(t), 1.0, {}
    channels = x0.shape[1]
    if name == "ti2v":  # the first frame is given: its tokens have time 0 and no loss
        wanted = torch.ones_like(x0)
        x_t[:, :, :1], wanted[:, :, :1] = x0[:, :, :1], 0
        tokens = x0.shape[3] * x0.shape[4] // 4
        time = time[:, None].repeat(1, x0.shape[2] * tokens)
        time[:, :tokens] = 0
    if PIPELINES[name][0]:  # the pipeline's own condition of the clip's first frame
        shape, where = (1, channels, *SIZE, FRAMES), (torch.float32, "cpu", None)
        pairs = zip(video[:, None, :, 0], noise[:, None], strict=True)
        conditions = [theirs.prepare_latents(x, *shape, *where, z)[1] for x, z in pairs]
        x_t = torch.cat([x_t, torch.cat(conditions)], 1)
        if theirs.image_encoder is not None:
            images = [diffusers.utils.pil_utils.numpy_to_pil(frame[0] / 255)[0] for frame in pixels]
            more["encoder_hidden_states_image"] = theirs.encode_image(images, "cpu")
    flow = network(x_t, time, text, **more).sample
    error = (flow - (noise - x0)) ** 2 * wanted
    return float(error.sum() / (torch.ones_like(x0) * wanted).sum())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_loss_of_a_batch(name: str, tmp_path: Path, clips: Path, near: Any) -> None:
    """Of two experts each, at its own times."""
    theirs, work, config = imported(name, tmp_path, clips)
    config.stages = ("latents",)
    run.run(config, work)
    boundary = config.dit.wan.boundary
    for stage in ("dit", "low") if boundary else ("dit",):
        ours = Ours(config, work, stage)
        found = ours.loss(ours.read(restore_ema, 0))
        low = stage == "low"
        assert (ours.drawn.t < boundary).all() if low else (ours.drawn.t >= boundary).all()
        # Latents and features are stored in float16.
        near(f"Wan's loss, {name}, {stage}", found, ours.expected(theirs, name), 1e-4)


def test_a_trained_expert_is_read_by_diffusers(tmp_path: Path, clips: Path, near: Any) -> None:
    """Only the second is trained: the first is the source's."""
    name = "a14b t2v"
    theirs, work, config = imported(name, tmp_path, clips)
    config.stages, config.dit.train.learning_rate = ("latents", "low"), 0.01
    run.run(config, work)
    out, ours = tmp_path / "out", Ours(config, work, "low")
    command = [f"--workdir={work}", f"--out={out}", "--pipeline=link", "--raw"]
    assert export_weights.main(command) == 0
    assert [p.name for p in sorted(out.iterdir()) if not p.is_symlink()] == ["transformer_2"]
    before, again = ours.expected(theirs, name), type(theirs).from_pretrained(out)
    after = ours.expected(again, name)
    assert abs(after - before) > 0.01 * before
    found = ours.loss(ours.read(restore_raw, 1))
    near("Wan's loss of an expert after a step", found, after, 1e-4)
    for a, b in zip(again.transformer.parameters(), theirs.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
