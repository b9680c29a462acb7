"""`glm5 run` on emulated devices: those of a plan, or of a plan made on the spot for a profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from foundation.writing import require_writable
from runtime.cli.compile_cache import open_compile_cache
from runtime.cli.runners.asked import CheckpointRun


@dataclasses.dataclass(frozen=True)
class EmulatedRun(CheckpointRun):
    """A checkpoint on the devices that a plan or a profile describes."""

    plan: Path | None
    profile: str | None
    devices: int | None
    tp: int | None
    dp: int | None
    ep: int | None
    pp: int | None
    formats: str | None
    kv: str | None
    engine: str | None
    mtp: int
    scale_memory: float
    trace: Path | None

    @classmethod
    def why_not(cls, name: str, backend: str) -> str:
        return f"does not go with --backend {backend}: the plan and its formats decide that; leave it out"

    def run(self) -> None:
        from backends import registry
        from runtime.execution.cluster.options import SimOptions
        from runtime.execution.cluster.session import prepare, serve

        if self.trace:
            require_writable(self.trace)
        words, adapter, opened = self.words(), registry.get(self.backend), self.opened()
        options = SimOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SimOptions)})
        plan = prepare(opened.config, options)
        requests, answers = self.asked(opened, words)
        open_compile_cache(self.compile_cache)
        served = serve(opened, adapter, plan, requests, answers.token, self.trace)
        more = {
            "plan": plan.serving.name,
            "devices": len(plan.devices),
            "run_s": served.run_s,
            "clock": f"virtual, priced in {served.clock.serving.spec.formats.weights}",
        }
        answers.give(served.outcome.completions, served.load_s, served.compile_s, more, self.dump_logits)
