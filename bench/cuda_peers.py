"""GLM-4.7-Flash's shape with random weights by transformers: decode tokens/s in bfloat16, with its own default
attention, eagerly and compiled. A process of its own, run by bench/cuda.sh before JAX takes the card's memory.

    python -m bench.cuda_peers [--dry]      prints JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, StaticCache

from bench.cuda_sizes import DRY, Sizes
from foundation.errors import first_line


def model_of(sizes: Sizes, device: str) -> Any:
    config = Glm4MoeLiteConfig(**{k: v for k, v in sizes.flash.items() if k != "architectures"})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Glm4MoeLiteForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def decode_s(model: Any, forward: Callable[..., Any], batch: int, context: int, steps: int) -> float:
    """Median seconds of a decode step behind `context` tokens; each waits for its token."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=context + steps + 8)
    ids = torch.randint(1, model.config.vocab_size, (batch, context), device=device)
    for first in range(0, context, 1024):
        out = model(ids[:, first : first + 1024], past_key_values=cache, logits_to_keep=1)
    token, times = out.logits[:, -1:].argmax(-1), []
    for index in range(steps + 4):
        at = torch.tensor([[context + index]], device=device).expand(batch, 1)
        begin = time.perf_counter()
        token = forward(token, past_key_values=cache, position_ids=at).logits[:, -1:].argmax(-1)
        token.tolist()
        if index >= 4:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def report(sizes: Sizes, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda" and not torch.cuda.is_available():
        return {**found, "error": "torch has no CUDA here: pip install a build of torch for it"}
    model = model_of(sizes, device)
    # a compiler takes a minute where there is no card to gain by it: traced there, and not compiled
    how: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    ways = {"eager": model, "compiled": torch.compile(model.forward, dynamic=False, **how)}
    for way, forward in ways.items():
        rates: dict[str, Any] = {}
        for name, (batch, tokens, context) in sizes.flash_steps.items():
            if tokens > 1:
                continue
            try:
                rates[name] = batch / decode_s(model, forward, batch, context, sizes.repeats)
            except Exception as error:  # out of memory, or what a compiler does not take: said, and others measured
                rates[name] = first_line(error)[:200]
            if device == "cuda":
                torch.cuda.empty_cache()
        found[f"{way} decode tokens_per_s"] = rates
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="at tiny shapes on the CPU, to see that it runs")
    options = parser.parse_args()
    print(json.dumps(report(DRY, "cpu") if options.dry else report(Sizes(), "cuda")))


if __name__ == "__main__":
    main()
