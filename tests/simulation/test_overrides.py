"""Every figure of a measured chip that can be set: some answer moves the way physics has it, or it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from hw_profiles.fields import CURVES, FIELDS, LABELS
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.engines import names as engine_names
from runtime.planning.assign import pool_of
from runtime.planning.kv_tiers import pool_kv
from runtime.pricing import PriceError
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, Spec, chip_with, memory, pricer_of, spec_for

GLM5, AIR = load_config("glm-5-fp8"), load_config("glm-4.5-air")
DECODE = BatchShape(np.full(32, 4096), decode_rows=32, graphed=True)
PREFILL = BatchShape(prefill_chunks=[(4096, 0)])


def spec(
    overrides: Mapping[str, Any], layout: Layout = Layout(tp=8), formats: str = "fp8", cfg: Any = AIR, **more: Any
) -> Spec:
    return spec_for(cfg, hw_profiles.load(more.pop("chip", "h200-sxm"), overrides), layout, formats, "bf16", **more)


def step(shape: BatchShape, **deployment: Any) -> Any:
    return lambda overrides: pricer_of(spec(overrides, **deployment), PriceTables(coarse=True)).seconds(shape)


def pool(overrides: Mapping[str, Any]) -> float:
    return memory(spec(overrides)).pool_tokens


def pool_of_groups(overrides: Mapping[str, Any]) -> float:
    """Of a chip without a figure for all groups together."""
    return memory(spec(overrides, formats="w8a8", chip="ascend-910c-die")).pool_tokens


def servers(overrides: Mapping[str, Any]) -> float:
    return pool_of(spec(overrides), 4).devices[-1].node


def fetching(overrides: Mapping[str, Any]) -> float:
    made = spec(overrides, Layout(tp=8))
    priced = pricer_of(made, PriceTables(coarse=True))
    return pool_kv(AIR, pool_of(made), made.profile, Demand(isl=2048), priced).curve[0].fetch_seconds


def served(shape: BatchShape) -> Any:
    """A step of the runtime's own engine, which has what `glm5 calibrate` measured of it on a machine."""

    def seconds(overrides: Mapping[str, Any]) -> float:
        engine = spec(overrides, engine="glm5", layout=Layout()).engine
        return engine.step_seconds(0.01, shape.graphed, shape.pieces, shape.rows, ahead=shape.ahead)

    return seconds


def in_front(overrides: Mapping[str, Any]) -> float:
    return spec(overrides, engine="glm5").engine.request_host_seconds


def from_rest(overrides: Mapping[str, Any]) -> float:
    return spec(overrides, engine="glm5").engine.idle_host_seconds


def after_rest(overrides: Mapping[str, Any]) -> float:
    return spec(overrides, engine="glm5").engine.warming_host_seconds


def before_the_queue(overrides: Mapping[str, Any]) -> float:
    return spec(overrides, engine="glm5").engine.request_seconds


class Moves(NamedTuple):
    """`measure` at two values of a figure: more makes it less, or `more` makes it more. beside: other settings."""

    low: float
    high: float
    measure: Any
    more: bool = False
    beside: Mapping[str, float] = {}


HALF = "chip.peak.fp16_flops_per_s"
APART = {"layout": Layout(tp=8, pp=2)}
WIDE = {"layout": Layout(tp=2, dp=8, ep=16), "cfg": GLM5}
RATES = {"fp32": "f32", "bf16": "bf16", "fp8": "fp8", "int8": "w8a8", "fp4": "nvfp4"}
MOVES = {
    **{
        f"chip.peak.{rate}_flops_per_s": Moves(1e14, 2e14, step(PREFILL, formats=formats))
        for rate, formats in RATES.items()
    },
    "chip.memory.capacity_bytes": Moves(100e9, 200e9, pool, more=True),
    "chip.memory.usable_bytes": Moves(100e9, 120e9, pool, more=True),
    "chip.memory.bandwidth_bytes_per_s": Moves(2e12, 4e12, step(DECODE)),
    "chip.memory.cache_bytes": Moves(1.0, 100e6, step(DECODE), more=True),
    "chip.memory.cache_bandwidth_bytes_per_s": Moves(5e12, 5e13, step(DECODE), more=True),
    "node.devices": Moves(4, 8, servers),
    "link.scale_up.bandwidth_bytes_per_s": Moves(10e9, 450e9, step(PREFILL)),
    "link.scale_up.latency_s": Moves(1e-6, 20e-6, step(DECODE), more=True),
    "link.scale_up.cross_node_latency_s": Moves(1e-6, 20e-6, step(DECODE), more=True, beside={"node.devices": 4}),
    "link.scale_up.domain_devices": Moves(8, 16, step(PREFILL, layout=Layout(tp=16), cfg=GLM5)),
    "link.scale_out.bandwidth_bytes_per_s": Moves(1e9, 50e9, step(PREFILL, **APART)),
    "link.scale_out.latency_s": Moves(5e-6, 1e-3, step(DECODE, **APART), more=True),
    "link.scale_out.collective_latency_s": Moves(
        44e-6, 150e-6, step(DECODE, layout=Layout(tp=16), cfg=GLM5), more=True
    ),
    "link.host.bandwidth_bytes_per_s": Moves(10e9, 60e9, fetching),
    "link.host.latency_s": Moves(1e-6, 1e-3, fetching, more=True),
    "overhead.kernel_launch_s": Moves(1e-6, 10e-6, step(DECODE), more=True),
    "chip.sustained_clock_fraction": Moves(0.7, 1.0, step(PREFILL)),
    "overhead.vector_launch_s": Moves(1e-6, 10e-6, step(DECODE), more=True),
    "overhead.collective_launch_s": Moves(5e-6, 50e-6, step(DECODE), more=True),
    "overhead.p2p_latency_s": Moves(5e-6, 50e-6, step(DECODE, **APART), more=True),
    "overhead.collective_buffer_bytes": Moves(1e9, 4e9, pool),
    "overhead.communicator_buffer_bytes": Moves(1e9, 4e9, pool_of_groups),
    "overhead.runtime_reserved_bytes": Moves(1e9, 4e9, pool),
    "overhead.serving_front_s": Moves(1e-4, 9e-3, before_the_queue, more=True),
    "overhead.serving_request_s": Moves(1e-3, 9e-3, in_front, more=True),
    "overhead.serving_step_s": Moves(1e-4, 2e-3, served(DECODE), more=True),
    "overhead.serving_ahead_s": Moves(5e-3, 2e-2, served(dataclasses.replace(DECODE, ahead=True)), more=True),
    "overhead.serving_row_s": Moves(1e-4, 2e-3, served(DECODE), more=True),
    "overhead.serving_idle_s": Moves(1e-3, 9e-3, from_rest, more=True),
    "overhead.serving_warming_s": Moves(1e-4, 9e-4, after_rest, more=True),
    "efficiency.compute": Moves(0.4, 0.8, step(PREFILL)),
    "efficiency.memory": Moves(0.4, 0.8, step(DECODE)),
    "efficiency.network": Moves(0.3, 0.7, step(PREFILL)),
}


def test_every_field_is_here_or_refused() -> None:
    for field in (*FIELDS, *CURVES, *LABELS):
        if field in MOVES:
            assert hw_profiles.refused(field) is None
            assert chip_with("gb200-nvl72", {field: MOVES[field].low}).number(field) == MOVES[field].low
        elif field != HALF:  # below
            with pytest.raises(UsageError, match=rf"^--set {field}: no plan and no simulation depends on it") as error:
                chip_with("gb200-nvl72", {field: "switch" if field in LABELS else FIELDS[field].low})
            assert "\n" not in str(error.value)


def test_a_rate_of_half_precision_counts_where_there_is_no_other() -> None:
    with pytest.raises(UsageError, match=r"are at the rate of chip.peak.bf16_flops_per_s; set that$"):
        chip_with("h200-sxm", {HALF: 1e15})
    took = step(PREFILL, chip="metax-c550", formats="bf16")
    assert chip_with("metax-c550", {HALF: 1e14}) and took({HALF: 1e14}) > took({HALF: 2e14})


@pytest.mark.parametrize("field", MOVES)
def test_a_figure_moves_an_answer_the_right_way(field: str) -> None:
    low, high, measure, more, beside = MOVES[field]
    small, large = (measure({**beside, field: value}) for value in (low, high))
    assert small < large if more else small > large


@pytest.mark.parametrize(
    ("field", "worse"),
    [
        ("link.scale_up.bandwidth_bytes_per_s", 10e9),
        ("link.scale_up.bandwidth_bytes_per_s", 200e9),
        ("link.scale_out.bandwidth_bytes_per_s", 1e9),
        ("link.scale_out.latency_s", 1e-3),
        ("link.scale_out.collective_latency_s", 150e-6),
        ("overhead.collective_launch_s", 50e-6),
        ("efficiency.network", 0.2),
    ],
)
@pytest.mark.parametrize("chip", ["h200-sxm", "gb200-nvl72"])
def test_tables_of_dispatch_and_combine_scale_too(field: str, worse: float, chip: str) -> None:
    """DeepEP over 16 ranks: two servers of H200s, one domain of a GB200."""
    if chip == "gb200-nvl72" and "scale_out" in field:
        pytest.skip("its 16 ranks share a domain")
    took = step(DECODE, **WIDE, chip=chip)
    assert took({field: worse}) > took({})


def test_figures_set_to_what_they_are_change_nothing() -> None:
    profile, took = hw_profiles.load("h200-sxm"), step(DECODE, **APART)
    same = {field: profile.figures[field].value for field in MOVES if field in profile.figures}
    assert took(same) == pytest.approx(took({}), rel=1e-9)


@given(st.lists(st.floats(80e9, 2e12), min_size=2, max_size=2), st.sampled_from(engine_names()))
@settings(max_examples=15, deadline=None)
def test_more_memory_never_shrinks_a_pool(capacities: list[float], engine: str) -> None:
    small, large = (
        memory(spec({"chip.memory.capacity_bytes": value}, engine=engine)).pool_tokens for value in sorted(capacities)
    )
    assert small <= large


def test_a_capacity_decides_what_fits() -> None:
    """755 GB of weights: 94.3 GB on each of eight devices."""
    with pytest.raises(Exception, match="does not fit"):
        memory(spec({"chip.memory.capacity_bytes": 80e9}, cfg=GLM5))
    held = memory(spec({"chip.memory.capacity_bytes": 200e9}, cfg=GLM5))
    plain = memory(spec({}, cfg=GLM5))
    assert held.capacity_bytes == 200e9 and held.usable_bytes == pytest.approx(200e9 * 150109106995 / 151397597184)
    assert held.pool_tokens > 1.5 * plain.pool_tokens
    assert memory(spec({"chip.memory.usable_bytes": 120e9}, cfg=GLM5)).usable_bytes == 120e9


def test_a_chip_whose_files_figures_are_edited_is_priced_by_them(tmp_path: Any) -> None:
    """Not by `--set` alone: a copy of a profile with a slower link, priced by the same tables."""
    text = hw_profiles.dumps(hw_profiles.load("h200-sxm"))
    (tmp_path / "mine.toml").write_text(text.replace("value = 450000000000.0", "value = 45000000000.0"))
    made = spec({}, chip=str(tmp_path / "mine.toml"))
    assert made.profile.number("link.scale_up.bandwidth_bytes_per_s") == 45e9
    slow = pricer_of(made, PriceTables(coarse=True)).seconds(PREFILL)
    assert slow == pytest.approx(step(PREFILL)({"link.scale_up.bandwidth_bytes_per_s": 45e9}))


def test_an_unmeasured_chips_launch_may_be_below_that_of_gpus() -> None:
    took = step(DECODE, chip="ascend-910c-die", formats="bf16")
    assert took({"overhead.kernel_launch_s": 1e-6}) < took({"overhead.kernel_launch_s": 2e-6})


def test_a_price_that_no_figure_supports_is_refused_by_name() -> None:
    profile = hw_profiles.load("h200-sxm")
    figures = {path: f for path, f in profile.figures.items() if not path.startswith("link.scale_out")}
    bare = dataclasses.replace(profile, figures=figures)
    made = spec_for(AIR, bare, Layout(tp=8, pp=2), "fp8")
    with pytest.raises(PriceError, match="h200-sxm has no link.scale_out.bandwidth_bytes_per_s, which a hop"):
        pricer_of(made, PriceTables(coarse=True)).seconds(DECODE)
