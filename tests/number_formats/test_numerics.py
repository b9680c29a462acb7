"""Casts, scales and products bit for bit against torch, compressed-tensors and torchao."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.emulation import products, rounding
from model import quantised
from model.formats import E2M1, E4M3, E8M0, FORMATS, INT4, INT8
from model.quantised import dequantise, quantise

torch = pytest.importorskip("torch", exc_type=ImportError)

SHAPES = [(4, 128), (3, 384), (5, 200), (2, 37)]


def normal(shape: tuple[int, ...], seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """Numbers of very different sizes, zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape))
    return np.where(rng.random(shape) < 0.05, 0.0, x).astype(np.float32)


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def same_bits(found: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(bits(np.asarray(found).astype(np.float32)), bits(np.asarray(wanted)))


# --- casts -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_e4m3_cast_is_torchs(numbers: list[float]) -> None:
    """Every finite and infinite float32: nearest, ties to even, saturating (torch 2.13 saturates too)."""
    x = np.resize(np.array(numbers, np.float32), 64)  # one shape: one program
    clipped = torch.from_numpy(np.clip(x, -448.0, 448.0)).to(torch.float8_e4m3fn).float().numpy()
    same_bits(rounding.to_type(jnp.asarray(x), E4M3), clipped)
    same_bits(quantised.cast(x, E4M3), clipped)
    finite = np.isfinite(x)
    same_bits(quantised.cast(x, E4M3)[finite], torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()[finite])


def test_e4m3_cast_of_every_16_bit_number() -> None:
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x)]
    wanted = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    same_bits(jax.jit(lambda a: rounding.to_type(a, E4M3))(x), wanted)
    same_bits(quantised.cast(x, E4M3), wanted)


def test_int8_cast_is_torchs() -> None:
    x = np.concatenate([np.arange(-300, 300, 0.25, np.float32), normal((500,), 3, 3.0)])
    wanted = torch.from_numpy(x).round().clamp(-128, 127).to(torch.int8).numpy()
    np.testing.assert_array_equal(np.asarray(rounding.to_type(jnp.asarray(x), INT8)), wanted)  # -0.0 is 0
    np.testing.assert_array_equal(quantised.cast(x, INT8), wanted)
    four = torch.from_numpy(x).round().clamp(-8, 7).to(torch.int8).numpy()
    np.testing.assert_array_equal(quantised.cast(x, INT4).astype(np.int8), four)


def test_e2m1_cast_takes_the_nearest_and_ties_to_even() -> None:
    """Against the definition: the eight magnitudes, and the one with the even last bit between two."""
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = np.arange(-8, 8, 1 / 64, np.float32)
    distance = np.abs(np.abs(x)[:, None] - magnitudes[None])
    nearest = distance.min(axis=1, keepdims=True) == distance
    even = np.where(nearest[:, ::2].any(axis=1), nearest[:, ::2].argmax(axis=1) * 2, nearest.argmax(axis=1))
    wanted = np.copysign(magnitudes[even], x).astype(np.float32)
    same_bits(rounding.to_type(jnp.asarray(x), E2M1), wanted)
    same_bits(quantised.cast(x, E2M1), wanted)


# --- activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_tokens_are_torchs(shape: tuple[int, int]) -> None:
    """npu_dynamic_quant: scale = rowmax |x| / 127, value = round(x / scale); compiled, as it runs."""
    x = normal(shape)
    t = torch.from_numpy(x)
    scale = t.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    found = jax.jit(lambda a: rounding.per_group(a, None, INT8, 127.0))(x)
    same_bits(found.scale, scale.numpy())
    np.testing.assert_array_equal(found.values, (t / scale).round().clamp(-128, 127).to(torch.int8).numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_groups_are_torchs(shape: tuple[int, int]) -> None:
    """vLLM's per_token_group_quant_fp8: scale = max |x| / 448 of 128 elements, value = e4m3(x / scale)."""
    x = normal(shape, 1)
    padded = np.zeros((shape[0], -(-shape[1] // 128) * 128), np.float32)
    padded[:, : shape[1]] = x
    t = torch.from_numpy(padded).reshape(shape[0], -1, 128)
    scale = t.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    wanted = (t / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float().reshape(shape[0], -1)[:, : shape[1]]
    found = jax.jit(lambda a: rounding.per_group(a, 128, E4M3, 448.0))(x)
    same_bits(found.scale, scale[..., 0].numpy())
    same_bits(found.values, wanted.numpy())


@pytest.mark.parametrize(("dtype", "element"), [(E4M3, "float8_e4m3fn"), (E2M1, "float4_e2m1fn_x2")])
def test_microscaling_is_torchaos(dtype: np.dtype, element: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", exc_type=ImportError)
    x = normal((6, 256), 2)
    element_type = getattr(torch, element)
    scale, data = mx.to_mx(torch.from_numpy(x), element_type, 32)
    wanted = mx.to_dtype(data, scale, element_type, 32, torch.float32).numpy()
    found = jax.jit(lambda a: rounding.microscaled(a, dtype))(x)
    same_bits(found.scale, scale.float().numpy())
    same_bits(rounding.restored(found, 32), wanted)
    held = quantise(FORMATS["mxfp8" if dtype == E4M3 else "mxfp4"], x)
    np.testing.assert_array_equal(held.scale.view(np.uint8), scale.view(torch.uint8).numpy())
    same_bits(dequantise(held), wanted)


# --- weights ---------------------------------------------------------------------------------------------


def test_weight_scales_are_torchs() -> None:
    w = normal((48, 320), 4)
    t = torch.from_numpy(w)
    for name, bound, low in (("w8a8-int8", 127, -128), ("w4a8", 7, -8)):  # msModelSlim's formulas
        scale = t.abs().amax(1, keepdim=True) / float(bound)
        held = quantise(FORMATS[name], w)
        same_bits(held.scale, scale.numpy())
        np.testing.assert_array_equal(
            held.values.astype(np.int8), (t / scale).round().clamp(low, bound).to(torch.int8).numpy()
        )
    held = quantise(FORMATS["fp8-tensor"], w)
    scale = t.abs().max() / 448
    same_bits(held.scale, scale.reshape(1, 1).numpy())
    same_bits(held.values.astype(np.float32), (t / scale).to(torch.float8_e4m3fn).float().numpy())
    blocks = t[:, :256].reshape(48, 2, 128).abs().amax((0, 2)) / 448
    same_bits(quantise(FORMATS["fp8-block"], w[:, :256]).scale[0], blocks.numpy())


def test_nvfp4_is_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = normal((24, 64), 5, 1.0)
    t = torch.from_numpy(w)
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    whole = generate_gparam(t.min(), t.max())
    groups = t.reshape(24, 4, 16)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole)
    values = quantize(t, scale.float(), None, args, global_scale=whole)
    held = quantise(FORMATS["nvfp4"], w)
    assert held.factor is not None
    same_bits(held.scale.astype(np.float32), scale.float().numpy())
    same_bits(1 / held.factor, whole.reshape(()).numpy())
    same_bits(held.values.astype(np.float32), values.float().numpy())


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].narrow])
@pytest.mark.parametrize("shape", [(64, 128), (3, 24, 200), (2, 1, 1)])
def test_rounding_stays_within_half_a_step(name: str, shape: tuple[int, ...]) -> None:
    """Shapes that no group divides too, leading dims, and a matrix of zeros."""
    w = normal(shape, 6, 1.0)
    fmt, held = FORMATS[name], quantise(FORMATS[name], w)
    step = {E4M3: 2**-3, E2M1: 2**-1}.get(fmt.values)
    scale = np.abs(w).max(axis=(-1, -2) if fmt.shared in ("tensor", "block") else -1, keepdims=True)
    # a step of the largest binade at most, twice where a power of two falls short of the largest value
    worst = scale * (step or 1 / fmt.bound) * (1.0 if fmt.scale == E8M0 else 0.6)
    assert (np.abs(dequantise(held) - w) <= worst + 1e-30).all()
    assert not dequantise(quantise(FORMATS[name], np.zeros(shape, np.float32))).any()


# --- products --------------------------------------------------------------------------------------------


def graph_layout(held: quantised.Matrix) -> tuple[jax.Array, jax.Array]:
    """[out, in] to the graph's [in, out]."""
    return jnp.asarray(quantised.carried(held.values.T)), jnp.asarray(held.scale.T)


@pytest.mark.parametrize("name", ["w8a8-int8", "w4a8"])
@pytest.mark.parametrize("width", [128, 2500])
def test_integer_products_are_torchs(name: str, width: int) -> None:
    x, w = normal((17, width), 7, 1.0), normal((48, width), 8, 1.0)
    held = quantise(FORMATS[name], w)
    t = torch.from_numpy(x)
    scale = t.abs().amax(-1, keepdim=True) / 127
    rows = (t / scale).round().to(torch.int8)
    exact = rows.to(torch.int32) @ torch.from_numpy(held.values.astype(np.int8)).T.to(torch.int32)
    if width % 8 == 0:  # torch's own integer product, where it takes the shape
        padded = torch.zeros(32, width, dtype=torch.int8)
        padded[:17] = rows
        assert torch.equal(torch._int_mm(padded, torch.from_numpy(held.values.astype(np.int8)).T)[:17], exact)
    wanted = exact.float() * torch.from_numpy(held.scale).T * scale
    same_bits(jax.jit(functools.partial(products.product, fmt=FORMATS[name]))(x, *graph_layout(held)), wanted.numpy())


def test_integer_product_is_exact_at_its_largest() -> None:
    x, w = np.full((2, 4096), -128, np.float32), np.full((4096, 3), -128, np.float32)
    assert (np.asarray(products.integer_dot(jnp.asarray(x), jnp.asarray(w))) == 4096 * 128 * 128).all()


def exact_e4m3(shape: tuple[int, int], seed: int) -> np.ndarray:
    """e4m3 numbers whose products any order of summing in float32 gets exactly right."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-15, 16, shape) * 2.0 ** rng.integers(-2, 2, shape)).astype(np.float32)


@pytest.mark.parametrize("out_type", ["float32", "bfloat16"])
def test_fp8_product_is_scaled_mms(out_type: str) -> None:
    """Per-tensor weights and per-token activations, on numbers where the order of summing does not matter."""
    x, w = exact_e4m3((16, 256), 9), exact_e4m3((32, 256), 10)
    x[:, 0], w[0, 0] = 448.0, 448.0  # makes every scale 1
    one = torch.tensor(1.0)
    wanted = torch._scaled_mm(
        torch.from_numpy(x).to(torch.float8_e4m3fn),
        torch.from_numpy(w).to(torch.float8_e4m3fn).T,
        scale_a=one,
        scale_b=one,
        out_dtype=getattr(torch, out_type),
    )
    held = quantise(FORMATS["fp8-tensor"], w)
    found = jax.jit(lambda *a: products.product(*a, FORMATS["fp8-tensor"]))(x, *graph_layout(held))
    same_bits(np.asarray(found.astype(out_type)).astype(np.float32), wanted.float().numpy())


def test_fp8_rows_are_scaled_mms() -> None:
    """Real scales: torch multiplies them into the operands first, the kernels after the sum, so 16 bits agree but
    for ties that the float32 error decides."""
    x, w = normal((16, 256), 11, 0.5), normal((32, 256), 12, 0.5)
    held = quantise(FORMATS["fp8-tensor"], w)
    act = rounding.per_group(jnp.asarray(x), None, E4M3, 448.0)
    wanted = torch._scaled_mm(
        torch.from_numpy(np.array(act.values)).to(torch.float8_e4m3fn),
        torch.from_numpy(held.values.astype(np.float32)).to(torch.float8_e4m3fn).T,
        scale_a=torch.from_numpy(np.array(act.scale)),
        scale_b=torch.full((1, 32), float(held.scale[0, 0])),
        out_dtype=torch.bfloat16,
    )
    found = products.product(jnp.asarray(x), *graph_layout(held), FORMATS["fp8-tensor"])
    np.testing.assert_allclose(np.asarray(found), wanted.float().numpy(), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("width", [128, 384, 200])
def test_block_fp8_product_is_scaled_mms_block_by_block(width: int) -> None:
    """DeepSeek's scheme from torch's parts: `_scaled_mm` of each 128 x 128 block, scaled and summed in float32."""
    n, out = 16, 160
    x, w = normal((n, width), 13, 0.5), normal((out, width), 14, 0.5)
    held = quantise(FORMATS["fp8-block"], w)
    found = np.asarray(jax.jit(functools.partial(products.product, fmt=FORMATS["fp8-block"]))(x, *graph_layout(held)))
    total = np.zeros((n, out), np.float64)
    for k in range(0, width, 128):
        t = torch.from_numpy(x[:, k : k + 128].copy())
        scale = t.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        rows = (t / scale).to(torch.float8_e4m3fn)
        for o in range(0, out, 128):
            block = torch.from_numpy(held.values[o : o + 128, k : k + 128].astype(np.float32)).to(torch.float8_e4m3fn)
            one = torch.tensor(1.0)
            if rows.shape[1] % 16 == 0:
                part = torch._scaled_mm(rows, block.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
            else:
                part = rows.float() @ block.float().T
            total[:, o : o + 128] += (part * scale * float(held.scale[o // 128, k // 128])).double().numpy()
    np.testing.assert_allclose(found, total, rtol=2e-6, atol=2e-6 * np.abs(total).max())


def test_block_fp8_product_bit_for_bit_where_sums_are_exact() -> None:
    x, w = exact_e4m3((16, 256), 15), exact_e4m3((128, 256), 16)
    x[:, [0, 128]], w[0, [0, 128]] = 448.0, 448.0
    one = torch.tensor(1.0)
    wanted = torch._scaled_mm(
        torch.from_numpy(x).to(torch.float8_e4m3fn),
        torch.from_numpy(w).to(torch.float8_e4m3fn).T,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.float32,
    )
    fmt = FORMATS["fp8-block"]
    found = jax.jit(functools.partial(products.product, fmt=fmt))(x, *graph_layout(quantise(fmt, w)))
    same_bits(found, wanted.numpy())


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "w4a16"])
def test_group_products_are_products_of_the_dequantised(name: str) -> None:
    """Against float64 products of what an independent cast leaves (see the tests of the casts)."""
    x, w = normal((9, 128), 17, 0.5), normal((24, 128), 18, 0.5)
    held = quantise(FORMATS[name], w)
    values, scale = quantised.carried(held.values.T), held.scale.T
    if held.factor is not None:
        scale = scale.astype(np.float32) * held.factor
    rows = {
        "mxfp8": lambda: dequantise(quantise(FORMATS["mxfp8"], x)),
        "mxfp4": lambda: dequantise(quantise(FORMATS["mxfp4"], x)),
        "nvfp4": lambda: np.stack([dequantise(quantise(FORMATS["nvfp4"], row[None]))[0] for row in x]),
        "w4a16": lambda: x,
    }[name]()
    wanted = rows.astype(np.float64) @ dequantise(held).astype(np.float64).T
    found = jax.jit(functools.partial(products.product, fmt=FORMATS[name]))(x, jnp.asarray(values), jnp.asarray(scale))
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
