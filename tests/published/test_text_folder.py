"""T5, UMT5 and CLIP from a folder: against transformers, and every folder that does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import base, unet
from vdit import loading, sample, stages
from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.identity import differences
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.errors import UserError
from vdit.models import text
from vdit.models.chunks import chunk_places, row_places
from vdit.models.text_encoders import position_buckets
from vdit.published import text_folder
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Runtime

GOLDEN = Path(__file__).parents[1] / "golden" / "text_encoders"
FOLDERS = {
    "t5_relu": "t5", "t5_gated": "t5", "umt5": "umt5", "clip_quick": "clip", "clip_gelu": "clip"
}  # fmt: skip
LONG = 512


@pytest.fixture(scope="module")
def expected() -> Any:
    return np.load(GOLDEN / "expected.npz")


def opened(folder: Path, name: str, length: int) -> tuple[text.Tokenizer, text.TextEncoder]:
    """As `vdit.build` opens a folder."""
    positions = text_folder.positions(name, str(folder))
    tokenizer = text.Tokenizer(
        text_folder.read_tokenizer(name, str(folder)), length, chunk=positions
    )
    options = {"path": str(folder), "vocab": tokenizer.vocab}
    return tokenizer, text_folder.encoder(name, **options)


def parameters(encoder: text.TextEncoder) -> Any:
    ids = np.zeros((1, 1), np.int32)
    return encoder.init(jax.random.key(0), ids, ids > 0)


def lengths(folder: str) -> tuple[int, ...]:
    return (77,) if FOLDERS[folder] == "clip" else (80, LONG)


CASES = [(folder, length) for folder in FOLDERS for length in lengths(folder)]


@pytest.mark.parametrize("folder, length", CASES)
def test_ids_are_those_of_transformers(expected: Any, folder: str, length: int) -> None:
    tokenizer, _ = opened(GOLDEN / folder, FOLDERS[folder], length)
    captions = [str(expected["long"])] if length == LONG else [*map(str, expected["captions"])]
    ids, mask = tokenizer.encode(captions)
    wanted, filled = expected[f"{folder}/{length}/ids"], expected[f"{folder}/{length}/mask"]
    told = np.array([bool(caption) for caption in captions])  # no text has no token here
    np.testing.assert_array_equal(ids[told], wanted[told])
    np.testing.assert_array_equal(mask[told], filled[told])
    assert not mask[~told].any() and (length != LONG or mask.sum() > LONG - 8)


@pytest.mark.parametrize("folder", ["clip_quick", "clip_gelu"])
def test_padded_texts_are_those_of_stable_diffusion(folder: str) -> None:
    """No mask: padding has features and is seen, by a text and by the text without words."""
    golden = np.load(GOLDEN.parent / "text_padding.npz")
    wanted, ids = golden[f"{folder}/features"], golden[f"{folder}/ids"]
    config = unet.get_config()
    config.text.encoder, config.text.path = "clip", str(GOLDEN / folder)
    config.text.length, config.text.padding = ids.shape[1], True
    joined.check(config)
    tokenizer = build_tokenizer(config, Path())
    encoder = build_text_encoder(config, tokenizer)
    made, mask = tokenizer.encode(["a small red ball falls", "ball"])
    empty, all_of_it = tokenizer.empty()
    np.testing.assert_array_equal(np.concatenate([made, empty]), ids)
    assert mask.all() and all_of_it.all()
    features = jax.jit(encoder.apply)(parameters(encoder), ids, np.ones(ids.shape, bool))
    assert np.abs(features - wanted).max() / np.abs(wanted).max() < 2e-5
    config.dit.model = "vdit"
    with pytest.raises(UserError, match="clip and unet are allowed"):
        joined.check(config)


@pytest.mark.parametrize("folder, length", CASES)
def test_features_are_those_of_transformers(expected: Any, folder: str, length: int) -> None:
    ids, mask = expected[f"{folder}/{length}/ids"], expected[f"{folder}/{length}/mask"]
    _, encoder = opened(GOLDEN / folder, FOLDERS[folder], length)
    params = parameters(encoder)
    features = np.asarray(jax.jit(encoder.apply)(params, ids, mask))
    assert features.shape == (*ids.shape, encoder.dim) and features.dtype == np.float32
    assert not features[~mask].any()
    places = np.arange(length) % int(expected["stride"]) == 0 if length == LONG else True
    wanted = expected[f"{folder}/{length}/features"]
    error = np.linalg.norm(features[mask & places] - wanted, axis=-1)
    assert (error / np.linalg.norm(wanted, axis=-1)).max() < 2e-5
    least = 2 if encoder.name == "clip" else 1  # begin and end, or only the end
    assert length == LONG or mask.sum(1).min() == least
    if encoder.name == "clip":
        pooled, wanted = encoder.pool(features, mask), expected[f"{folder}/{length}/pooled"]
        error = np.linalg.norm(pooled - wanted, axis=-1)
        assert (error / np.linalg.norm(wanted, axis=-1)).max() < 2e-5
    batched = text.encode_features(encoder, params, ids, mask, batch=2)
    np.testing.assert_allclose(batched, features, atol=2e-5)


def test_dtypes_of_the_folders_are_kept() -> None:
    """Half the memory for a model in two bytes; sums are float32 all the same."""
    found = {}
    for folder, name in FOLDERS.items():
        leaves = jax.tree.leaves(parameters(opened(GOLDEN / folder, name, 16)[1]))
        (found[folder],) = {leaf.dtype.name for leaf in leaves}
    assert found == {
        "t5_relu": "float16", "t5_gated": "bfloat16", "umt5": "float32",
        "clip_quick": "float16", "clip_gelu": "float16",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["t5_gated", "umt5", "clip_quick"])
def test_only_clip_is_causal_and_padding_has_no_influence(expected: Any, folder: str) -> None:
    length = lengths(folder)[0]
    ids, mask = expected[f"{folder}/{length}/ids"][:1], expected[f"{folder}/{length}/mask"][:1]
    _, encoder = opened(GOLDEN / folder, FOLDERS[folder], length)
    params, apply = parameters(encoder), jax.jit(encoder.apply)
    features = np.asarray(apply(params, ids, mask))
    np.testing.assert_array_equal(apply(params, np.where(mask, ids, 7), mask), features)
    changed = ids.copy()
    changed[0, 9] += 1
    moved = (np.asarray(apply(params, changed, mask)) != features).any(-1)[0]
    first = np.flatnonzero(moved)[0]
    assert first == (9 if encoder.name == "clip" else 0)
    assert moved[9 : mask.sum()].all()


@pytest.mark.parametrize("folder", ["t5_relu", "umt5", "clip_gelu"])
def test_no_text_has_zero_features(folder: str) -> None:
    tokenizer, encoder = opened(GOLDEN / folder, FOLDERS[folder], 16)
    ids, mask = tokenizer.encode(["", "ball"])
    features = jax.jit(encoder.apply)(parameters(encoder), ids, mask)
    pooled = np.asarray(encoder.pool(features, mask))
    assert np.isfinite(features).all() and not np.asarray(features)[0].any()
    assert not pooled[0].any() and pooled[1].all()


def test_buckets_are_one_distance_each_and_then_wider() -> None:
    """The published sizes: 32 buckets up to distance 128, half of them for what comes after."""
    row = position_buckets(600, 32, 128)
    np.testing.assert_array_equal(row[0, :8], [0, *range(17, 24)])
    np.testing.assert_array_equal(row[7, :8], range(7, -1, -1))
    after = row[0, 1:]
    assert (np.diff(after) >= 0).all() and after[126] == after[-1] == 31
    # Bucket 8 + k of 16 begins at 8 · 16^(k / 8); where that is whole, the edge is exact.
    assert [int(after[d - 1]) - 16 for d in (16, 31, 32, 63, 64, 127)] == [10, 11, 12, 13, 14, 15]
    np.testing.assert_array_equal(row[300:, 300], row[:300, 0])


def test_an_end_token_in_a_prompt_of_clip_is_only_text() -> None:
    """Or the pooled text would be that of half a prompt."""
    tokenizer, _ = opened(GOLDEN / "clip_quick", "clip", 40)
    ids, mask = tokenizer.encode(["red <|endoftext|> ball", "ball"])
    end = ids[1, mask[1].sum() - 1]
    assert (ids[0][mask[0]] == end).sum() == 1 and ids[0, mask[0].sum() - 1] == end


def test_more_text_than_clip_has_positions_is_in_chunks() -> None:
    """Each is as if it were alone; the pooled text is the mean of theirs, by their tokens."""
    tokenizer, encoder = opened(GOLDEN / "clip_gelu", "clip", 400)
    params = parameters(encoder)
    parts = ["a small red ball falls to the floor, " * 4 + "and it rolls.", "the ball is blue."]
    ids, mask = tokenizer.encode([" ".join(parts), *parts])
    assert mask[0].sum() == mask[1:].sum() > 77 and 20 < mask[1].sum() <= 77
    features = text.encode_features(encoder, params, ids, mask)
    alone = text.encode_features(encoder, params, ids[1:], mask[1:])
    np.testing.assert_allclose(features[0][mask[0]], alone[mask[1:]], atol=1e-5)
    pooled, count = encoder.pool(alone, mask[1:]), mask[1:].sum(1)
    wanted = np.average(pooled, axis=0, weights=count)
    np.testing.assert_allclose(encoder.pool(features, mask)[0], wanted, atol=1e-5)
    np.testing.assert_array_equal(pooled[1], alone[1][count[1] - 1])  # of one chunk exactly its end
    config = unet.get_config()
    config.text.encoder, config.text.path = "clip", str(GOLDEN / "clip_gelu")
    config.text.length, config.text.padding = 78, True
    with pytest.raises(UserError, match="text.length is 78 with text.padding: 77, the positions"):
        joined.check(config)


@pytest.mark.slow
def test_a_prompt_of_many_words_goes_the_whole_road_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base.get_config("smoke")
    config.latents.clips = config.latents.batch = config.latents.shard = 8
    config.data.frames, config.text.length = 5, 1200
    config.text.encoder, config.text.path = "clip", str(GOLDEN / "clip_gelu")
    config.dit.train.steps, config.dit.train.warmup, config.dit.train.optimizer = 1, 0, "adamw"
    config.sample.steps, config.sample.batch = 1, 2
    vae = build_vae(config)
    video, noise = np.zeros((1, 5, 32, 32, 3)), np.zeros((1, *vae.latent_shape(5, 32, 32)))
    params = {"vae": jax.jit(vae.init)(jax.random.key(0), video, noise)["params"]}
    with Preemption() as preemption, Metrics(tmp_path) as metrics:
        runtime = Runtime(tmp_path, make_mesh({"data": -1}), metrics, preemption, config.run)
        with monkeypatch.context() as patch:  # so that the world's captions need some too
            patch.setattr(text_folder, "positions", lambda name, path: 20)
            joined.check(config)
            cache = stages.cache_latents(config, runtime, params)
            assert (row_places(cache[3]["mask"]) - cache[3]["mask"].sum()) in range(1, 9)
            params |= stages.train_dit(config, runtime, cache)
    tokenizer = build_tokenizer(config, tmp_path)
    encoder = build_text_encoder(config, tokenizer)
    params |= {"text": parameters(encoder)}
    model = sample.Model(config, tokenizer, encoder, params, cache.statistics())
    prompt = "a small red ball falls to the floor, and then it rolls away. " * 18
    assert len(prompt.split()) > 200
    mask, features = model.text([[prompt]])
    assert chunk_places(mask[0])[0].max() > 7 and np.isfinite(features).all()
    assert model.generate([prompt, prompt + "it is blue."])[1].video.shape == (5, 32, 32, 3)
    with pytest.raises(UserError, match=r"is \d{4} tokens long; allowed: 1200"):
        model.generate(prompt * 3)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda folder: Path(shutil.copytree(GOLDEN / folder, tmp_path / folder))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """A JSON file, changed."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_truncation_and_padding_of_the_file_do_not_count(
    expected: Any, copy: Callable[[str], Path]
) -> None:
    folder = copy("t5_gated")
    padding = {"strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None,
               "pad_id": 5, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit(folder / "tokenizer.json", lambda v: v.update(padding=padding, truncation=cut))
    captions = [str(caption) for caption in expected["captions"]]
    ids, _ = opened(folder, "t5", 80)[0].encode(captions)
    np.testing.assert_array_equal(ids[:-1], expected["t5_gated/80/ids"][:-1])
    with pytest.raises(UserError, match=r"prompt 1 of 5 'A small.*' is \d\d tokens long; .*: 8"):
        opened(folder, "t5", 8)[0].encode(captions)


def test_a_tokenizer_without_what_is_needed_is_refused(copy: Callable[[str], Path]) -> None:
    def drop(token: str) -> Callable[[Any], None]:
        def change(value: Any) -> None:
            value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != token]
            vocab = value["model"]["vocab"]
            if isinstance(vocab, dict):
                vocab[f"{token}?"] = vocab.pop(token)
            else:
                next(row for row in vocab if row[0] == token)[0] = f"{token}?"

        return change

    folder = copy("t5_gated")
    path = folder / "tokenizer.json"
    kept = path.read_text(encoding="utf-8")
    edit(path, drop("<pad>"))
    with pytest.raises(UserError, match="tokenizer.json lacks the token '<pad>', which t5 needs"):
        opened(folder, "t5", 8)
    path.write_text(kept, encoding="utf-8")
    edit(path, lambda v: v.update(post_processor=None))
    with pytest.raises(UserError, match="encodes 'a' as '.*'; allowed by t5: '... </s>'"):
        opened(folder, "t5", 8)
    path.write_text(kept, encoding="utf-8")
    edit(folder / "config.json", lambda v: v.update(vocab_size=20))
    with pytest.raises(UserError, match="shared.weight is .*; allowed: "):
        opened(folder, "t5", 8)
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "[NONE]"}}')
    with pytest.raises(UserError, match=r"lacks the token '\[NONE\]'"):
        opened(folder, "t5", 8)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read .*tokenizer.json"):
        opened(folder, "t5", 8)
    path.unlink()
    with pytest.raises(UserError, match="cannot read .*tokenizer.json: No such file"):
        opened(folder, "t5", 8)

    folder = copy("clip_quick")
    edit(folder / "tokenizer.json", lambda v: v.update(post_processor=None))
    with pytest.raises(UserError, match=r"allowed by clip: '<\|startoftext\|> \.\.\. <\|endoftext"):
        opened(folder, "clip", 8)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("t5_gated")
    ids = text.Tokenizer(text_folder.read_tokenizer("t5", str(folder)), 8).vocab
    path = folder / "model.safetensors"
    made = load_file(path)
    made["shared.weight"] = made["shared.weight"][: ids - 1].copy()
    save_file(made, path)
    edit(folder / "config.json", lambda v: v.update(vocab_size=ids - 1))
    with pytest.raises(UserError, match=f"ids up to {ids - 1}; .* allows: {ids - 2}"):
        opened(folder, "t5", 8)


@pytest.mark.parametrize(
    "folder, change, why",
    [
        ("t5_relu", {"model_type": "bert"}, "model_type is 'bert'; allowed: t5"),
        ("t5_relu", {"feed_forward_proj": "gated-silu"}, '"gated-silu"; allowed: relu or'),
        ("t5_relu", {"feed_forward_proj": "gated-gelu"}, r"lacks the tensor .*wi_\d.weight"),
        ("t5_relu", {"num_layers": 3}, r"lacks the tensor encoder.block.2.layer.0"),
        ("t5_relu", {"num_layers": 1}, r"an unexpected tensor: encoder.block.1.layer.0.* more\)"),
        ("t5_relu", {"num_layers": 10**9}, "num_layers is 1000000000; allowed"),
        ("t5_relu", {"num_layers": 2**24}, "lacks the tensor encoder.block.2.layer.0"),
        ("t5_relu", {"d_kv": 5}, r"SelfAttention.[qkv].weight is \(8, 12\); allowed: \(10, 12\)"),
        ("t5_relu", {"relative_attention_num_buckets": 2}, "2 buckets of relative attention"),
        ("umt5", {"relative_attention_max_distance": 3}, "12 buckets .* up to distance 3"),
        ("clip_quick", {"hidden_act": "relu"}, 'hidden_act is "relu"; allowed: quick_gelu or gelu'),
        ("clip_quick", {"num_attention_heads": 3}, "the width 8 is not a multiple of its 3 heads"),
        ("clip_quick", {"max_position_embeddings": 9}, r"is \(77, 8\); allowed: \(9, 8\)"),
        ("clip_gelu", {"text_config": [1]}, "text_config is no JSON object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    copy: Callable[[str], Path], folder: str, change: dict[str, Any], why: str
) -> None:
    made = copy(folder)
    edit(made / "config.json", lambda value: value.update(change))
    with pytest.raises(UserError, match=why) as caught:
        opened(made, FOLDERS[folder], 16)
    assert str(made) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tensor_is_called_by_the_name_of_its_own_layout(
    copy: Callable[[str], Path],
) -> None:
    names = {
        "t5_relu": "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "clip_quick": "embeddings.position_embedding.weight",
        "clip_gelu": "text_model.encoder.layers.1.mlp.fc1.bias",
    }
    for folder, name in names.items():
        path = copy(folder) / "model.safetensors"
        made = load_file(path)
        del made[name]
        save_file(made, path)
        with pytest.raises(UserError, match=f"lacks the tensor {name}$"):
            opened(path.parent, FOLDERS[folder], 16)


def test_the_digest_is_of_the_content(copy: Callable[[str], Path]) -> None:
    folder = copy("t5_gated")
    path = folder / "model.safetensors"

    def digest() -> str:
        return text_folder.content("t5", str(folder))

    assert digest() == text_folder.content("t5", str(GOLDEN / "t5_gated"))
    found = {digest()}
    made = load_file(path)
    made["encoder.final_layer_norm.weight"][3] *= 2
    save_file(made, path)
    found.add(digest())
    edit(folder / "config.json", lambda value: value.update(layer_norm_epsilon=1e-3))
    found.add(digest())
    edit(folder / "tokenizer.json", lambda value: value.update(version="1.1"))
    found.add(digest())
    assert len(found) == 4


def test_features_are_cached_and_the_encoder_is_known_again(
    tmp_path: Path, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, workdir = copy("umt5"), tmp_path / "run"
    config = base.get_config("smoke")
    config.latents.clips = config.latents.batch = config.latents.shard = 8
    config.data.frames = 5
    config.text.encoder, config.text.path = "umt5", str(folder)
    joined.check(config)
    vae = build_vae(config)
    video, noise = np.zeros((1, 5, 32, 32, 3)), np.zeros((1, *vae.latent_shape(5, 32, 32)))
    params = {"vae": jax.jit(vae.init)(jax.random.key(0), video, noise)["params"]}
    with Preemption() as preemption, Metrics(workdir) as metrics:
        runtime = Runtime(workdir, make_mesh({"data": -1}), metrics, preemption, config.run)
        row = stages.cache_latents(config, runtime, params)[3]
        assert row["mask"].any() and row["features"].dtype == np.float16
        _, encoder = opened(folder, "umt5", config.text.length)
        ids, mask = row["ids"][None], row["mask"][None]
        wanted = text.encode_features(encoder, parameters(encoder), ids, mask)[0]
        np.testing.assert_allclose(row["features"], wanted, rtol=1e-3, atol=1e-5)

        # Another place is no conflict, another content is.
        meta, vae_meta = (stages.stage_meta(config, stage) for stage in ("dit", "vae"))
        config.text.path = str(folder.rename(tmp_path / "moved"))
        assert stages.stage_meta(config, "dit") == meta
        assert len(stages.cache_latents(config, runtime, params)) == 8
        shard = sorted(Path(config.text.path).glob("model-*.safetensors"))[0]
        made = load_file(shard)
        name = sorted(made)[0]
        save_file(made | {name: made[name] * np.float32(1.01)}, shard)
        with pytest.raises(UserError, match="latents was made from another .* or text encoder"):
            stages.cache_latents(config, runtime, params)
    assert stages.stage_meta(config, "vae") == vae_meta
    changed = stages.stage_meta(config, "dit")
    assert differences(meta["fields"], changed["fields"]).startswith("text.content was ")

    # A finished workdir's text is that of its encoder, or there is no sample.
    statistics = {"latents": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    found = [({}, changed | statistics)]
    monkeypatch.setattr(loading, "read_newest", lambda directory, read: (1, found[-1]))
    _, features = sample.load(workdir, config).text([["a red ball"]])
    assert features.shape == (1, 1, config.text.length, 12)
    found.append(({}, meta | statistics))
    with pytest.raises(UserError, match="moved holds another text encoder than that of"):
        sample.load(workdir, config)
