"""What whole steps take of what their ops take one by one, on a machine that was measured both ways.

Kernels of a price file are timed each alone, one waiting for the one before. In a step a backend runs some of them
beside others, makes several in one pass, and finds in caches what the last one left; how much that saves goes by how
long the ops take. So `glm5 calibrate` times whole steps, too, and a price file may have

    "steps": {"model": "..", "decode": [[layer_s, share], ..], "prefill": [..]}

model: whose they are and in which formats, as of `model_key`; another's ops take other shares, and so do those of a
part of each layer, all of which are priced from ops alone. share: seconds of a step's layers over their ops'
prices, by what those come to a layer; head and drafts are in neither. A step with prompts goes by `prefill`. Between
two knots shares go by the logarithm of seconds, beyond them they stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.formats import Formats
from model.split import Layout
from runtime.deployment.manifest import Phase
from runtime.pricing.price import PriceError

PHASES: tuple[Phase, ...] = ("decode", "prefill")
LEAST, MOST = 0.1, 10.0
"""Shares beyond which something else was measured."""


@dataclass(frozen=True)
class _Line:
    """Shares over the logarithm of seconds, rising."""

    logs: tuple[float, ...]
    shares: tuple[float, ...]

    def __call__(self, seconds: float) -> float:
        return float(np.interp(math.log(max(seconds, 1e-12)), self.logs, self.shares))


@dataclass(frozen=True)
class WholeSteps:
    """Of one model on one machine, with any number of its layers."""

    model: str
    lines: Mapping[Phase, _Line]

    def of(self, cfg: ModelConfig, layout: Layout, formats: Formats) -> bool:
        """Whether a device of a deployment runs such steps: it holds whole layers."""
        return layout.stage_devices == 1 and self.model == model_key(cfg, formats)

    def share(self, ops_s: float, layers: float, prompts: bool) -> float:
        """Of a step whose ops take `ops_s` together; prompts: it has tokens of some."""
        return self.lines["prefill" if prompts else "decode"](ops_s / layers)


def whole_steps(body: Any) -> WholeSteps | None:
    """`steps` of a price file; None where it has none. Raises `PriceError`."""
    if body is None:
        return None
    if not isinstance(body, dict) or set(body) != {"model", *PHASES} or not isinstance(body["model"], str):
        raise PriceError(f"steps: must have model, {' and '.join(PHASES)}")
    return WholeSteps(body["model"], {phase: _line(phase, body[phase]) for phase in PHASES})


def model_key(cfg: ModelConfig, formats: Formats) -> str:
    """The same for models that differ in their names, in how they are stored, and in how many layers of each type they
    have alone. formats: what is computed in."""
    alike = dataclasses.replace(
        cfg, name="", layers=(), mtp_layers=0, eos_token_ids=(), dtype="", weight_format="plain"
    )
    computed = formats.weights, formats.experts
    return hashlib.sha256(repr((alike, computed)).encode()).hexdigest()[:16]


def _line(phase: Phase, body: Any) -> _Line:
    if not isinstance(body, list) or not body or not all(_knot(each) for each in body):
        raise PriceError(f"steps.{phase}: must be [seconds, share] pairs, shares {LEAST:g} to {MOST:g}")
    seconds = [knot[0] for knot in body]
    if any(after <= before for before, after in zip(seconds, seconds[1:], strict=False)):
        raise PriceError(f"steps.{phase}: seconds must rise")
    return _Line(tuple(math.log(each) for each in seconds), tuple(float(share) for _, share in body))


def _knot(knot: Any) -> bool:
    numbers = isinstance(knot, list) and len(knot) == 2 and all(type(each) in (int, float) for each in knot)
    return numbers and 0 < knot[0] < math.inf and LEAST <= knot[1] <= MOST


def knots(found: Sequence[tuple[float, float]], apart: float = 1.6) -> list[list[float]]:
    """Knots through (seconds, share) points: of those less than a factor `apart` from the first of them, their means
    by the logarithm."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(found):
        if groups and point[0] < apart * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    made = []
    for group in groups:
        logs = [sum(math.log(point[place]) for point in group) / len(group) for place in (0, 1)]
        seconds, share = map(math.exp, logs)
        made.append([float(f"{seconds:.4g}"), float(f"{share:.4g}")])
    return made
