"""A checkpoint in another number format: tensor by tensor, shard by shard, whole or not at all.

Weights are rounded to the nearest as they are, without calibration data (no smoothing, rotation or search). Names and
scales are those of the layout that the wanted engines read:

    deepseek            `NAME.weight` F8_E4M3 and `NAME.weight_scale_inv`; GLM-5-FP8, DeepSeek-V3
    compressed-tensors  `weight`, `weight_packed`, `weight_scale`, ..; vLLM, SGLang, transformers
    msmodelslim         `weight`, `weight_scale`, `weight_offset`, `scale_bias` and `quant_model_description.json`;
                        vllm-ascend, SGLang on Ascend
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import UsageError
from model import quantised
from model.checkpoint import Checkpoint, groups, stored_shape
from model.checkpoint_writer import FP8_CONFIG, SHARD_BYTES, copy_companions, new_directory, write_shards
from model.formats import (
    BF16,
    BITS,
    E2M1,
    E4M3,
    E8M0,
    F32,
    FORMATS,
    FP8_BLOCK,
    INT4,
    INT8,
    MatrixFormat,
    Scheme,
    matrix_format,
)
from model.hf_config import MODELSLIM_FILE
from model.quantization_config import MODELSLIM_TYPES
from model.spelling import spell, tensor_name


@dataclasses.dataclass(frozen=True)
class QuantizedCheckpoint:
    """What was written: bytes of all tensors before and after, matrices by format, and those kept from the source."""

    path: Path
    layout: str | None
    source_bytes: int
    bytes: int
    matrices: Mapping[str, int]
    kept: int


def layout_of(scheme: Scheme, wanted: str | None = None) -> str | None:
    """The layout to write a scheme in: the usual one of its experts' format. None where nothing is quantised.

    Raises `UsageError` for a layout that has no name for one of the formats.
    """
    narrow = [fmt for fmt in map(matrix_format, (scheme.experts, scheme.dense)) if fmt.narrow]
    if not narrow:
        if wanted:
            raise UsageError(f"formats {scheme.name} are plain: --layout does not apply")
        return None
    usable = [layout for layout in narrow[0].layouts if all(layout in fmt.layouts for fmt in narrow)]
    if wanted is None:
        return usable[0]
    if wanted not in usable:
        raise UsageError(f"formats {scheme.name} are written as {' or '.join(usable)}, not as {wanted!r}")
    return wanted  # type: ignore[return-value]


def quantize(
    source: Checkpoint,
    scheme: Scheme,
    out: Path,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizedCheckpoint:
    """Writes `source` in the formats of `scheme` to the new directory `out`.

    Matrices that the source stores in the wanted format keep their values and scales. One shard at a time is in
    memory. Raises `UsageError` where a matrix does not divide into a format's groups or the disk is full, and
    `CheckpointError` where `out` exists.
    """
    chosen = layout_of(scheme, layout)
    _check_groups(source, scheme)
    writer = _Writer(source, scheme, chosen)
    with new_directory(out) as folder:
        write_shards(folder, writer.tensors(), shard_bytes)
        _write_config(folder, source, writer)
        copy_companions(source.path, folder)
        Checkpoint(folder)  # what cannot be read back is not left behind
    return QuantizedCheckpoint(out, chosen, writer.source_bytes, writer.bytes, dict(writer.matrices), writer.kept)


def _check_groups(source: Checkpoint, scheme: Scheme) -> None:
    """Raises `UsageError` where a format's groups do not divide a matrix's columns, before anything is written."""
    for place, found in groups(source.config, source.has_mtp).items():
        for group in found:
            for weight in group.weights:
                fmt = scheme.stored(weight, mtp=place == "mtp")
                width = stored_shape(source.config, weight)[-1]
                if isinstance(fmt.shared, int) and not _divides(width, fmt.shared):
                    other = next((size for size in (128, 64, 32, 16) if width % size == 0 and size != fmt.shared), None)
                    instead = f"; groups of {other} would" if other and fmt.any_group else ""
                    raise UsageError(
                        f"formats {scheme.name}: groups of {fmt.shared} do not divide the {width} columns of "
                        f"{next(group.tensors(weight))} in a way that readers find again{instead}"
                    )


def _divides(width: int, size: int) -> bool:
    return width % size == 0 and quantised.shared_size(width, width // size) == size


class _Writer:
    """Yields the tensors of the new checkpoint, and counts them."""

    def __init__(self, source: Checkpoint, scheme: Scheme, layout: str | None):
        self.source, self.scheme, self.layout = source, scheme, layout
        self.source_bytes = self.bytes = self.kept = 0
        self.matrices: Counter[str] = Counter()
        self.types: dict[str, str] = {}  # msModelSlim's name of each tensor's type
        self.plain_modules: list[str] = []

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        done: set[str] = set()
        for place, found in groups(self.source.config, self.source.has_mtp).items():
            for group in found:
                for weight in group.weights:
                    fmt = self.scheme.stored(weight, mtp=place == "mtp")
                    shape = stored_shape(self.source.config, weight)
                    for name in group.tensors(weight):
                        if name in done:  # kv_b_proj makes two weights
                            continue
                        done.add(name)
                        for tensor, array in self._stored(name, shape, fmt).items():
                            self.bytes += array.nbytes
                            self.types[tensor] = MODELSLIM_TYPES.get(fmt.name, "FLOAT")
                            yield tensor, array

    def _stored(self, name: str, shape: tuple[int, ...], fmt: MatrixFormat) -> dict[str, np.ndarray]:
        held = self.source.spelling(name, shape)
        parts = held.parts if held else {"": shape}
        self.source_bytes += sum(self.source.array(tensor_name(name, suffix)).nbytes for suffix in parts)
        if not fmt.narrow:
            if len(shape) == 2 and "embed_tokens" not in name:
                self.plain_modules.append(name.removesuffix(".weight"))
            return {name: self.source.plain(name).astype(BF16) if held else self.source.array(name)}
        self.matrices[fmt.name] += 1
        assert self.layout is not None
        try:
            if held and held.format.stored_as(fmt):
                self.kept += 1
                matrix = held.read(name, self.source.array)
                if fmt.scale == F32:  # sources may have them in 16 bits, which float32 holds as well
                    matrix = matrix._replace(scale=matrix.scale.astype(F32))
            else:
                matrix = quantised.quantise(fmt, self.source.plain(name))
            return spell(name, fmt, self.layout, matrix)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None


def _write_config(folder: Path, source: Checkpoint, writer: _Writer) -> None:
    config = {key: value for key, value in source.raw_config.items() if key != "quantization_config"}
    match writer.layout:
        case "deepseek":
            config["quantization_config"] = FP8_CONFIG
        case "compressed-tensors":
            config["quantization_config"] = compressed_tensors_config(writer.scheme, writer.plain_modules)
        case "msmodelslim":
            described = {
                **writer.types,
                "version": "1.0.0",
                "model_quant_type": MODELSLIM_TYPES[writer.scheme.dense],
                "group_size": 32 if isinstance(FORMATS[writer.scheme.dense].shared, int) else 0,
                "metadata": {},
                "optional": {},
            }
            (folder / MODELSLIM_FILE).write_text(json.dumps(described, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _group_config(fmt: MatrixFormat) -> dict[str, Any]:
    """What compressed-tensors 0.20 says of a format: the weights, the activations, and how they are packed.

    NVFP4's activations need a calibrated scale, which rounding alone does not give: weights only.
    """
    integer = fmt.values in (INT8, INT4)
    weights = _args(fmt.bits, integer, *_strategy(fmt.shared, fmt.factor is not None), False)
    if fmt.scale in (E8M0, E4M3):
        weights["scale_dtype"] = "torch.uint8" if fmt.scale == E8M0 else "torch.float8_e4m3fn"
    if fmt.shared == "block":
        weights["block_structure"] = [FP8_BLOCK, FP8_BLOCK]
    acts: dict[str, Any] | None = None
    if fmt.activations.scale is not None and fmt.factor is None:
        kind = fmt.activations
        acts = _args(BITS[kind.values], kind.values == INT8, *_strategy(kind.shared or "token", False), True)
        if kind.scale == E8M0:
            acts["scale_dtype"] = "torch.uint8"
    packed = {INT4: "pack-quantized", INT8: "int-quantized", E2M1: "mxfp4-pack-quantized", E4M3: "float-quantized"}
    layout = packed[fmt.values]
    if fmt.scale == E8M0 and fmt.values == E4M3:
        layout = "mxfp8-quantized"
    if fmt.factor is not None:
        layout = "nvfp4-pack-quantized"
    return {"weights": weights, "input_activations": acts, "format": layout}


def _strategy(shared: str | int | None, tensor_group: bool) -> tuple[str, int | None]:
    if isinstance(shared, int):
        return "tensor_group" if tensor_group else "group", shared
    return {"row": "channel"}.get(str(shared), str(shared)), None


def _args(bits: int, integer: bool, strategy: str, group: int | None, dynamic: bool) -> dict[str, Any]:
    made = {"num_bits": bits, "type": "int" if integer else "float", "symmetric": True, "strategy": strategy}
    return {**made, "dynamic": dynamic} | ({"group_size": group} if group else {})


def compressed_tensors_config(scheme: Scheme, plain_modules: list[str]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors 0.20 for a scheme; `plain_modules` are left as they are."""
    # A pattern comes before "Linear", which is all other matrices; a pattern for these would match norms too.
    targets = {scheme.experts: ["re:.*mlp\\.experts\\..*"], scheme.dense: ["Linear"]}
    made = [
        {"targets": names, **_group_config(fmt)}
        for name, names in targets.items()
        if (fmt := matrix_format(name)).narrow
    ]
    layouts = [group["format"] for group in made]
    return {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(set(layouts)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(made)},
        "ignore": sorted(plain_modules),
    }
