"""What the gradient of each op of the contract costs, from the op of the forward list.

The gradient of a product x w is two products of the same size: dx = dy w^T and dw = x^T dy. Attention has four of its
forward two (dv, dp, dq, dk), and the scores again, which a fused kernel does not keep. Experts are products. Everything
else reads what it was given and the gradient of what it gave, and writes the gradient of what it was given.

Frozen, as in reinforcement learning with DeepSeek sparse attention (arXiv 2602.15763; `runtime/training/optimizer.py`
leaves them out alike): indexers, into whose inputs no gradient goes either, and the routers' biases, which take part in
choosing only. `tests/cost/test_training_backward.py` holds the counts to the products of the graph's own traced
gradient.
"""

from __future__ import annotations

from model.weights import Weight
from runtime.pricing.oplist import Sizes, TracedOp

BACKWARD_RATE = 0.85
"""Rate of a backward attention kernel over that of the forward one. FlashAttention-3 on H100, head size 128, 1k to 16k
tokens: 424/565, 501/625, 542/638, 559/646, 561/648 TFLOP/s (arXiv 2407.08608, figures 5 and 6): 0.75 to 0.87."""
ACCUMULATE_BYTES = 8.0
"""Of an element of a weight: its float32 gradient is read and written with every micro-batch."""
UP_PROJECTIONS = ("q_b", "k_up")
"""Weights that make queries and keys of MLA's low-rank ones."""
ELEMENTWISE = ("glm.rms_norm", "glm.layer_norm", "glm.swiglu", "glm.rope", "glm.bias")
FROZEN_STAGE = "indexer"


def trained(weight: Weight) -> bool:
    """Whether a weight has a gradient."""
    return not weight.of_indexer and weight.name != "router_bias"


def differentiated(op: TracedOp) -> bool:
    """Whether gradients go through an op."""
    return op.stage != FROZEN_STAGE and op.name not in ("glm.index_scores", "glm.select_topk")


def repeated(op: TracedOp) -> bool:
    """Whether selective recompute does a whole op again: norms, activation functions, rotary embeddings and MLA's
    up-projections (DeepSeek-V3, arXiv 2412.19437, 3.2.3; Megatron-LM's layernorm, moe_act and mla_up_proj). Expanded
    attention and experts it does again in part."""
    up = op.name in ("glm.linear", "glm.head_linear") and op.weights[:1] and op.weights[0] in UP_PROJECTIONS
    return differentiated(op) and (op.name in ELEMENTWISE or bool(up))


def gradient_flops(op: TracedOp, sizes: Sizes) -> int:
    """Floating-point operations of an op's gradient, products alone and nothing computed again: twice its own."""
    return 2 * op.flops(sizes) if differentiated(op) else 0


def score_share(qk: int, v: int) -> float:
    """Share of an attention kernel's products that are its scores'."""
    return qk / (qk + v)


def attention_factor(qk: int, v: int) -> float:
    """Seconds of a backward attention kernel over those of the forward one: its gradients and the scores again, at the
    rate that such kernels reach."""
    return (2.0 + score_share(qk, v)) / BACKWARD_RATE


def passed_bytes(op: TracedOp, sizes: Sizes) -> int:
    """Bytes of an elementwise op's gradient: what it was given, and the gradients of what it gave and was given."""
    given = sum(x.elements(sizes) * x.element_bytes for x in op.inputs if not x.weight)
    return op.moved_bytes(sizes) + given
