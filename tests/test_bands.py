"""Bands: what they promise over groups that share their errors, and that an answer says on what its band rests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from runtime.pricing import bands
from runtime.pricing.bands import FEW, GroupResiduals, PredictionKind, band, coverage, known_groups

STEADY = PredictionKind("sglang", "measured", "steady")


def made(
    seed: int, groups: int, rows: int, between: float, within: float, bias: float = 0.0, kind: PredictionKind = STEADY
) -> list[GroupResiduals]:
    rng = np.random.default_rng(seed)
    middles = bias + between * rng.standard_normal(groups)
    return [
        GroupResiduals(f"{kind.engine} {place}", kind, {"tpot": tuple(middle + within * rng.standard_normal(rows))})
        for place, middle in enumerate(middles)
    ]


def test_students_t() -> None:
    for degrees, value in enumerate(bands._T95, start=1):
        assert value == pytest.approx(stats.t.ppf(0.95, degrees), abs=0.01)


@pytest.mark.parametrize("bias", [0.0, 0.25])
@pytest.mark.parametrize(("groups", "rows"), [(5, 8), (12, 4), (30, 2)])
def test_a_new_row_of_a_new_group_is_inside_nine_times_in_ten(groups: int, rows: int, bias: float) -> None:
    """Whatever the bias and however many rows a group has: of a thousand worlds."""
    inside = []
    for seed in range(1000):
        *known, new = made(seed, groups + 1, rows, 0.2, 0.08, bias)
        found = band("tpot", STEADY, 0.0, groups=known)
        inside.append(found.low <= new.figures["tpot"][0] <= found.high)
    assert 0.86 <= np.mean(inside) <= 0.96


def test_more_rows_of_the_same_groups_teach_little() -> None:
    """Ten rows a server are not ten servers: the band of 5 groups stays as wide as it is."""
    few, many = (band("tpot", STEADY, 0.0, groups=made(1, 5, rows, 0.2, 0.02)) for rows in (2, 200))
    assert (many.high - many.low) > 0.7 * (few.high - few.low)


def test_the_band_leans_where_measurements_lay() -> None:
    slower = band("tpot", STEADY, 0.0, groups=made(3, 20, 4, 0.05, 0.02, bias=0.3))
    assert slower.low > 0 and slower.around(100.0)[0] > 100
    assert slower.around(100.0) == [100 * math.exp(slower.low), 100 * math.exp(slower.high)]


def test_the_narrowest_kind_with_enough_groups_is_asked() -> None:
    near = made(1, FEW, 3, 0.02, 0.01)
    far = made(2, 12, 3, 0.4, 0.1, kind=PredictionKind("vllm", "measured", "steady"))
    own = band("tpot", STEADY, 0.0, groups=near + far)
    assert own.high - own.low < 0.3 and own.basis.startswith(f"{FEW} deployment groups measured: sglang on chips")
    fewer = band("tpot", STEADY, 0.0, groups=near[1:] + far)
    assert fewer.high - fewer.low > 0.8 and f"{FEW - 1} groups of this kind" in fewer.basis and "quarter" in fewer.basis
    none = band("tpot", PredictionKind("trtllm", "carried", "saturated"), 0.0, groups=near + far)
    assert none.basis.startswith("no measurement of this kind") and "16 deployment groups measured: all" in none.basis


def test_less_certain_prices_and_extrapolation_widen_it() -> None:
    groups = made(1, 8, 3, 0.1, 0.05)

    def width(*args: float) -> float:
        found = band("tpot", STEADY, *args, groups=groups)
        return found.high - found.low

    assert width(0.02) == width(bands.USUAL_PRICE_ERROR) < width(0.3) < width(0.6)
    assert width(0.02) < width(0.02, 0.5) < width(0.02, 1.0)


def test_the_kept_residuals_are_of_known_kinds_and_finite() -> None:
    groups = known_groups()
    assert len({group.name for group in groups}) >= 10
    for group in groups:
        assert group.figures and group.kind.regime in ("steady", "saturated", "burst")
        assert all(math.isfinite(row) for rows in group.figures.values() for row in rows)


@pytest.mark.parametrize("figure", ["tpot", "ttft", "throughput"])
def test_groups_that_are_left_out_are_covered(figure: str) -> None:
    share, width, count = coverage(figure)
    assert count >= 8 and share >= 0.85 and 0.05 < width < 1.5


def test_coverage_counts_groups_alike() -> None:
    groups = made(1, 10, 3, 0.1, 0.02)
    odd = GroupResiduals("odd", STEADY, {"tpot": (9.0,) * 100})
    share, _, count = coverage("tpot", [*groups, odd])
    assert count == 11 and share == pytest.approx(10 / 11)
