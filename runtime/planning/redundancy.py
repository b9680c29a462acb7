"""How many expert slots to spend, against the KV pages they cost, where the experts' load was measured.

Each device may hold copies of experts beside its own share. More copies make the busiest device's load more
even, and leave less memory for the cache. Both are priced; the better total wins.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from foundation.errors import CapacityError, first_line
from model.split import moe_layers
from runtime.deployment.errors import LoadError
from runtime.deployment.plan import Rejected
from runtime.deployment.pool import Experts
from runtime.planning.contender import Contender, Part
from runtime.planning.estimate import OptionPrices, score
from runtime.planning.experts import ExpertPlacement, place_experts
from runtime.planning.experts.packing import Floats
from runtime.planning.options import Option, Question, make_option
from runtime.pricing.load import ExpertLoad
from runtime.simulation.apart import role_refused
from runtime.simulation.build import PriceTables

SLOTS = (0, 1, 2, 4)
"""Redundant slots a device that are tried."""
_SAMPLED_LAYERS = 16
"""Layers that the number of slots is decided on; the placement itself is made for all."""


def checked(question: Question, matrix: Floats) -> Floats:
    """The load if it has the model's shape. Raises `LoadError`."""
    cfg = question.cfg
    if cfg.moe is None:
        raise LoadError(f"{cfg.name} has no routed experts: leave out --expert-load")
    expected = (len(moe_layers(cfg)), cfg.moe.experts)
    if matrix.shape != expected:
        raise LoadError(
            f"the expert load is {list(matrix.shape)}, {cfg.name} has [MoE layers, experts] = {list(expected)}"
        )
    return matrix


def nodes_of(option: Option) -> int:
    """Groups of devices with fast links among themselves that one stage's experts are spread over."""
    ep = option.layout.ep
    domain = int(option.spec.profile.number("link.scale_up.domain_devices") or ep)
    return ep // domain if domain < ep and ep % domain == 0 else 1


def slot_shares(placement: ExpertPlacement, matrix: Floats) -> Floats:
    """[slots] share of each slot, devices and their slots in order of load, mean over layers.

    Ordering each layer by itself keeps how uneven a layer is, which a mean over fixed devices would hide.
    """
    layers, slots = placement.slot_expert.shape
    load = np.take_along_axis(matrix / placement.replicas, placement.slot_expert, axis=1)
    by_device = np.sort(load.reshape(layers, len(placement.device_slots), -1), axis=2)[:, :, ::-1]
    order = np.argsort(-by_device.sum(axis=2), axis=1, kind="stable")
    ordered = np.take_along_axis(by_device, order[:, :, None], axis=1).reshape(layers, slots)
    total = ordered.sum(axis=1, keepdims=True)
    return np.divide(ordered, total, out=np.full_like(ordered, 1 / slots), where=total > 0).mean(axis=0)


def experts_of(placement: ExpertPlacement) -> Experts:
    return Experts(
        int(placement.device_slots[0]),
        tuple(tuple(row) for row in placement.slot_expert.tolist()),
        float(placement.max_over_mean.mean()),
        float(placement.max_over_mean.max()),
        float(placement.bound.mean()),
    )


def loaded(option: Option, matrix: Floats, name: str) -> Option:
    """The option under a measured load, experts in their own order and none twice."""
    layers, experts = matrix.shape
    rows = matrix.reshape(layers, option.layout.ep, -1)
    rows = np.sort(rows, axis=2)[:, :, ::-1]
    order = np.argsort(-rows.sum(axis=2), axis=1, kind="stable")
    rows = np.take_along_axis(rows, order[:, :, None], axis=1).reshape(layers, experts)
    total = rows.sum(axis=1, keepdims=True)
    shares = np.divide(rows, total, out=np.full_like(rows, 1 / experts), where=total > 0).mean(axis=0)
    return dataclasses.replace(option, spec=dataclasses.replace(option.spec, expert_load=ExpertLoad(name, shares)))


def spend(
    question: Question, contender: Contender, matrix: Floats, name: str, tables: PriceTables
) -> tuple[Contender, list[Rejected]]:
    """The contender with its experts placed and its slots decided, and the numbers of slots that lost."""
    parts, lost = [], []
    for part in contender.parts:
        found, reasons = _spend(question, part, matrix, name, tables)
        parts.append(found)
        lost += reasons
    if len(parts) > 1:
        return dataclasses.replace(contender, parts=tuple(parts)), lost
    model, replicas = OptionPrices(parts[0].option, question.demand, tables), parts[0].replicas
    best = min(model.operating_points(replicas), key=lambda point: score(point, question.demand))
    part = dataclasses.replace(parts[0], option=parts[0].option.limited(best.running_limit))
    return Contender((part,), best, (best, *model.sweep(replicas))), lost


def _spend(
    question: Question, part: Part, matrix: Floats, name: str, tables: PriceTables
) -> tuple[Part, list[Rejected]]:
    option, layout = part.option, part.option.layout
    experts = matrix.shape[1]
    if not layout.by_expert or layout.grouped:  # experts are placed on devices, not on groups of them
        return dataclasses.replace(part, option=loaded(option, matrix, name)), []
    if why := role_refused(option.spec, part.role, placement=True):
        lost = [Rejected(f"{option.name}, experts placed", why)]
        return dataclasses.replace(part, option=loaded(option, matrix, name)), lost
    sample = matrix[:: max(1, len(matrix) // _SAMPLED_LAYERS)]
    tried, lost = [], []
    for extra in SLOTS:
        if experts // layout.ep + extra > experts:
            continue
        slots = experts + extra * layout.ep
        label = f"{option.name}, {extra} redundant expert slots a device"
        try:
            sized = make_option(
                question,
                option.spec.profile,
                layout,
                option.spec.formats.scheme,
                option.spec.formats.kv,
                {k: v for k, v in option.settings.items() if k != "max_running_requests" or k in question.settings},
                redundant_slots=extra,
                replicas=option.spec.replicas,
            )
        except CapacityError as error:
            lost.append(Rejected(label, first_line(error)))
            continue
        if sized.pool_tokens < sum(question.demand.longest):
            lost.append(Rejected(label, f"leaves {sized.pool_tokens:,} tokens of cache, less than one request"))
            continue
        placement = place_experts(sample, layout.ep, nodes_of(option), slots)
        spec = dataclasses.replace(sized.spec, expert_load=ExpertLoad(name, slot_shares(placement, sample)))
        sized = dataclasses.replace(sized, spec=spec)
        best = min(
            (
                score(e, question.demand)
                for e in OptionPrices(sized, question.demand, tables).operating_points(part.replicas)
            ),
        )
        tried.append((best, extra, sized, float(placement.max_over_mean.mean())))
    best, extra, sized, _ = min(tried, key=lambda each: (each[0], each[1]))
    for other, slots, option_, balance in tried:
        if slots != extra:
            lost.append(
                Rejected(
                    f"{option.name}, {slots} redundant expert slots a device",
                    f"max over mean load {balance:.3f}, {option_.pages:,} KV pages a rank: "
                    f"{_objective(other)} against {_objective(best)} with {extra} slots",
                )
            )
    placement = place_experts(matrix, layout.ep, nodes_of(option), experts + extra * layout.ep)
    load = ExpertLoad(name, slot_shares(placement, matrix))
    sized = dataclasses.replace(sized, spec=dataclasses.replace(sized.spec, expert_load=load))
    return dataclasses.replace(part, option=sized, experts=experts_of(placement)), lost


def _objective(found: tuple[float, float]) -> str:
    missed, objective = found
    value = f"{-objective:,.0f} tok/s" if objective < 0 else f"{objective:.2f} s a request"
    return f"{value}, targets missed by {missed:.0%}" if missed else value
