"""What each op of the contract becomes on Ascend: CANN's operators, or the decomposition and why.

`cann_form` is the CANN column of the table of export forms. A form is what the op *may* become: `lowerings.py` looks at
the shapes and number formats of each call, and decomposes what CANN's kernel would not take.
"""

from __future__ import annotations

import dataclasses

from backends.ascend.catalog import CannOperator, cann_operators

_DECOMPOSED = {
    "glm.embed": "one Gather",
    "glm.layer_norm": "the indexer's norm of 128 values: elementwise operators, which CANN's graph engine fuses",
    "glm.head_linear": "one batched MatMul",
    "glm.bias": "one Add",
    "glm.swiglu": "elementwise operators; CANN's SwiGlu has no ONNX node, and saves one pass at most",
    "glm.rope": "CANN's InterleaveRope takes cosines in the activations' 16 bits, the graph's are float32",
    "glm.expanded_attention": "keys and values are expanded from latents: batched MatMuls, which dominate a chunk",
    "glm.paged_attention": "CANN's FusedInferAttentionScore is not mapped yet; batched MatMuls and a softmax",
}


@dataclasses.dataclass(frozen=True)
class CannForm:
    """The CANN form of an op: the operators it becomes in order, or none and the reason."""

    op: str
    operators: tuple[CannOperator, ...]
    reason: str = ""

    @property
    def text(self) -> str:
        """A cell of a table."""
        if not self.operators:
            return f"decomposed: {self.reason}"
        return ", ".join(f"`{operator.node}`" for operator in self.operators)


def cann_form(op: str) -> CannForm:
    """The CANN form of `glm.*` op `op`. Raises KeyError for an op that has neither operators nor a reason."""
    operators = tuple(o for o in cann_operators().values() if op in o.ops)
    return CannForm(op, operators) if operators else CannForm(op, (), _DECOMPOSED[op])
