"""The choice of a kernel: by length and machine, refused where it cannot run, split over a mesh."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.base import get_config
from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import build_dit
from vdit.config.identity import digest, read_config, stage_fields, write_config
from vdit.errors import UserError
from vdit.kernels import chunked, cudnn, splash
from vdit.nn import dot_product
from vdit.nn.attention import Attend
from vdit.runtime import attention
from vdit.runtime.mesh import make_mesh

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from beside import difference, inputs, pulled  # noqa: E402

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the choice on a CPU")


@pytest.mark.parametrize(
    ("platform", "length", "keys", "want"),
    [
        ("cpu", 1023, 1024, dot_product),
        ("cpu", 1024, 1024, chunked),
        ("cpu", 2**14, 49, dot_product),
        ("gpu", 2**13, 2**13, dot_product),  # two heads
        ("gpu", 2**14, 2**13, chunked),
        ("tpu", 2**14, 49, dot_product),
        ("tpu", 127, 127, dot_product),
        ("tpu", 128, 128, splash),
    ],
)
def test_auto_goes_by_machine_and_length(
    platform: str, length: int, keys: int, want: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for module in (dot_product, chunked, splash):
        stub = lambda q, *_, module=module, **__: called.append(module)  # noqa: E731
        monkeypatch.setattr(module, "attend", stub)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (length, keys))
    attention.auto(q, k, k)
    assert called == [want]


@pytest.mark.parametrize(
    ("capability", "dtype", "length", "want"),
    [("8.0", "bfloat16", 1024, True), ("8.0", "bfloat16", 1023, False),
     ("7.5", "bfloat16", 1024, False), ("gfx90a", "bfloat16", 1024, False)],
)  # fmt: skip
def test_auto_takes_cudnn_where_a_gpu_has_it(
    capability: str, dtype: str, length: int, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for module in (dot_product, chunked, cudnn):
        stub = lambda q, *_, module=module, **__: called.append(module)  # noqa: E731
        monkeypatch.setattr(module, "attend", stub)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.dtype(dtype)) for n in (length, 1024))
    attention.auto(q, k, k, platform="gpu")
    assert (called == [cudnn]) == want


def test_the_configuration_s_kernel_is_what_the_models_are_given() -> None:
    config = get_config("smoke")
    assert build_dit(config).attend is build_vae(config).attend is attention.auto
    config.run.attention = "chunked"
    assert build_dit(config).attend is build_vae(config).attend is attention.ON_CPU["chunked"]
    assert build_dit(config).attend.func is chunked.attend


def test_it_is_no_field_that_a_stage_depends_on() -> None:
    config, other = get_config("smoke"), get_config("smoke")
    other.run.attention = "chunked"
    for stage in ("vae", "latents", "dit"):
        assert digest(stage_fields(config, stage)) == digest(stage_fields(other, stage))


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    config = get_config("smoke")
    config.run.attention = "flash"
    for refuse in (joined.check, build_dit):
        with pytest.raises(UserError, match="known are auto, chunked, cudnn, splash, xla"):
            refuse(config)


@CPU
@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_of_another_machine_is_refused_with_those_of_this_one(name: str) -> None:
    config = get_config("smoke")
    config.run.attention = name
    with pytest.raises(UserError, match="has cpu: allowed here are auto, chunked, xla"):
        joined.check(config)


@CPU
def test_a_run_of_another_machine_is_read_as_auto(tmp_path: Path) -> None:
    config = get_config("smoke")
    for name, want in (("splash", "auto"), ("chunked", "chunked")):
        config.run.attention = name
        write_config(config, tmp_path)
        assert read_config(tmp_path).run.attention == want


@pytest.mark.parametrize("masked", [False, True], ids=["all", "ids"])
@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ((4, 10, 8, 2), (2, 5, 1, 8)),  # a text's keys are fewer: queries are split
        ((4, 8, 10, 2), (1, 8, 1, 8)),  # a window's are more: rows are
        ((3, 5, 7, 3), (3, 5, 3, 8)),  # nothing divides
    ],
    ids=str,
)
def test_on_a_mesh_it_computes_the_same(
    sizes: tuple[int, ...], share: tuple[int, ...], masked: bool
) -> None:
    """Rows, queries and heads that the mesh divides, and such as it does not."""
    batch, length, keys, heads = sizes
    shapes = [(batch, n, heads, 8) for n in (length, keys, keys, length)]
    q, k, v, gradient = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    ids: tuple[jax.Array, ...] = ()
    if masked:
        ids = (jnp.arange(batch * length).reshape(batch, length) % 2,
               jnp.arange(batch * keys).reshape(batch, keys) % 2)  # fmt: skip
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2})

    def pulled(attend: Attend) -> Any:
        out, back = jax.vjp(lambda *arrays: attend(*arrays, *ids), q, k, v)
        return out, *back(gradient)

    got = jax.jit(lambda: pulled(attention.kernel("chunked", mesh)))()
    for mine, want in zip(got, pulled(dot_product.attend), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-5)
    assert got[0].sharding.shard_shape(got[0].shape) == share


EXCHANGES = [
    ({"data": 2, "sequence": 4}, "ulysses", (8, 0)),
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, "auto", (8, 0)),
    ({"sequence": 8}, "auto", (8, 8)),  # four heads: two groups of four shards
    ({"tensor": 2, "sequence": 4}, "ring", (0, 8)),
    ({"data": 2, "sequence": 4}, "gather", (0, 0)),
]


@pytest.mark.parametrize(("axes", "how", "sent"), EXCHANGES, ids=str)
def test_tokens_of_all_shards_are_seen(
    axes: dict[str, int], how: str, sent: tuple[int, int]
) -> None:
    """Samples that lie across the shards; forward and back there are (all-to-all, ring) sends."""
    (q, k, v, gradient), _ = inputs(32, 32, heads=4)
    ids = jnp.asarray([np.repeat([0, 1, 2], [3, 10, 19]), np.repeat([1, 2, 0], [30, 1, 1])])
    attend = attention.kernel("chunked", make_mesh(axes), how=how)
    compiled = pulled.lower(attend, q, k, v, gradient, ids, ids).compile()
    got = compiled(q, k, v, gradient, ids, ids)
    plain = pulled(dot_product.attend, q, k, v, gradient, ids, ids)
    for mine, want in zip(got, plain, strict=True):
        assert difference(mine, want) < 1e-5
    text = compiled.as_text()
    assert (text.count(" all-to-all("), text.count(" collective-permute(")) == sent


@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_a_device_s_memory_falls_with_the_shards(how: str) -> None:
    x = jax.ShapeDtypeStruct((1, 2048, 8, 16), jnp.float32)

    def needed(shards: int) -> int:
        mesh = make_mesh({"sequence": shards}, jax.devices()[:shards])
        attend = attention.kernel("chunked", mesh, how=how)
        where = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        grad = jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))
        compiled = jax.jit(grad, in_shardings=where, out_shardings=where).lower(x, x, x).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes

    assert needed(8) < 0.3 * needed(2)


@pytest.mark.parametrize(
    ("name", "how", "sizes", "line"),
    [
        ("auto", "auto", {"tensor": 3, "sequence": 1}, "tensor=3: there are 8 heads"),
        ("auto", "ulysses", {"tensor": 2, "sequence": 8}, "divide the 4 heads of a tensor shard"),
        ("splash", "auto", {"tensor": 1, "sequence": 16}, "takes auto or chunked; or run"),
    ],
)
def test_wrong_shards_are_one_line(name: str, how: str, sizes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        attention.check_mesh(name, how, 8, sizes)
    assert "\n" not in str(caught.value)
    for fits in ({"tensor": 2, "sequence": 4}, {"tensor": 1, "sequence": 8}):
        attention.check_mesh(name, how, 8, fits)
