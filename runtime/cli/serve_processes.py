"""`glm5 serve --coordinator`: a plan over several processes, of which this is one. Process 0 listens, schedules and
answers; the others carry out its steps."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.api.backing import Backing, Opened, opened, warmed
from runtime.api.server import bound
from runtime.api.synthetic import Inventor
from runtime.cli.compile_cache import open_compile_cache
from runtime.cli.front import Front, TellProgress
from runtime.execution.cluster.processes import ProcessPlace, Ticket, connect, require_spread, supervise

if TYPE_CHECKING:
    from backends.spmd.processes import Processes
    from model.checkpoint import Checkpoint
    from runtime.deployment.plan import Plan
    from runtime.execution.cluster.led import Leader
    from runtime.serving.service import Service


@dataclasses.dataclass(frozen=True)
class ProcessesServe:
    """Picklable, because a child runs it."""

    front: Front
    backing: Backing
    plan: Path | None
    coordinator: str | None
    process: str | None

    def run(self) -> None:
        """Refuses what can be refused here, then has a child process do it."""
        place = self._place
        require_spread(self.backing.backend, self.plan)
        self._prepared(opened(self.backing))
        supervise(place, self.join, drains=True)

    def join(self, ticket: Ticket) -> None:
        """What the child does: joins the others, and serves or follows."""
        if self._place.index:
            self._follow(ticket)
            return
        with bound(self.front.host, self.front.port) as listening:
            self._lead(ticket, listening)

    @property
    def _place(self) -> ProcessPlace:
        return ProcessPlace.parse(self.coordinator, self.process)

    def _prepared(self, found: Opened) -> tuple[Checkpoint, Plan]:
        from runtime.execution.cluster.options import SimOptions
        from runtime.execution.cluster.session import prepare

        assert found.checkpoint is not None and found.config is not None
        plan = prepare(found.config, SimOptions(plan=self.plan))
        self._place.check(plan)
        return found.checkpoint, plan

    def _connected(self, plan: Plan, ticket: Ticket) -> Processes:
        from backends import registry

        open_compile_cache(self.front.compile_cache)
        return connect(self._place, ticket, registry.get(self.backing.backend), self.backing.dtype, plan, "serve")

    def _lead(self, ticket: Ticket, listening: socket.socket) -> None:
        from runtime.execution.services import led_service

        found = opened(self.backing)
        checkpoint, plan = self._prepared(found)
        machines = self._connected(plan, ticket)
        leaders: list[Leader] = []

        def make(inventor: Inventor | None, progress: TellProgress) -> Service:
            progress("loading")
            service, leader = led_service(checkpoint, machines, plan, self.backing.max_queue)
            leaders.append(leader)
            warmed(service, found, self.backing, progress)
            return service

        try:
            self.front.serve(listening, found, make)
        finally:
            for leader in leaders:
                leader.end()

    def _follow(self, ticket: Ticket) -> None:
        from itertools import chain

        from backends.spmd.processes import send
        from runtime.execution.cluster.led import follow
        from runtime.execution.services import executors_of

        checkpoint, plan = self._prepared(opened(self.backing))
        machines = self._connected(plan, ticket)
        follow([*chain(*executors_of(checkpoint, machines, plan))], send)
