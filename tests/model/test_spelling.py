"""Quantised matrices as others store them: what is read is what compressed-tensors' own decompressor, or the format's
arithmetic, gives; what cannot be read is refused in one line."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model.formats import matrix_format
from model.quantised import dequantise, quantise
from model.spelling import Found, spelling, tensor_name

NAME = "layer.weight"
DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "int32": "I32", "int8": "I8", "uint8": "U8", "int64": "I64",
    "float8_e4m3fn": "F8_E4M3", "float16": "F16",
}  # fmt: skip


def stored(tensors: dict[str, np.ndarray]) -> Any:
    return lambda name: Found(DTYPES[tensors[name].dtype.name], tensors[name].shape) if name in tensors else None


def read(tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    found = spelling(NAME, shape, stored(tensors))
    assert found is not None
    for suffix, expected in found.parts.items():
        assert tensors[tensor_name(NAME, suffix)].shape == expected
    return dequantise(found.read(NAME, tensors.__getitem__))


def refused(tensors: dict[str, np.ndarray], shape: tuple[int, int], *mentions: str) -> None:
    with pytest.raises(ValueError) as error:
        spelling(NAME, shape, stored(tensors))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in mentions), error.value


def packed(bits: int, group: int | None, symmetric: bool, width: int, out: int = 24) -> tuple[Any, np.ndarray]:
    """Tensors that compressed-tensors packs, and what it unpacks them to."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs.model_validate({"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    made = torch.Generator().manual_seed(0)
    groups = width // (group or width)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    state = {
        "weight": torch.randn(out, width, generator=made),
        "weight_scale": 0.1 + torch.rand(out, groups, generator=made) * 2 ** (4 - bits),
        "weight_zero_point": torch.randint(low, high, (out, groups), generator=made).to(torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    held = PackedQuantizationCompressor.compress(state, scheme)
    tensors = {f"layer.{name}": tensor.numpy() for name, tensor in held.items()}
    return tensors, PackedQuantizationCompressor.decompress(held, scheme)["weight"].numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("width", "group"),
    [(256, 64), (256, 128), (384, 192), (96, 48), (192, 96), (56, 28), (14, 7), (96, 24), (256, None)],
)
def test_int4_in_any_group(width: int, group: int | None, symmetric: bool) -> None:
    tensors, expected = packed(4, group, symmetric, width)
    np.testing.assert_array_equal(read(tensors, (24, width)), expected)


def test_int4_zero_points_of_rows_that_no_word_ends_with() -> None:
    tensors, expected = packed(4, 32, False, 64, out=21)
    np.testing.assert_array_equal(read(tensors, (21, 64)), expected)


def test_eight_bits_packed() -> None:
    tensors, expected = packed(8, None, True, 96)
    np.testing.assert_array_equal(read(tensors, (24, 96)), expected)
    refused(packed(8, 32, True, 96)[0], (24, 96), "8 bits", "groups of 32")
    refused(packed(8, None, False, 96)[0], (24, 96), "zero_point")


def test_what_moves_columns_or_zero_is_refused() -> None:
    tensors, _ = packed(4, 32, True, 64)
    refused({**tensors, NAME + "_g_idx": np.zeros(64, np.int32)}, (24, 64), "weight_g_idx")
    int8 = {NAME: np.zeros((4, 8), np.int8), NAME + "_scale": np.ones((4, 1), np.float32)}
    refused({**int8, NAME + "_zero_point": np.ones((4, 1), np.int8)}, (4, 8), "zero_point")
    refused({**tensors, NAME + "_scale": np.ones((24, 3), np.float32)}, (24, 64), "3 scales", "64 columns")


def fp8(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 50, shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scales", ["()", "(1,)", "(1, 1)", "(200,)", "(200, 1)", "blocks"])
def test_fp8_by_the_shape_of_its_scales(scales: str, dtype: Any) -> None:
    """One, one a row, or one a block, the last ones ragged; whatever their type."""
    rng, values = np.random.default_rng(1), fp8((200, 300))
    shape = (2, 3) if scales == "blocks" else tuple(map(int, scales.strip("()").replace(",", " ").split()))
    scale = rng.uniform(0.5, 2, shape).astype(dtype)
    wide = scale.astype(np.float32)
    blocks = scales == "blocks"
    full = np.repeat(np.repeat(wide, 128, 0)[:200], 128, 1)[:, :300] if blocks else wide.reshape(-1, 1)
    tensors = {NAME: values, NAME + "_scale": scale}
    np.testing.assert_array_equal(read(tensors, (200, 300)), values.astype(np.float32) * full)


@pytest.mark.parametrize("shape", [(200, 3), (2,), (3, 2), (100, 1)])
def test_fp8_scales_of_no_known_shape(shape: tuple[int, ...]) -> None:
    refused({NAME: fp8((200, 300)), NAME + "_scale": np.ones(shape, np.float32)}, (200, 300), str(list(shape)))


def test_4_bit_floats_whose_scales_are_another_formats() -> None:
    pairs = {NAME + "_packed": np.zeros((8, 32), np.uint8)}
    refused({**pairs, NAME + "_scale": np.ones((8, 4), np.uint8)}, (8, 64), "32 columns")
    refused({**pairs, NAME + "_scale": np.ones((8, 2), np.float32)}, (8, 64), "F32")


def test_groups_that_quantise_makes_are_found_again() -> None:
    """Or refused: by numbers alone 2 scales for 96 columns are of 64 and 32, not of 48."""
    matrix = np.random.default_rng(2).normal(size=(8, 96)).astype(np.float32)
    with pytest.raises(ValueError, match="groups of 48"):
        quantise(matrix_format("w4a16-g48"), matrix)
    assert np.abs(dequantise(quantise(matrix_format("w4a16-g24"), matrix)) - matrix).max() < 0.5


E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def modelopt_nvfp4(out: int, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors as modelopt stores a matrix in NVFP4, and what they stand for: value x scale of 16 x scale of all."""
    made = np.random.default_rng(0)
    pairs = made.integers(0, 256, (out, width // 2)).astype(np.uint8)
    scale = (0.1 + made.random((out, width // 16))).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(0.037)
    halves = np.stack([pairs % 16, pairs // 16], axis=-1).reshape(out, width)
    values = np.where(halves < 8, 1, -1) * E2M1_VALUES[halves % 8]
    expected = values * np.repeat(scale.astype(np.float32), 16, axis=1) * whole
    return {NAME: pairs, f"{NAME}_scale": scale, f"{NAME}_scale_2": np.array(whole)}, expected


@pytest.mark.parametrize("width", [16, 64, 112])
def test_nvfp4_of_modelopt(width: int) -> None:
    tensors, expected = modelopt_nvfp4(24, width)
    np.testing.assert_allclose(read(tensors, (24, width)), expected, rtol=1e-6)
    tensors[f"{NAME}_scale_2"] = tensors[f"{NAME}_scale_2"].reshape(1)
    np.testing.assert_allclose(read(tensors, (24, width)), expected, rtol=1e-6)


def test_fp8_blocks_of_modelopt() -> None:
    """Scales [blocks, 1, blocks, 1]."""
    held = quantise(matrix_format("fp8-block"), np.random.default_rng(0).standard_normal((256, 384), np.float32))
    tensors = {NAME: held.values, f"{NAME}_scale": held.scale.reshape(2, 1, 3, 1)}
    np.testing.assert_array_equal(read(tensors, (256, 384)), dequantise(held))


# --- AWQ and GPTQ ----------------------------------------------------------------------------------


def in_words(numbers: np.ndarray, places: Any) -> np.ndarray:
    """[rows, columns] of 4 bits, eight of a row in a word: place i, from the lowest, holds column `places[i]`."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for i, place in enumerate(places):
            words[:, word] |= numbers[:, 8 * word + place].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def turned(method: str, width: int, group: int, out: int = 24) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors as AutoAWQ and AutoGPTQ pack a matrix, word by word, and what they stand for."""
    made = np.random.default_rng(0)
    values = made.integers(0, 16, (width, out))
    points = made.integers(0, 16, (width // group, out)) + (method == "gptq")
    scales = (0.1 + made.random((width // group, out))).astype(np.float16)
    if method == "awq":  # along the outputs
        places = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"layer.qweight": in_words(values, places), "layer.qzeros": in_words(points, places)}
    else:  # down the inputs; a zero point is stored less 1
        tensors = {"layer.qweight": in_words(values.T, range(8)).T, "layer.qzeros": in_words(points - 1, range(8))}
        tensors["layer.g_idx"] = np.array([row // group for row in range(width)], np.int32)
    rows = [(values[row] - points[row // group]) * scales[row // group].astype(np.float32) for row in range(width)]
    return {**tensors, "layer.scales": scales}, np.stack(rows, axis=1).astype(np.float32)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(("width", "group"), [(256, 128), (96, 32), (96, 48), (64, 64), (32, 16)])
def test_awq_and_gptq(method: str, width: int, group: int) -> None:
    tensors, expected = turned(method, width, group)
    np.testing.assert_array_equal(read(tensors, (24, width)), expected)


def test_gptq_without_or_with_another_order() -> None:
    tensors, expected = turned("gptq", 64, 32)
    order = tensors.pop("layer.g_idx")
    np.testing.assert_array_equal(read(tensors, (24, 64)), expected)
    with pytest.raises(ValueError, match="desc_act"):
        read({**tensors, "layer.g_idx": order[::-1].copy()}, (24, 64))


def test_awq_and_gptq_of_another_shape() -> None:
    tensors, _ = turned("awq", 64, 32)
    refused({**tensors, "layer.qweight": np.zeros((16, 24), np.int32)}, (24, 64), "neither AWQ's [64, 3]", "[8, 24]")
    refused({**tensors, "layer.scales": np.ones((3, 24), np.float16)}, (24, 64), "3 scales", "64 columns")
    refused({**tensors, "layer.g_idx": np.zeros(64, np.int32)}, (24, 64), "g_idx")
