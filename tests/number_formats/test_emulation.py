"""Weights as a chip holds them, ops as it computes them, and whole runs of the graph in every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw_profiles
from backends.emulation import products, rounding
from backends.emulation.fidelity import Observer, load
from backends.emulation.number_formats import NumberFormats
from model import graph, quantised
from model.checkpoint import Checkpoint, groups
from model.checkpoint_writer import save
from model.formats import BF16, FORMATS, INT4, ROWS, SCHEMES, CacheFormats, Formats, matrix_format
from model.formats import scheme as scheme_named
from model.hf_config import from_hf
from model.ops import OPS
from model.split import scale_shape
from model.weights import Quantized, Weight, layer_weights
from runtime.deployment.choice import chip_formats
from tests.engine.conftest import DSA, GQA, random_weights
from tests.marks import slow_but

torch = pytest.importorskip("torch", exc_type=ImportError)

DSA = {**DSA, "num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
GQA = {**GQA, "num_hidden_layers": 2}
CFG = from_hf(DSA)
TOKENS = np.random.default_rng(1).integers(0, 160, 64).astype(np.int32)


def formats(name: str, cache: CacheFormats = CacheFormats()) -> NumberFormats:
    found = scheme_named(name)
    if name == "f32":
        cache = CacheFormats.plain("f32")
    return NumberFormats(CFG, Formats(found.dense, found.experts, "f32" if name == "f32" else "bf16", cache))


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a16-g16"])
def test_weights_keep_their_shape_and_nearly_their_value(scheme: str) -> None:
    held, weights = formats(scheme), random_weights(CFG)
    for weight in layer_weights(CFG, CFG.layers[1]):
        value = weights["layers"][1][weight.name]
        out = held.weight(weight, value)
        if isinstance(out, Quantized):
            assert out.values.shape == weight.shape
            assert out.scale.shape == scale_shape(weight, held.scheme.held(weight), weight.shape)
            scale = out.scale.astype(np.float32)
            for axis in range(value.ndim):
                scale = quantised.spread(scale, value.shape[axis], axis)
            out = out.values.astype(np.float32) * scale
        # of the largest element; an MX scale is a power of two that the largest element may exceed
        coarse = {
            "mxfp4": 0.35,
            "nvfp4": 0.2,
            "nvfp4a16": 0.2,
            "w4a8": 0.08,
            "w4a16": 0.08,
            "w4afp8": 0.08,
            "mxfp8": 0.13,
        }
        error = np.abs(out.astype(np.float32) - value).max() / np.abs(value).max()
        assert error <= (0.0 if scheme == "f32" else coarse.get(held.scheme.stored(weight).base, 0.04)), weight.name


def test_scales_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    """A matrix stored in the scheme's own format comes through with the bytes it has, whatever they are."""
    raw = random_weights(CFG)
    save(tmp_path / "ck", DSA, raw, fp8=True)
    stored = Checkpoint(tmp_path / "ck").load(keep_fp8=True)["layers"][1]
    for weight in layer_weights(CFG, CFG.layers[1]):
        value = stored[weight.name]
        if isinstance(value, Quantized):
            doubled = Quantized(value.values, value.scale * 2)  # scales that rounding would not find
            out = formats("fp8").weight(weight, doubled)
            assert isinstance(out, Quantized)
            assert out.values is doubled.values and out.scale is doubled.scale
            wide = formats("bf16").weight(weight, value)
            assert isinstance(wide, np.ndarray) and wide.dtype == BF16


def test_another_format_of_the_checkpoint_is_rounded_again(tmp_path: Path) -> None:
    save(tmp_path / "ck", DSA, random_weights(CFG), fp8=True)
    opened = Checkpoint(tmp_path / "ck")
    weight = next(w for w in layer_weights(CFG, CFG.layers[1]) if w.name == "o")
    value, plain = opened.load(keep_fp8=True)["layers"][1]["o"], opened.load()["layers"][1]["o"]
    out = formats("w8a8").weight(weight, value)
    assert isinstance(out, Quantized)
    wanted = quantised.quantise(FORMATS["w8a8-int8"], plain.T)
    np.testing.assert_array_equal(out.values, wanted.values.T)
    np.testing.assert_array_equal(out.scale, wanted.scale.T)


# --- ops -------------------------------------------------------------------------------------------------


def weight_of(name: str) -> Weight:
    return next(w for kind in CFG.layers for w in layer_weights(CFG, kind) if w.name == name)


@pytest.mark.parametrize(
    "scheme",
    slow_but(["fp8"], ["fp8", "w8a8", "fp8-tensor", "fp8-channel", "mxfp8"]),
)
def test_gate_and_up_are_two_matrices(scheme: str) -> None:
    held, rng = formats(scheme), np.random.default_rng(2)
    weight = weight_of("gate_up")
    value = (rng.standard_normal(weight.shape) * np.array([1.0, 9.0])[None, :, None]).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, weight.shape[0])), jnp.bfloat16)
    out = held.lowerings()["glm.linear"](x, *jnp_operands(held.weight(weight, value)))
    assert out.shape == (2, 3, *weight.shape[1:]) and out.dtype == jnp.bfloat16
    for part in (0, 1):
        alone = quantised.quantise(matrix_format(SCHEMES[scheme].dense), value[:, part].T)
        wanted = products.product(
            x.reshape(-1, weight.shape[0]),
            jnp.asarray(alone.values.T),
            jnp.asarray(alone.scale.T),
            matrix_format(SCHEMES[scheme].dense),
        )
        np.testing.assert_array_equal(
            bits(out[..., part, :].reshape(-1, weight.shape[2])), bits(wanted.astype(jnp.bfloat16))
        )


def jnp_operands(value: Any) -> tuple[Any, ...]:
    return tuple(map(jnp.asarray, value)) if isinstance(value, Quantized) else (jnp.asarray(value),)


@pytest.mark.parametrize(
    "scheme",
    slow_but(["fp8", "w4a8"], ["fp8", "w4a8", "w4afp8", "nvfp4", "w4a16-g16"]),
)
def test_experts_one_by_one(scheme: str) -> None:
    """Against a loop over tokens and choices with the product of each expert alone; some experts live elsewhere."""
    held, rng = formats(scheme), np.random.default_rng(3)
    gate_up, down = weight_of("experts_gate_up"), weight_of("experts_down")
    values = [(0.2 * rng.standard_normal(w.shape)).astype(np.float32) for w in (gate_up, down)]
    (g, gs), (d, ds) = (held.weight(w, v) for w, v in zip((gate_up, down), values, strict=True))
    x = jnp.asarray(rng.standard_normal((5, gate_up.shape[1])), jnp.bfloat16)
    count = gate_up.shape[0]
    chosen = rng.permuted(np.tile(np.arange(count + 2), (5, 1)), axis=1)[:, :3].astype(np.int32)
    share = rng.random((5, 3)).astype(np.float32)
    out = held.lowerings()["glm.expert_ffn"](
        x, jnp.asarray(chosen), jnp.asarray(share), *map(jnp.asarray, (g, gs, d, ds))
    )
    wanted, fmt = np.zeros(x.shape, np.float32), matrix_format(held.scheme.experts)
    for token in range(5):
        for expert, weight in zip(chosen[token], share[token], strict=True):
            if expert < count:
                hidden = held._product(x[token : token + 1], jnp.asarray(g[expert]), jnp.asarray(gs[expert]), fmt)
                hidden = OPS["glm.swiglu"].meaning(hidden)
                part = held._product(hidden, jnp.asarray(d[expert]), jnp.asarray(ds[expert]), fmt)
                wanted[token] += np.asarray(part[0], np.float32) * weight
    # compiled together, SwiGLU keeps more bits than op by op, which tips some roundings of what follows
    error = np.asarray(out, np.float32) - wanted
    assert np.sqrt(np.mean(error**2) / np.mean(wanted**2)) < 0.02


@pytest.mark.parametrize("each", [1, 4])
def test_blocks_that_a_split_cut(each: int) -> None:
    """Scales that come one for each few elements give what whole blocks give, to float32's rounding."""
    rng, fmt = np.random.default_rng(4), FORMATS["fp8-block"]
    held = quantised.quantise(fmt, rng.standard_normal((96, 300)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((7, 300)), jnp.float32)
    values, scale = jnp.asarray(held.values.T), np.asarray(held.scale.T)
    whole = products.product(x, values, jnp.asarray(scale), fmt)
    cut = np.repeat(scale, 128, 0)[:300:each]
    np.testing.assert_allclose(products.product(x, values, jnp.asarray(cut), fmt), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["w4afp8", "w4a16-g16", "w4a16", "nvfp4a16"])
def test_grouped_products_by_hand(name: str) -> None:
    """Against the dequantised matrix and activations that torch rounds: FP8 a token, or 16 bits as they are."""
    rng, fmt = np.random.default_rng(14), matrix_format(name)
    held = quantised.quantise(fmt, rng.standard_normal((40, 256)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16)
    scale = held.scale.astype(np.float32) * (1 if held.factor is None else held.factor)
    found = products.product(x, jnp.asarray(quantised.carried(held.values.T)), jnp.asarray(scale.T), fmt)
    rows = torch.from_numpy(np.array(x, np.float32))
    matrix = torch.from_numpy(quantised.dequantise(held))
    if name == "w4afp8":
        one = rows.abs().amax(-1, keepdim=True) / 448
        rows = (rows / one).to(torch.float8_e4m3fn).float() * one
    else:
        matrix = matrix.to(torch.bfloat16).float()
    np.testing.assert_allclose(np.asarray(found), (rows @ matrix.T).numpy(), rtol=2e-5, atol=2e-5)


# --- caches ----------------------------------------------------------------------------------------------


def test_fp8_latents_are_flashmlas_record() -> None:
    """e4m3 with a float32 scale for 128 latents, widened to bfloat16; the rotary part untouched. torch's arithmetic."""
    row = jnp.asarray(np.random.default_rng(5).standard_normal((3, 4, 256 + 16)), jnp.bfloat16)
    found = rounding.latent_row(row, 256, ROWS["fp8_ds_mla"])
    t = torch.from_numpy(np.array(row, np.float32))
    groups_ = t[..., :256].reshape(3, 4, 2, 128)
    scale = groups_.abs().amax(-1, keepdim=True) / 448
    kept = ((groups_ / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16).float().reshape(3, 4, 256)
    np.testing.assert_array_equal(bits(found[..., :256]), bits(kept.numpy()))
    np.testing.assert_array_equal(bits(found[..., 256:]), bits(row[..., 256:]))


def test_int8_latents_are_ascends_packed_record() -> None:
    """A float32 scale for each 128 latents, the rotary part in 16 bits (vllm-ascend `sfa_v1.py`)."""
    row = jnp.asarray(np.random.default_rng(6).standard_normal((3, 256 + 8)), jnp.bfloat16)
    found = rounding.latent_row(row, 256, ROWS["int8_packed"])
    t = torch.from_numpy(np.array(row, np.float32))[:, :256].reshape(3, 2, 128)
    scale = t.abs().amax(-1, keepdim=True) / 127
    kept = ((t / scale).round() * scale).to(torch.bfloat16).float().reshape(3, 256)
    np.testing.assert_array_equal(bits(found[:, :256]), bits(kept.numpy()))
    np.testing.assert_array_equal(bits(found[:, 256:]), bits(row[:, 256:]))


def test_plain_fp8_latents_have_no_scale() -> None:
    """Dense attention, and sparse attention on Blackwell: the whole row in e4m3, its rotary part too."""
    row = jnp.asarray(np.random.default_rng(16).standard_normal((3, 256 + 8)), jnp.bfloat16)
    wanted = torch.from_numpy(np.array(row, np.float32)).to(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(bits(rounding.latent_row(row, 256, ROWS["fp8"])), bits(wanted.numpy()))


@pytest.mark.parametrize("cache", ["fp8_scaled", "int8_scaled"])
def test_index_rows_keep_their_products(cache: str) -> None:
    """The rotation cancels in query . key; what is left is the rounding."""
    rng = np.random.default_rng(7)
    query, key = (jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2))
    exact = np.asarray(query) @ np.asarray(key).T
    found = np.asarray(rounding.index_row(query, ROWS[cache])) @ np.asarray(rounding.index_row(key, ROWS[cache])).T
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < (0.05 if cache == "fp8_scaled" else 0.012)


def test_index_scales_are_powers_of_two_for_fp8() -> None:
    """DeepSeek's `fast_round_scale`: 2^ceil(log2(amax / 448)); then bfloat16 holds the key exactly."""
    row = np.random.default_rng(8).standard_normal((20, 32)).astype(np.float32)
    rotated = row @ rounding.hadamard(32)
    scale = np.exp2(np.ceil(np.log2(np.abs(rotated).max(-1, keepdims=True) / 448)))
    wanted = torch.from_numpy(rotated / scale).to(torch.float8_e4m3fn).float().numpy() * scale
    found = np.asarray(rounding.index_row(jnp.asarray(row), ROWS["fp8_scaled"]))
    close = np.isclose(found, wanted, rtol=1e-6)
    assert close.mean() > 0.99  # the rotation sums in another order, which may tip a tie
    np.testing.assert_array_equal(found, found.astype(BF16).astype(np.float32))


def test_hadamard_is_orthonormal() -> None:
    np.testing.assert_allclose(rounding.hadamard(128) @ rounding.hadamard(128).T, np.eye(128), atol=1e-6)


def test_cache_rows_go_to_their_own_formats() -> None:
    held = formats("fp8", CacheFormats("fp8_ds_mla", "fp8_scaled", "fp8"))
    write = held.lowerings()["glm.cache_write"]
    rng = np.random.default_rng(9)
    pages, slots = jnp.zeros((2, 4, 48), jnp.bfloat16), jnp.asarray([[4, 5]], jnp.int32)
    row = jnp.asarray(rng.standard_normal((1, 2, 48)), jnp.bfloat16)
    found = write(pages, row, slots, cache="latent")[1, :2]
    np.testing.assert_array_equal(bits(found), bits(rounding.latent_row(row, 32, ROWS["fp8_ds_mla"])[0]))
    key = jnp.asarray(rng.standard_normal((1, 2, 32)), jnp.bfloat16)
    np.testing.assert_array_equal(
        bits(write(pages[..., :32], key, slots, cache="index")[1, :2]),
        bits(rounding.index_row(key, ROWS["fp8_scaled"])[0]),
    )


# --- the graph -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dsa(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("formats") / "dsa"
    save(path, DSA, random_weights(CFG))
    return Checkpoint(path)


def observe(checkpoint: Checkpoint, held: NumberFormats) -> Any:
    return Observer(checkpoint.config, load(checkpoint, held), held).run(TOKENS)


@pytest.fixture(scope="module")
def reference(dsa: Checkpoint) -> Any:
    return observe(dsa, formats("f32"))


def test_float32_is_the_graph_itself(dsa: Checkpoint, reference: Any) -> None:
    weights = load(dsa, formats("f32"))
    table = np.arange(1, 5, dtype=np.int32)[None]
    caches = [{k: jnp.zeros((5, 16, n), jnp.float32) for k, n in rows} for rows in _rows(dsa)]
    batch = graph.Batch(*map(jnp.asarray, (TOKENS[None], np.zeros(1, np.int32), np.full(1, 64, np.int32), table)))
    step = jax.jit(lambda w, c, b: graph.step(dsa.config, w, c, b, graph.Mode("expanded", "all")).logits)
    logits = step(weights, caches, batch)
    np.testing.assert_allclose(reference.logits, np.asarray(logits[0]), rtol=1e-4, atol=1e-4)
    assert sorted(reference.selected) == [0] and sorted(reference.experts) == [1]


def _rows(checkpoint: Checkpoint) -> list[list[tuple[str, int]]]:
    from model.cache import cache_rows

    return [[(row.name, row.width) for row in cache_rows(checkpoint.config, kind)] for kind in checkpoint.config.layers]


@pytest.mark.parametrize(
    ("profile", "scheme", "kv"),
    [
        ("h200-sxm", "fp8", "fp8"),
        pytest.param("ascend-910c", "w4a8", "int8", marks=pytest.mark.slow),
        pytest.param("ascend-950dt", "mxfp4", "fp8", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_a_chips_formats(dsa: Checkpoint, reference: Any, profile: str, scheme: str, kv: str) -> None:
    """Finite, unlike float32, and still the same model: random weights change some selections and experts."""
    found = observe(dsa, NumberFormats(dsa.config, chip_formats(dsa.config, hw_profiles.load(profile), scheme, kv)))
    error = np.sqrt(np.mean((found.logits - reference.logits) ** 2) / np.mean(reference.logits**2))
    assert 1e-3 < error < 0.8, error
    first = np.sqrt(np.mean((found.hidden[0] - reference.hidden[0]) ** 2) / np.mean(reference.hidden[0] ** 2))
    assert 1e-3 < first < 0.4, first


@pytest.mark.slow
def test_other_attention(tmp_path: Path) -> None:
    raw = GQA
    cfg = from_hf(raw)
    save(tmp_path / "ck", raw, random_weights(cfg))
    opened = Checkpoint(tmp_path / "ck")
    plain = NumberFormats(cfg, Formats("f32", "f32", "f32", CacheFormats.plain("f32")))
    held = NumberFormats(cfg, chip_formats(cfg, hw_profiles.load("ascend-910c"), "w8a8", "int8"))
    a, b = observe(opened, plain), observe(opened, held)
    assert 1e-4 < np.sqrt(np.mean((a.logits - b.logits) ** 2) / np.mean(a.logits**2)) < 0.3
    assert not a.selected


def test_no_weight_is_left_in_the_checkpoints_type(dsa: Checkpoint) -> None:
    """Everything is bfloat16 or quantised but the router's bias."""
    weights = load(dsa, formats("w4a8"))
    found = {
        (weight.name, np.asarray(weights["layers"][1][weight.name]).dtype.name)
        for weight in groups(dsa.config, False)["layers"][1].weights
        if not isinstance(weights["layers"][1][weight.name], Quantized)
    }
    assert {kind for name, kind in found if name != "router_bias"} == {"bfloat16"}
    assert ("router_bias", "float32") in found
    assert {FORMATS["w4a8"].values} == {INT4}
