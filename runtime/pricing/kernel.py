"""One priced kernel: the roofline formula with its fitted constants, times a small grid of ratios.

    seconds = max6(floor, launch + max3(compute, memory, chain)) * exp(grid)
    compute = flops / (peak * compute_efficiency)      memory = bytes / (bandwidth * memory_efficiency)
    chain   = steps * seconds_per_step                 maxP(...) = (sum of P-th powers) ** (1/P)

`floor` is the host-bound time of kernels launched one by one from Python (prefill blocks); it is 0 for
kernels measured inside a captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.pricing.chip import Knots, kept_share
from runtime.pricing.eras import OLDER_ERROR
from runtime.pricing.grid import Array, RatioGrid
from runtime.pricing.price import Bound, PriceEvidence
from runtime.pricing.work import FAMILIES, Features, weight_bytes

_CALIBRATED_ERROR, _CARRIED_ERROR = 0.2, 0.5
"""Errors of what calibration measured (the spread of its own points about the curves), and of kernels that
borrow its rates."""
_KIN_ERROR = 0.2
"""Of a chip's prices by the tables of another of its architecture. Operators of a step by H100's tables are within 5 %
of H200's own in the median and 12 % at the 90th percentile, and the other way round; B200's and B300's within 3 and 8 %
(38 % under vLLM). Chips that nobody measured are less alike: H20 has a seventh of the FLOP/s."""
ROTATED = {"gemm": 6}
"""Weights that the tables' benchmarks took in turn, so as not to find them in a cache: six at most (aiconfigurator
collect_gemm.py:298); one, where nothing is said."""
KERNEL_BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead")


@dataclass(frozen=True, slots=True)
class Constants:
    """Fitted constants of the formula. Efficiencies are shares of the chip's datasheet rates."""

    launch_s: float = 3e-6
    compute_efficiency: float = 0.7
    memory_efficiency: float = 0.8
    step_s: float = 0.0
    floor_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Efficiencies by size, measured on the machine itself: (ln size, share) columns by FLOP and by bytes."""

    compute: tuple[Array, Array]
    memory: tuple[Array, Array]

    @classmethod
    def of(cls, compute: Knots, memory: Knots) -> Rates:
        """From (size, share) knots; read linearly in ln(size), constant outside."""
        columns = [np.array(knots, float).T for knots in (compute, memory)]
        return cls(*((np.log(sizes), shares) for sizes, shares in columns))


@dataclass(frozen=True, slots=True)
class Timing:
    """Vectorised answer of a kernel."""

    seconds: Array
    bound: NDArray[np.intp]
    """Index into BOUNDS."""
    extrapolated: NDArray[np.bool_]


def _share(column: tuple[Array, Array], size: Any) -> Array:
    return np.interp(np.log(np.maximum(size, 1e-12)), *column)


def formula(
    features: Features,
    family: str,
    constants: Constants,
    peak_flops_per_s: float,
    bandwidth_bytes_per_s: float,
    rates: Rates | None = None,
    clock: float = 1.0,
) -> tuple[Array, NDArray[np.intp]]:
    """Seconds by the formula in the module's docstring, without the grid, and the index of the bound.

    With `rates`, efficiencies are read from them at the size of one piece of the work, and every launch of
    the work counts. clock: what products run at, as a share of the clock that the efficiencies were taken at.
    """
    work = FAMILIES[family](features)
    compute_share: Any = constants.compute_efficiency
    memory_share: Any = constants.memory_efficiency
    launch: Any = constants.launch_s
    if rates:
        compute_share = _share(rates.compute, work.flops / work.pieces)
        memory_share = _share(rates.memory, work.bytes / work.pieces)
        launch = constants.launch_s * work.launches
    compute = np.asarray(work.flops / (peak_flops_per_s * compute_share * clock), float)
    memory = np.asarray(work.bytes / (bandwidth_bytes_per_s * memory_share), float)
    chain = np.asarray(work.steps * constants.step_s, float)
    compute, memory, chain = np.broadcast_arrays(compute, memory, chain)
    busy = launch + np.cbrt(compute**3 + memory**3 + chain**3)
    seconds = (constants.floor_s**6 + busy**6) ** (1 / 6)
    idle = np.maximum(seconds - np.maximum(compute, memory), np.maximum(chain, 0.0))
    return seconds, np.argmax(np.stack(np.broadcast_arrays(compute, memory, idle)), axis=0)


@dataclass(frozen=True)
class Kernel:
    """A kernel of one engine on one chip, as read from `hw_profiles/prices/<profile>.json`."""

    key: str
    family: str
    constants: Constants
    grid: RatioGrid | None = None
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    """Measured range of each feature."""
    relative_error: float = 0.5
    """90th percentile of the held-out relative error."""
    evidence: PriceEvidence = "assumed"
    source: str = ""
    rates: Rates | None = None
    assumed: frozenset[str] = frozenset()
    """Figures of the chip that nobody gave, and what was taken for them."""
    rotated: int = 0
    """Weights that its measurements took in turn; 0: as `ROTATED` says."""

    @property
    def cited(self) -> frozenset[str]:
        """Where its prices come from, in words."""
        return frozenset({f"{self.key}: {self.source}"})

    def time(
        self, features: Features, peak_flops_per_s: float, bandwidth_bytes_per_s: float, clock: float = 1.0
    ) -> Timing:
        """Seconds at each point of the broadcast features. clock: see `formula`."""
        seconds, bound = formula(
            features, self.family, self.constants, peak_flops_per_s, bandwidth_bytes_per_s, self.rates, clock
        )
        if self.grid is not None:
            seconds = seconds * np.exp(self.grid(features))
        outside = np.zeros(seconds.shape, bool)
        for name, low in self.low.items():
            value = np.asarray(features[name], float)
            outside = outside | (value < low * 0.999) | (value > self.high[name] * 1.001)
        return Timing(seconds, bound, outside)

    def cold_bytes(self, features: Features, cache_bytes: float) -> Array:
        """Bytes of weights that a layer of a model reads from memory, and measuring read from the chip's cache.

        A step goes through all weights before it comes back to a layer's, which no cache holds; whoever measures runs
        one kernel over and over, whose weights stay in the cache while they fit (`kept_share`).
        """
        work = FAMILIES[self.family](features)
        touched = np.asarray(work.bytes, float) * (self.rotated or ROTATED.get(self.family, 1))
        return np.asarray(weight_bytes(self.family, features), float) * kept_share(cache_bytes, touched)

    def adjusted(self, launch_s: float, compute_scale: float, memory_scale: float) -> Kernel:
        """The same kernel with a launch time of a chip's own, and efficiencies scaled by what its profile says.

        The grid keeps the dependence on shape. Efficiencies stay at or below 1.
        """
        kept = self.constants
        constants = replace(
            kept,
            launch_s=launch_s,
            compute_efficiency=min(kept.compute_efficiency * compute_scale, 1.0),
            memory_efficiency=min(kept.memory_efficiency * memory_scale, 1.0),
        )
        return replace(self, constants=constants)

    def resting_on(self, assumed: frozenset[str]) -> Kernel:
        """The same kernel, graded for figures that nobody gave."""
        return replace(self, assumed=assumed, evidence="assumed") if assumed else self

    def of_kin(self, measured: str) -> Kernel:
        """The same kernel, on a chip of the architecture of the one that was measured."""
        source = f"{self.source}, measured on {measured}, of the same architecture"
        error = math.hypot(self.relative_error, _KIN_ERROR)
        return replace(self, relative_error=error, evidence="transferred", source=source)

    def of_later_release(self, taken: str) -> Kernel:
        """The same kernel, for a release of its engine that is older than any that was measured."""
        wider = replace(self, relative_error=math.hypot(self.relative_error, OLDER_ERROR))
        return wider.resting_on(self.assumed | {taken})

    def measured_by(self, rates: Rates, launch_s: float) -> Kernel:
        """The same work at the rates that a machine's own calibration found.

        Nothing of other chips is left but the count of FLOPs and bytes: no ratios by shape, no serial chain.
        Matrix products and streams are then measured; other kernels are taken to reach the same rates.
        """
        own = self.family in ("gemm", "memory")
        return replace(
            self,
            constants=Constants(launch_s, 1.0, 1.0),
            grid=None,
            low={},
            high={},
            relative_error=_CALIBRATED_ERROR if own else _CARRIED_ERROR,
            evidence="measured" if own else "transferred",
            rates=rates,
            source="glm5 calibrate",
        )


def kernel_from_json(key: str, body: Mapping[str, Any], evidence: PriceEvidence = "fitted") -> Kernel:
    """Reads one entry of the `kernels` table; see `bench/fit_prices.py` for the writer."""
    grid = None
    if body.get("ratio"):
        names = tuple(body["axes"])
        knots = tuple(np.log(np.asarray(body["axes"][n], float)) for n in names)
        values = np.asarray(body["ratio"], float).reshape([len(k) for k in knots]) * body["ratio_unit"]
        grid = RatioGrid(names, knots, values)
    return Kernel(
        key,
        body["family"],
        Constants(**body["constants"]),
        grid,
        {n: r[0] for n, r in body["range"].items()},
        {n: r[1] for n, r in body["range"].items()},
        max(body["error"][name][1] for name in ("held_out_shapes", "power_law_rows") if name in body["error"]),
        body.get("evidence", evidence),
        body["source"],
        rotated=body.get("rotated", 0),
    )
