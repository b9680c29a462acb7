"""A serving engine's steps as the prices of a rollout replica."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.deployment.engines import Engine
from runtime.planning.rl.replica import GrowthReserve, RolloutSide
from runtime.serving.pricing import NO_CONTEXTS, StepPricer, step_seconds, step_shape


def side_of(engine: Engine, pricer: StepPricer, pool_tokens: int, replicas: int = 1, ranks: int = 1) -> RolloutSide:
    """Replicas of an engine, and how it admits."""
    reserve = None
    if engine.admission == "max-length":
        reserve = GrowthReserve(1.0, 1.0)
    elif engine.admission == "estimate":
        reserve = GrowthReserve(
            engine.new_token_ratio, engine.new_token_ratio_min, engine.new_token_ratio_decay_steps,
            engine.retract_decode_steps, engine.max_new_tokens_clip,
        )  # fmt: skip
    prices, most = EnginePrices(engine, pricer), engine.max_running_requests
    return RolloutSide(replicas, ranks, pool_tokens, most, prices, engine.prefix_cache, reserve)


class EnginePrices:
    """`RolloutPrices` of an engine whose steps cost what `pricer` says, the host's time included. What passes before
    the scheduler, milliseconds an answer, is left out."""

    def __init__(self, engine: Engine, pricer: StepPricer):
        self._engine, self._pricer = engine, pricer
        self.mixed = engine.policy == "mixed"
        self.prompt_tokens = max(
            1, min(engine.chunked_prefill_tokens or engine.max_step_tokens, engine.max_step_tokens)
        )

    def decode_seconds(self, rows: int, context: float) -> float:
        shape = step_shape(self._engine, np.full(rows, context))
        return step_seconds(self._engine, self._pricer.seconds(shape), shape)

    def prompt_seconds(self, chunks: Sequence[tuple[int, int]], rows: int, context: float) -> float:
        """Cut into steps of `prompt_tokens`, in order."""
        contexts = np.full(rows, context) if rows else NO_CONTEXTS
        left = [list(chunk) for chunk in chunks]
        seconds = 0.0
        while left:
            budget, step, begun = max(1, self.prompt_tokens - rows), [], 0
            while left and budget > 0:
                new = min(left[0][0], budget)
                step.append((new, left[0][1]))
                budget -= new
                left[0] = [left[0][0] - new, left[0][1] + new]
                if not left[0][0]:
                    left.pop(0)
                    begun += 1
            shape = step_shape(self._engine, contexts, 1, step, begun)
            seconds += step_seconds(self._engine, self._pricer.seconds(shape), shape)
        return seconds
