"""Every compiled form of every kernel, as data: what `tools.kernels` compiles and what `launch` may ask for.

A kernel (a function in `source/`) is compiled once for each set of constants. All else that tells one model's shapes
from another's is an argument: few forms serve every preset and every rank. Free of JAX and of Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

TARGETS = (80, 90, 100)
"""Architectures that kernels are compiled for, as major * 10 + minor. The first is the least: it runs, through the
driver's compiler, on all that are none of the others."""

BF16, FP8, F32, I32 = "*bf16", "*u8", "*fp32", "*i32"  # FP8: as bytes
SIZE, SIZE16, NUMBER = "i32", "i32/16", "fp32"  # SIZE16: a multiple of 16, so that rows may be read 16 bytes at a time


@dataclasses.dataclass(frozen=True)
class Variant:
    """A compiled form.

    kernel: "module.function" of `source/`. parameters: name to type, in the source's order, inputs before outputs
    before numbers. constants: the rest of the source's parameters; None stands for an array that is not there. Two
    among them are left to the target: "NATIVE", whether it converts e4m3 itself, and "LOOK", whether it is Hopper.
    warps, stages: of Triton's compiler.
    """

    name: str
    kernel: str
    parameters: Mapping[str, str]
    constants: Mapping[str, int | bool | None]
    warps: int = 4
    stages: int = 3


def native_fp8(target: int) -> bool:
    """Whether an architecture has a conversion of e4m3 (from 8.9)."""
    return target >= 89


def _typed(arrays: Mapping[str, str], numbers: str, sixteen: str = "", floats: str = "") -> dict[str, str]:
    multiples = sixteen.split()
    sizes = {name: SIZE16 if name in multiples else SIZE for name in numbers.split()}
    return {**arrays, **sizes, **dict.fromkeys(floats.split(), NUMBER)}


FEW, MANY = 16, 64
"""Rows of a tile of a product: of a step of decode, and of a chunk."""
DEPTH, DOWN_DEPTH = 128, 64
"""What a step of a product takes of the depth, at the most. A rank's share of an expert's width may cut FP8 blocks."""
VALUE, REST, INDEX_WIDTH, HEAD_WIDTH = 512, 64, 128, 128
"""Widths that the attention kernels are compiled for: a latent, its rotated rest, an index key, a head of GQA."""


def _linear() -> list[Variant]:
    arrays = {"x": BF16, "matrix": FP8, "scale": F32}
    numbers = "rows depth width scale_width each_depth each_width group group_scales split_depth"
    constants = {"COLUMNS": 64, "NATIVE": None}
    return [
        Variant(f"linear_{rows}_{out[1:]}", "products.linear", _typed({**arrays, "out": out}, numbers, "depth width"),
                {"ROWS": rows, **constants, "DEPTH": DEPTH if rows == FEW else DEPTH // 2}, stages=4)
        for rows in (FEW, MANY) for out in (BF16, F32)
    ]  # fmt: skip


def _experts() -> list[Variant]:
    found = []
    for rows in (FEW, MANY):
        for matrix in (FP8, BF16):
            kind = f"{rows}_{matrix[1:]}"
            given = {"x": BF16, "order": I32, "tiles": I32, "matrix": matrix, "scale": F32, "hidden": BF16}
            ends = {
                "hidden": BF16, "order": I32, "tiles": I32, "weights": F32, "matrix": matrix, "scale": F32,
                "out": F32 if rows == FEW else BF16,
            }  # fmt: skip
            sizes, scales = "depth width", "scale_depth scale_width each_depth each_width"
            part = "begin part_width"
            constants: dict[str, int | bool | None] = {
                "ROWS": rows, "COLUMNS": 64, "DEPTH": DEPTH if rows == FEW else DEPTH // 2, "QUANTISED": matrix == FP8,
                "NATIVE": None,
            }  # fmt: skip
            if matrix == BF16:
                del given["scale"], ends["scale"]
                constants |= {"scale": None, "DEPTH": 64}
            found += [
                Variant(f"expert_up_{kind}", "products.expert_up",
                        _typed(given, f"choices {sizes} {scales}", sizes), constants, stages=4),
                Variant(f"expert_down_{kind}", "products.expert_down",
                        _typed(ends, f"{sizes} {part} {scales}", f"{sizes} {part}"),
                        constants | {"COLUMNS": 128, "DEPTH": DOWN_DEPTH}, stages=3),
            ]  # fmt: skip
    return found


def _attention() -> list[Variant]:
    ends = {"parts": F32, "stats": F32}
    found = []
    for rows in (FEW, MANY):
        warps, stages = (4, 3) if rows == FEW else (8, 2)
        found += [
            Variant(f"sparse_attention_{rows}", "attention.sparse_attention",
                    _typed({"query": BF16, "pages": BF16, "table": I32, "selected": I32, "positions": I32, **ends},
                           "tokens heads count page_size table_width splits", "", "scale"),
                    {"ROWS": rows, "VALUE": VALUE, "REST": REST, "BLOCK": 32}, warps, stages),
            Variant(f"latent_attention_{rows}", "attention.context_attention",
                    _typed({"query": BF16, "key_pages": BF16, "table": I32, "positions": I32, **ends},
                           "tokens heads groups page_size table_width splits", "", "scale"),
                    {"value_pages": None, "ROWS": rows, "VALUE": VALUE, "REST": REST, "BLOCK": 32, "LATENT": True},
                    warps, stages),
            Variant(f"paged_attention_{rows}", "attention.context_attention",
                    _typed({"query": BF16, "key_pages": BF16, "value_pages": BF16, "table": I32, "positions": I32,
                            **ends}, "tokens heads groups page_size table_width splits", "", "scale"),
                    {"ROWS": rows, "VALUE": HEAD_WIDTH, "REST": 0, "BLOCK": 64, "LATENT": False}, 4, 3),
        ]  # fmt: skip
    return found + [
        Variant(f"join_{width}", "attention.join", _typed({"parts": F32, "stats": F32, "out": BF16}, "splits"),
                {"VALUE": width}, 4, 2)
        for width in (VALUE, HEAD_WIDTH)
    ]  # fmt: skip


EXPANDED = ((128, 64, 256), (128, 0, 128))
"""Widths of heads that are expanded from latents: of a key, as a power of two and what is beyond it, and of a value.
GLM-5 and GLM-4.7-Flash; DeepSeek and Kimi."""
TALL = 128


def _expanded() -> list[Variant]:
    arrays = {"query": BF16, "latents": BF16, "keys": BF16, "values": BF16, "positions": I32, "out": BF16}
    return [
        Variant(f"expanded_attention_{rows}_{nope + more}", "expanded.expanded_attention",
                _typed(arrays, "tokens heads context", "", "scale"),
                {"ROWS": rows, "NOPE": nope, "MORE": more, "REST": REST, "LATENT": VALUE, "VALUE": value,
                 "BLOCK": 64 if rows == TALL else 32, "LOOK": None}, 8 if rows == TALL else 4, 2)
        for nope, more, value in EXPANDED for rows in (MANY, TALL)
    ]  # fmt: skip


INDEX_HEADS = (32, 64)
INDEX_QUERIES = 64
ROUTED = (256, 512)
MOST_CHOSEN, MOST_GROUPS = 32, 32


def _indexer() -> list[Variant]:
    found = [
        Variant(f"index_scores_{heads}", "indexer.index_scores",
                _typed({"query": BF16, "head_weights": BF16, "pages": BF16, "table": I32, "positions": I32,
                        "out": F32}, "tokens heads page_size table_width", "", "factor head_factor"),
                {"QUERIES": INDEX_QUERIES, "HEADS": heads, "WIDTH": INDEX_WIDTH, "BLOCK": 128}, 4, 2)
        for heads in INDEX_HEADS
    ]  # fmt: skip
    found.append(
        Variant("select_topk", "indexer.select_topk", _typed({"scores": F32, "out": I32}, "context count"),
                {"BLOCK": 2048}, 8, 2)
    )  # fmt: skip
    return found + [
        Variant(f"route_{experts}", "indexer.route",
                _typed({"logits": F32, "bias": F32, "chosen": I32, "weights": F32},
                       "experts count groups best_groups normalise", "", "scale"),
                {"EXPERTS": experts, "COUNT": MOST_CHOSEN, "GROUPS": MOST_GROUPS}, 1, 2)
        for experts in ROUTED
    ]  # fmt: skip


def _narrow() -> list[Variant]:
    """Of caches in FP8 records."""
    sizes = {"VALUE": VALUE, "REST": REST, "NATIVE": None}
    found = []
    for rows in (FEW, MANY):
        for kind in ("sparse", "latent"):
            selected = {"selected": I32} if kind == "sparse" else {}
            arrays = {"query": BF16, "pages": FP8, "table": I32, **selected, "positions": I32}
            arrays |= {"parts": F32, "stats": F32}
            block = 32 if rows == FEW else 16  # widened in registers, of which more would spill
            own = {**sizes, "BLOCK": block, "SELECTED": kind == "sparse"}
            constants: dict[str, int | bool | None] = {"ROWS": rows, **own}
            found.append(
                Variant(f"{kind}_attention_u8_{rows}", "narrow.latent_attention",
                        _typed(arrays, "tokens heads count page_size table_width splits", "", "scale"),
                        constants if selected else {"selected": None, **constants},
                        8, 2)
            )  # fmt: skip
    return found + [
        Variant(f"index_scores_u8_{heads}", "narrow.index_scores",
                _typed({"query": BF16, "head_weights": BF16, "pages": FP8, "table": I32, "positions": I32,
                        "out": F32}, "tokens heads page_size table_width", "", "factor head_factor"),
                {"QUERIES": INDEX_QUERIES, "HEADS": heads, "WIDTH": INDEX_WIDTH, "BLOCK": 128, "NATIVE": None}, 4, 2)
        for heads in INDEX_HEADS
    ]  # fmt: skip


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {each.name: each for each in (*_linear(), *_experts(), *_attention(), *_expanded(), *_indexer(), *_narrow())}
)
