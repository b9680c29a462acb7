"""`glm5 run --coordinator`: a plan over several processes, of which this is one. Process 0 answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.compile_cache import open_compile_cache
from runtime.cli.runners.asked import CheckpointRun

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from runtime.deployment.plan import Plan
    from runtime.execution.cluster.processes import ProcessPlace, Ticket


@dataclasses.dataclass(frozen=True)
class ProcessesRun(CheckpointRun):
    """A checkpoint on the devices of several processes. Picklable, because a child runs it."""

    dtype: str | None
    plan: Path | None
    coordinator: str | None
    process: str | None

    @classmethod
    def why_not(cls, name: str, backend: str) -> str:
        return "does not go with --coordinator and --process, which run a plan as it is; leave it out"

    @property
    def place(self) -> ProcessPlace:
        """Raises `UsageError`."""
        from runtime.execution.cluster.processes import ProcessPlace

        return ProcessPlace.parse(self.coordinator, self.process)

    def run(self) -> None:
        """Refuses what can be refused here, then has a child process do it."""
        from runtime.execution.cluster.processes import require_spread, supervise

        place = self.place
        require_spread(self.backend, self.plan)
        self.words()
        self._prepared(self.opened())
        supervise(place, self.join)

    def join(self, ticket: Ticket) -> None:
        """What the child does: joins the others, and serves with them."""
        from backends import registry
        from runtime.execution.cluster.processes import connect
        from runtime.execution.cluster.session import serve

        open_compile_cache(self.compile_cache)
        place, opened = self.place, self.opened()
        plan = self._prepared(opened)
        requests, answers = self.asked(opened, self.words())
        machines = connect(place, ticket, registry.get(self.backend), self.dtype, plan, requests)
        served = serve(opened, machines, plan, requests, answers.token)
        more = {
            "plan": plan.serving.name,
            "devices": len(plan.devices),
            "run_s": served.run_s,
            "processes": place.count,
        }
        logits = None if place.index else self.dump_logits
        answers.give(served.wall, served.load_s, served.compile_s, more, logits)

    def _prepared(self, opened: Checkpoint) -> Plan:
        from runtime.execution.cluster.options import SimOptions
        from runtime.execution.cluster.session import prepare

        plan = prepare(opened.config, SimOptions(plan=self.plan))
        self.place.check(plan)
        return plan
