"""What InferenceX's launch scripts pass to a server (latest versions of the scripts), by kind of engine.

Benchmarks of public tables were run with these, so that predictions of their rows have to be, too.
"""

from __future__ import annotations

import math
from typing import Any

from runtime.deployment.engines.engine import Circumstances


def launch_settings(kind: str, at: Circumstances, concurrency: int, isl: int, osl: int) -> dict[str, Any]:
    """Settings of `Engine`, as the scripts give them."""
    if kind == "sglang" and at.sparse and at.family == "blackwell":
        sizes = [size for size in (1, 2, 4, *range(8, concurrency, 8)) if size < concurrency] + [concurrency]
        return {"chunked_prefill_tokens": 32768, "max_step_tokens": 32768, "max_running_requests": concurrency,
                "graph_batch_sizes": sizes, "memory_fraction": 0.85, "prefix_cache": False}  # fmt: skip
    if kind == "sglang" and at.sparse:
        return {"memory_fraction": 0.85}
    if kind == "sglang":
        running = 512 if (isl, osl) == (1024, 1024) else 256
        return {"chunked_prefill_tokens": 32768, "max_step_tokens": 32768, "max_running_requests": running,
                "memory_fraction": 0.82, "prefix_cache": False, "stream_interval_tokens": 10}  # fmt: skip
    if kind == "trtllm":
        tokens = max(8192, math.ceil((concurrency + isl + 64) / 64) * 64)
        return {"memory_fraction": 0.75, "max_step_tokens": tokens, "prefix_cache": False,
                "graph_padding": True, "stream_interval_tokens": 10}  # fmt: skip
    return {}


def launch_kv(kind: str) -> str | None:
    """The KV cache's format that the scripts ask for; None: the engine's choice."""
    return "fp8" if kind == "trtllm" else None
