"""What measured operators of a chip say of the kernels that prices are made of: a price file, and a word for each row.

    products            matrix products, and grouped ones that no routing was measured beside: the profile's efficiency
                        curves (`operator_times.py`)
    mla_prolog          npu_mla_prolog_v3
    mla_decode, sparse_prefill      npu_sparse_flash_attention and npu_kv_quant_sparse_flash_attention
    indexer_decode, indexer_prefill npu_lightning_indexer and npu_quant_lightning_indexer
    moe                 routed experts whole: what sorts the tokens, both grouped products with what is between them,
                        and the sum back. Where tokens are sent to other devices, without the sending
    deepep_ll_dispatch, deepep_ll_combine   the sending; its time includes the wait for the slowest device
    memory              norms, rotations, activations, rounding, sums, the choice of experts, writes to caches: by op

A row counts as it was timed, one call, at a launch of the profile's more than an operator that does nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backends.ascend.constraints import LATENT, ROPE
from hw_profiles import Profile
from model.formats import ROWS
from runtime.porting import kernel_fit
from runtime.porting.kernel_fit import Measurement
from runtime.porting.operator_times import BYTES, MeasuredProduct, OperatorTime, product
from runtime.pricing.adjust import stated
from runtime.pricing.chip import Chip
from runtime.pricing.fused import INDEX_FORMATS
from runtime.pricing.kernel import Constants

_HOLD = 0.05  # of `kernel_fit.FitBasis`
_FEW = 3  # sizes, below which the error of sizes left out says nothing
_FAMILIES = {
    "mla_decode": "attention",
    "sparse_prefill": "attention",
    "indexer_decode": "indexer",
    "indexer_prefill": "indexer",
}
_GROUPED_FORMATS = {
    ("int8", "int8"): "w8a8-int8",
    ("int8", "int32"): "w4a8",
    ("bfloat16", "int32"): "w4a16",
    ("bfloat16", "bfloat16"): "bf16",
    ("float16", "float16"): "bf16",
}
"""By the types of rows and matrices; eight 4-bit integers are in an int32."""


@dataclasses.dataclass(frozen=True)
class RowUse:
    """What became of a row: the kernels that it went into, or why none."""

    row: OperatorTime
    used_for: str = ""
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class SortedRows:
    """Measurements by the key of a price file's kernel or collective; products are apart. Seconds are those of a call,
    its launch included."""

    kernels: Mapping[str, Sequence[Measurement]]
    sent: Mapping[str, Sequence[tuple[float, float]]]  # (bytes, seconds)
    products: Sequence[MeasuredProduct]
    uses: Sequence[RowUse]


class _LeftOut(Exception):
    """Why a row says nothing that prices have."""


def _some(amount: float) -> float:
    if not amount > 0:
        raise _LeftOut("nothing is done in it, or in no time")
    return amount


KernelPoint = tuple[str, dict[str, float]]  # a kernel's key, its features


def sorted_rows(rows: Sequence[OperatorTime], base: Profile) -> SortedRows:
    launch = base.number("overhead.kernel_launch_s") or 0.0
    vector = base.number("overhead.vector_launch_s") or launch
    kernels: dict[str, list[Measurement]] = defaultdict(list)
    sent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    products: list[MeasuredProduct] = []
    used: dict[int, RowUse] = {}

    def seconds(row: OperatorTime) -> float:
        return max(row.seconds, 0.0) + (vector if row.name in _ELEMENTWISE else launch)

    for key, features, parts in _experts(rows):
        taken = sum(map(seconds, parts))
        if not min(taken, *features.values()) > 0:
            continue
        kernels[key].append(Measurement(features, taken))
        used |= {id(row): RowUse(row, key) for row in parts if row.name not in _SENDING}
    for row in rows:
        if id(row) in used:
            continue
        try:
            if row.name in _SENDING:
                key, size = _SENDING[row.name](row)
                sent[key].append((_some(size), _some(seconds(row))))
            elif row.name in _OPERATORS:
                key, features = _OPERATORS[row.name](row)
                point = Measurement({name: _some(size) for name, size in features.items()}, _some(seconds(row)))
                kernels[key].append(point)
            elif found := product(row):
                key = "products"
                products.append(found)
            else:
                raise _LeftOut("no kernel of its own in prices")
            used[id(row)] = RowUse(row, key)
        except _LeftOut as reason:
            used[id(row)] = RowUse(row, left_out=str(reason))
        except (IndexError, ValueError, ZeroDivisionError):
            used[id(row)] = RowUse(row, left_out="its tensors are not those of the operator as packages call it")
    alone = {key for key, points in sent.items() if len({size for size, _ in points}) < 2}
    for number, use in used.items():
        if use.used_for in alone:
            used[number] = RowUse(use.row, left_out="one size of it, where two make a curve")
    return SortedRows(
        {key: _merged(points) for key, points in sorted(kernels.items())},
        {key: points for key, points in sorted(sent.items()) if key not in alone},
        products,
        [used[id(row)] for row in rows],
    )


def prices(found: SortedRows, described: Profile, source: str) -> dict[str, Any] | None:
    """The price file of what was found; None where it has no kernel. described: the profile that it stands beside."""
    chip = Chip.from_fields(described.name, described.number)
    kernels = {}
    for key, points in found.kernels.items():
        family, fmt = key.split("/")[:2]
        body = kernel_fit.fitted(_FAMILIES.get(family, family), points, _basis(chip, family, fmt), source)
        if len(points) < _FEW:
            body["error"] = {"held_out_shapes": [kernel_fit.FEW_ERROR, kernel_fit.FEW_ERROR]}
        kernels[key] = body
    collectives = {key: kernel_fit.curve(points, source) for key, points in found.sent.items()}
    if not kernels and not collectives:
        return None
    return {
        "schema": 1,
        "profile": described.name,
        "relative_to": stated(described.number),
        "kernels": kernels,
        "collectives": collectives,
    }


def _basis(chip: Chip, family: str, fmt: str) -> kernel_fit.FitBasis:
    computed = {"mla_decode": "bf16", "sparse_prefill": "fp8-block", "memory": "bf16"}.get(family, fmt)
    if family.startswith("indexer"):
        computed = INDEX_FORMATS.get(fmt, "bf16")
    launch = chip.vector_launch_s if family == "memory" else chip.kernel_launch_s
    start = Constants(launch or 1e-6, chip.compute_efficiency or 0.7, chip.memory_efficiency or 0.7)
    return kernel_fit.FitBasis(chip.peak(computed), chip.memory_bandwidth_bytes_per_s, start, _HOLD)


def _merged(points: Sequence[Measurement]) -> list[Measurement]:
    """A point for each size, at the median of its seconds."""
    alike: dict[tuple[tuple[str, float], ...], list[float]] = defaultdict(list)
    for point in points:
        alike[tuple(sorted(point.features.items()))].append(point.seconds)
    return [Measurement(dict(features), statistics.median(each)) for features, each in alike.items()]


# --- rows ---------------------------------------------------------------------------------------------


def _prolog(row: OperatorTime) -> KernelPoint:
    """token_x [t,d], weight_dq [d,q], weight_uq_qr [q,..], weight_uk [h,n,l], weight_dkv_kr [d,l+r]; matrices may be
    in FRACTAL_NZ's four dims."""
    (x, kind), (down, _), _, (absorb, _), (latent, _) = row.inputs[:5]
    tokens, hidden = math.prod(x[:-1]), x[-1]
    heads, nope, lora = absorb
    fmt = {"int8": "w8a8-int8", "bfloat16": "bf16"}.get(kind)
    if fmt is None:
        raise _LeftOut(f"rows in {kind}")
    sizes = {"tokens": tokens, "hidden": hidden, "q_lora": math.prod(down) / hidden, "kv_lora": lora,
             "rope": math.prod(latent) / hidden - lora, "nope": nope, "heads": heads,
             "weight_bytes": BYTES[kind], "act_bytes": BYTES[kind]}  # fmt: skip
    return f"mla_prolog/{fmt}/any", _floats(sizes)


def _attention(row: OperatorTime) -> KernelPoint:
    """query [b,t,h,..], pages [p,s,1,..] twice, indices [b,t,1,k], and among the rest a page table [b,n]."""
    (query, _), (pages, kind), _, (selected, _) = row.inputs[:4]
    b, t, heads, _ = _four(query)
    context = _context(row, pages)
    decode = _decodes(row, t)
    seen = context if decode else context - t / 2  # the gear's last chunk: its queries see half of it on average
    packed = kind == "int8"
    row_bytes = pages[-1] if packed else 2 * (pages[-1] + ROPE)
    latent = LATENT if packed else pages[-1]
    sizes = {"sequences": b, "tokens": b * t, "context": min(seen, selected[-1]), "heads": heads,
             "kv_bytes": row_bytes, "qk": latent + ROPE, "v": latent}  # fmt: skip
    if not decode:
        return "sparse_prefill/bf16/any", _floats({**sizes, "kv_bytes": 2 * (latent + ROPE)})
    return f"mla_decode/{'int8' if packed else 'bf16'}/any", _floats(sizes)


def _indexer(row: OperatorTime) -> KernelPoint:
    """query [b,t,h,i], pages of keys [p,s,1,i], and among the rest a page table [b,n]; indices [b,t,1,k] out."""
    (query, _), (pages, kind) = row.inputs[:2]
    b, t, heads, width = _four(query)
    context = _context(row, pages)
    decode = _decodes(row, t)
    name = "int8_scaled" if kind == "int8" else "bf16"
    sizes = {"sequences": b, "tokens": b * t, "context": context if decode else context - t / 2, "index_heads": heads,
             "index_dim": width, "index_topk": row.outputs[0][0][-1],
             "index_kv_bytes": ROWS[name].bytes(width)}  # fmt: skip
    return f"indexer_{'decode' if decode else 'prefill'}/{ROWS[name].kind}/any", _floats(sizes)


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 4:
        raise _LeftOut("tokens of all sequences in one row, which do not say whose they are")
    return shape


def _context(row: OperatorTime, pages: tuple[int, ...]) -> int:
    """Tokens of a sequence's page table, which packages are measured at the end of."""
    tables = [shape for shape, kind in row.inputs if len(shape) == 2 and kind == "int32"]
    if not tables:
        raise _LeftOut("no page table, which says how long contexts are")
    return tables[0][1] * pages[1]


def _decodes(row: OperatorTime, tokens: int) -> bool:
    return row.phase == "decode" if row.phase else tokens == 1


def _moved(op: str, *places: int) -> Callable[[OperatorTime], KernelPoint]:
    """An elementwise op: the bytes of some inputs and of the first output."""

    def found(row: OperatorTime) -> KernelPoint:
        given = [row.inputs[place] for place in places]
        return f"memory/{op}/any", {"bytes": float(sum(map(_size, [*given, row.outputs[0]])))}

    return found


def _dynamic_quant(row: OperatorTime) -> KernelPoint:
    return "memory/dynamic_quant/any", {"bytes": float(sum(map(_size, [row.inputs[0], *row.outputs[:2]])))}


def _sum(row: OperatorTime) -> KernelPoint:
    if len(row.inputs) < 2 or row.inputs[0] != row.inputs[1] or len(row.inputs[0][0]) < 2:
        raise _LeftOut("not of two whole activations")
    return _moved("add", 0, 1)(row)


def _route(row: OperatorTime) -> KernelPoint:
    (tokens, experts), top_k = row.inputs[0][0], row.outputs[0][0][-1]
    return "memory/route/any", {"bytes": 4.0 * tokens * (experts + 2 * top_k)}


def _cache_write(row: OperatorTime) -> KernelPoint:
    return "memory/cache_write/any", {"bytes": 4.0 * math.prod(row.inputs[2][0])}


def _dispatch(row: OperatorTime) -> tuple[str, float]:
    """x [t,d], expert_ids [t,k]; counts of the device's experts [e] and of all [ranks*e] are the fourth and fifth of
    its results."""
    ((tokens, width), _), ((_, choices), _) = row.inputs[:2]
    ranks = row.outputs[4][0][0] // row.outputs[3][0][0]
    return f"deepep_ll_dispatch/{ranks}/any", float(tokens * choices * width)


def _combine(row: OperatorTime) -> tuple[str, float]:
    """expand_x [a,d], expert_ids [t,k], places [a*128], counts [ranks*e]; a is t * ranks * min(e, k)."""
    ((given, width), _), ((tokens, choices), _), _, ((counts,), _) = row.inputs[:4]
    for ranks in range(1, counts + 1):
        if counts % ranks == 0 and tokens * ranks * min(counts // ranks, choices) == given:
            return f"deepep_ll_combine/{ranks}/any", 2.0 * tokens * choices * width
    raise _LeftOut("its tensors do not say how many devices there are")


def _experts(rows: Sequence[OperatorTime]) -> list[tuple[str, dict[str, float], list[OperatorTime]]]:
    """(kernel, features, its rows) of each layer's routed experts of which everything was measured; rows of several
    steps that are alike are dealt out, one each."""
    taken: set[int] = set()
    found = []
    for first in rows:
        if first.name != _GROUPED or not (first.rows and first.groups) or id(first) in taken:
            continue
        if len(first.inputs) < 2 or not first.outputs or not len(first.inputs[0][0]) == len(first.outputs[0][0]) == 2:
            continue
        (given, kind), (_, held) = first.inputs[:2]
        fmt, (count, hidden), inter = _GROUPED_FORMATS.get((kind, held)), given, first.outputs[0][0][-1] // 2
        left = [r for r in rows if r.phase == first.phase and id(r) not in taken and r is not first]
        down = _one(left, _GROUPED, (count, inter), given)
        sends = _one(rows, _DISPATCH, None, given)
        begins, ends = _one(left, _INIT, None, given), _one(left, "npu.npu_moe_finalize_routing", given)
        if not fmt or not down or not (sends or (begins and ends)):
            continue
        parts = [
            first,
            *down,
            *_one(left, "npu.npu_swiglu", (count, 2 * inter)),
            *_one(left, _ROUNDING, (count, inter)),
        ]
        if not sends:
            parts += [*begins, *ends, *_one(left, _ROUNDING, given)]
        taken |= {id(part) for part in parts}
        sizes = {"rows": first.rows, "active": first.groups, "touched": first.rows if sends else count,
                 "rows_per_expert": max(1.0, first.rows / first.groups),
                 "spread": 1.0 if sends else count / first.rows, "hidden": hidden, "inter": inter,
                 "weight_bytes": 0.5 if held == "int32" else BYTES[held],
                 "act_bytes": 1 if kind == "int8" else 2}  # fmt: skip
        found.append((f"moe/{fmt}/any", _floats(sizes), parts))
    return found


def _one(
    rows: Sequence[OperatorTime], name: str, given: tuple[int, ...] | None, made: tuple[int, ...] | None = None
) -> list[OperatorTime]:
    """The first row of an operator by the shapes of its first input and first result, or none."""
    alike = (r for r in rows if r.name == name and r.inputs and r.outputs)
    return [
        r for r in alike
        if (given is None or r.inputs[0][0] == given) and (made is None or r.outputs[0][0] == made)
    ][:1]  # fmt: skip


def _size(tensor: tuple[tuple[int, ...], str]) -> int:
    return math.prod(tensor[0]) * BYTES.get(tensor[1], 4)


def _floats(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in sizes.items()}


_INIT, _DISPATCH = "npu.npu_moe_init_routing_v2", "npu.npu_moe_distribute_dispatch_v2"
_GROUPED, _ROUNDING = "npu.npu_grouped_matmul", "npu.npu_dynamic_quant"
_SENDING: Mapping[str, Callable[[OperatorTime], tuple[str, float]]] = {
    _DISPATCH: _dispatch,
    "npu.npu_moe_distribute_combine_v2": _combine,
}
_ELEMENTWISE: Mapping[str, Callable[[OperatorTime], KernelPoint]] = {
    "npu.npu_rms_norm": _moved("rms_norm", 0, 1),
    "npu.npu_swiglu": _moved("swiglu", 0),
    "npu.npu_interleave_rope": _moved("rope", 0),
    _ROUNDING: _dynamic_quant,
    "npu.npu_moe_gating_top_k": _route,
    "npu.npu_scatter_nd_update_": _cache_write,
    "aten.add": _sum,
}
_OPERATORS: Mapping[str, Callable[[OperatorTime], KernelPoint]] = {
    **_ELEMENTWISE,
    "npu.npu_mla_prolog_v3": _prolog,
    "npu.npu_sparse_flash_attention": _attention,
    "npu.npu_kv_quant_sparse_flash_attention": _attention,
    "npu.npu_lightning_indexer": _indexer,
    "npu.npu_quant_lightning_indexer": _indexer,
}
"""Kernels by the operator that starts them, as `backends/ascend/npu_operators.toml` names it."""
