"""CANN's fused operators in NumPy, after their documentation: what `onnx.reference` runs a package's graphs with.

Written from the operators' READMEs (the sources in `backends/ascend/cann_operators.toml`), not from our lowerings, so
that a test compares the graph's meaning on a chip, as documented, with the JAX op. Accelerators' rounding is not
imitated: sums are taken in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from tests.backends import cann_forms as forms
from tests.backends.cann_forms import f64


class RmsNorm(OpRun):
    op_domain = "cann"

    def _run(self, x, gamma, epsilon=1e-6):
        wide = f64(x)
        rstd = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
        return (wide * rstd * f64(gamma)).astype(x.dtype), rstd.astype(np.float32)


class NPURmsNorm(OpRun):
    op_domain = "npu"

    def _run(self, x, gamma):
        wide = f64(x)
        rstd = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        return (wide * rstd * f64(gamma)).astype(x.dtype), rstd.astype(np.float32)


class ScatterNdUpdate(OpRun):
    op_domain = "cann"

    def _run(self, var, indices, updates, use_locking=0):
        out = var.copy()
        out[indices[:, 0]] = updates
        return (out,)


class LightningIndexer(OpRun):
    op_domain = "cann"

    def _run(self, *given, **attributes):
        return forms.lightning_indexer(*given, **attributes)


class SparseFlashAttention(OpRun):
    op_domain = "cann"

    def _run(self, *given, **attributes):
        return forms.sparse_flash_attention(*given, **attributes)


class MoeGatingTopK(OpRun):
    op_domain = "cann"

    def _run(self, *given, **attributes):
        return forms.moe_gating_top_k(*given, **attributes)


class MoeInitRoutingV3(OpRun):
    op_domain = "cann"

    def _run(self, *given, **attributes):
        return forms.moe_init_routing(*given, **attributes)


class GroupedMatmul(OpRun):
    op_domain = "cann"

    def _run(self, x, weight, scale=None, group_list=None, per_token_scale=None, split_item=0, dtype=0,
             transpose_weight=0, transpose_x=0, group_type=-1, group_list_type=0, act_type=0):  # fmt: skip
        assert group_list is not None and (scale is None) == (per_token_scale is None)
        assert (split_item, group_type, group_list_type) == (3, 0, 1) and not transpose_weight and not transpose_x
        out = np.full((x.shape[0], weight.shape[2]), np.nan, np.float64)
        start = 0
        for group, rows in enumerate(group_list):
            part = f64(x[start : start + rows]) @ f64(weight[group])
            if scale is not None and per_token_scale is not None:
                part = part * f64(scale[group]) * f64(per_token_scale[start : start + rows])[:, None]
            out[start : start + rows] = part
            start += rows
        kinds = {0: np.float32, 1: np.float16}
        return (out.astype(kinds[dtype] if dtype in kinds else _bfloat16()),)


class NPUDynamicQuant(OpRun):
    op_domain = "npu"

    def _run(self, x):
        wide = np.nan_to_num(f64(x))  # rows that no expert has
        scale = np.maximum(np.abs(wide).max(-1), 1e-12) / 127
        return np.rint(wide / scale[..., None]).astype(np.int8), scale.astype(np.float32)


class QuantBatchMatmulV3(OpRun):
    op_domain = "cann"

    def _run(self, x1, x2, scale, offset=None, bias=None, pertoken_scale=None, dtype=0, transpose_x1=0, transpose_x2=0):
        assert x1.dtype == x2.dtype == np.int8 and scale.shape == (x2.shape[1],) and not transpose_x1
        out = (x1.astype(np.int64) @ x2.astype(np.int64)) * f64(scale) * f64(pertoken_scale)[:, None]
        kinds = {0: np.float32, 1: np.float16}
        return (out.astype(kinds[dtype] if dtype in kinds else _bfloat16()),)


class WeightQuantBatchMatmulV2(OpRun):
    op_domain = "npu"

    def _run(self, x, weight, antiquant_scale, antiquant_group_size=0, dtype=-1):
        return ((f64(x) @ (f64(weight) * f64(antiquant_scale))).astype(x.dtype),)


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


OPERATORS = [
    RmsNorm, NPURmsNorm, ScatterNdUpdate, LightningIndexer, SparseFlashAttention, MoeGatingTopK, MoeInitRoutingV3,
    GroupedMatmul, NPUDynamicQuant, QuantBatchMatmulV3, WeightQuantBatchMatmulV2,
]  # fmt: skip
