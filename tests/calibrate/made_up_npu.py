"""A made-up chip's operators: how long each takes by a law of the chip's own, which is not the cost model's formula,
and the rows that a run.py writes of GLM-5's decode steps on it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hw_profiles
from runtime.pricing.load import ExpertLoad

BASE = hw_profiles.load("ascend-910c-die")
PEAKS = {"int8": 707.8e12, "bf16": 353.9e12}
BANDWIDTH = 1.6e12
EMPTY_S = 21e-6
TP, HEADS, CONTEXT, PAGE, TOP_K = 16, 4, 8192, 128, 8
HIDDEN, Q_LORA, LATENT, ROPE, NOPE, V = 6144, 2048, 512, 64, 192, 256
INDEX_HEADS, INDEX_DIM, SELECTED = 32, 128, 2048
EXPERTS, INTER = 16, 2048  # of a device: 256 over 16
DENSE, SPARSE = 3, 75  # layers

I8, BF16, F32, I32 = "int8", "bfloat16", "float32", "int32"
_BYTES = {I8: 1, BF16: 2, F32: 4, I32: 4, "int64": 8}
# share of the peak, share of the bandwidth, seconds beyond the profile's launch
_LAWS = {
    "npu.npu_quant_matmul": (0.55, 0.7, 1e-6),
    "aten.mm": (0.6, 0.7, 1e-6),
    "aten.bmm": (0.6, 0.7, 1e-6),
    "npu.npu_mla_prolog_v3": (0.35, 0.45, 9e-6),
    "npu.npu_sparse_flash_attention": (0.25, 0.3, 14e-6),
    "npu.npu_lightning_indexer": (0.3, 0.5, 11e-6),
    "npu.npu_grouped_matmul": (0.4, 0.6, 4e-6),
}
_VECTOR = (1.0, 0.35, 2.5e-6)  # of every other operator


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator in a step, so often; flops and moved: the work of it."""

    name: str
    inputs: list[tuple[list[int], str]]
    outputs: list[tuple[list[int], str]]
    times: int
    flops: float = 0.0
    moved: float | None = None
    rate: str = "bf16"
    rows: float | None = None
    groups: float | None = None

    @property
    def beyond_s(self) -> float:
        """Seconds beyond a launch: what computing and what moving takes, one after the other."""
        compute, memory, fixed = _LAWS.get(self.name, _VECTOR)
        every = [*self.inputs, *self.outputs]
        moved = self.moved if self.moved is not None else sum(math.prod(s) * _BYTES[kind] for s, kind in every)
        return fixed + self.flops / (PEAKS[self.rate] * compute) + moved / (BANDWIDTH * memory)

    @property
    def seconds(self) -> float:
        launch = "kernel" if self.name in _LAWS else "vector"
        return self.times * (self.beyond_s + (BASE.number(f"overhead.{launch}_launch_s") or 0.0))

    def row(self) -> dict[str, Any]:
        def tensors(of: list[tuple[list[int], str]]) -> list[dict[str, Any]]:
            return [{"shape": shape, "dtype": kind} for shape, kind in of]

        return {
            "operator": self.name, "phase": "decode", "equation": "", "calls_a_step": self.times,
            "inputs": tensors(self.inputs), "outputs": tensors(self.outputs), "rows": self.rows,
            "groups": self.groups, "median_s": EMPTY_S + self.beyond_s,
        }  # fmt: skip


def decode_step(b: int, experts: ExpertLoad, context: int = CONTEXT) -> list[Call]:
    """What a device of tp16 ep16 runs for `b` sequences in w8a8, but for collectives."""
    layers = DENSE + SPARSE
    pages = [b * context // PAGE, PAGE, 1]
    table = [([b, context // PAGE], I32), ([b], I32)]

    def quantised(k: int, n: int, times: int) -> list[Call]:
        rounded = Call("npu.npu_dynamic_quant", [([b, k], BF16)], [([b, k], I8), ([b], F32)], times)
        return [rounded, product(k, n, times)]

    def product(k: int, n: int, times: int) -> Call:
        return Call("npu.npu_quant_matmul", [([b, k], I8), ([k, n], I8)], [([b, n], BF16)], times, 2.0 * b * k * n,
                    rate="int8")  # fmt: skip

    def plain(k: int, n: int, times: int) -> Call:
        return Call("aten.mm", [([b, k], BF16), ([k, n], BF16)], [([b, n], BF16)], times, 2.0 * b * k * n)

    hidden, norm = ([b, HIDDEN], BF16), ([HIDDEN], BF16)
    matrices = [([HIDDEN, Q_LORA], I8), ([Q_LORA, HEADS * (NOPE + ROPE)], I8), ([HEADS, NOPE, LATENT], BF16),
                ([HIDDEN, LATENT + ROPE], I8)]  # fmt: skip
    query = ([b, 1, HEADS, LATENT], BF16)
    out = [Call("npu.npu_rms_norm", [hidden, norm], [hidden, ([b, 1], F32)], 2 * layers + 1)]
    out.append(Call("aten.add", [hidden, hidden], [hidden], 2 * layers))
    out.append(Call("npu.npu_dynamic_quant", [hidden], [([b, HIDDEN], I8), ([b], F32)], layers))
    out.append(Call("npu.npu_mla_prolog_v3", [([b, HIDDEN], I8), *matrices, ([LATENT], BF16)],
                    [([b, HEADS, LATENT], BF16)], layers, 2.0 * b * sum(math.prod(s) for s, _ in matrices),
                    sum(math.prod(s) * _BYTES[kind] for s, kind in matrices), "int8"))  # fmt: skip
    out.append(product(Q_LORA, INDEX_HEADS * INDEX_DIM, layers))
    out.append(plain(HIDDEN, INDEX_DIM + INDEX_HEADS, layers))
    out.append(Call("npu.npu_lightning_indexer",
                    [([b, 1, INDEX_HEADS, INDEX_DIM], BF16), ([*pages, INDEX_DIM], BF16),
                     ([b, 1, INDEX_HEADS], BF16), *table], [([b, 1, 1, SELECTED], I32)], layers,
                    2.0 * b * context * INDEX_HEADS * INDEX_DIM, 2.0 * b * context * INDEX_DIM))  # fmt: skip
    keys = min(context, SELECTED)
    out.append(Call("npu.npu_sparse_flash_attention",
                    [query, ([*pages, LATENT], BF16), ([*pages, LATENT], BF16), ([b, 1, 1, SELECTED], I32), *table,
                     ([b, 1, HEADS, ROPE], BF16), ([*pages, ROPE], BF16)], [query], layers,
                    2.0 * b * keys * HEADS * (2 * LATENT + ROPE), 2.0 * b * keys * (LATENT + ROPE)))  # fmt: skip
    out.append(Call("aten.bmm", [([HEADS, b, LATENT], BF16), ([HEADS, LATENT, V], BF16)], [([HEADS, b, V], BF16)],
                    layers, 2.0 * b * HEADS * LATENT * V))  # fmt: skip
    out += quantised(HEADS * V, HIDDEN, layers)
    for width, times in ((12288 // TP, DENSE), (INTER // TP, SPARSE)):  # dense layers, shared experts
        out += quantised(HIDDEN, 2 * width, times)
        out.append(Call("npu.npu_swiglu", [([b, 2 * width], BF16)], [([b, width], BF16)], times))
        out += quantised(width, HIDDEN, times)
    scores = ([b, TP * EXPERTS], F32)
    out.append(Call("aten.mm", [([b, HIDDEN], F32), ([HIDDEN, TP * EXPERTS], F32)], [scores], SPARSE,
                    2.0 * b * HIDDEN * TP * EXPERTS))  # fmt: skip
    out.append(Call("npu.npu_moe_gating_top_k", [scores, ([TP * EXPERTS], F32)],
                    [([b, TOP_K], F32), ([b, TOP_K], I32), scores], SPARSE))  # fmt: skip
    out += _experts(b, experts)
    return [*out, plain(HIDDEN, 154880 // TP, 1)]


def _experts(b: int, load: ExpertLoad) -> list[Call]:
    rows, active = (float(each) for each in load.busiest_rank(b, TOP_K, TP))
    n = b * TOP_K

    def grouped(k: int, columns: int) -> Call:
        return Call("npu.npu_grouped_matmul", [([n, k], I8), ([EXPERTS, k, columns], I8)], [([n, columns], BF16)],
                    SPARSE, 2.0 * rows * k * columns, active * k * columns + rows * (k + 2 * columns), "int8", rows,
                    active)  # fmt: skip

    sorted_, middle = ([n, HIDDEN], BF16), ([n, INTER], BF16)
    return [
        Call("npu.npu_moe_init_routing_v2", [([b, HIDDEN], BF16), ([b, TOP_K], I32)], [sorted_, ([n], I32)], SPARSE),
        Call("npu.npu_dynamic_quant", [sorted_], [([n, HIDDEN], I8), ([n], F32)], SPARSE),
        grouped(HIDDEN, 2 * INTER),
        Call("npu.npu_swiglu", [([n, 2 * INTER], BF16)], [middle], SPARSE),
        Call("npu.npu_dynamic_quant", [middle], [([n, INTER], I8), ([n], F32)], SPARSE),
        grouped(INTER, HIDDEN),
        Call("npu.npu_moe_finalize_routing", [sorted_, ([b, TOP_K], BF16), ([n], I32)], [([b, HIDDEN], BF16)], SPARSE),
    ]  # fmt: skip
