"""What operators take by series of chips: graphs are made for the profile's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

pytest.importorskip("torch")
import hw_profiles
from backends.ascend import constraints
from backends.ascend.operators import npu_release
from backends.ascend.target import NpuOptions
from backends.ascend.writer import NpuGraph, write
from backends.toolchains import narrow
from model.formats import scheme
from model.split import Layout
from runtime.deployment.manifest import Gear
from runtime.porting.export.ascend import AscendWriter
from tests.npu import graphs as g
from tests.npu.packages import request

A2, A3, A5 = "Atlas A2", "Atlas A3", "Ascend 950"


def _written(layer: g.Layer, inputs: Mapping[str, np.ndarray], series: str) -> NpuGraph:
    return write(g.graph(layer, inputs, ["out"]), dataclasses.replace(g.F32, series=series))


def test_profiles_name_the_series_that_the_record_knows() -> None:
    named = {profile.labels.get("chip.series") for profile in map(hw_profiles.load, hw_profiles.names())
             if profile.family == "ascend"}  # fmt: skip
    assert named == set(npu_release().series)
    for operator in npu_release().operators.values():
        told = {*operator.series, *operator.heads, *operator.lacks, *operator.nd_only}
        assert told <= set(npu_release().series), operator.name
        assert not operator.heads or set(operator.heads) == set(npu_release().series)


@pytest.mark.parametrize("series", [A2, A3, A5])
def test_rotation_is_decomposed_where_its_operator_is_not_documented(series: str) -> None:
    inputs = g.rope_inputs()
    made = _written(g.rope(), inputs, series)
    assert g.operators(made) == (set() if series == A5 else {"npu_interleave_rope"})
    reasons = [why for _, why in made.declined]
    assert reasons == (["npu_interleave_rope is not documented for Ascend 950 as graphs call it"] * (series == A5))
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(g.rope()(**inputs)[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("series", "indexer", "attention"),
    [(A2, {12: True, 64: True, 65: False}, {48: False, 64: True}),
     (A3, {12: True, 64: True, 65: False}, {48: False, 64: True}),
     (A5, {12: False, 24: True, 64: True}, {48: True, 128: True, 129: False})],
)  # fmt: skip
def test_heads_are_those_of_the_series(series: str, indexer: dict[int, bool], attention: dict[int, bool]) -> None:
    for heads, taken in indexer.items():
        for int8 in (False, True):
            why = constraints.lightning_indexer((2, 1, heads, 128), 128, 2048, int8, series)
            assert (why is None) == taken and (taken or series in str(why))
    for heads, taken in attention.items():
        assert (constraints.sparse_flash_attention(heads, 512, 64, 128, series=series) is None) == taken


@pytest.mark.parametrize(("name", "series", "fused"), [
    ("w4a8", A2, True), ("w4a8", A5, False), ("w4a16", A3, True), ("w4a16", A5, False),
])  # fmt: skip
def test_4_bit_experts_are_one_operator_where_the_series_has_it(name: str, series: str, fused: bool) -> None:
    inputs, call = g.narrow_experts(name), narrow.lowerings(scheme(name), "ascend")["glm.expert_ffn"]

    def layer(**x: np.ndarray) -> tuple[object, ...]:
        return (call(x["x"], x["experts"], x["weights"], x["gate_up.values"], x["gate_up.scale"], x["down.values"],
                     x["down.scale"]),)  # fmt: skip

    made = _written(layer, inputs, series)
    grouped = inputs["gate_up.scale"].shape[1] > 1
    assert ("npu_grouped_matmul" in g.operators(made)) == (fused or (name == "w4a16" and not grouped))
    want = np.asarray(layer(**inputs)[0])
    assert np.abs(g.run(made, inputs)["out"] - want).max() <= 0.01 * np.abs(want).max()


def test_grouped_weights_stay_in_plain_layout_where_the_kernel_takes_no_other() -> None:
    inputs = g.expert_inputs(0)
    for name in ("gate_up", "down"):
        inputs[name] = np.random.default_rng(1).integers(-127, 128, inputs[name].shape).astype(np.int8)
    inputs["gate_up_scale"] = np.abs(g.normal(6, 1, 2, 16)) / 127
    inputs["down_scale"] = np.abs(g.normal(6, 1, 32)) / 127
    call = narrow.lowerings(scheme("w8a8"), "torch")["glm.expert_ffn"]

    def layer(**x: np.ndarray) -> tuple[object, ...]:
        return (call(x["x"], x["experts"], x["weights"], x["gate_up"], x["gate_up_scale"], x["down"], x["down_scale"]),)

    assert _written(layer, inputs, A3).nz == ("gate_up", "down") and _written(layer, inputs, A5).nz == ()


@pytest.mark.parametrize(
    ("chip", "how"),
    [
        ("ascend-910c-die", "operators"),
        ("ascend-910b2", "collectives"),
        ("ascend-950dt", "operators"),
        (None, "operators"),
    ],
)
def test_experts_are_reached_by_operators_on_the_series_that_they_are_documented_for(
    chip: str | None, how: str
) -> None:
    job = request("glm-5", "w8a8", {"decode": [Gear(2, 1, 64)]}, Layout(tp=4, dp=4, ep=16), page_size=128)
    if chip:
        job = dataclasses.replace(job, options={"profile": hw_profiles.load(chip)})
    assert job.cut.exchange == how
    why = "npu_moe_distribute_dispatch_v2 is not documented for Atlas A2 as graphs call it"
    assert list(AscendWriter(job).not_sent) == ([] if how == "operators" else [why])


def test_a_chip_of_a_series_that_no_document_tells_of_takes_the_default_and_says_so() -> None:
    other = dataclasses.replace(hw_profiles.load("ascend-910c-die"), labels={"chip.series": "Atlas A9"})
    job = request("glm-5", "w8a8", {"decode": [Gear(2, 1, 64)]}, Layout(tp=4, dp=4, ep=16), page_size=128)
    writer = AscendWriter(dataclasses.replace(job, options={"profile": other}))
    assert writer.options.series == constraints.DEFAULT_SERIES and writer.other_chip == other.description
    assert NpuOptions().series == constraints.DEFAULT_SERIES
