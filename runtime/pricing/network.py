"""Collectives: measured curves where a group size was measured, a latency-bandwidth formula elsewhere.

`total_bytes` is the full vector: what an all-reduce reduces, what an all-gather has produced, what a
reduce-scatter starts from, what one rank sends in an all-to-all (its own share included).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from runtime.pricing.chip import Chip, Link
from runtime.pricing.grid import Polyline
from runtime.pricing.price import Price, PriceError, PriceEvidence

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
VOLUME: Mapping[str, float] = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Times (group - 1) / group * total_bytes: what each device sends."""
FORMULA_ERROR = 0.5
"""90th percentile of the formula against NCCL on five measured NVLink chips, 2 to 8 devices (median 0.21)."""
FREE = Price(0.0, "network", "measured", 0.0)


@dataclass(frozen=True)
class MeasuredCurve:
    curve: Polyline
    low: float
    high: float
    relative_error: float

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> MeasuredCurve:
        sizes = np.asarray(body["bytes"], float)
        curve = Polyline(sizes, np.asarray(body["seconds"], float))
        return cls(curve, float(sizes[0]), float(sizes[-1]), float(body["error"]["left_out"][1]))

    def price(self, size: float) -> Price:
        beyond = not self.low <= size <= self.high
        return Price(self.curve(size), "network", "fitted", self.relative_error, beyond)


class Network:
    """Collectives of one chip under one engine."""

    def __init__(self, chip: Chip, tables: Mapping[str, Any], engine: str) -> None:
        self._chip = chip
        self._engine = engine
        self._curves = {key: MeasuredCurve.from_json(body) for key, body in tables.items()}

    def collective(self, op: Collective, total_bytes: float, group: int, *, captured: bool = True) -> Price:
        """One collective over `group` devices.

        `captured` picks the engine's all-reduce kernel as replayed from a graph; otherwise as launched
        from the host. Raises PriceError when the chip has no link figure and nothing was measured.
        """
        if group <= 1 or total_bytes <= 0:
            return FREE
        engine = self._engine if f"all_reduce/{group}/{self._engine}-graph" in self._curves else "sglang"
        if op == "all_reduce":
            mode = "graph" if captured or f"{op}/{group}/{engine}-eager" not in self._curves else "eager"
            if measured := self._curves.get(f"{op}/{group}/{engine}-{mode}"):
                return measured.price(total_bytes)
        if measured := self._curves.get(f"{op}/{group}/nccl"):
            return measured.price(total_bytes)
        return self._formula(op, total_bytes, group)

    def deepep(self, phase: Literal["dispatch", "combine"], mode: Literal["ll", "normal"],
               tokens: float, hidden: int, top_k: int, ranks: int) -> Price:  # fmt: skip
        """DeepEP all-to-all of `tokens` tokens per rank: dispatch in 8 bits, combine in 16.

        Measured at 8, 16, 32 and 64 ranks; in between the next larger one is taken, beyond the largest it
        is marked extrapolated. Chips without such tables fall back to an all-to-all by formula.
        """
        if ranks <= 1 or tokens <= 0:
            return FREE
        size = tokens * top_k * hidden * (1.0 if phase == "dispatch" else 2.0)
        prefix = f"deepep_{mode}_{phase}/"
        measured = sorted(int(k.split("/")[1]) for k in self._curves if k.startswith(prefix))
        if not measured:
            return self._formula("all_to_all", size, ranks)
        fitting = next((r for r in measured if r >= ranks), measured[-1])
        price = self._curves[f"{prefix}{fitting}/any"].price(size)
        far = price.extrapolated or ranks > measured[-1]
        return Price(price.seconds, "network", price.evidence, price.relative_error, far)

    def point_to_point(self, size_bytes: float, *, across_nodes: bool = False) -> Price:
        """One message between two devices, e.g. activations between pipeline stages."""
        if size_bytes <= 0:
            return FREE
        link = self._link(across_nodes)
        start = self._chip.p2p_latency_s if self._chip.p2p_latency_s is not None else 10e-6
        seconds = start + size_bytes / (link.bandwidth_bytes_per_s * link.efficiency)
        return Price(seconds, "network", "assumed", FORMULA_ERROR)

    def _link(self, across_nodes: bool) -> Link:
        link = self._chip.scale_out if across_nodes else self._chip.scale_up
        if link is None:
            level = "scale_out" if across_nodes else "scale_up"
            raise PriceError(f"{self._chip.name}: --set link.{level}.bandwidth_bytes_per_s=… to price collectives")
        return link

    def _formula(self, op: Collective, total_bytes: float, group: int) -> Price:
        near = self._link(False)
        inside = min(group, near.domain_devices)
        launch = self._chip.collective_launch_s if self._chip.collective_launch_s is not None else 10e-6
        rate = near.bandwidth_bytes_per_s * near.efficiency
        hops = np.ceil(np.log2(inside)) * (2.0 if op == "all_reduce" else 1.0)
        evidence: PriceEvidence = "transferred"
        if group <= inside:
            seconds = launch + hops * near.latency_s + VOLUME[op] * (group - 1) / group * total_bytes / rate
            return Price(float(seconds), "network", evidence, FORMULA_ERROR)
        far = self._link(True)
        nodes = -(-group // inside)
        outside_rate = far.bandwidth_bytes_per_s * far.efficiency
        steps = np.ceil(np.log2(nodes)) * (2.0 if op == "all_reduce" else 1.0)
        latency = launch + hops * near.latency_s + steps * far.latency_s
        if op == "all_to_all":
            local = total_bytes * (inside - 1) / group / rate
            remote = total_bytes * (group - inside) / group / outside_rate
            seconds = latency + max(local, remote)
        else:
            local = VOLUME[op] * (inside - 1) / inside * total_bytes / rate
            remote = VOLUME[op] * (nodes - 1) / nodes * total_bytes / inside / outside_rate
            seconds = latency + local + remote
        return Price(float(seconds), "network", evidence, FORMULA_ERROR, True)
