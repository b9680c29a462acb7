"""Measured times of a chip's operators, and the profile that they make of the chip's: its efficiency curves.

    run.py --operators --json   the runner of an Ascend package: every operator of its graphs, by name and tensors
    msmodeling                  its profiling database: a CSV a kernel (`MatMulV2.csv`, `QuantBatchMatmulV3.csv`, ..)
                                with the columns of `CSV_COLUMNS`, or a folder of them (Ascend/msmodeling, tensor_cast/
                                performance_model/profiling_database, read 2026-11)

Names are those of torch_npu and ATen; msmodeling's kernels are read under the names of the operators that start them.
Products say how near a size comes to the chip's peak or to its bandwidth; `operator_kernels.py` has what the others
say. The base profile's other figures stay.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from foundation.errors import UsageError
from foundation.reading import Unreadable, read_csv
from hw_profiles import Curve, Profile
from runtime.simulation import package_runs

CSV_COLUMNS = ("Input Shapes", "Input Data Types", "Output Shapes", "Output Data Types")
_DURATIONS = ("Average Duration(us)", "Profiling Average Duration(us)", "Duration(us)")
KERNELS: Mapping[str, str] = {
    "MatMulV2": "aten.mm",
    "MatMulV3": "aten.mm",
    "MatMulCommon": "aten.mm",
    "BatchMatMulV2": "aten.bmm",
    "BatchMatMulNd": "aten.bmm",
    "QuantBatchMatmulV3": "npu.npu_quant_matmul",
    "WeightQuantBatchMatmulV2": "npu.npu_weight_quant_batchmatmul",
    "GroupedMatmul": "npu.npu_grouped_matmul",
    "MlaPrologV3": "npu.npu_mla_prolog_v3",
    "SparseFlashAttention": "npu.npu_sparse_flash_attention",
    "KvQuantSparseFlashAttention": "npu.npu_kv_quant_sparse_flash_attention",
    "LightningIndexer": "npu.npu_lightning_indexer",
    "QuantLightningIndexer": "npu.npu_quant_lightning_indexer",
    "RmsNorm": "npu.npu_rms_norm",
    "DynamicQuant": "npu.npu_dynamic_quant",
    "SwiGlu": "npu.npu_swiglu",
    "InterleaveRope": "npu.npu_interleave_rope",
    "MoeGatingTopK": "npu.npu_moe_gating_top_k",
    "ScatterNdUpdate": "npu.npu_scatter_nd_update_",
    "Add": "aten.add",
}
"""The operators that kernels are started by, whose names msmodeling's files have."""
_PRODUCTS = ("aten.mm", "aten.bmm", "aten.matmul", "npu.npu_quant_matmul", "npu.npu_weight_quant_batchmatmul",
             "npu.npu_grouped_matmul")  # fmt: skip
BYTES = {
    "int8": 1, "uint8": 1, "bool": 1, "float16": 2, "bfloat16": 2, "int16": 2, "float32": 4, "int32": 4, "int64": 8,
    "uint64": 8,
}  # fmt: skip
_SPELT = {"FLOAT": "float32", "DT_BF16": "bfloat16", "FLOAT16": "float16", "DT_FLOAT": "float32", "BOOL": "bool"}
_RATES = {"int8": "int8", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FEW = 3
"""Sizes, at least, that say something of a curve."""

ShapeAndType = tuple[tuple[int, ...], str]  # shape, type


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """An operator's call: what it was given and made, and how long it took beyond what an empty one takes. rows,
    groups: of a grouped product, the rows that belong to a group, and the groups that have any; None where not said.
    phase: "decode" or "prefill", "" where not said."""

    name: str
    inputs: tuple[ShapeAndType, ...]
    outputs: tuple[ShapeAndType, ...]
    seconds: float
    equation: str = ""
    rows: float | None = None
    groups: float | None = None
    phase: str = ""


@dataclasses.dataclass(frozen=True)
class MeasuredProduct:
    """A matrix product: FLOP, bytes moved at least, the rate it computes at ("bf16"), seconds."""

    flops: float
    bytes: float
    rate: str
    seconds: float


def read(path: Path, launch_s: float) -> list[OperatorTime]:
    """launch_s: what a kernel of msmodeling's takes however small it is. Raises `UsageError` for a file that is
    neither form, or holds none."""
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.csv")) if file.stem in KERNELS]
        found = [each for file in files for each in _of_csv(file, launch_s)]
    elif path.suffix == ".csv":
        found = list(_of_csv(path, launch_s))
    else:
        found = list(_of_run(path))
    if not found:
        raise UsageError(f"{path}: no measured operators; run.py writes them with --measure N --operators --json FILE")
    return found


def _of_run(path: Path) -> Iterator[OperatorTime]:
    found = package_runs.read(path)
    try:
        empty = float(found["empty_s"])
        for entry in found["operators"]:
            inputs, outputs = (
                tuple((tuple(map(int, each["shape"])), str(each["dtype"])) for each in entry[key])
                for key in ("inputs", "outputs")
            )
            seconds = float(entry["median_s"]) - empty
            if not math.isfinite(seconds) or any(size < 0 for shape, _ in (*inputs, *outputs) for size in shape):
                raise ValueError("a time or a shape that is none")
            rows, groups = (None if entry.get(key) is None else float(entry[key]) for key in ("rows", "groups"))
            if not all(each is None or 0 <= each < math.inf for each in (rows, groups)):
                raise ValueError("rows or groups that are none")
            equation, phase = str(entry["equation"]), str(entry["phase"])
            yield OperatorTime(str(entry["operator"]), inputs, outputs, seconds, equation, rows, groups, phase)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"operators: {type(error).__name__}: {error}"
        raise UsageError(f"{path}: {why}; measure again with this package's run.py") from None


def _of_csv(path: Path, launch_s: float) -> Iterator[OperatorTime]:
    if path.stem not in KERNELS:
        raise UsageError(f"{path}: a kernel that prices have none of; known file names: {', '.join(KERNELS)}")
    try:
        columns, rows = read_csv(path)
    except Unreadable as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    duration = next((name for name in _DURATIONS if name in columns), None)
    missing = [name for name in CSV_COLUMNS if name not in columns]
    if missing or duration is None:
        raise UsageError(f"{path}: no column {', '.join([*missing, *([_DURATIONS[0]] * (duration is None))])}")
    for number, row in enumerate(rows, 2):
        try:
            seconds = float(row[duration] or 0) * 1e-6
            inputs, outputs = (_tensors(row[f"{of} Shapes"], row[f"{of} Data Types"]) for of in ("Input", "Output"))
        except ValueError as error:
            raise UsageError(f"{path}: line {number}: {error}") from None
        if seconds > 0:
            yield OperatorTime(KERNELS[path.stem], inputs, outputs, seconds - launch_s)


def _tensors(shapes: str, types: str) -> tuple[ShapeAndType, ...]:
    """ "1,64;4,4" and "INT8;DT_BF16"; the empty shape of an argument that is absent is left out."""
    pairs = zip(shapes.strip().strip('"').split(";"), types.strip().strip('"').split(";"), strict=False)
    return tuple(
        (tuple(int(size) for size in shape.split(",")), _SPELT.get(kind, kind.removeprefix("DT_").lower()))
        for shape, kind in pairs
        if shape
    )


# --- products -----------------------------------------------------------------------------------------


def product(each: OperatorTime) -> MeasuredProduct | None:
    """Of an operator that is a matrix product, and took some time. A grouped one does the work of the rows that belong
    to groups: where experts are on several devices, most of what it is given may belong to none."""
    flops = _flops(each)
    if not flops or each.seconds <= 0 or (rate := _RATES.get(each.inputs[0][1])) is None:
        return None
    sizes = [math.prod(shape) * BYTES.get(kind, 4) for shape, kind in (*each.inputs, *each.outputs)]
    moved = float(sum(sizes))
    if each.rows is not None and each.groups is not None:
        share, held = each.rows / max(1, each.inputs[0][0][0]), each.groups / max(1, each.inputs[1][0][0])
        given, weights, made = sizes[0], sizes[1], sizes[len(each.inputs)]
        moved -= (1 - share) * (given + made) + (1 - held) * weights
        flops *= share
    return MeasuredProduct(flops, moved, rate, each.seconds) if flops else None


def _flops(each: OperatorTime) -> float:
    """0 for what is no product, or not one that its tensors tell."""
    if not each.outputs or len(each.inputs) < 2:
        return 0.0
    (left, _), (out, _) = each.inputs[0], each.outputs[0]
    if each.name == "aten.einsum":
        terms = re.fullmatch(r"([a-z]+),([a-z]+)->[a-z]*", each.equation)
        sizes: dict[str, int] = {}
        for term, (shape, _) in zip(terms.groups() if terms else (), each.inputs, strict=False):
            sizes.update(zip(term, shape, strict=False))
        return 2.0 * math.prod(sizes.values()) if sizes else 0.0
    if each.name in _PRODUCTS:
        return 2.0 * math.prod(out) * left[-1]
    return 0.0


def calibrated(base: Profile, found: Sequence[MeasuredProduct], source: str, name: str) -> Profile:
    """The base with efficiency curves of measured products: by FLOP those that computing bounds, by bytes those that
    memory does; a curve that too few say anything of stays the base's. Raises `UsageError` where the base lacks a
    figure."""
    bandwidth = base.number("chip.memory.bandwidth_bytes_per_s")
    if bandwidth is None:
        raise UsageError(f"--profile {base.name}: has no chip.memory.bandwidth_bytes_per_s")
    compute: list[tuple[float, float]] = []
    memory: list[tuple[float, float]] = []
    for each in found:
        peak = base.number(f"chip.peak.{each.rate}_flops_per_s")
        if peak is None:
            continue
        computing, moving = each.flops / peak, each.bytes / bandwidth
        if computing > 2 * moving:
            compute.append((each.flops, computing / each.seconds))
        elif moving > 2 * computing:
            memory.append((each.bytes, moving / each.seconds))
    curves = dict(base.curves)
    today = time.strftime("%Y-%m-%d")
    for path, unit, points in (("efficiency.compute", "FLOP", compute), ("efficiency.memory", "bytes", memory)):
        if knots := _knots(points):
            most = max(share for _, share in points)
            note = f"Medians by octave of {len(points)} measured products."
            if most > 1:
                note += f" The fastest is at {most:.2f} of the profile's figure, which is too low, and counted as 1."
            curves[path] = Curve(knots, unit, source, today, "measured", note)
    return dataclasses.replace(base, name=name, curves=curves, prices=None, prices_sha256=None, path=None)


def _knots(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    octaves: dict[int, list[tuple[float, float]]] = {}
    for size, share in points:
        octaves.setdefault(round(math.log2(size)), []).append((size, share))
    if len(points) < _FEW:
        return ()
    return tuple(
        (
            float(f"{math.exp(statistics.fmean(math.log(size) for size, _ in each)):.4g}"),
            float(f"{min(1.0, statistics.median(share for _, share in each)):.4g}"),
        )
        for _, each in sorted(octaves.items())
    )
