"""How checkpoints spell quantised matrices: the tensors that store one, and back. Free of JAX.

deepseek            `NAME.weight` F8_E4M3 and `NAME.weight_scale_inv`
compressed-tensors  `weight` or `weight_packed`, `weight_scale`, `weight_shape`, `weight_global_scale`,
                    `weight_zero_point`
msmodelslim         `weight`, `weight_scale`, `weight_offset`, `scale_bias`
modelopt            `weight`, `weight_scale`, `weight_scale_2` (read only)
AWQ, GPTQ           `qweight`, `qzeros`, `scales`, and `g_idx` of GPTQ; 4 bits, turned to [in, out] (read only)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from model.formats import E2M1, E8M0, FORMATS, FP8_BLOCK, INT4, INT8, MatrixFormat, matrix_format
from model.quantised import Matrix, dequantise, shared_size


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

    format: MatrixFormat
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
    """How the matrix `name` is stored, read off the names, types and shapes beside it; None where it is plain.

    Its format says how it is stored: what activations become, the checkpoint's config says. Raises ValueError for
    groups that do not divide, and for what cannot be read.
    """
    out, width = shape if len(shape) == 2 else (1, shape[-1])
    held, scale, packed = look(name), look(name + "_scale"), look(name + "_packed")
    if (words := look(tensor_name(name, ".qweight"))) and held is None:
        return _turned_words(name, (out, width), words, look)
    groups = scale.shape[-1] if scale and len(scale.shape) == 2 else 1
    if look(name + "_g_idx"):
        raise ValueError(f"{name}: weight_g_idx (actorder by groups) cannot be read; columns must be in order")
    if packed and packed.dtype == "I32":
        return _packed_words(name, (out, width), packed, scale, look(name + "_zero_point"))
    if look(name + "_zero_point"):
        raise ValueError(f"{name}: weight_zero_point can be read for weights packed in 4 bits only")
    if packed or (held and held.dtype == "U8"):
        key = "_packed" if packed else ""
        # compressed-tensors divides by its scale of the matrix, modelopt multiplies
        factor = look(name + "_global_scale") or look(name + "_scale_2")
        parts: dict[str, tuple[int, ...]] = {key: (out, width // 2), "_scale": (out, groups)}
        each, types = (16, ("F8_E4M3",)) if factor else (32, ("U8", "F8_E8M0"))
        if scale and (scale.dtype not in types or groups != -(-width // each)):
            found = f"scales {scale.dtype} {list(scale.shape)}"
            raise ValueError(f"{name}: {found} are not {types[0]}, one for {each} columns")
        if factor:
            divides = look(name + "_global_scale") is not None
            parts["_global_scale" if divides else "_scale_2"] = factor.shape if factor.shape in ((), (1,)) else (1,)

            def of_pairs(pairs: np.ndarray, s: np.ndarray, g: np.ndarray) -> Matrix:
                g = g.astype(np.float32).reshape(())
                return Matrix(_unpack_pairs(pairs).view(E2M1), s, 1 / g if divides else g)

            return Spelling(FORMATS["nvfp4"], parts, (), of_pairs)
        return Spelling(
            FORMATS["mxfp4"], parts, (), lambda pairs, s: Matrix(_unpack_pairs(pairs).view(E2M1), s.view(E8M0))
        )
    if held and held.dtype == "I8":
        row = {"_scale": (out, 1)}
        if look(tensor_name(name, ".scale_bias")):
            parts = {"": (out // 2, width), **row}
            spare = ("_offset", ".scale_bias")
            return Spelling(FORMATS["w4a8"], parts, spare, lambda v, s: Matrix(_unpack_rows(v), s))
        return Spelling(FORMATS["w8a8-int8"], {"": shape, **row}, ("_offset",))
    if held and held.dtype == "F8_E4M3":
        return _fp8(name, shape, scale)
    return None


def _fp8(name: str, shape: tuple[int, ...], scale: Found | None) -> Spelling:
    """e4m3 values, and scales whose shape says what shares one."""
    blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
    if scale is None:
        return Spelling(FORMATS["fp8-block"], {"": shape, "_scale_inv": blocks})
    parts = {"": shape, "_scale": scale.shape}
    if scale.dtype in ("U8", "F8_E8M0"):
        if scale.shape != (shape[0], -(-shape[-1] // 32)):
            raise ValueError(f"{name}: power-of-two scales {list(scale.shape)} are not one for 32 columns")
        return Spelling(FORMATS["mxfp8"], parts, (), lambda v, s: Matrix(v, s.view(E8M0)))
    if math.prod(scale.shape) == 1 and shape[0] > 1 and blocks != scale.shape:
        return Spelling(FORMATS["fp8-tensor"], parts, (), lambda v, s: Matrix(v, s.reshape(1, 1)))
    if scale.shape in ((shape[0],), (shape[0], 1)) and shape[0] > 1:
        return Spelling(FORMATS["fp8-channel"], parts, (), lambda v, s: Matrix(v, s.reshape(-1, 1)))
    if scale.shape == blocks:  # compressed-tensors, strategy "block"
        return Spelling(FORMATS["fp8-block"], parts)
    if len(blocks) == 2 and scale.shape == (blocks[0], 1, blocks[1], 1):  # modelopt, FP8_PB_WO
        return Spelling(FORMATS["fp8-block"], parts, (), lambda v, s: Matrix(v, s.reshape(blocks)))
    raise ValueError(
        f"{name}: scales {list(scale.shape)} of {list(shape)} FP8 weights are neither one, nor one a row, nor one a "
        f"block of {FP8_BLOCK} x {FP8_BLOCK}"
    )


def _packed_words(
    name: str, shape: tuple[int, int], packed: Found, scale: Found | None, zero: Found | None
) -> Spelling:
    """compressed-tensors "pack-quantized": integers of 4 or 8 bits in int32 words, scales a row or for equal groups of
    its columns, and zero points packed down the rows."""
    out, width = shape
    groups = scale.shape[-1] if scale and len(scale.shape) == 2 else 1
    if width % groups:
        raise ValueError(f"{name}: {groups} scales do not divide its {width} columns into equal groups")
    bits = 8 if packed.shape[-1] == -(-width // 4) != -(-width // 8) else 4
    size, repeat = _equal_groups(width, groups)
    if bits == 8:
        if groups > 1:
            raise ValueError(f"{name}: weights packed in 8 bits are read with a scale a row, not in groups of {size}")
        fmt = FORMATS["w8a8-int8"]
    elif groups > 1 or zero or (scale and scale.dtype != "F32"):
        fmt = matrix_format(f"w4a16-g{size // repeat}")
    else:
        fmt = FORMATS["w4a8"]
    parts = {"_packed": (out, -(-width * bits // 32)), "_scale": (out, groups)}
    if zero is None:
        return Spelling(
            fmt, parts, ("_shape",), lambda words, s: Matrix(_unpack_words(words, width, bits), np.repeat(s, repeat, 1))
        )
    if bits == 8:
        raise ValueError(f"{name}: weight_zero_point can be read for weights packed in 4 bits only")
    whole = zero.dtype == "I8"  # not packed
    parts["_zero_point"] = (out if whole else -(-out // 8), groups)

    def decode(words: np.ndarray, s: np.ndarray, points: np.ndarray) -> Matrix:
        zeros = points if whole else _unpack_words(points.T, out, 4).T
        values = _unpack_words(words, width, 4).astype(np.int8) - np.repeat(zeros.astype(np.int8), size, axis=1)
        return Matrix(values, np.repeat(s, repeat, 1))

    return Spelling(_shifted(size // repeat), parts, ("_shape",), decode)


def _equal_groups(width: int, groups: int) -> tuple[int, int]:
    """Columns of each group, and how often a scale stands in `Matrix.scale`: their number alone would be taken for
    ragged groups where it does not say the size, and in parts it does."""
    size = width // groups
    return (size, 1) if size == shared_size(width, groups) else (size, size // (size & -size))


def _shifted(size: int) -> MatrixFormat:
    """4 bits less a zero point of 4 bits, which are read as whole numbers from -16 to 15."""
    return dataclasses.replace(matrix_format(f"w4a16-g{size}-zp"), values=INT8)


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which 4 bits of a word, from the lowest, have its first column, its second, ..: AutoAWQ packs columns 0, 2, 4, 6, 1,
3, 5, 7 (`WQLinear_GEMM.from_linear`)."""


def _turned_words(name: str, shape: tuple[int, int], words: Found, look: Look) -> Spelling:
    """A matrix [in, out] of 4 bits in int32 words, with a scale and a zero point for equal groups of its rows. AWQ's
    words (AutoAWQ, version "gemm") go along the columns in an order of their own, GPTQ's (AutoGPTQ, GPTQModel's format
    "gptq") down the rows, and its zero points are stored less 1."""
    out, width = shape
    scales, order = look(tensor_name(name, ".scales")), look(tensor_name(name, ".g_idx"))
    groups = scales.shape[0] if scales and len(scales.shape) == 2 else 1
    if groups < 1 or width % groups:
        raise ValueError(f"{name}: {groups} scales do not divide its {width} columns into equal groups")
    awq, gptq = (width, -(-out // 8)), (-(-width // 8), out)
    if words.dtype != "I32" or words.shape not in (awq, gptq):
        raise ValueError(
            f"{name}: qweight {words.dtype} {list(words.shape)} is neither AWQ's {list(awq)} nor GPTQ's {list(gptq)} "
            "of 4 bits in int32 words"
        )
    of_gptq = words.shape == gptq
    if order and not of_gptq:
        raise ValueError(f"{name}: g_idx is GPTQ's, and its qweight is packed as AWQ's")
    size, repeat = _equal_groups(width, groups)
    parts: dict[str, tuple[int, ...]] = {
        ".qweight": words.shape, ".qzeros": (groups, -(-out // 8)), ".scales": (groups, out)
    }  # fmt: skip
    if order:
        parts[".g_idx"] = (width,)

    def decode(packed: np.ndarray, points: np.ndarray, s: np.ndarray, index: np.ndarray | None = None) -> Matrix:
        if index is not None and not np.array_equal(index, np.arange(width) // size):
            raise ValueError(f"{name}: g_idx (desc_act) cannot be read; columns must be in order")
        if of_gptq:
            values, zeros = _nibbles(packed.T)[:, :width], _nibbles(points)[:, :out].T + 1
        else:
            values, zeros = _nibbles(packed, _AWQ_ORDER)[:, :out].T, _nibbles(points, _AWQ_ORDER)[:, :out].T
        return Matrix(values - np.repeat(zeros, size, axis=1), np.repeat(s.T, repeat, 1))

    return Spelling(_shifted(size // repeat), parts, (), decode)


def _nibbles(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """[rows, words] int32 -> [rows, 8 words] int8 from 0 to 15; order: which 4 bits of a word come first, second, .."""
    pairs = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    lowest_first = _unpack_pairs(pairs).reshape(words.shape[0], -1, 8)
    return lowest_first[..., order].reshape(words.shape[0], -1).astype(np.int8)


def _unpack_pairs(pairs: np.ndarray) -> np.ndarray:
    """[out, in/2] bytes, low half first -> [out, in] bytes of 4 bits."""
    return np.stack([pairs & 0xF, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)


def _pack_pairs(values: np.ndarray) -> np.ndarray:
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _unpack_words(words: np.ndarray, width: int, bits: int) -> np.ndarray:
    """compressed-tensors: numbers of 4 or 8 bits in an int32, the first lowest, each stored plus half its range."""
    low_first = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return (low_first[:, :width].astype(np.int16) - 128).astype(np.int8)
    return (_unpack_pairs(low_first)[:, :width].astype(np.int8) - 8).astype(INT4)


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


_MODELSLIM_SHARDS = 16  # of a down projection's sums: msModelSlim writes them for tensor parallelism over 16


def spell(name: str, fmt: MatrixFormat, layout: str, held: Matrix) -> dict[str, np.ndarray]:
    """The tensors that store a matrix under `name`, by their full names.

    Raises ValueError, whose text says what does not divide.
    """
    values, scale, factor = held
    out, width = values.shape
    if isinstance(fmt.shared, int) and width % fmt.shared:
        raise ValueError(f"its {width} columns are not a multiple of the {fmt.shared} that share a scale in {fmt.name}")
    suffixes: dict[str, np.ndarray]
    match fmt.values, fmt.base, layout:
        case _, "fp8-block", "deepseek":
            suffixes = {"": values, "_scale_inv": scale}
        case _, "fp8-tensor", _:
            suffixes = {"": values, "_scale": scale.reshape(1)}
        case _, "w8a8-int8", "msmodelslim":
            suffixes = {"": values, "_scale": scale, "_offset": np.zeros_like(scale)}
        case _, "w8a8-int8" | "fp8-channel" | "fp8-block", _:
            suffixes = {"": values, "_scale": scale}
        case _, "w4a8", "msmodelslim":
            if out % 2 or ("down_proj" in name and width % _MODELSLIM_SHARDS):
                raise ValueError(f"[{out}, {width}] does not pack by twos of rows and sixteenths of columns")
            suffixes = {"": _pack_rows(values), "_scale": scale, "_offset": np.zeros_like(scale)}
            suffixes[".scale_bias"] = _scale_bias(name, held)
        case numpy_type, _, _ if numpy_type == INT4:
            suffixes = {"_packed": _pack_words(values), "_scale": scale, "_shape": np.array([out, width], np.int64)}
        case _, "mxfp8", _:
            suffixes = {"": values, "_scale": scale.view(np.uint8)}
        case _, "mxfp4", _:
            packed = _pack_pairs(values.view(np.uint8))
            suffixes = {"" if layout == "msmodelslim" else "_packed": packed, "_scale": scale.view(np.uint8)}
        case _, "nvfp4" | "nvfp4a16", _ if factor is not None:
            suffixes = {"_packed": _pack_pairs(values.view(np.uint8)), "_scale": scale}
            suffixes["_global_scale"] = (np.float32(1.0) / factor).reshape(1).astype(np.float32)
        case _:
            raise ValueError(f"{layout} has no spelling for {fmt.name}")
    return {tensor_name(name, suffix): array for suffix, array in suffixes.items()}


def _scale_bias(name: str, held: Matrix) -> np.ndarray:
    """What CANN's W4A8 kernel adds for storing 4-bit values as unsigned: 8 times the sums of the dequantised rows,
    a down projection's in 16 parts (msModelSlim `save/utils/pack.py: process_scale`)."""
    full = dequantise(held)
    parts = full.reshape(full.shape[0], _MODELSLIM_SHARDS if "down_proj" in name else 1, -1)
    return 8 * parts.sum(axis=-1, dtype=np.float32)
