"""`glm5 run` on a backend of this host: one device."""

from __future__ import annotations

import dataclasses
import time

from runtime.cli.compile_cache import open_compile_cache
from runtime.cli.runners.asked import CheckpointRun


@dataclasses.dataclass(frozen=True)
class LocalRun(CheckpointRun):
    """A checkpoint on a device of this host."""

    mtp: int
    dtype: str | None
    keep_fp8: bool
    pool_tokens: int | None
    prefill_chunk: int | None
    engine: str | None
    kv: str | None

    @classmethod
    def why_not(cls, name: str, backend: str) -> str:
        return "needs a backend that emulates: --backend sim"

    def run(self) -> None:
        from backends import registry
        from runtime.execution.local.engine import EngineConfig
        from runtime.execution.local.load import load_engine

        words, started = self.words(), time.perf_counter()
        open_compile_cache(self.compile_cache)
        adapter = registry.usable(self.backend)
        opened = self.opened()
        requests, answers = self.asked(opened, words)
        config = EngineConfig(self.engine or "glm5", drafts=self.mtp, prefill_chunk=self.prefill_chunk, kv=self.kv)
        engine = load_engine(opened, adapter, config, self.dtype, self.keep_fp8, self.pool_tokens)
        load_s = time.perf_counter() - started
        completions = engine.generate(requests, answers.token)
        answers.give(completions, load_s, engine.programs.compile_s, logits=self.dump_logits)
