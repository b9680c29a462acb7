"""What torch_npu's Meta kernels refuse and what they let pass; where they do, `check.py` refuses.

The table of docs/ascend.md is made of `MUTATED`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from backends.ascend.check import argument_names, named, refusal
from tests.npu import vendor
from tests.npu.calls import GRAPHS, calls_of

Call = dict[str, Any]  # arguments by name


def _typed(dtype: torch.dtype) -> Any:
    def change(x: Any) -> Any:
        return [change(each) for each in x] if isinstance(x, list) else x.to(dtype)

    return change


def _flat(x: Any) -> Any:
    return [each.flatten() for each in x] if isinstance(x, list) else x.flatten()


F32, F16, I64 = (_typed(dtype) for dtype in (torch.float32, torch.float16, torch.int64))
I32 = _typed(torch.int32)

# (operator, its place or name, what is done to the argument, in words, whether torch_npu 2.13.0's Meta kernel refuses)
MUTATED: list[tuple[str, int | str, Any, str, bool]] = [
    ("npu_rms_norm", 1, F32, "gamma of another type", False),
    ("npu_dynamic_quant", 0, I32, "input in int32", False),
    ("npu_dynamic_quant", "quant_mode", "perrow", "quant_mode that there is not", False),
    ("npu_quant_matmul", 0, F32, "x1 in float32", False),
    ("npu_quant_matmul", 2, F16, "scale in float16", False),
    ("npu_quant_matmul", "output_dtype", 27, "output_dtype 27, which is ge::DataType's bfloat16", True),
    ("npu_scatter_nd_update_", 1, F32, "indices in float32", False),
    ("npu_scatter_nd_update_", 1, _flat, "indices of one dim", False),
    ("npu_scatter_nd_update_", 2, F32, "updates of another type", False),
    ("npu_lightning_indexer", 1, F32, "key of another type", False),
    ("npu_lightning_indexer", "block_table", I64, "block_table in int64", False),
    ("npu_lightning_indexer", "layout_key", "PA_NZ", "layout_key that there is not", False),
    ("npu_lightning_indexer", "sparse_mode", 2, "sparse_mode that there is not", False),
    ("npu_sparse_flash_attention", 0, _flat, "query of one dim", True),
    ("npu_sparse_flash_attention", 3, I64, "sparse_indices in int64", False),
    ("npu_sparse_flash_attention", "key_rope", F32, "key_rope of another type", False),
    ("npu_sparse_flash_attention", "layout_query", "BNSD", "layout_query that there is not", True),
    ("npu_sparse_flash_attention", "attention_mode", 0, "attention_mode without MLA", False),
    ("npu_mla_prolog_v3", 0, _flat, "token_x of one dim", True),
    ("npu_mla_prolog_v3", 1, F16, "weight_dq in float16", False),
    ("npu_mla_prolog_v3", 8, F32, "rope_cos in float32", False),
    ("npu_mla_prolog_v3", "cache_index", I32, "cache_index in int32", False),
    ("npu_mla_prolog_v3", "cache_mode", "PA", "cache_mode that there is not", False),
    ("npu_mla_prolog_v3", "weight_quant_mode", 6, "weight_quant_mode that there is not", False),
    ("npu_quant_lightning_indexer", 1, F16, "key in float16", False),
    ("npu_quant_lightning_indexer", 2, F32, "weights in float32", False),
    ("npu_quant_lightning_indexer", 4, F32, "key_dequant_scale in float32", False),
    ("npu_quant_lightning_indexer", "query_quant_mode", 1, "query_quant_mode that there is not", False),
    ("npu_quant_lightning_indexer", "layout_query", "BNSD", "layout_query that there is not", True),
    ("npu_kv_quant_sparse_flash_attention", 0, _flat, "query of one dim", True),
    ("npu_kv_quant_sparse_flash_attention", 1, F16, "key in float16", False),
    ("npu_kv_quant_sparse_flash_attention", 6, 0, "value_quant_mode that there is not", False),
    ("npu_kv_quant_sparse_flash_attention", "tile_size", 64, "tile_size that there is not", False),
    ("npu_moe_gating_top_k", 0, _flat, "x of one dim", True),
    ("npu_moe_gating_top_k", "bias", F16, "bias of another type", False),
    ("npu_moe_gating_top_k", "norm_type", 7, "norm_type that there is not", False),
    ("npu_moe_gating_top_k", "group_select_mode", 2, "group_select_mode that there is not", False),
    ("npu_moe_init_routing_v2", 1, I64, "expert_idx in int64", False),
    ("npu_moe_init_routing_v2", 1, _flat, "expert_idx of one dim", True),
    ("npu_moe_init_routing_v2", "quant_mode", 10, "quant_mode that there is not", True),
    ("npu_moe_init_routing_v2", "row_idx_type", 2, "row_idx_type that there is not", True),
    ("npu_grouped_matmul", 1, F32, "weight of another type", False),
    ("npu_grouped_matmul", "group_list", I32, "group_list in int32", False),
    ("npu_grouped_matmul", "group_type", 1, "group_type that there is not", True),
    ("npu_grouped_matmul", "group_list_type", 3, "group_list_type that there is not", False),
    ("npu_grouped_matmul", "output_dtype", 27, "output_dtype 27, which is ge::DataType's bfloat16", True),
    ("npu_weight_quant_batchmatmul", 1, F32, "weight in float32", False),
    ("npu_weight_quant_batchmatmul", 2, F32, "antiquant_scale of another type", False),
    ("npu_weight_quant_batchmatmul", "inner_precise", 2, "inner_precise that there is not", False),
    ("npu_swiglu", 0, I32, "input in int32", False),
    ("npu_moe_finalize_routing", 4, F32, "scales of another type", False),
    ("npu_moe_finalize_routing", "drop_pad_mode", 1, "drop_pad_mode 1 for rows of two dims", True),
    ("npu_moe_finalize_routing", "drop_pad_mode", 4, "drop_pad_mode that there is not", False),
    ("npu_interleave_rope", 1, F32, "cos of another type", False),
    ("npu_interleave_rope", 0, _flat, "x of one dim", False),
    ("npu_moe_distribute_dispatch_v2", 0, F32, "x in float32", False),
    ("npu_moe_distribute_dispatch_v2", 1, I64, "expert_ids in int64", False),
    ("npu_moe_distribute_dispatch_v2", 0, _flat, "x of one dim", True),
    ("npu_moe_distribute_dispatch_v2", "quant_mode", 6, "quant_mode that there is not", False),
    ("npu_moe_distribute_dispatch_v2", "expert_token_nums_type", 2, "expert_token_nums_type that there is not", True),
    ("npu_moe_distribute_dispatch_v2", "comm_alg", "ring", "comm_alg that there is not", False),
    ("npu_moe_distribute_combine_v2", 0, F32, "expand_x in float32", False),
    ("npu_moe_distribute_combine_v2", 4, F16, "expert_scales in float16", False),
    ("npu_moe_distribute_combine_v2", 2, I64, "assist_info_for_combine in int64", False),
    ("npu_moe_distribute_combine_v2", "comm_quant_mode", 1, "comm_quant_mode that there is not", False),
]


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    """One call of each operator, of tensors without data."""
    vendor.reason_absent()
    found: dict[str, Call] = {}
    for make in GRAPHS.values():
        for name, args, attributes, _ in calls_of(make()):
            found[name] = named(name, args, attributes)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="meta"), found)


def _mutated(operator: str, call: Call, where: int | str, change: Any) -> Call:
    name = argument_names(operator)[where] if isinstance(where, int) else where
    return {**call, name: change(call[name]) if callable(change) else change}


def _id(row: Any) -> str:
    return f"{row[0]}: {row[3]}"


@pytest.mark.parametrize("row", MUTATED, ids=_id)
def test_our_check_refuses_it(row: Any, calls: dict[str, Call]):
    operator, where, change, _, _ = row
    assert refusal(operator, (), calls[operator]) is None
    assert (why := refusal(operator, (), _mutated(operator, calls[operator], where, change))) and "\n" not in why


@pytest.mark.npu
@pytest.mark.parametrize("row", MUTATED, ids=_id)
def test_the_vendors_kernel_does_what_the_table_says(row: Any, calls: dict[str, Call]):
    operator, where, change, _, refused = row
    kernel = getattr(vendor.operators(), operator).default
    kernel(**calls[operator])
    mutated = _mutated(operator, calls[operator], where, change)
    if refused:
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            kernel(**mutated)
    else:
        kernel(**mutated)


def test_the_documents_table_is_this_one():
    rows = [
        f"| `{operator}` | {words} | {'refused' if refused else 'passes'} |"
        for operator, _, _, words, refused in MUTATED
    ]
    page = (Path(__file__).parents[2] / "docs/ascend.md").read_text()
    assert "\n".join(rows) in page
