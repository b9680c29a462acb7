"""How checkpoints spell quantised matrices: the tensors that store one, and back. Free of JAX.

deepseek            `NAME.weight` F8_E4M3 and `NAME.weight_scale_inv`
compressed-tensors  `weight` or `weight_packed`, `weight_scale`, `weight_shape`, `weight_global_scale`
msmodelslim         `weight`, `weight_scale`, `weight_offset`, `scale_bias`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from model.formats import E2M1, E8M0, FORMATS, FP8_BLOCK, INT4, MatrixFormat, matrix_format
from model.quantised import Matrix, dequantise


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
    groups that do not divide.
    """
    out, width = shape if len(shape) == 2 else (1, shape[-1])
    held, scale, packed = look(name), look(name + "_scale"), look(name + "_packed")
    groups = scale.shape[-1] if scale and len(scale.shape) == 2 else 1
    if packed and packed.dtype == "I32":
        fmt = FORMATS["w4a8"]
        if groups > 1 or (scale and scale.dtype != "F32"):
            if width % groups:
                raise ValueError(f"{name}: {groups} scales do not divide its {width} columns into equal groups")
            fmt = matrix_format(f"w4a16-g{width // groups}")
        return Spelling(
            fmt,
            {"_packed": (out, -(-width // 8)), "_scale": (out, groups)},
            ("_shape",),
            lambda words, s: Matrix(_unpack_words(words, width), s),
        )
    if packed or (held and held.dtype == "U8"):
        key = "_packed" if packed else ""
        parts = {key: (out, width // 2), "_scale": (out, groups)}
        if look(name + "_global_scale"):
            return Spelling(
                FORMATS["nvfp4"],
                {**parts, "_global_scale": (1,)},
                ("_input_scale",),
                lambda pairs, s, g: Matrix(_unpack_pairs(pairs).view(E2M1), s, (1 / g.astype(np.float32)).reshape(())),
            )
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
        blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
        if not scale:
            return Spelling(FORMATS["fp8-block"], {"": shape, "_scale_inv": blocks})
        if scale.dtype in ("U8", "F8_E8M0"):
            parts = {"": shape, "_scale": (out, groups)}
            return Spelling(FORMATS["mxfp8"], parts, (), lambda v, s: Matrix(v, s.view(E8M0)))
        if scale.shape == (out, 1) and out > 1:
            return Spelling(FORMATS["fp8-channel"], {"": shape, "_scale": (out, 1)})
        if scale.shape == blocks:  # compressed-tensors, strategy "block"
            return Spelling(FORMATS["fp8-block"], {"": shape, "_scale": blocks})
        parts = {"": shape, "_scale": scale.shape}
        return Spelling(FORMATS["fp8-tensor"], parts, (), lambda v, s: Matrix(v, s.reshape(1, 1)))
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
