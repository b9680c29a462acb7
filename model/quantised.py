"""Quantised matrices: what each number format is, and how checkpoints spell it. Free of JAX.

A matrix `[.., out, in]` becomes values of a narrow type and scales, so that matrix = values * scales. Each format
says which elements share a scale; rounding is to nearest, ties to even, with saturation. Sources of the formulas:

    fp8-block   e4m3, 128 x 128 blocks, float32 amax / 448       DeepSeek-V3 `inference/kernel.py`, GLM-5-FP8
    fp8-tensor  e4m3, one scale, float32 amax / 448              compressed-tensors 0.20, strategy "tensor"
    w8a8-int8   int8, one scale a row, float32 amax / 127        msModelSlim 26.1 `int_quantization.py`
    w4a8        int4, one scale a row, float32 amax / 7          msModelSlim 26.1, recipe `glm_5_w4a8.yaml`
    w4a16       int4, groups of 32, bfloat16 amax / 7.5          compressed-tensors 0.20, strategy "group"
    mxfp8       e4m3, groups of 32, 2^(floor(log2 amax) - 8)     OCP Microscaling 1.0, section 6.3
    mxfp4       e2m1, groups of 32, 2^(floor(log2 amax) - 2)     OCP Microscaling 1.0, section 6.3
    nvfp4       e2m1, groups of 16, e4m3 amax / 6 and one        compressed-tensors 0.20, "nvfp4-pack-quantized"
                float32 a matrix: amax / (448 * 6)

Weights are rounded as they are: no smoothing, rotation or search (msModelSlim's QuaRot, AWQ and SSZ steps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from model.weights import FP8_BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
CARRIER: Mapping[np.dtype, np.dtype] = {INT4: INT8, E2M1: E5M2}
"""What holds 4-bit values on a device: XLA's buffers of types below a byte differ in layout from program to program.
Every int4 number is an int8 number, and every e2m1 number an e5m2 number."""


@dataclasses.dataclass(frozen=True)
class MatrixFormat:
    """A number format of a matrix: the type of its values, which of them share a scale, and the scale's type.

    `shared`: "block" (128 x 128), "tensor", "row" (an output channel), or the number of consecutive elements of
    the contracted dim. `bound`: what a group's largest magnitude is scaled to.
    """

    name: str
    values: np.dtype
    shared: Literal["block", "tensor", "row"] | int
    scale: np.dtype
    bound: float

    @property
    def bits(self) -> float:
        """Bits of one element, its part of the scales left out."""
        return 4.0 if self.values in (INT4, E2M1) else 8.0


FORMATS: Mapping[str, MatrixFormat] = {
    f.name: f
    for f in (
        MatrixFormat("fp8-block", E4M3, "block", F32, E4M3_MAX),
        MatrixFormat("fp8-tensor", E4M3, "tensor", F32, E4M3_MAX),
        MatrixFormat("w8a8-int8", INT8, "row", F32, 127.0),
        MatrixFormat("w4a8", INT4, "row", F32, 7.0),
        MatrixFormat("w4a16", INT4, 32, BF16, 7.5),
        MatrixFormat("mxfp8", E4M3, 32, E8M0, E4M3_MAX),
        MatrixFormat("mxfp4", E2M1, 32, E8M0, E2M1_MAX),
        MatrixFormat("nvfp4", E2M1, 16, E4M3, E2M1_MAX),
    )
}


class Matrix(NamedTuple):
    """A quantised matrix: values [.., out, in], scale [.., out or its blocks or 1, in's groups or 1], and for
    nvfp4 the float32 factor [..] that the scales are multiplied by."""

    values: np.ndarray
    scale: np.ndarray
    factor: np.ndarray | None = None


def carried(values: np.ndarray) -> np.ndarray:
    """Values in the type that a device holds them in."""
    return values.astype(CARRIER.get(values.dtype, values.dtype), copy=False)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 to a narrow type: nearest, ties to even, saturating."""
    if dtype in (INT8, INT4):
        low, high = (-128.0, 127.0) if dtype == INT8 else (-8.0, 7.0)
        return np.clip(np.rint(x), low, high).astype(np.int8).astype(dtype, copy=False)
    largest = E4M3_MAX if dtype == E4M3 else E2M1_MAX
    return np.clip(x, -largest, largest).astype(dtype)


def _groups(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[.., out, in] as [.., out/rows, rows, in/columns, columns], padded with zeros."""
    *lead, out, width = matrix.shape
    blocks = (-(-out // rows), -(-width // columns))
    padded = np.zeros((*lead, blocks[0] * rows, blocks[1] * columns), np.float32)
    padded[..., :out, :width] = matrix
    return padded.reshape(*lead, blocks[0], rows, blocks[1], columns)


def power_of_two_scale(largest: np.ndarray, emax: int) -> np.ndarray:
    """2^(floor(log2 largest) - emax) as float32, within what e8m0 holds; `emax` is the exponent of the element
    type's largest value (8 for e4m3, 2 for e2m1)."""
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - emax, -127)
    return np.ldexp(np.float32(1.0), np.clip(exponent, -127, 127)).astype(np.float32)


def _shared_shape(shared: str | int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    match shared:
        case "block":
            return FP8_BLOCK, FP8_BLOCK
        case "tensor":
            return shape[-2], shape[-1]
        case "row":
            return 1, shape[-1]
        case _:
            return 1, int(shared)


def quantise(name: str, matrix: np.ndarray) -> Matrix:
    """float32 or bfloat16 `[.., out, in]` in the format `name`. A last group may be shorter than the others."""
    fmt = FORMATS[name]
    groups = _groups(matrix.astype(np.float32, copy=False), *_shared_shape(fmt.shared, matrix.shape))
    largest = np.abs(groups).max(axis=(-3, -1))
    factor = None
    if fmt.scale == E8M0:
        scale = power_of_two_scale(largest, 8 if fmt.values == E4M3 else 2)
        divisor = scale
    elif fmt.name == "nvfp4":
        whole = np.abs(matrix.astype(np.float32)).max(axis=(-2, -1))
        inverse = np.float32(E4M3_MAX * E2M1_MAX) / np.where(whole > 0, whole, np.float32(1.0))
        inverse = inverse.astype(np.float32)
        scale = cast(inverse[..., None, None] * (largest / np.float32(fmt.bound)), E4M3).astype(np.float32)
        scale = np.where(scale == 0, np.float32(0.125), scale)  # e4m3's epsilon, as compressed-tensors has it
        divisor, factor = scale / inverse[..., None, None], np.float32(1.0) / inverse
    else:
        scale = (largest / np.float32(fmt.bound)).astype(fmt.scale).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(1.0))
        divisor = scale
    *lead, out, width = matrix.shape
    *_, above, rows, across, columns = groups.shape
    with np.errstate(over="ignore", under="ignore"):
        scaled = groups / divisor[..., :, None, :, None].astype(np.float32)
    values = cast(scaled.reshape(*lead, above * rows, across * columns)[..., :out, :width], fmt.values)
    return Matrix(values, scale.astype(fmt.scale), factor)


def spread(scale: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Scales repeated along `axis` to the matrix's own `size`: one an element, a group or a 128-block (the last one
    may be shorter), or all."""
    parts = scale.shape[axis]
    if parts == size:
        return scale
    block = next((n for n in (FP8_BLOCK, 32, 16) if parts == -(-size // n)), size)
    return np.take(np.repeat(scale, block, axis), range(size), axis)


def dequantise(held: Matrix) -> np.ndarray:
    """float32 `[.., out, in]`."""
    values = held.values.astype(np.float32)
    scale = held.scale.astype(np.float32)
    for axis in (values.ndim - 2, values.ndim - 1):
        scale = spread(scale, values.shape[axis], axis)
    return values * (scale if held.factor is None else scale * held.factor[..., None, None])


# --- how checkpoints spell them --------------------------------------------------------------------------


class Found(NamedTuple):
    """What a checkpoint holds under a name: dtype name as safetensors has it, and shape."""

    dtype: str
    shape: tuple[int, ...]


Look = Callable[[str], Found | None]
Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How one matrix `NAME.weight` [out, in] is stored: `parts` are the suffixes to its name with their shapes,
    `spare` further tensors that belong to it and are not needed to read it."""

    format: str
    parts: Mapping[str, tuple[int, ...]]
    spare: tuple[str, ...] = ()
    decode: Callable[..., Matrix] = dataclasses.field(default=lambda *parts: Matrix(*parts), compare=False)

    def read(self, name: str, array: Read) -> Matrix:
        """The matrix from its tensors."""
        return self.decode(*(array(tensor_name(name, suffix)) for suffix in self.parts))


def tensor_name(name: str, suffix: str) -> str:
    """`NAME.weight` and a suffix: "_scale" is a parameter beside it, ".scale_bias" a sibling of the module's."""
    return name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix


def spelling(name: str, shape: tuple[int, ...], look: Look) -> Spelling | None:
    """How the matrix `name` is stored, read off the names, types and shapes beside it; None where it is plain."""
    out, width = shape if len(shape) == 2 else (1, shape[-1])
    held, scale, packed = look(name), look(name + "_scale"), look(name + "_packed")
    groups = scale.shape[-1] if scale and len(scale.shape) == 2 else 1
    if packed and packed.dtype == "I32":
        return Spelling(
            "w4a8" if scale and scale.dtype == "F32" else "w4a16",
            {"_packed": (out, -(-width // 8)), "_scale": (out, groups)},
            ("_shape",),
            lambda words, s: Matrix(_unpack_words(words, width), s),
        )
    if packed or (held and held.dtype == "U8"):
        key = "_packed" if packed else ""
        parts = {key: (out, width // 2), "_scale": (out, groups)}
        if look(name + "_global_scale"):
            return Spelling(
                "nvfp4",
                {**parts, "_global_scale": (1,)},
                ("_input_scale",),
                lambda pairs, s, g: Matrix(_unpack_pairs(pairs).view(E2M1), s, (1 / g.astype(np.float32)).reshape(())),
            )
        return Spelling("mxfp4", parts, (), lambda pairs, s: Matrix(_unpack_pairs(pairs).view(E2M1), s.view(E8M0)))
    if held and held.dtype == "I8":
        row = {"_scale": (out, 1)}
        if look(tensor_name(name, ".scale_bias")):
            parts = {"": (out // 2, width), **row}
            return Spelling("w4a8", parts, ("_offset", ".scale_bias"), lambda v, s: Matrix(_unpack_rows(v), s))
        return Spelling("w8a8-int8", {"": shape, **row}, ("_offset",))
    if held and held.dtype == "F8_E4M3":
        if not scale:
            blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
            return Spelling("fp8-block", {"": shape, "_scale_inv": blocks})
        if scale.dtype in ("U8", "F8_E8M0"):
            parts = {"": shape, "_scale": (out, groups)}
            return Spelling("mxfp8", parts, (), lambda v, s: Matrix(v, s.view(E8M0)))
        if scale.shape == (out, 1) and out > 1:
            return Spelling("fp8-tensor", {"": shape, "_scale": (out, 1)})
        return Spelling("fp8-tensor", {"": shape, "_scale": scale.shape}, (), lambda v, s: Matrix(v, s.reshape(1, 1)))
    return None


def _unpack_pairs(pairs: np.ndarray) -> np.ndarray:
    """[out, in/2] bytes, low half first -> [out, in] bytes of 4 bits."""
    return np.stack([pairs & 0xF, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)


def _pack_pairs(values: np.ndarray) -> np.ndarray:
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _unpack_words(words: np.ndarray, width: int) -> np.ndarray:
    """compressed-tensors: eight 4-bit values an int32, each stored plus 8."""
    low_first = _unpack_pairs(np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8))
    return (low_first[:, :width].astype(np.int8) - 8).astype(INT4)


def _pack_words(values: np.ndarray) -> np.ndarray:
    nibbles = (values.astype(np.int8) + 8).astype(np.uint8)
    padded = np.zeros((nibbles.shape[0], -(-nibbles.shape[1] // 8) * 8), np.uint8)
    padded[:, : nibbles.shape[1]] = nibbles
    return np.ascontiguousarray(_pack_pairs(padded)).view("<i4").astype(np.int32, copy=False)


def _unpack_rows(packed: np.ndarray) -> np.ndarray:
    """msModelSlim: rows 2i and 2i+1 share a byte, the even row in its low half."""
    low, high = (packed << 4) >> 4, packed >> 4  # arithmetic shifts keep the sign
    return np.stack([low, high], axis=1).reshape(-1, packed.shape[1]).astype(INT4)


def _pack_rows(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.int8)
    return ((bits[1::2] << 4) | (bits[0::2] & 0x0F)).astype(np.int8)


MODELSLIM_TYPES = {
    "w8a8-int8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC", "mxfp8": "W8A8_MXFP8", "mxfp4": "W4A4_MXFP4",
}  # fmt: skip
"""Format -> msModelSlim's name of it (`quant_model_description.json`)."""
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "fp8-block": ("deepseek",),
    "fp8-tensor": ("compressed-tensors",),
    "w8a8-int8": ("compressed-tensors", "msmodelslim"),
    "w4a8": ("msmodelslim", "compressed-tensors"),
    "w4a16": ("compressed-tensors",),
    "mxfp8": ("msmodelslim", "compressed-tensors"),
    "mxfp4": ("msmodelslim", "compressed-tensors"),
    "nvfp4": ("compressed-tensors",),
}
"""The checkpoint layouts ("deepseek", "compressed-tensors", "msmodelslim") that can hold a format, the usual first."""
_MODELSLIM_SHARDS = 16  # of a down projection's sums: msModelSlim writes them for tensor parallelism over 16


def spell(name: str, fmt: str, layout: str, held: Matrix) -> dict[str, np.ndarray]:
    """The tensors that store a matrix under `name`, by their full names.

    Raises ValueError, whose text says what does not divide.
    """
    values, scale, factor = held
    out, width = values.shape
    shared = FORMATS[fmt].shared
    if isinstance(shared, int) and width % shared:
        raise ValueError(f"{name}: its {width} columns are not a multiple of the {shared} that share a scale in {fmt}")
    suffixes: dict[str, np.ndarray]
    match fmt, layout:
        case "fp8-block", _:
            suffixes = {"": values, "_scale_inv": scale}
        case "fp8-tensor", _:
            suffixes = {"": values, "_scale": scale.reshape(1)}
        case "w8a8-int8", "msmodelslim":
            suffixes = {"": values, "_scale": scale, "_offset": np.zeros_like(scale)}
        case "w8a8-int8", _:
            suffixes = {"": values, "_scale": scale}
        case "w4a8", "msmodelslim":
            if out % 2 or ("down_proj" in name and width % _MODELSLIM_SHARDS):
                raise ValueError(f"{name}: [{out}, {width}] does not pack by twos of rows and sixteenths of columns")
            suffixes = {"": _pack_rows(values), "_scale": scale, "_offset": np.zeros_like(scale)}
            suffixes[".scale_bias"] = _scale_bias(name, held)
        case (("w4a8" | "w4a16"), _):
            suffixes = {"_packed": _pack_words(values), "_scale": scale, "_shape": np.array([out, width], np.int64)}
        case "mxfp8", _:
            suffixes = {"": values, "_scale": scale.view(np.uint8)}
        case "mxfp4", _:
            packed = _pack_pairs(values.view(np.uint8))
            suffixes = {"" if layout == "msmodelslim" else "_packed": packed, "_scale": scale.view(np.uint8)}
        case _:
            assert factor is not None
            suffixes = {"_packed": _pack_pairs(values.view(np.uint8)), "_scale": scale}
            suffixes["_global_scale"] = (np.float32(1.0) / factor).reshape(1).astype(np.float32)
    return {tensor_name(name, suffix): array for suffix, array in suffixes.items()}


def _scale_bias(name: str, held: Matrix) -> np.ndarray:
    """What CANN's W4A8 kernel adds for storing 4-bit values as unsigned: 8 times the sums of the dequantised rows,
    a down projection's in 16 parts (msModelSlim `save/utils/pack.py: process_scale`)."""
    full = dequantise(held)
    parts = full.reshape(full.shape[0], _MODELSLIM_SHARDS if "down_proj" in name else 1, -1)
    return 8 * parts.sum(axis=-1, dtype=np.float32)
