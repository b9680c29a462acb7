"""The smallest number of a chip that is found to hold a model and meet its targets.

Devices come in nodes: a part of one (a divisor of its devices), or whole ones. More devices never serve less, so
the counts of nodes are about doubled until one does, and halved in between; the serving simulator confirms each.
But the simulator plays a few plans of each number only, so that a number may fail that has a plan. So what is found is
tried again below: without devices that it leaves idle, and with more plans of the next smaller number, until one fails.
"""

from __future__ import annotations

import dataclasses

from foundation.errors import first_line
from hw_profiles import Profile
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Plan, Rejected
from runtime.planning.experts.packing import Floats
from runtime.planning.options import Question
from runtime.planning.search import SIMULATED, Chips, Progress, merit, search
from runtime.simulation.build import node_devices

_THOROUGH = 3 * SIMULATED
"""Contenders played where a number of devices is tried again."""


def counts(profile: Profile, most: int) -> list[int]:
    """Device counts that can be had, ascending."""
    node = node_devices(profile)
    parts = [n for n in range(1, node) if node % n == 0]
    return [n for n in (*parts, *range(node, most + 1, node)) if n <= most] or [most]


def smallest(
    question: Question,
    profile: Profile,
    most: int,
    load: Floats | None = None,
    load_name: str = "measured",
    progress: Progress = lambda _: None,
) -> Plan:
    """The plan on the fewest devices found, up to `most`, that meets the targets in simulation; where none does, the
    plan that comes closest. What other numbers of devices came to is among its `rejected`.

    Raises `NoPlanError` where the model does not fit `most` devices.
    """
    sizes = counts(profile, most)
    tried: dict[int, Plan | NoPlanError] = {}

    def works(at: int, played: int = SIMULATED) -> bool:
        """Whether the count at that place of `sizes` has a plan that meets the targets."""
        progress(f"{sizes[at]} devices")
        try:
            found = search(question, [Chips(profile, sizes[at])], load, load_name, progress, played)
        except NoPlanError as error:
            tried[at] = error
            return False
        tried[at] = found
        return met(found)

    failed, at = -1, 0
    while not works(at):
        failed = at
        if at == len(sizes) - 1:
            return _closest(question, profile, sizes, tried)
        at = min(at + 1 if sizes[at] < node_devices(profile) else 2 * at, len(sizes) - 1)
    while at - failed > 1:
        middle = (failed + at) // 2
        if works(middle):
            at = middle
        else:
            failed = middle
    at = _without_idle(sizes, at, tried)
    while at and sizes[at - 1] >= _least_that_fit(sizes, tried) and works(at - 1, _THOROUGH):
        at = _without_idle(sizes, at - 1, tried)
    chosen = tried[at]
    assert isinstance(chosen, Plan)
    return _with_others(question, profile, sizes, tried, at, chosen)


def met(plan: Plan) -> bool:
    """Whether the plan's figures meet its targets."""
    return plan.predicted is not None and plan.predicted.meets_targets


def _without_idle(sizes: list[int], at: int, tried: dict[int, Plan | NoPlanError]) -> int:
    """The place of the count that the plan at `at` uses, where it is as good: devices that do nothing are none of an
    answer, but for those that share a node with others."""
    plan = tried[at]
    assert isinstance(plan, Plan)
    used = len(plan.devices)
    least = next(place for place, size in enumerate(sizes) if size >= used)
    if least < at:
        tried[least] = dataclasses.replace(plan, idle_devices=sizes[least] - used)
    return least


def _least_that_fit(sizes: list[int], tried: dict[int, Plan | NoPlanError]) -> int:
    """Devices below which the model was found not to fit."""
    return 1 + max((sizes[at] for at, found in tried.items() if isinstance(found, NoPlanError)), default=0)


def _closest(question: Question, profile: Profile, sizes: list[int], tried: dict[int, Plan | NoPlanError]) -> Plan:
    plans = {at: plan for at, plan in tried.items() if isinstance(plan, Plan) and plan.predicted}
    if not plans:
        raise NoPlanError(str(tried[max(tried)]))

    def miss(at: int) -> tuple[float, int]:
        figures = plans[at].predicted
        assert figures
        return merit(figures, question.demand)[0], at

    at = min(plans, key=miss)
    return _with_others(question, profile, sizes, tried, at, plans[at])


def _with_others(
    question: Question, profile: Profile, sizes: list[int], tried: dict[int, Plan | NoPlanError], at: int, plan: Plan
) -> Plan:
    """The plan, with what the other numbers of devices that were tried came to."""
    others = []
    for place in sorted(tried):
        found = tried[place]
        if isinstance(found, NoPlanError):
            reason = first_line(found)
        elif place != at and found.predicted and (missed := found.predicted.missed(question.demand)):
            reason = "; ".join(missed)
        else:
            continue
        others.append(Rejected(f"{sizes[place]} x {profile.name}", reason))
    return dataclasses.replace(plan, rejected=(*others, *plan.rejected))
