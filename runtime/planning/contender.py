"""A contender: which options serve, in how many replicas, and how well it is expected to go. From it comes a `Plan`."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from hw_profiles import Profile
from runtime.deployment.plan import Alternative, ModelRef, Plan, Transfer, config_hash
from runtime.deployment.pool import Experts, Pool, PoolRole
from runtime.planning.assign import first_nodes, pool_of
from runtime.planning.estimate import Estimate, score
from runtime.planning.options import Option, Question


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One pool of a contender."""

    role: PoolRole
    option: Option
    replicas: int
    experts: Experts | None = None

    @property
    def devices(self) -> int:
        return self.replicas * self.option.devices


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """Pools that serve the load together, at one operating point. points: others of its sweep over loads."""

    parts: tuple[Part, ...]
    estimate: Estimate
    points: tuple[Estimate, ...] = ()
    transfer: Transfer | None = None

    @property
    def devices(self) -> int:
        return sum(part.devices for part in self.parts)

    @cached_property
    def name(self) -> str:
        names = [f"{part.replicas} x {part.option.name}" for part in self.parts]
        return names[0] if len(names) == 1 else f"prefill {names[0]} | decode {names[1]}"

    @property
    def profiles(self) -> list[Profile]:
        return [part.option.spec.profile for part in self.parts]


def rank_key(contender: Contender, question: Question) -> tuple[float, float, int, str]:
    """Sorts contenders best first; equals by fewer devices, then by name, so that the order is always the same."""
    missed, objective = score(contender.estimate, question.demand)
    return round(missed, 9), objective, contender.devices, contender.name


def plan_of(contender: Contender, question: Question, devices: int) -> Plan:
    """The plan of a contender at its operating point, without predictions. devices: there are in all."""
    demand = question.demand
    if demand.rate is None and demand.concurrency is None:
        demand = dataclasses.replace(demand, concurrency=max(1, contender.estimate.concurrency))
    pools: list[Pool] = []
    device = 0
    nodes = first_nodes([(part.option.spec.profile, part.devices) for part in contender.parts])
    for part, node in zip(contender.parts, nodes, strict=True):
        spec = part.option.spec
        pools.append(
            pool_of(spec, part.replicas, role=part.role, experts=part.experts, first_device=device, first_node=node)
        )
        device += part.devices
    model = ModelRef(question.cfg.name, config_hash(question.cfg))
    return Plan(model, demand, tuple(pools), contender.transfer, idle_devices=devices - contender.devices)


def alternative(contender: Contender, estimate: Estimate, question: Question) -> Alternative:
    """A contender at one load, as a row of the plan."""
    tpot = estimate.tpot_seconds
    return Alternative(
        name=contender.name,
        devices=contender.devices,
        concurrency=estimate.concurrency,
        simulated=False,
        chosen=False,
        front=False,
        output_tokens_per_s_per_device=estimate.output_tokens_per_s / contender.devices,
        output_tokens_per_s_per_user=1 / tpot if tpot else None,
        ttft_ms=estimate.ttft_seconds * 1e3,
        tpot_ms=tpot * 1e3 if tpot else None,
        meets_targets=estimate.misses(question.demand) == 0,
        evidence="assumed",
    )


def mark_front(rows: list[Alternative]) -> list[Alternative]:
    """The rows with `front` set where no other simulated, or no other estimated, row is better in both rates."""
    front: set[int] = set()
    for kind in (True, False):
        best = -1.0
        numbers = [number for number, row in enumerate(rows) if row.simulated == kind]
        for number in sorted(numbers, key=lambda n: (-rows[n].output_tokens_per_s_per_device, -_per_user(rows[n]), n)):
            if _per_user(rows[number]) > best:
                front.add(number)
                best = _per_user(rows[number])
    return [dataclasses.replace(row, front=number in front) for number, row in enumerate(rows)]


def _per_user(row: Alternative) -> float:
    return row.output_tokens_per_s_per_user or 0.0
