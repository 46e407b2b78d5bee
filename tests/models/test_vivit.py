"""ViViT and ViT: transformers' numbers, dense formulations with masks, the paper's table."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.importing.inflation import central_frame, fit_positions, from_image, inflate
from vdit.errors import UserError
from vdit.models.vivit import ATTENTIONS, PRESETS, WITHOUT_TOKEN, ViViT, sample_frames

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "vivit.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model: ViViT, method: str, params: Any, video: jax.Array) -> Any:
    return model.apply({"params": params}, video, method=method)


# A parameter's path here: the tensor there ("{}": ours are stacked along it), and how it is turned.
SAME: Callable[[np.ndarray], np.ndarray] = np.asarray
TURNED: Callable[[np.ndarray], np.ndarray] = np.transpose
LAYER = {
    "attention_norm": "layernorm_before",
    "attention/q": "attention.q_proj",
    "attention/k": "attention.k_proj",
    "attention/v": "attention.v_proj",
    "attention/o": "attention.o_proj",
    "mlp_norm": "layernorm_after",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def patches(weight: np.ndarray) -> np.ndarray:
    """A convolution's (D, C, [t,] h, w) as a kernel (t·h·w·C, D)."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1).T


def table(prefix: str) -> dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Our paths, their names."""
    projection = f"{prefix}.embeddings.patch_embeddings.projection"
    rows: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        "embed_video/kernel": (f"{projection}.weight", patches),
        "embed_video/bias": (f"{projection}.bias", SAME),
        "encoder/token": (f"{prefix}.embeddings.cls_token", np.ravel),
        "encoder/position": (f"{prefix}.embeddings.position_embeddings", np.squeeze),
        "encoder/norm/scale": (f"{prefix}.layernorm.weight", SAME),
        "encoder/norm/bias": (f"{prefix}.layernorm.bias", SAME),
        "head/kernel": ("classifier.weight", TURNED),
        "head/bias": ("classifier.bias", SAME),
    }
    for ours, theirs in LAYER.items():
        first = "scale" if ours.endswith("norm") else "kernel"
        turn = SAME if first == "scale" else TURNED
        rows[f"encoder/blocks/{ours}/{first}"] = (f"{prefix}.layers.{{}}.{theirs}.weight", turn)
        rows[f"encoder/blocks/{ours}/bias"] = (f"{prefix}.layers.{{}}.{theirs}.bias", SAME)
    return rows


def converted(case: str, depth: int) -> dict[str, Any]:
    """Their state dict as our parameters; every tensor is used."""
    shapes = [tuple(map(int, s.split(","))) for s in GOLDEN[f"{case}/shapes"]]
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    flat = np.split(GOLDEN[f"{case}/values"], cuts)
    state = {
        str(name): value.reshape(shape)
        for name, value, shape in zip(GOLDEN[f"{case}/names"], flat, shapes, strict=True)
    }
    params: dict[str, Any] = {}
    for path, (name, turn) in table(case.split("_")[0]).items():
        *folders, leaf = path.split("/")
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        if "{}" in name:
            place[leaf] = np.stack([turn(state.pop(name.format(i))) for i in range(depth)])
        else:
            place[leaf] = turn(state.pop(name))
    assert not state, f"not converted: {sorted(state)}"
    return params


def near(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    """The largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() / np.abs(b).max() < tolerance


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_transformers_computes(case: str) -> None:
    t, h, w, width, depth, heads, mlp = GOLDEN[f"{case}/case"].tolist()
    model = ViViT(
        classes=5, width=width, depth=depth, heads=heads, patch=(t, h, w), mlp_ratio=mlp / width,
        activation="gelu_erf" if case.startswith("vit_") else "gelu",
    )  # fmt: skip
    params, video = converted(case, depth), GOLDEN[f"{case}/video"]
    tokens, pooled = run(model, "features", params, video)
    hidden = GOLDEN[f"{case}/hidden"]
    near(np.asarray(tokens).reshape(len(hidden), -1, width), hidden[:, 1:])
    near(pooled, hidden[:, 0])
    near(run(model, "__call__", params, video), GOLDEN[f"{case}/logits"])


# --------------------------------------------------------------------------------------------------
# Models 2, 3 and 4 against all tokens at once under masks, in float64


def norm(x: np.ndarray, p: Any) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def affine(x: np.ndarray, p: Any) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def attention(x: np.ndarray, p: Any, masks_NLL: np.ndarray) -> np.ndarray:
    """x (L, D); each head has a mask of its own."""
    size = x.shape[-1] // len(masks_NLL)
    out = []
    for head, mask in enumerate(masks_NLL):
        q, k, v = (affine(x, p[n])[:, head * size : (head + 1) * size] for n in "qkv")
        logits = np.where(mask, q @ k.T / np.sqrt(size), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v)
    return affine(np.concatenate(out, -1), p["o"])


def blocks(x: np.ndarray, p: Any, masks: dict[str, np.ndarray]) -> np.ndarray:
    """The stack of layers; `masks` names the attentions, in turn."""
    for layer in range(len(p["mlp_norm"]["bias"])):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p)
        for name, masks_NLL in masks.items():
            x = x + attention(norm(x, one[f"{name}_norm"]), one[name], masks_NLL)
        up = affine(norm(x, one["mlp_norm"]), one["mlp"]["up"])
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + affine(up, one["mlp"]["down"])
    return x


def dense(model: ViViT, p: Any, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (t·h·w, D) and summary (D,) of one video."""
    a, b, c = model.patch
    t, h, w = (n // q for n, q in zip(video.shape[:3], model.patch, strict=True))
    rows = [
        video[i * a : i * a + a, j * b : j * b + b, k * c : k * c + c].ravel()
        for i in range(t) for j in range(h) for k in range(w)
    ]  # fmt: skip
    x = affine(np.stack(rows), p["embed_video"])
    time, place = np.divmod(np.arange(t * h * w), h * w)
    heads, encoder = model.heads, p["encoder"]
    if model.model == "factorised_encoder":
        token = model.pool == "token"
        if token:  # one before each frame's tokens
            x = np.concatenate([np.vstack([encoder["token"], x[time == i]]) for i in range(t)])
            time = np.repeat(np.arange(t), h * w + 1)
        x = x + np.tile(encoder["position"], (t, 1))
        same_frame = np.tile(time[:, None] == time, (heads, 1, 1))
        x = norm(blocks(x, encoder["blocks"], {"attention": same_frame}), encoder["norm"])
        frames = np.stack([x[time == i][0] if token else x[time == i].mean(0) for i in range(t)])
        tokens = np.concatenate([x[time == i][int(token) :] for i in range(t)])
        second = p["temporal"]
        if token:
            frames = np.vstack([second["token"], frames])
        frames = frames + second["position"]
        everything = np.ones((heads, len(frames), len(frames)), bool)
        out = norm(blocks(frames, second["blocks"], {"attention": everything}), second["norm"])
        return tokens, out[0] if token else out.mean(0)
    same_frame, same_place = time[:, None] == time, place[:, None] == place
    if model.model == "factorised_self_attention":
        masks = {
            "attention": np.tile(same_frame, (heads, 1, 1)),
            "time": np.tile(same_place, (heads, 1, 1)),
        }
    else:
        masks = {"attention": np.stack([same_frame] * (heads // 2) + [same_place] * (heads // 2))}
    x = blocks(x + encoder["position"], encoder["blocks"], masks)
    x = norm(x, encoder["norm"])
    return x, x.mean(0)


def small(model: str, **options: Any) -> ViViT:
    pool = "mean" if model in WITHOUT_TOKEN else "token"
    defaults = {"patch": (2, 2, 3), "temporal_depth": 1, "mlp_ratio": 2.0, "pool": pool}
    return ViViT(3, 16, 2, 4, model=model, **(defaults | options))


def random_video(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(*shape, 3)).astype(np.float32)


def random_params(model: ViViT, video: np.ndarray, seed: int = 0) -> Any:
    """Parameters of which none is zero or one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), video)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("shape", [(6, 4, 6), (3, 7, 4)])
@pytest.mark.parametrize(
    "name, pool",
    [
        ("factorised_encoder", "token"),
        ("factorised_encoder", "mean"),
        ("factorised_self_attention", "mean"),
        ("factorised_dot_product", "mean"),
    ],
)
def test_factorised_models_are_the_dense_one_under_masks(
    name: str, pool: str, shape: tuple[int, int, int]
) -> None:
    model = small(name, pool=pool)
    video = random_video(2, *shape)
    params = random_params(model, video)
    features = run(model, "features", params, video)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i in range(2):
        tokens, pooled = dense(model, exact, video[i].astype(np.float64))
        near(np.asarray(features.tokens[i]).reshape(tokens.shape), tokens)
        near(features.pooled[i], pooled)


# --------------------------------------------------------------------------------------------------
# The paper's table, embeddings, the start from an image model


@pytest.mark.parametrize(
    "name, millions",
    [
        ("joint", 88.9),
        ("factorised_encoder", 115.1),
        ("factorised_self_attention", 117.3),
        ("factorised_dot_product", 88.9),
    ],
)
def test_parameters_are_as_many_as_the_paper_says(name: str, millions: float) -> None:
    """Table 2: ViViT-B/16x2 on Kinetics 400, 32 frames of 224 x 224; counted with token or without.

    (The paper's last digit is cut off, not rounded, in two of four.)
    """
    pool = "mean" if name in WITHOUT_TOKEN else "token"
    model = ViViT(400, **PRESETS["B/16x2"], model=name, pool=pool)
    video = jax.ShapeDtypeStruct((1, 32, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), video)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert abs(count - millions) < 0.1


def test_frames_are_sampled_from_the_middle_of_equal_parts() -> None:
    video = jnp.arange(12.0).reshape(1, 12, 1, 1, 1)
    for count, frames in ((1, [6]), (3, [2, 6, 10]), (4, [1, 4, 7, 10]), (12, list(range(12)))):
        assert sample_frames(video, count).ravel().tolist() == frames
    with pytest.raises(UserError, match="1 to 12"):
        sample_frames(video, 13)


def test_sampled_frames_are_embedded_each_by_itself() -> None:
    model = small("joint", patch=(1, 2, 3), samples=3)
    video = random_video(2, 9, 4, 6)
    params = random_params(model, video)
    whole = small("joint", patch=(1, 2, 3))
    out = run(model, "__call__", params, video)
    near(out, run(whole, "__call__", params, video[:, [1, 4, 7]]), 1e-6)
    grad = jax.jit(jax.grad(lambda v: run(model, "__call__", params, v).sum()))(video)
    seen = np.abs(np.asarray(grad)).sum((0, 2, 3, 4)) > 0
    assert np.flatnonzero(seen).tolist() == [1, 4, 7]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_tubelets_start_as_an_image_s_patches(frames: int) -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(12, 5)).astype(np.float32))
    tubelet = rng.normal(size=(frames, 12)).astype(np.float32)
    average = tubelet.mean(0) @ kernel
    np.testing.assert_allclose(tubelet.ravel() @ inflate(kernel, frames), average, atol=1e-5)
    central = tubelet[frames // 2] @ kernel
    np.testing.assert_allclose(tubelet.ravel() @ central_frame(kernel, frames), central, atol=1e-5)


@pytest.mark.parametrize("start", [inflate, central_frame])
def test_from_an_image_model_each_frame_of_a_still_video_is_the_image(start: Any) -> None:
    """Model 3, whose attention over time is nothing at the start: exactly the image model."""
    image = random_video(2, 1, 4, 6)
    vit = small("joint", patch=(1, 2, 3), pool="mean")
    theirs = random_params(vit, image)
    model = small("factorised_self_attention")
    video = np.repeat(image, 6, axis=1)
    params = from_image(theirs, random_params(model, video, seed=1), (1, 2, 2), (3, 2, 2), start)
    time = params["encoder"]["blocks"]["time"]["o"]
    assert not np.any(time["kernel"]) and not np.any(time["bias"])
    still = run(model, "features", params, video)
    alone = run(vit, "features", theirs, image)
    for frame in range(3):
        near(still.tokens[:, frame], alone.tokens[:, 0])
    near(still.pooled, alone.pooled)


def test_from_an_image_model_the_token_s_position_stays_one() -> None:
    image = random_video(1, 1, 4, 6)
    theirs = random_params(small("joint", patch=(1, 2, 3)), image)
    video = np.repeat(image, 4, axis=1)
    for name, times in (("joint", 2), ("factorised_encoder", 1)):
        mine = random_params(small(name), video, seed=1)
        new = small(name).position_grid(4, 4, 6)
        assert new == (times, 2, 2)
        made = from_image(theirs, mine, (1, 2, 2), new)
        position = theirs["encoder"]["position"]
        want = np.concatenate([position[:1], *[position[1:]] * times])
        np.testing.assert_array_equal(made["encoder"]["position"], want)
        np.testing.assert_array_equal(made["head"]["kernel"], mine["head"]["kernel"])
        for a, b in zip(
            jax.tree.leaves(made["encoder"]["blocks"]),
            jax.tree.leaves(theirs["encoder"]["blocks"]),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_positions_of_other_sizes_are_interpolated() -> None:
    """By Keys' kernel, a = -3/4, between places and with the last repeated beyond the edge."""
    taps = np.array([-27, 225, 67, -9]) / 256  # a quarter of the way from one place to the next
    x = np.random.default_rng(0).normal(size=(1 + 4 * 3, 5)).astype(np.float32)
    grid = x[1:].reshape(4, 3, 5)
    made = fit_positions(jnp.asarray(x), (1, 4, 3), (2, 8, 3))
    np.testing.assert_array_equal(made[0], x[0])
    first, second = np.asarray(made[1:]).reshape(2, 8, 3, 5)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first[3], np.tensordot(taps, grid, 1), atol=1e-6)
    near_edge = np.tensordot(taps[::-1], grid[[0, 0, 0, 1]], 1)
    np.testing.assert_allclose(first[0], near_edge, atol=1e-6)
    back = fit_positions(made, (2, 8, 3), (1, 8, 3))  # of frames read one by one: their mean
    np.testing.assert_array_equal(back[1:], first.reshape(-1, 5))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_layers_are_stored_stacked_and_the_run_s_choices_change_nothing(name: str) -> None:
    video = random_video(1, 4, 4, 6)
    model = small(name)
    params = random_params(model, video)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params["encoder"]["blocks"]))

    def value(model: ViViT) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.square(run(model, "__call__", params, video)).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = value(model)
    other = value(small(name, unroll=2, remat="full"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "factorised"}, "known are joint"),
        ({"pool": "max"}, "known are token, mean"),
        ({"model": "factorised_dot_product", "pool": "token"}, "only the pool mean"),
        ({"model": "factorised_self_attention", "pool": "token"}, "only the pool mean"),
        ({"samples": 2}, "tubelets of one frame"),
        ({"patch": (9, 2, 3)}, "less than a tubelet"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    model = ViViT(3, 8, 1, 2, **({"patch": (2, 2, 3)} | options))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), random_video(1, 4, 4, 6))
