"""What each op of the contract is in each format: the published table (docs/ops.md).

StableHLO keeps every op by name as a composite. In ONNX each is a model-local function: its body is the decomposition
or, where `onnx_ops.py` has one, a body in ONNX's own terms. torch decomposes all into ATen, and why is said here;
torch_npu is `backends/ascend/operators.py`.
"""

from __future__ import annotations

import dataclasses

from backends.ascend.operators import npu_form
from backends.toolchains.onnx_ops import BODIES
from model.ops import OPS

TORCH: dict[str, str] = {
    "glm.embed": "`index_select`",
    "glm.rms_norm": "`rsqrt` of a mean: `aten.rms_norm` rounds 16-bit activations in another place",
    "glm.layer_norm": "elementwise, in float32 whatever the activations",
    "glm.linear": "`einsum`, which is one `mm` or `bmm`",
    "glm.head_linear": "`einsum`, which is one `bmm`",
    "glm.bias": "`add`",
    "glm.swiglu": "`sigmoid`, `mul`",
    "glm.rope": "`cos`, `sin`, `mul`: ATen has no rotary operator",
    "glm.cache_write": "`index_put`",
    "glm.index_scores": "`einsum`, `maximum`: ATen has no indexer",
    "glm.select_topk": "stable `sort`: `topk` leaves open which of equal scores it takes",
    "glm.sparse_attention": "`index_select`, `einsum`: `scaled_dot_product_attention` takes no selection a query",
    "glm.latent_attention": "`einsum`: `scaled_dot_product_attention` has no paged latents",
    "glm.expanded_attention": "`einsum`: `scaled_dot_product_attention` has no paged latents",
    "glm.paged_attention": "`einsum`: `scaled_dot_product_attention` has no page table",
    "glm.route": "`sigmoid`, stable `sort`: ATen has no router",
    "glm.expert_ffn": "`index_select`, `einsum`: ATen's grouped product takes sorted rows of 16 bits",
}
"""What ATen's operators each becomes, and why not one of them."""


@dataclasses.dataclass(frozen=True)
class Forms:
    """An op's cell in each column."""

    stablehlo: str
    onnx: str
    torch: str
    npu: str


def forms(op: str) -> Forms:
    """Raises KeyError for an op that has no row."""
    short = op.removeprefix("glm.")
    assert op in OPS, op
    return Forms(
        stablehlo=f'composite `"{op}"`',
        onnx=f"function `glm::{short}`" + (", body of its own" if op in BODIES else ""),
        torch=f"decomposed: {TORCH[op]}",
        npu=npu_form(op),
    )
