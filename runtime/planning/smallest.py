"""The smallest number of a chip that holds a model and meets its targets.

Devices come in nodes: a part of one (a divisor of its devices), or whole ones. More devices never serve less, so
the counts of nodes are about doubled until one does, and halved in between; the serving simulator confirms each.
"""

from __future__ import annotations

import dataclasses

from hw_profiles import Profile
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Plan, Rejected
from runtime.planning.assign import node_devices
from runtime.planning.experts.packing import Floats
from runtime.planning.options import Question
from runtime.planning.search import Chips, Progress, search


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
    """The plan on the fewest devices, up to `most`, that meets the targets in simulation.

    Raises `NoPlanError` where the model does not fit `most` devices, or no count meets the targets, with the best
    that was reached.
    """
    sizes = counts(profile, most)
    reasons: dict[int, str] = {}
    plans: dict[int, Plan] = {}

    def works(at: int) -> bool:
        """Whether the count at that place of `sizes` has a plan that meets the targets."""
        progress(f"{sizes[at]} devices")
        try:
            plan = search(question, [Chips(profile, sizes[at])], load, load_name, progress)
        except NoPlanError as error:
            reasons[at] = str(error)
            return False
        plans[at] = plan
        assert plan.predicted
        if not plan.predicted.meets_targets:
            got = plan.predicted
            reasons[at] = (
                f"{sizes[at]} x {profile.name}: TTFT {got.ttft_ms['mean'] or 0:,.0f} ms, "
                f"TPOT {got.tpot_ms['mean'] or 0:,.1f} ms"
            )
            return False
        return True

    failed, at = -1, 0
    while not works(at):
        failed = at
        if at == len(sizes) - 1:
            raise NoPlanError(_missed(question, profile, most, reasons[at], at in plans))
        at = min(at + 1 if sizes[at] < node_devices(profile) else 2 * at, len(sizes) - 1)
    while at - failed > 1:
        middle = (failed + at) // 2
        if works(middle):
            at = middle
        else:
            failed = middle
    fewer = [Rejected(f"{sizes[i]} x {profile.name}", reasons[i].splitlines()[0]) for i in sorted(reasons) if i < at]
    return dataclasses.replace(plans[at], rejected=(*fewer, *plans[at].rejected))


def _missed(question: Question, profile: Profile, most: int, reason: str, fits: bool) -> str:
    if not fits:
        return reason
    demand = question.demand
    asked = [f"{name} {value:g}{unit}" for name, value, unit in (
        ("TTFT", demand.ttft_ms, " ms"), ("TPOT", demand.tpot_ms, " ms"), ("rate", demand.rate, "/s")
    ) if value is not None]  # fmt: skip
    return f"no plan of up to {most} x {profile.name} meets {' and '.join(asked)}: relax it; the best was {reason}"
