"""PriceBook: what each operator costs on one chip under one engine.

Prices of one shape are tabulated once over tokens (or batch and context) and then looked up, so that a
scalar price takes a few microseconds and more tokens are never cheaper. Where the chip has measured
tables they are used ('fitted'); otherwise the joint fit over NVIDIA generations ('transferred').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from foundation.reading import Unreadable, read_json
from model.formats import matrix_format
from runtime.pricing.adjust import Changes, OtherChip, own_rates, reference_chip
from runtime.pricing.chip import Chip, rate_of
from runtime.pricing.choices import (
    RING_REDUCE,
    BesideRouted,
    FusedReduce,
    FusedShared,
    absorbed_prefill,
    beside_routed,
    dense_prefill,
    fused_reduce,
    fused_shared,
    latent_decode,
    table_choices,
    unpacked_decode,
    untuned_experts,
)  # fmt: skip
from runtime.pricing.eras import ENGINES, choose, entry_of
from runtime.pricing.grid import Array, Polyline, Surface, log_knots
from runtime.pricing.kernel import KERNEL_BOUNDS, Kernel, Timing, kernel_from_json
from runtime.pricing.load import ExpertLoad
from runtime.pricing.network import Network
from runtime.pricing.price import Price, PriceError, PriceEvidence, total
from runtime.pricing.whole_steps import whole_steps
from runtime.pricing.work import least

PRICES_FOLDER = Path(__file__).resolve().parents[2] / "hw_profiles" / "prices"
TOKEN_KNOTS = log_knots(1.0, 2.0**20, 3)
BATCH_KNOTS = log_knots(1.0, 2.0**13, 2)
BYTE_KNOTS = log_knots(1.0, 2.0**40, 1)
CONTEXT_KNOTS = log_knots(1.0, 2.0**21, 2)
FALLBACK_FORMAT: Mapping[str, tuple[str, ...]] = {
    "fp8-block": ("fp8-tensor", "bf16"),
    "fp8-tensor": ("fp8-block", "bf16"),
    "fp8-channel": ("fp8-tensor", "fp8-block", "bf16"),
    "w8a8-int8": ("fp8-tensor", "bf16"),
    "mxfp8": ("fp8-block", "fp8-tensor", "bf16"),
    "w4a8": ("fp8-tensor", "fp8-block", "bf16"),
    "nvfp4": ("fp8-tensor", "fp8-block", "bf16"),
    "mxfp4": ("nvfp4", "fp8-tensor", "fp8-block", "bf16"),
    "w4a16": ("bf16",),
    "nvfp4a16": ("w4a16", "bf16"),
    "w4afp8": ("fp8-block", "fp8-tensor", "bf16"),
    "fp16": ("bf16",),
    "f32": ("bf16",),
    "fp8": ("bf16",),
    "int8": ("fp8", "bf16"),
}
"""Whose kernel stands in for a format without a table, at the format's own bytes and peak rate. Not an error
where the kernel holds a machine's own rates, which were measured in the format computed in."""
KIN: Mapping[str, Mapping[str, float]] = {
    "ampere": {"a100-sxm-80gb": 19.5e12},
    "hopper": {"h100-sxm": 67e12, "h200-sxm": 67e12},
    "blackwell": {"b200-sxm": 75e12, "b300-sxm": 75e12},
}
"""Measured chips by architecture, for others of the same, and their FLOP/s beside matrix products (data sheets)."""
REFERENCE = "gemm/bf16/sglang"
"""The kernel of the joint fit that a profile's own efficiencies are compared with."""
STAND_IN_ERROR = 0.35
"""Least error of a price taken from another format's kernel."""


@cache
def read_prices(path: Path) -> Mapping[str, Any]:
    """The body of one coefficients file. Raises PriceError when it is not one."""
    try:
        body = read_json(path)
    except Unreadable as error:
        raise PriceError(f"prices file {path}: {error}") from None
    if not isinstance(body, dict) or body.get("schema") != 1 or "kernels" not in body:
        raise PriceError(f"prices file {path}: not a schema-1 price table")
    try:
        whole_steps(body.get("steps"))
    except PriceError as error:
        raise PriceError(f"prices file {path}: {error}") from None
    return body


@dataclass(frozen=True)
class Tabulated:
    """Seconds over one or two sizes, with the grade, and what bounds it where."""

    table: Polyline | Surface
    bound_at: Callable[..., int]
    extrapolated_at: Callable[..., bool]
    evidence: PriceEvidence
    relative_error: float
    assumed: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()

    def seconds(self, *sizes: float) -> float:
        """Seconds at one point, in about 2 microseconds."""
        return self.table(*sizes)

    def many(self, *sizes: ArrayLike) -> Array:
        """Seconds at many points; arguments are broadcast together."""
        return self.table.many(*sizes)

    def price(self, *sizes: float) -> Price:
        """The full price at one point, in about 10 microseconds."""
        bound = KERNEL_BOUNDS[self.bound_at(*sizes)]
        far = self.extrapolated_at(*sizes)
        return Price(self.table(*sizes), bound, self.evidence, self.relative_error, far, self.assumed, self.sources)


class PriceBook:
    """Prices of one chip under one engine. Build with `open_book`.

    kin: the chip of the same architecture that was measured instead of it; "" where it was itself. release: of the
    engine; "" for the newest that was measured. family: of the chip. wide: the format of what no scheme quantises
    ("bf16", or "f32" where everything is computed in float32). of_own_graph: a model's products were measured on the
    machine itself, one by one as this project's graph has them. steps: what whole ones take of that, where they were
    measured there, too.
    """

    def __init__(
        self,
        chip: Chip,
        engine: str,
        measured: Mapping[str, Any] | None,
        transfer: Mapping[str, Any],
        wide: str = "bf16",
        release: str = "",
        family: str = "",
        kin: str = "",
    ) -> None:
        self._chooses = engine, release, family
        self.family = family
        self.chip = chip
        self.wide = wide
        self.engine = engine
        self.measured = measured is not None and not kin
        self._kernels: dict[str, Kernel] = {}
        self._found: dict[tuple[str, str, str, str | None], tuple[Kernel, bool]] = {}
        reference = (reference_chip(measured) or chip) if measured else None
        own = Changes(chip, reference, KIN[family][kin] if kin else 0.0) if reference else None
        joint = transfer["kernels"][REFERENCE]["constants"]
        # a table without products says nothing of how kernels that it lacks run on its chip
        products = measured is not None and any(key.startswith("gemm/") for key in measured["kernels"])
        carried = own if own and products and own_rates(chip) is None and not kin else OtherChip(chip, joint)
        for key, body in transfer["kernels"].items():
            self._kernels[f"transfer:{key}"] = carried(kernel_from_json(key, body, "transferred"))
        if measured and own:
            entries = measured["kernels"]
            eras = choose(entries, engine, release)
            for each in table_choices(engine, release, family):
                if each.taken in entries:
                    eras[each.key] = entry_of(entries, each.taken, engine, release)
            for key, era in eras.items():
                kernel = own(kernel_from_json(key, era.body))
                kernel = kernel.of_kin(kin) if kin else kernel
                self._kernels[key] = kernel.of_later_release(era.later) if era.later else kernel
        self.of_own_graph = any(key.startswith("gemm/") and key.endswith("/any") for key in self._kernels)
        self.steps = whole_steps((measured or {}).get("steps")) if not kin else None
        curves = choose((measured or {}).get("collectives", {}), engine, release)
        self.network = Network(chip, curves, engine, reference)
        self._tables: dict[tuple[Any, ...], Tabulated] = {}
        self._loads: dict[int, ExpertLoad] = {}

    # ---- finding a kernel -------------------------------------------------------------------------

    def kernel(
        self, family: str, weight_format: str, suffix: str = "", engine: str | None = None
    ) -> tuple[Kernel, bool]:
        """The kernel for a family and format, and whether another format stands in for it.

        engine: whose table to take, by default the book's. Order: this engine's table, another engine's, the joint
        fit; then the same for the fallback formats.
        Raises PriceError when nothing is known for the family.
        """
        asked = (family, weight_format, suffix, engine)
        if asked not in self._found:
            self._found[asked] = self._find(*asked)
        return self._found[asked]

    def _find(self, family: str, weight_format: str, suffix: str, engine: str | None) -> tuple[Kernel, bool]:
        base = weight_format.partition("-g")[0]  # one table for every group size
        for number, name in enumerate((base, *FALLBACK_FORMAT.get(base, ()))):
            for source in (engine or self.engine, *ENGINES, "any"):
                for key in (f"{family}/{name}/{source}{suffix}", f"{family}/{name}/{source}"):
                    if key in self._kernels:
                        return self._kernels[key], number > 0
            for source in (*ENGINES, "any"):
                if (key := f"transfer:{family}/{name}/{source}") in self._kernels:
                    return self._kernels[key], number > 0 and self._kernels[key].rates is None
        raise PriceError(f"no price for {family} in {weight_format}: neither measured nor transferred")

    def fused_reduce(self, model: str) -> FusedReduce | None:
        """The all-reduce that the engine fuses with the next norm, for a model type; None where it does not."""
        return fused_reduce(*self._chooses, model)

    def fused_shared(self, model: str) -> FusedShared | None:
        """How the engine runs a shared expert with the routed ones, for a model type; None where it does not."""
        return fused_shared(*self._chooses, model)

    def beside_routed(self, model: str) -> BesideRouted | None:
        """Which steps run a shared expert beside the routed ones, for a model type; None where none do."""
        return beside_routed(*self._chooses, model)

    def expert_tables(self, model: str, weight_format: str, experts: int, width: int) -> str | None:
        """The engine whose experts' table holds for a model's; None for this one's own."""
        choice = untuned_experts(*self._chooses, model, weight_format, experts, width)
        return choice.tables if choice else None

    def absorbs_prefill(self, cached_tokens: float) -> bool:
        """Whether dense MLA prefill stays in the latent, for sequences with so many cached tokens together."""
        choice = absorbed_prefill(*self._chooses)
        return choice is not None and 0 < cached_tokens < choice.below

    def reduced_by_rings(self, total_bytes: float, devices: int, nodes: int) -> float:
        """What an all-reduce takes, over what its table says, where the engine keeps the switches from reducing."""
        rings, family = RING_REDUCE, self.family
        return (
            rings.slower(total_bytes) if family in rings.families and devices >= rings.devices and nodes == 1 else 1.0
        )

    @property
    def latent_decode_more_s(self) -> float:
        """What dense attention of answers in a 16-bit latent takes more a call than its table says, in seconds."""
        choice = latent_decode(*self._chooses)
        return choice.more_s if choice else 0.0

    @property
    def prefills_densely(self) -> bool:
        """Whether sparse attention reads prompts that it would select whole as dense layers do."""
        return dense_prefill(*self._chooses) is not None

    @property
    def unpacked_tile(self) -> int:
        """Queries that grouped-query attention computes for each head of a sequence that decodes beside prompts; 0
        where it computes there what it computes alone."""
        choice = unpacked_decode(*self._chooses)
        return choice.tile if choice else 0

    def named(self, key: str) -> Kernel | None:
        """A kernel by its exact key, or None."""
        return self._kernels.get(key)

    def own(self, family: str) -> Kernel | None:
        """A kernel that is no engine's, as `glm5 calibrate` measures those of this project's graph, or None."""
        return self.named(f"{family}/{self.wide}/any")

    @property
    def wide_bytes(self) -> float:
        """Bytes of one element of what no scheme quantises."""
        return matrix_format(self.wide).bytes_per_element

    def time(self, kernel: Kernel, features: Mapping[str, Any], weight_format: str = "bf16") -> Timing:
        if self.wide != "bf16":  # then everything is computed in it
            weight_format = self.wide
        # measured in short bursts, at a clock that long products do not keep; memory and launches keep theirs
        clock = self.chip.sustained_clock_fraction
        timing = kernel.time(features, self.chip.peak(weight_format), self.chip.memory_bandwidth_bytes_per_s, clock)
        if kernel.rates is None:  # a machine's own rates were measured through its caches
            seconds = timing.seconds
            if self.chip.cache_bytes:
                seconds = seconds + self._cold_seconds(kernel, features)
            timing = replace(timing, seconds=np.maximum(seconds, self._least_seconds(kernel, features, weight_format)))
        return timing

    def _cold_seconds(self, kernel: Kernel, features: Mapping[str, Any]) -> Array:
        """What reading weights takes longer in a model's step than where the kernel was measured."""
        chip = self.chip
        longer = 1.0 / chip.memory_bandwidth_bytes_per_s
        if chip.cache_bandwidth_bytes_per_s:
            longer = max(0.0, longer - 1.0 / chip.cache_bandwidth_bytes_per_s)
        return kernel.cold_bytes(features, chip.cache_bytes) * longer * (1.0 - chip.kept)

    def _least_seconds(self, kernel: Kernel, features: Mapping[str, Any], weight_format: str) -> Array:
        """What the chip's peak rates allow. Ratios that were fitted to small sizes can ask for more beyond them:
        tables end where a device's memory does, so no measurement has the longest contexts of the largest batches."""
        work = least(kernel.family, features)
        formats = {weight_format, *({"fp8-tensor"} if "fp8" in kernel.key.split("/") else ())}
        peak = max(self.chip.peak(each) for each in formats)
        return np.maximum(work.flops / peak, work.bytes / self.chip.memory_bandwidth_bytes_per_s)

    # ---- tabulating -------------------------------------------------------------------------------

    def curve(self, key: tuple[Any, ...], kernel: Kernel, stand_in: bool, weight_format: str,
              features: Callable[[Array], Mapping[str, Any]], knots: Array = TOKEN_KNOTS) -> Tabulated:  # fmt: skip
        """One-dimensional table over `knots`, cached under `key`."""
        if key not in self._tables:
            timing = self.time(kernel, features(knots), weight_format)
            self._tables[key] = Tabulated(
                Polyline(knots, timing.seconds),
                lambda x: int(timing.bound[_nearest(knots, x)]),
                lambda x: bool(timing.extrapolated[_nearest(knots, x)]),
                "transferred" if stand_in and kernel.evidence == "fitted" else kernel.evidence,
                max(kernel.relative_error, STAND_IN_ERROR) if stand_in else kernel.relative_error,
                kernel.assumed,
                kernel.cited,
            )
        return self._tables[key]

    def surface(self, key: tuple[Any, ...], kernel: Kernel, weight_format: str, rows: Array,
                features: Callable[[Array, Array], Mapping[str, Any]]) -> Tabulated:  # fmt: skip
        """Two-dimensional table over `rows` x CONTEXT_KNOTS, cached under `key`."""
        if key not in self._tables:
            timing = self.time(kernel, features(rows[:, None], CONTEXT_KNOTS[None, :]), weight_format)

            def at(table: Any, row: float, column: float) -> Any:
                return table[_nearest(rows, row), _nearest(CONTEXT_KNOTS, column)]

            self._tables[key] = Tabulated(
                Surface(rows, CONTEXT_KNOTS, timing.seconds),
                lambda r, c: int(at(timing.bound, r, c)),
                lambda r, c: bool(at(timing.extrapolated, r, c)),
                kernel.evidence,
                kernel.relative_error,
                kernel.assumed,
                kernel.cited,
            )
        return self._tables[key]

    # ---- dense and expert GEMMs, elementwise ------------------------------------------------------

    def gemm_curve(self, n: int, k: int, weight_format: str) -> Tabulated:
        """Tokens -> seconds of [m, k] x [k, n], the quantising of its activations included (as the tables have it)."""
        kernel, stand_in = self.kernel("gemm", weight_format)
        sizes = {"n": float(n), "k": float(k), "out_bytes": self.wide_bytes, **element_bytes(weight_format)}
        return self.curve(("gemm", n, k, weight_format), kernel, stand_in, weight_format, lambda m: {"m": m, **sizes})

    def gemm(self, m: float, n: int, k: int, weight_format: str) -> Price:
        """One dense GEMM. `m` tokens, output width `n`, reduction `k`, all local to the device."""
        product = self.gemm_curve(n, k, weight_format).price(m)
        return total([product, self.rounding(m, k)]) if self.rounds(weight_format) else product

    def rounds(self, weight_format: str) -> bool:
        """Whether what rounds a product's rows has a price of its own; without one the tables of products have it."""
        narrow = matrix_format(weight_format).activations.bytes_per_element < 2
        return narrow and self.named("memory/dynamic_quant/any") is not None

    def rounding(self, rows: float, width: int) -> Price:
        """Rows [rows, width] rounded to 8 bits, each with a scale."""
        return self.memory(rows * (width * (self.wide_bytes + 1.0) + 4.0), "dynamic_quant")

    def bmm_curve(self, heads: int, n: int, k: int) -> Tabulated:
        """Tokens -> seconds of `heads` independent [m, k] x [k, n] products (absorbed W_UK, W_UV), which no scheme
        quantises."""
        kernel, stand_in = self.kernel("bmm", self.wide)
        sizes = {"heads": float(heads), "n": float(n), "k": float(k), "out_bytes": self.wide_bytes}
        return self.curve(("bmm", heads, n, k), kernel, stand_in, "bf16", lambda m: {"m": m, **sizes})

    def bmm(self, m: float, heads: int, n: int, k: int) -> Price:
        return self.bmm_curve(heads, n, k).price(m)

    def moe_curve(self, hidden: int, inter: int, top_k: int, load: ExpertLoad, moe_tp: int = 1, moe_ep: int = 1,
                  weight_format: str = "fp8-block", dispatched: bool = False,
                  tables: str | None = None) -> Tabulated:  # fmt: skip
        """Tokens of the whole expert group -> seconds of the routed experts on its busiest rank.

        Includes permutation, both grouped GEMMs, the activation and the weighted sum; not the router, the
        shared expert or any collective. `tokens` counts every token that enters the group: with attention
        data parallelism, the sum over its ranks. `dispatched`: an all-to-all has brought this rank its own
        rows alone; otherwise every rank holds, and its kernels move, the rows of all. `tables`: another engine's.
        Raises PriceError when `inter` does not divide by `moe_tp` or the experts by `moe_ep`.
        """
        if inter % moe_tp:
            raise PriceError(f"expert width {inter} / moe_tp {moe_tp} = {inter / moe_tp:g}: not a whole number")
        kernel, stand_in = self.kernel("moe", weight_format, "/tp" if moe_tp > 1 else "", tables)
        sizes = {"hidden": float(hidden), "inter": inter / moe_tp, **element_bytes(weight_format)}

        def features(tokens: Array) -> Mapping[str, Any]:
            rows, active = load.busiest_rank(tokens, top_k, moe_ep)
            touched = rows if dispatched else np.maximum(tokens * top_k, rows)
            per_expert, spread = np.maximum(rows / active, 1.0), touched / rows
            return {"rows": rows, "active": active, "touched": touched, "rows_per_expert": per_expert,
                    "spread": spread, **sizes}  # fmt: skip

        key = ("moe", hidden, inter, top_k, id(load), moe_tp, moe_ep, weight_format, dispatched, tables)
        self._loads[id(load)] = load  # keeps the id from being reused while the table is cached
        return self.curve(key, kernel, stand_in, weight_format, features)

    def moe(self, tokens: float, hidden: int, inter: int, top_k: int, load: ExpertLoad, moe_tp: int = 1,
            moe_ep: int = 1, weight_format: str = "fp8-block", dispatched: bool = False,
            tables: str | None = None) -> Price:  # fmt: skip
        """Routed experts of one layer on the busiest rank; see `moe_curve`."""
        curve = self.moe_curve(hidden, inter, top_k, load, moe_tp, moe_ep, weight_format, dispatched, tables)
        return curve.price(tokens)

    def memory_curve(self, op: str = "any") -> Tabulated:
        """Bytes moved -> seconds of an elementwise kernel: of an op ("rms_norm"), where that was measured, or any."""
        own = self.named(f"memory/{op}/any")
        kernel, stand_in = (own, False) if own else self.kernel("memory", "any")
        return self.curve(
            ("memory", op if own else "any"), kernel, stand_in, "bf16", lambda x: {"bytes": x}, BYTE_KNOTS
        )

    def memory(self, moved_bytes: float, op: str = "any") -> Price:
        """An elementwise kernel: bytes read plus bytes written. op: as of `memory_curve`."""
        return self.memory_curve(op).price(moved_bytes)


@cache
def element_bytes(weight_format: str) -> dict[str, float]:
    """Bytes of one element of a matrix and of its activations. Raises `PriceError` for an unknown format."""
    rate_of(weight_format)
    fmt = matrix_format(weight_format)
    return {"weight_bytes": fmt.bytes_per_element, "act_bytes": fmt.activations.bytes_per_element}


def _nearest(knots: Array, size: float) -> int:
    return min(int(knots.searchsorted(size * 0.84)), len(knots) - 1)


def open_book(
    chip: Chip,
    engine: str = "sglang",
    prices: Path | None = None,
    wide: str = "bf16",
    release: str = "",
    family: str = "",
) -> PriceBook:
    """A price book for a chip. `prices` defaults to `hw_profiles/prices/<chip.name>.json` if there is one."""
    path, kin = prices or PRICES_FOLDER / f"{chip.name}.json", ""
    if not prices and not path.is_file() and own_rates(chip) is None and (kin := measured_kin(chip, family)):
        path = PRICES_FOLDER / f"{kin}.json"
    measured = read_prices(path) if prices or path.is_file() else None
    return PriceBook(chip, engine, measured, read_prices(PRICES_FOLDER / "transfer.json"), wide, release, family, kin)


def measured_kin(chip: Chip, family: str) -> str:
    """The measured chip of the same architecture whose memory is about as fast; "" where there is none.

    It runs the same kernels: launches, chains and how far shapes fill the machine are theirs, rates are the chip's own.
    """
    near = {
        name: abs(np.log(chip.memory_bandwidth_bytes_per_s / known.memory_bandwidth_bytes_per_s))
        for name in KIN.get(family, ())
        if (known := reference_chip(read_prices(PRICES_FOLDER / f"{name}.json")))
    }
    return min(near, key=near.__getitem__, default="")
