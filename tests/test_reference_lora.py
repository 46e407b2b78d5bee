"""Adapters beside diffusers and PEFT, live: `pytest -m reference`.

What is written here is loaded there, and the other way round, on one base of random weights.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.test_wan import given, imported, inputs, tokens
from tests.published.test_lora_files import CASE, drawn, file, unflat
from vdit.nn.lora import flat, merged, shapes
from vdit.published.lora import WEIGHTS, read_adapters, to_peft

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.reference
WAN = Path(__file__).parent / "golden" / "wan" / "t2v"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, params = imported("t2v", tmp_path_factory.mktemp("wan"))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    run = jax.jit(lambda params, *told: model.apply({"params": params}, *told))
    return params, lambda params: run(params, *inputs(CASE, given(CASE)))


def theirs() -> Any:
    kind = diffusers.WanTransformer3DModel
    return kind.from_pretrained(WAN, torch_dtype=torch.float32).eval()


def answer(model: Any) -> np.ndarray:
    stored = given(CASE)
    x, text = (torch.from_numpy(stored[name]) for name in ("x", "text"))
    text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    with torch.no_grad():
        out = model(x.permute(0, 4, 1, 2, 3), torch.tensor([413.0, 999.0]), text).sample
    return tokens(out.permute(0, 2, 3, 4, 1).numpy())


@pytest.mark.parametrize("paths", ["attention", "all"])
def test_what_is_written_loads_in_diffusers(
    paths: str, ours: Any, tmp_path: Path, near: Any
) -> None:
    params, run = ours
    low = {}
    for path, leaf in flat(params).items():
        if path.endswith("/kernel") and (paths == "all" or "/attention/" in path):
            made = shapes(path, leaf.shape, 3).items()
            low |= {name: 0.3 * drawn(i, *shape) for i, (name, shape) in enumerate(made)}
    tensors, metadata = to_peft(unflat(low), params, 0.7, "transformer")
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    model = theirs()
    plain = answer(model)
    model.load_lora_adapter(tmp_path, prefix="transformer", weight_name=WEIGHTS)
    want = answer(model)
    assert np.abs(want - plain).max() > 0.1 * np.abs(plain).max()
    near(f"LoRA to diffusers, {paths}", run(merged(params, unflat(low), 0.7)), want, 1e-5)
    near("and back", run(merged(params, read_adapters(tmp_path, params))), want, 1e-5)
    # Of a second expert: the first stays as it was.
    network = theirs()
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=theirs(),
        transformer_2=network, boundary_ratio=0.9,
    )  # fmt: skip
    (tmp_path / "transformer_2").mkdir()
    (tmp_path / WEIGHTS).rename(tmp_path / "transformer_2" / WEIGHTS)
    options = {"subfolder": "transformer_2", "weight_name": WEIGHTS}
    pipeline.load_lora_weights(tmp_path, load_into_transformer_2=True, **options)
    near(f"LoRA to a second expert, {paths}", answer(network), want, 1e-6)
    np.testing.assert_array_equal(answer(pipeline.transformer), plain)


def test_what_peft_writes_is_read(ours: Any, tmp_path: Path, near: Any) -> None:
    params, run = ours
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules="all-linear",
        alpha_pattern={"attn2.to_k": 2}, rank_pattern={"ffn.net.2": 1},
    )  # fmt: skip
    model = peft.get_peft_model(theirs(), config)
    model.save_pretrained(tmp_path)
    got = run(merged(params, read_adapters(tmp_path, params)))
    near("LoRA of PEFT", got, answer(model), 1e-5)


@pytest.mark.parametrize("form", ["ComfyUI", "musubi"])
def test_other_forms_are_what_diffusers_makes_of_them(
    form: str, ours: Any, tmp_path: Path, near: Any
) -> None:
    from diffusers.loaders import lora_conversion_utils as conversion

    params, run = ours
    path = file(tmp_path / "a.safetensors", form)
    state = {key: torch.from_numpy(x) for key, x in load_file(path).items()}
    if form == "ComfyUI":
        state = conversion._convert_non_diffusers_wan_lora_to_diffusers(state)
    else:  # of which a file has all modules
        full = {}
        for block in (0, 1):
            for name, (out, into) in {
                **{f"{a}_{n}": (16, 16) for a in ("self_attn", "cross_attn") for n in "qkvo"},
                "ffn_0": (40, 16), "ffn_2": (16, 40),
            }.items():  # fmt: skip
                key = f"lora_unet_blocks_{block}_{name}"
                full |= {f"{key}.lora_down.weight": drawn(block, 2, into),
                         f"{key}.lora_up.weight": 0.2 * drawn(block + 5, out, 2),
                         f"{key}.alpha": np.float32(3.0)}  # fmt: skip
        save_file({key: np.asarray(x) for key, x in full.items()}, path)
        state = {key: torch.from_numpy(np.asarray(x)) for key, x in full.items()}
        state = conversion._convert_musubi_wan_lora_to_diffusers(state)
    model = theirs()
    model.load_lora_adapter(state, prefix="transformer")
    near(f"LoRA of {form}", run(merged(params, read_adapters(path, params))), answer(model), 1e-5)
