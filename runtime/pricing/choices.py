"""Which kernel an engine runs where its releases choose by model, chip family and layout, as data.

A choice holds from its release on, until one of the same engine and kind that is newer.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.pricing.eras import order


@dataclass(frozen=True)
class FusedReduce:
    """All-reduces with the next norm fused in, on one server and without DP attention: FlashInfer's kernel, which is
    TensorRT-LLM's (`tables`), for steps of up to `most_tokens`."""

    engine: str
    since: str
    families: frozenset[str]
    models: frozenset[str]
    source: str
    tables: str = "trtllm"
    most_tokens: int = 2048


_BOTH = frozenset({"hopper", "blackwell"})
FUSED_REDUCES = (
    FusedReduce("sglang", "0.5.6", frozenset({"blackwell"}), frozenset({"deepseek_v3", "deepseek_v32"}),
                "sglang 0.5.6.post1 server_args.py, common to all Deepseek MoE models"),
    FusedReduce("sglang", "0.5.7", _BOTH, frozenset({"deepseek_v3", "glm4_moe"}),
                "sglang 0.5.7 server_args.py _handle_model_specific_adjustments; communicator.py for the tokens"),
    FusedReduce("sglang", "0.5.9", _BOTH, frozenset({"deepseek_v3", "glm4_moe", "glm4_moe_lite"}),
                "sglang 0.5.9 server_args.py _handle_model_specific_adjustments"),
    FusedReduce("sglang", "0.5.14", _BOTH,
                frozenset({"deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite"}),
                "sglang 0.5.14 server_args.py _handle_model_specific_adjustments"),
)  # fmt: skip


def fused_reduce(engine: str, release: str, family: str, model: str) -> FusedReduce | None:
    """What a release chooses; None where its all-reduces stay alone, or none of its releases is known."""
    asked = order(release)
    mine = [c for c in FUSED_REDUCES if c.engine == engine and asked and (order(c.since) or asked) <= asked]
    chosen = mine[-1] if mine else None
    return chosen if chosen and family in chosen.families and model in chosen.models else None
