"""Files of adapters: PEFT's and diffusers' numbers, every form of key, the way back, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from models.test_wan import given, imported, inputs, root, tokens
from safetensors.numpy import load_file, save_file

from experiments import base, dit_paper, unet
from vdit.errors import UserError
from vdit.initial import denoiser_shapes
from vdit.nn.lora import flat, merged
from vdit.nn.lora import shapes as adapter_shapes
from vdit.published.lora import WEIGHTS, parse, places, read_adapters, to_peft

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
CASE = "t2v/1x4x4"
__all__ = ["root"]


def test_the_numbers_of_diffusers_and_peft(root: Path, near: Any) -> None:
    """Ranks and alphas that differ, rslora; both at once with weights, in either order."""
    expected = np.load(GOLDEN / "expected.npz")
    model, params = imported("t2v", root)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    run = jax.jit(lambda params, *told: model.apply({"params": params}, *told))
    told = inputs(CASE, given(CASE))
    made = {name: read_adapters(GOLDEN / name, params) for name in ("diffusers", "peft")}
    for name, adapters in made.items():
        near(name, run(merged(params, adapters), *told), tokens(expected[name]), 1e-5)
    for order in (("diffusers", "peft"), ("peft", "diffusers")):
        whole = params
        for name in order:
            whole = merged(whole, made[name], {"diffusers": 0.5, "peft": -2.0}[name])
        near("both", run(whole, *told), tokens(expected["both"]), 1e-5)


# --------------------------------------------------------------------------------------------------
# Forms


@pytest.fixture
def params(root: Path) -> Any:
    return imported("t2v", root)[1]


ORIGINAL = {
    "attn1.to_q": "self_attn.q", "attn1.to_out.0": "self_attn.o", "attn2.to_v": "cross_attn.v",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
SHAPES = {"ffn.net.0.proj": (40, 16), "ffn.net.2": (16, 40)}  # (out, in); others are (16, 16)
ALPHA, RANK = 6.0, 3


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B of modules by diffusers' names: of the second block alone."""
    made = {}
    for i, name in enumerate(ORIGINAL):
        out, into = SHAPES.get(name, (16, 16))
        made[f"blocks.1.{name}"] = 0.3 * drawn(i, RANK, into), 0.3 * drawn(i + 9, out, RANK)
    return made


def original(name: str) -> str:
    block, rest = name[: len("blocks.1")], name[len("blocks.1.") :]
    return f"{block}.{ORIGINAL[rest]}"


def file(path: Path, form: str) -> Path:
    """The factors in one of the forms that are published; in each W + 2 B A."""
    low: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for name, (a, b) in factors().items():
        if form.startswith("diffusers"):
            prefix = "" if form == "diffusers, bare" else "transformer."
            low |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": 2 * b}
            if form == "diffusers, metadata":
                low[f"{prefix}{name}.lora_B.weight"] = b
                said = {"lora_adapter_metadata": json.dumps({
                    "transformer.r": RANK, "transformer.lora_alpha": ALPHA})}  # fmt: skip
        elif form == "PEFT":
            key = f"base_model.model.{name}"
            low |= {f"{key}.lora_A.default.weight": a, f"{key}.lora_B.default.weight": 2 * b}
        elif form == "ComfyUI":
            key = f"diffusion_model.{original(name)}"
            low |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": 2 * b}
        elif form == "original":
            key = original(name)
            low |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            low[f"{key}.alpha"] = np.float32(ALPHA)
        else:
            key = "lora_unet_" + (name if form == "kohya" else original(name)).replace(".", "_")
            low |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            low[f"{key}.alpha"] = np.float32(ALPHA)
    save_file({name: np.asarray(x) for name, x in low.items()}, path, said or None)
    return path


FORMS = (
    "diffusers", "diffusers, bare", "diffusers, metadata", "PEFT", "ComfyUI", "original", "kohya",
    "musubi",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_update(form: str, params: Any, tmp_path: Path) -> None:
    got = flat(merged(params, read_adapters(file(tmp_path / "a.safetensors", form), params)))
    found = {place.path: name for name, place in places(flat(params)).items()
             if name.removesuffix(".weight") in factors()}  # fmt: skip
    assert len(found) == len(ORIGINAL)
    for path, leaf in flat(params).items():
        want = np.array(leaf, np.float32)
        if path in found:
            a, b = factors()[found[path].removesuffix(".weight")]
            want[1] += (2 * b @ a).T
        np.testing.assert_allclose(got[path], want.astype(leaf.dtype), rtol=2e-3, atol=1e-5)


def test_full_updates_of_weights_biases_and_modulations(params: Any, tmp_path: Path) -> None:
    """And the bias of a second factor, which is scaled as the factors are."""
    near, q = "diffusion_model.blocks.0", "diffusion_model.blocks.1.self_attn.q"
    low = {
        f"{near}.norm3.diff": drawn(0, 16), f"{near}.norm3.diff_b": drawn(1, 16),
        f"{near}.diff_m": drawn(2, 1, 6, 16), "diffusion_model.head.head.diff": drawn(3, 12, 16),
        "diffusion_model.patch_embedding.diff": drawn(4, 16, 3, 1, 2, 2),
        "diffusion_model.head.modulation.diff": drawn(5, 1, 2, 16),
        f"{q}.lora_down.weight": drawn(6, 1, 16), f"{q}.lora_up.weight": drawn(7, 16, 1),
        f"{q}.lora_up.bias": drawn(8, 16), f"{q}.alpha": np.array([3.0], np.float32),
    }  # fmt: skip
    save_file(low, tmp_path / "a.safetensors")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    got, was = flat(merged(params, read_adapters(tmp_path / "a.safetensors", params))), flat(params)
    kernel = low["diffusion_model.patch_embedding.diff"].transpose(2, 3, 4, 1, 0)
    updates = {
        "blocks/cross_norm/scale": (0, low[f"{near}.norm3.diff"]),
        "blocks/cross_norm/bias": (0, low[f"{near}.norm3.diff_b"]),
        "blocks/table": (0, low[f"{near}.diff_m"]),
        "out/kernel": (None, low["diffusion_model.head.head.diff"].T),
        "table": (None, low["diffusion_model.head.modulation.diff"]),
        "embed/kernel": (None, kernel.reshape(was["embed/kernel"].shape)),
        "blocks/attention/q/kernel": (1, 3 * np.outer(drawn(6, 1, 16), drawn(7, 16, 1))),
        "blocks/attention/q/bias": (1, 3 * drawn(8, 16)),
    }
    for path, value in was.items():
        want = np.array(value)
        if path in updates:
            layer, update = updates[path]
            want[layer if layer is not None else ...] += update
        np.testing.assert_allclose(got[path], want, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("kind", ["vdit", "paper", "unet", "wan"])
def test_what_is_written_comes_back(kind: str, root: Path, tmp_path: Path) -> None:
    """Every kernel of every network, convolutions too; Stable Diffusion's by diffusers' names."""
    if kind == "wan":
        shapes = imported("t2v", root)[1]
    else:
        of = {"vdit": base, "paper": dit_paper, "unet": unet}[kind].get_config
        config = of("smoke")
        config.dit.unet.temporal = False
        shapes = denoiser_shapes(config, config.text.width)
    low = {}
    for path, leaf in flat(shapes).items():
        if path.endswith("/kernel"):
            for i, (name, shape) in enumerate(adapter_shapes(path, leaf.shape, 2).items()):
                low[name] = drawn(i, *shape)
    tensors, metadata = to_peft(unflat(low), shapes, 2.0, "transformer")
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    names = {"vdit": "blocks.0.joint.attention.q", "wan": "blocks.1.attn1.to_q"}
    names |= {"unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"}
    if kind in names:
        assert f"transformer.{names[kind]}.lora_A.weight" in tensors
    back = flat(read_adapters(tmp_path, shapes))
    assert back.keys() == low.keys()
    for name, value in low.items():
        np.testing.assert_allclose(back[name], 2 * value if name.endswith("up") else value)


def unflat(low: dict[str, Any]) -> Any:
    return unflatten_dict(low, sep="/")


# --------------------------------------------------------------------------------------------------
# Refusals

Q = "transformer.blocks.0.attn1.to_q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize("change, words", [
    ({"transformer.blocks.9.attn1.to_q.lora_A.weight": (2, 16)},
     "transformer.blocks.9.attn1.to_q.lora_A.weight matches no layer of this network"),
    ({"lora_te1_q.lora_down.weight": (2, 16)}, "lora_te1_q.lora_down.weight matches no layer"),
    ({"transformer.blocks.0.norm2.lora_A.weight": (2, 16)}, "norm2.lora_A.weight matches no"),
    ({"blocks.0.attn1.to_q.hada_w1_a": (2, 16)}, "blocks.0.attn1.to_q.hada_w1_a matches no"),
    ({A: (2, 24)}, r"blocks.0.attn1.to_q.lora_A.weight is (2, 24); allowed: (R, 16)"),
    ({B: (24, 2)}, r"blocks.0.attn1.to_q.lora_B.weight is (24, 2); allowed: (16, 2)"),
    ({B: (16, 3)}, r"is (16, 3); allowed: (16, 2)"),
    ({A: ()}, r"is (); allowed: (R, 16)"),
    ({A: (0, 16), B: (16, 0)}, r"is (0, 16); allowed: (R, 16)"),
    ({B: None}, "to_q.lora_A.weight lacks a factor"),
    ({f"{Q}.alpha": (2,)}, "to_q.alpha is (2,); allowed: ()"),
    ({"diffusion_model.blocks.0.self_attn.k.alpha": ()}, "self_attn.k.alpha lacks a factor"),
    ({"blocks.0.attn1.to_q.lora_A.weight": (2, 16)}, "lora_A.weight again"),
    ({"blocks.0.self_attn.q.lora_A.weight": (2, 16), "blocks.0.self_attn.q.lora_B.weight": (16, 2)},
     "is there by another name too"),
    ({f"{Q}.lora_magnitude_vector": (16,)}, "lora_magnitude_vector is DoRA's"),
    ({f"{Q}.diff_m": (1, 6, 16)}, "to_q.diff_m matches no layer"),
    ({f"{Q}.diff": (16, 15)}, "to_q.diff is (16, 15); allowed: (16, 16)"),
    ({A: None, B: None}, "holds no adapters"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_named(
    change: dict[str, Any], words: str, params: Any, tmp_path: Path
) -> None:
    shapes = {A: (2, 16), B: (16, 2)} | change
    low = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    save_file(low, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        read_adapters(tmp_path / "a.safetensors", params)
    assert words in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/a.saf")


def test_a_header_that_is_none_is_one_line(params: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(UserError, match="its header says 4611686018427387904 bytes; allowed"):
        read_adapters(path, params)


def test_values_dtypes_and_metadata(params: Any, tmp_path: Path) -> None:
    ones = np.ones((16, 2), np.float32)
    path, plain = tmp_path / "a.safetensors", {A: ones.T.copy(), B: ones}

    def refused(words: str, changes: Any = None, said: Any = None) -> None:
        low = plain | (changes or {})
        save_file(low, path, said and {"lora_adapter_metadata": said})
        with pytest.raises(UserError, match=words):
            read_adapters(path, params)

    refused("is I32; allowed: F32, F16, BF16", {A: np.ones((2, 16), np.int32)})
    refused("not finite", {A: np.full((2, 16), np.nan, np.float32)})
    refused("not JSON", said="{")
    refused("lora_alpha is 'x'; allowed: a number below 1e", said='{"transformer.lora_alpha": "x"}')
    refused("alpha_pattern is no JSON obj", said='{"transformer.alpha_pattern": [1]}')
    refused("alpha_pattern .*: a module's name", said='{"transformer.alpha_pattern": {"(": 1}}')
    large = np.array(3e38, np.float32)
    refused(r"times 1.5e\+38 is not finite", {f"{Q}.alpha": large, B: 9 * ones})
    refused("use_dora is set", said='{"transformer.use_dora": true}')
    with pytest.raises(UserError, match="holds neither pytorch_lora_weights.saf"):
        read_adapters(tmp_path, params)
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="adapter_config.json: not a JSON object"):
        read_adapters(tmp_path / "peft", params)
    assert load_file(path).keys() == plain.keys()


def test_files_and_weights(tmp_path: Path) -> None:
    assert parse("a.safetensors") == (Path("a.safetensors"), 1.0, "dit")
    assert parse("a.safetensors:0.8") == (Path("a.safetensors"), 0.8, "dit")
    assert parse("low=a.safetensors:0.8") == (Path("a.safetensors"), 0.8, "low")
    assert parse("runs/a:b:-1e-1") == (Path("runs/a:b"), -0.1, "dit")
    (tmp_path / "a:2").touch()
    assert parse(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0, "dit")
    for wrong in ("a:", "a:x", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="FILE or FILE:WEIGHT is allowed"):
            parse(wrong)
