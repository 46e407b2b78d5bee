"""The networks of vdit in PyTorch, timed on request of tools/bench.py.

Started by `tools/bench.py` with a Python that has torch. It answers JSON lines on stdout:
{"version"} with that of torch; {"load": FILE} by building the network of the npz file with its
parameters, with the differences of output and losses from those stored; {"task", "dtype",
"compiled", "threads"} with the time of one run. This is optimised PyTorch: joint projections of q,
k and v, scaled_dot_product_attention, fused AdamW, inference mode, torch.compile of the entire
network.

Dimension key: B batch, L tokens, S text tokens, C channels, D width, N heads, K head dim; T latent
frames and P positions of the VAE.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arrays = Mapping[str, np.ndarray]
THETA = (10_000.0, 100.0, 100.0)
WARM_UP = 2


def part(arrays: Arrays, prefix: str, layer: int | None = None) -> dict[str, np.ndarray]:
    """The arrays under `prefix`/; of stacked ones, one layer."""
    return {
        name.removeprefix(f"{prefix}/"): value if layer is None else value[layer]
        for name, value in arrays.items()
        if name.startswith(f"{prefix}/")
    }


def linear(arrays: Arrays, *names: str) -> nn.Linear:
    """One linear layer with the kernels `names` concatenated."""
    kernel = np.concatenate([arrays[f"{name}/kernel"] for name in names], axis=1)
    has_bias = f"{names[0]}/bias" in arrays
    made = nn.Linear(*kernel.shape, bias=has_bias)
    made.weight = parameter(kernel.T)
    if has_bias:
        made.bias = parameter(np.concatenate([arrays[f"{name}/bias"] for name in names]))
    return made


def parameter(array: np.ndarray) -> nn.Parameter:
    """A parameter that owns its memory."""
    return nn.Parameter(torch.tensor(np.ascontiguousarray(array)))


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), 1e-6)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sincos(value: Tensor, dim: int, theta: float = 10_000.0) -> Tensor:
    half = dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = value[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_angles(
    position_LA: Tensor, head_dim: int, theta: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., 1, L, K/2), for queries laid out (..., N, L, K)."""
    axes, pairs = position_LA.shape[-1], head_dim // 2
    share = pairs // axes
    counts = (pairs - share * (axes - 1),) + (share,) * (axes - 1)
    angles = []
    for axis, count in enumerate(counts):
        frequency = theta[axis] ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(position_LA[..., axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)[..., None, :, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Attention with qk-norm; self-attention projects q, k and v at once, cross k and v."""

    def __init__(self, arrays: Arrays, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        if cross:
            self.q, self.kv = linear(arrays, "q"), linear(arrays, "k", "v")
        else:
            self.qkv = linear(arrays, "q", "k", "v")
        self.q_norm = parameter(arrays["q_norm/scale"])
        self.k_norm = parameter(arrays["k_norm/scale"])
        self.o = linear(arrays, "o")

    def forward(
        self,
        x_BLD: Tensor,
        memory_BSD: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if memory_BSD is None:
            q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(x_BLD), self.kv(memory_BSD).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)
        if angles is not None:
            q, k = rotate(q, angles).to(v.dtype), rotate(k, angles).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.up, self.down = linear(arrays, "up"), linear(arrays, "down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """The DiT's block: adaLN-Zero around self-attention and MLP, text cross-attention between."""

    def __init__(self, arrays: Arrays, heads: int) -> None:
        super().__init__()
        self.modulation = linear(arrays, "adaln/modulation")
        self.attention = Attention(part(arrays, "attention"), heads)
        self.cross = Attention(part(arrays, "cross"), heads, cross=True)
        self.mlp = MLP(part(arrays, "mlp"))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        condition: Tensor,
        pick_BLK: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chosen(
            self.modulation(F.silu(condition)), pick_BLK
        ).chunk(6, dim=-1)
        y = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, angles=angles)
        x = x + self.cross(layer_norm(x), text, mask=mask)
        y = layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(y)


def chosen(vectors_BKF: Tensor, pick_BLK: Tensor) -> Tensor:
    """Gathers each token's vector by slot; (B, 1, F) if there is a single slot."""
    return vectors_BKF if vectors_BKF.shape[1] == 1 else pick_BLK @ vectors_BKF


class DiT(nn.Module):
    """vdit.models.dit.DiT, joint attention, dense batches."""

    def __init__(self, arrays: Arrays, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = linear(arrays, "embed")
        self.embed_position = linear(arrays, "embed_position")
        self.level_in, self.level_out = linear(arrays, "level_in"), linear(arrays, "level_out")
        self.pooled, self.embed_text = linear(arrays, "pooled"), linear(arrays, "embed_text")
        self.null_text = parameter(arrays["null_text"])
        self.heads = options["heads"]
        self.blocks = nn.ModuleList(
            Block(part(arrays, "blocks/joint", layer), self.heads)
            for layer in range(options["depth"])
        )
        self.final, self.out = linear(arrays, "final/modulation"), linear(arrays, "out")

    def forward(self, x: Tensor, level: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        position, slot, mask = inputs["position"], inputs["slot"], inputs["mask"]
        x = self.embed(x)
        place = [sincos(position[..., axis], 64, THETA[axis]) for axis in range(3)]
        x = x + self.embed_position(torch.cat(place, dim=-1))
        condition = self.level_out(F.silu(self.level_in(sincos(level, 256))))
        condition = condition + self.pooled(inputs["pooled"])[:, None]
        text = self.embed_text(inputs["text"])
        null = self.null_text.to(text.dtype).expand(text.shape[0], 1, -1)
        text = layer_norm(torch.cat([null, text], dim=1))
        mask = F.pad(mask, (1, 0), value=True)[:, None, None]
        pick = F.one_hot(slot, level.shape[1]).to(x.dtype)
        angles = rotary_angles(position, x.shape[-1] // self.heads, THETA)
        for block in self.blocks:
            x = block(x, text, condition, pick, angles, mask)
        shift, scale = chosen(self.final(F.silu(condition)), pick).chunk(2, dim=-1)
        return self.out(layer_norm(x) * (1 + scale) + shift)


class SpaceTimeBlock(nn.Module):
    """The VAE's block: spatial attention, causal windowed attention over time, MLP."""

    def __init__(self, arrays: Arrays, heads: int) -> None:
        super().__init__()
        self.space = Attention(part(arrays, "space"), heads)
        self.time = Attention(part(arrays, "time"), heads)
        self.mlp = MLP(part(arrays, "mlp"))
        self.space_norm = parameter(arrays["space_norm/scale"])
        self.time_norm = parameter(arrays["time_norm/scale"])
        self.mlp_norm = parameter(arrays["mlp_norm/scale"])

    def forward(
        self,
        x_BTPD: Tensor,
        space: tuple[Tensor, Tensor],
        time: tuple[Tensor, Tensor],
        mask_TT: Tensor,
    ) -> Tensor:
        x, batch = x_BTPD, x_BTPD.shape[0]
        rows = self.space(rms_norm(x, self.space_norm).flatten(0, 1), angles=space)
        x = x + rows.unflatten(0, (batch, -1))
        columns = rms_norm(x, self.time_norm).transpose(1, 2).flatten(0, 1)
        columns = self.time(columns, angles=time, mask=mask_TT)
        x = x + columns.unflatten(0, (batch, -1)).transpose(1, 2)
        return x + self.mlp(rms_norm(x, self.mlp_norm))


class Trunk(nn.Module):
    def __init__(self, arrays: Arrays, depth: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(part(arrays, "blocks", layer), heads) for layer in range(depth)
        )
        self.norm = parameter(arrays["norm/scale"])

    def forward(self, x_BThwD: Tensor) -> Tensor:
        _, frames, height, width, dim = x_BThwD.shape
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([rows, columns], dim=-1).flatten(0, 1).float()
        t = torch.arange(frames)
        space = rotary_angles(grid, dim // self.heads, (100.0, 100.0))
        time = rotary_angles(t[:, None].float(), dim // self.heads, (100.0,))
        age = t[:, None] - t[None]
        mask = (age >= 0) & (age < self.window)
        x = x_BThwD.flatten(2, 3)
        for block in self.blocks:
            x = block(x, space, time, mask)
        return rms_norm(x, self.norm).unflatten(2, (height, width))


class VAE(nn.Module):
    """vdit.models.vae.VAE on clips of 1 + k·p frames of a size divisible by the patch."""

    def __init__(self, arrays: Arrays, options: dict[str, Any]) -> None:
        super().__init__()
        self.patch = tuple(options["patch"])
        heads, window = options["heads"], options["window"]
        self.embed_video = linear(arrays, "embed_video")
        self.encoder = Trunk(part(arrays, "encoder"), options["encoder_depth"], heads, window)
        self.moments = linear(arrays, "moments")
        self.embed_latent = linear(arrays, "embed_latent")
        self.decoder = Trunk(part(arrays, "decoder"), options["decoder_depth"], heads, window)
        self.pixels = linear(arrays, "pixels")
        self.detail = MLP(part(arrays, "detail_pixels")) if options["detail"] else None

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self.patch[0]
        copies = video[:, :1].expand(-1, p - 1, -1, -1, -1)
        x = self.encoder(self.embed_video(patchify(torch.cat([copies, video], 1), self.patch)))
        mean, log_variance = self.moments(x).float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(-20.0, 4.0)
        x = self.decoder(self.embed_latent(mean + torch.exp(0.5 * log_variance) * noise))
        patches = self.pixels(x)
        if self.detail is not None:
            patches = patches + self.detail(x)
        video = unpatchify(patches, self.patch)
        first = video[:, :p].mean(1, keepdim=True)
        return torch.cat([first, video[:, p:]], dim=1), mean, log_variance


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    p, q, r = patch
    batch, t, h, w, c = x.shape
    x = x.reshape(batch, t // p, p, h // q, q, w // r, r, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def unpatchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    p, q, r = patch
    batch, t, h, w, _ = x.shape
    x = x.reshape(batch, t, h, w, p, q, r, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, t * p, h * q, w * r, -1)


def dit_output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(inputs["x"], inputs["level"], inputs)


def dit_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return F.mse_loss(dit_output(model, inputs).float(), inputs["target"])


def vae_output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(inputs["video"], inputs["noise"])[0]


def vae_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    video, mean, log_variance = model(inputs["video"], inputs["noise"])
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return F.mse_loss(video.float(), inputs["video"]) + 1e-4 * kl.mean()


def wan(arrays: Arrays, options: dict[str, Any]) -> nn.Module:
    """diffusers' WanTransformer3DModel, on the parameters by its names."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**options["config"])
    model.load_state_dict({name: parameter(array) for name, array in arrays.items()})
    return model


def wan_output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    video = inputs["video"].permute(0, 4, 1, 2, 3)
    out = model(video, inputs["level"][:, 0], inputs["text"], return_dict=False)[0]
    return out.permute(0, 2, 3, 4, 1)


def wan_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return F.mse_loss(wan_output(model, inputs).float(), inputs["target"])


NETWORKS: dict[str, tuple[Any, Any, Any]] = {
    "wan": (wan, wan_output, wan_loss),
    "dit": (DiT, dit_output, dit_loss),
    "vae": (VAE, vae_output, vae_loss),
}


class Bench:
    """A network with its inputs, and the tasks to time."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        self.options = json.loads(str(arrays.pop("options")))
        make, self.output, self.loss = NETWORKS[self.options["network"]]
        self.inputs = {n: torch.tensor(a) for n, a in part(arrays, "inputs").items()}
        self.inputs |= {n: x.long() for n, x in self.inputs.items() if x.dtype == torch.int32}
        self.model = make(part(arrays, "params"), self.options)
        self.expected = part(arrays, "expected")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.options["learning_rate"], betas=(0.9, 0.95),
            weight_decay=0.0, fused=True,
        )  # fmt: skip
        self.ready: dict[str, Callable[[], Any]] = {}

    def differences(self) -> dict[str, float]:
        """Largest difference of the output, in standard deviations, and of the first losses."""
        with torch.inference_mode():
            out = self.output(self.model, self.inputs).numpy()
        wanted = self.expected["output"]
        losses = [float(self.train_step(self.loss)) for _ in self.expected["losses"]]
        return {
            "output": float(np.abs(out - wanted).max() / wanted.std()),
            "losses": float(np.abs(losses / self.expected["losses"] - 1).max(initial=0)),
        }

    def train_step(self, loss: Callable[..., Tensor], dtype: str = "float32") -> Tensor:
        with autocast(dtype):
            value = loss(self.model, self.inputs)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return value.detach()

    @torch.inference_mode()
    def forward(self, output: Callable[..., Tensor], dtype: str) -> Tensor:
        with autocast(dtype):
            return output(self.model, self.inputs)

    @torch.inference_mode()
    def sample(self, output: Callable[..., Tensor], dtype: str, steps: int | None = None) -> Tensor:
        """Unguided Euler steps from noise to data; clean tokens are kept."""
        steps = self.options["steps"] if steps is None else steps
        given = self.inputs["slot"][..., None] == 1
        x, clean, level = self.inputs["x"], self.inputs["x"], self.inputs["level"].clone()
        for i in range(steps):
            level[:, 0] = 1000.0 * (1.0 - i / steps)
            x = torch.where(given, clean, x)
            with autocast(dtype):
                velocity = output(self.model, {**self.inputs, "x": x, "level": level})
            x = x - velocity / steps
        return torch.where(given, clean, x)

    def time(self, task: str, dtype: str, compiled: bool, threads: int) -> float:
        """Seconds of one run, after warm-up (and compilation) at the first call."""
        torch.set_num_threads(threads)
        call = {"forward": self.forward, "train": self.train_step, "sample": self.sample}[task]
        # torch.compile guards on more than shapes: inputs created inside the loop would recompile.
        warm = functools.partial(call, steps=WARM_UP) if task == "sample" else call
        function = self.loss if task == "train" else self.output
        name = f"{task} {dtype} {compiled} {threads}"
        if name not in self.ready:
            self.ready[name] = torch.compile(function) if compiled else function
            for _ in range(WARM_UP):
                warm(self.ready[name], dtype)
        start = time.perf_counter()
        call(self.ready[name], dtype)
        return time.perf_counter() - start


def autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def main() -> None:
    """Answers requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to stdout too
    torch._dynamo.config.recompile_limit = 64
    bench: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "version" in request:
                answer: dict[str, Any] = {"version": torch.__version__}
            elif "load" in request:
                bench = Bench(request["load"])
                answer = bench.differences()
            else:
                answer = {"seconds": bench.time(**request)}
        except Exception as error:  # a failing variant must not stop the others
            answer = {"error": (str(error).strip() or repr(error)).splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
