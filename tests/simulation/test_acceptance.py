"""How sure the acceptance of drafts is, and what that does to the bands."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cli.loads import acceptance_asked
from runtime.pricing.bands import Band
from runtime.serving import Speculation, WorkloadError
from runtime.simulation.build import speculation
from runtime.simulation.trust import _drafting
from tests.cli.cli import glm5, refused

LOAD = ("--isl", 500, "--osl", 40, "--requests", 8, "--model", "glm-4.7-flash", "--devices", 2)


def test_the_range_of_tokens_a_step() -> None:
    """1 + 0.7 + 0.49 and 1 + 0.9 + 0.81, positions moving together."""
    _, found = acceptance_asked("0.8+-0.1,0.8±0.1", 0)
    made = Speculation(found["acceptance"], found["acceptance_ranges"])
    assert made.mean_range == (pytest.approx(2.19), pytest.approx(2.71))
    _, found = acceptance_asked("0.95+-0.1,0.5", 2)
    assert found["acceptance_ranges"] == ((pytest.approx(0.85), 1.0), (pytest.approx(0.475), pytest.approx(0.525)))


def test_where_nobody_says_published_acceptance_is_within() -> None:
    """GLM-5's 2.76 and DeepSeek-V3.2's 2.55 tokens at 4 steps (arXiv 2602.15763), DeepSeek-V3's 1.85 to 1.90 of one
    draft (arXiv 2412.19437)."""
    for drafts, lengths in ((4, (2.76, 2.55)), (1, (1.85, 1.90))):
        made = speculation(drafts)
        assert made
        low, high = made.mean_range
        assert all(low <= length <= high for length in lengths) and low < made.mean_tokens < high
    given_ = speculation(1, 1.875)
    assert given_ and given_.mean_range == (pytest.approx(1.85), pytest.approx(1.90))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), min_size=1, max_size=4),
    st.floats(-0.5, 0), st.floats(0, 0.5), st.booleans(),
)  # fmt: skip
def test_less_certain_drafts_never_make_a_band_narrower(
    drafts: list[tuple[float, float]], low: float, high: float, closed: bool
) -> None:
    bands = {name: Band(low, high, "known") for name in ("tpot", "ttft", "throughput")}
    ends = tuple((max(0.0, p - spread), min(1.0, p + spread)) for p, spread in drafts)
    chances = tuple(p for p, _ in drafts)
    wide = _drafting(bands, Speculation(chances, ends), closed)
    assert wide["ttft"] == bands["ttft"] and (closed or wide["throughput"] == bands["throughput"])
    for name in ("tpot", "throughput"):
        assert wide[name].low <= low + 1e-12 and wide[name].high >= high - 1e-12
    made = Speculation(chances, ends)
    middle = (low + high) / 2
    slower = math.log(made.mean_tokens / made.mean_range[0])
    assert wide["tpot"].high == pytest.approx(middle + math.hypot(high - middle, slower))
    assert _drafting(bands, Speculation(chances), closed) == bands == _drafting(bands, None, closed)


def test_the_answer_says_it() -> None:
    def asked(*words: Any) -> Any:
        return glm5("simulate", *LOAD, "--json", *words).json

    sure, unsure = (asked("--acceptance", text) for text in ("0.8+-0,0.7+-0", "0.8+-0.2,0.7+-0.2"))
    assert sure["tpot_ms"] == unsure["tpot_ms"]
    narrow, wide = (each["band"]["tpot_ms"] for each in (sure, unsure))
    assert wide[0] < narrow[0] and wide[1] > narrow[1]
    assert "1.90 to 2.90 tokens a step with drafts widen it" in unsure["band_basis"]["tpot"]
    for words in ("0.8+-2", "0.8+-", "0.8+-nan", "+-0.1", "0.8+-0.1+-0.1", "1.2+-0.5"):
        assert "--acceptance" in refused("simulate", "--acceptance", words) or "from 0 to 1" in words or "1.2" in words


def test_ranges_hold_their_chances() -> None:
    with pytest.raises(WorkloadError, match="outside its ranges"):
        Speculation((0.5,), ((0.6, 0.7),))
    with pytest.raises(WorkloadError, match="give one for each"):
        Speculation((0.5, 0.5), ((0.4, 0.7),))
