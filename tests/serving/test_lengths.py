"""What is drawn of a load, lengths and accepted drafts: means hold, bounds are kept, a file is read or refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving import (
    Deployment,
    Fixed,
    Histogram,
    Lognormal,
    Speculation,
    WorkloadError,
    closed_loop,
    open_loop,
    read_histogram,
    simulate,
)
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer

DRAWN = 10_000


@settings(max_examples=40)
@given(mean=st.floats(20, 1e5), cv=st.floats(0.1, 4), times=st.floats(1.05, 20), seed=st.integers(0, 9))
def test_a_cut_lognormal_keeps_its_mean(mean: float, cv: float, times: float, seed: int) -> None:
    """The oracle is the law of large numbers: within five standard errors of the sample, and a rounding to whole
    tokens."""
    lengths = Lognormal(mean, cv, int(mean * times) + 1)
    drawn = lengths.draw(np.random.default_rng(seed), DRAWN)
    assert drawn.min() >= 1 and drawn.max() <= lengths.most
    assert abs(drawn.mean() - mean) <= 5 * drawn.std() / DRAWN**0.5 + 0.5
    assert (drawn == lengths.draw(np.random.default_rng(seed), DRAWN)).all()


def test_a_lognormal_far_below_its_cut_is_a_lognormal() -> None:
    """Its median is mean / sqrt(1 + cv^2)."""
    drawn = Lognormal(3000, 1.0, 10**7).draw(np.random.default_rng(0), 200_000)
    assert np.median(drawn) == pytest.approx(3000 / 2**0.5, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(1.0, rel=0.05)
    assert (Lognormal(1, 1.0, 8).draw(np.random.default_rng(0), 100) == 1).all()


@given(acceptance=st.lists(st.floats(0, 1), min_size=1, max_size=5), seed=st.integers(0, 3))
@settings(max_examples=6)
def test_drafts_are_accepted_as_often_as_asked(acceptance: list[float], seed: int) -> None:
    """Tokens made a step, over a long answer, against the sum over positions of the chance to get so far."""
    reach = [math.prod(acceptance[: position + 1]) for position in range(len(acceptance))]
    mean, tokens = 1 + sum(reach), 1500
    deployment = Deployment(plain_engine(), LinearPricer(), 100_000, speculation=Speculation(tuple(acceptance)))
    steps = simulate(closed_loop(1, 1, Fixed(10), Fixed(tokens)), deployment, seed=seed).steps["decode"]
    spread = sum((2 * k + 3) * chance for k, chance in enumerate(reach)) + 1 - mean**2  # E[n^2] - mean^2
    error = 5 * math.sqrt(max(spread, 0.0) / steps) + len(reach) / steps
    assert abs((tokens - 1) / steps - mean) <= error


ROWS = st.lists(st.tuples(st.integers(1, 10**5), st.integers(1, 10**4), st.floats(0.01, 100)), min_size=1, max_size=8)


@given(rows=ROWS, seed=st.integers(0, 9))
def test_a_histogram_is_drawn_in_pairs_by_weight(rows: list[tuple[int, int, float]], seed: int) -> None:
    histogram = Histogram(tuple(rows))
    prompts, outputs = histogram.draw_pairs(np.random.default_rng(seed), DRAWN)
    assert set(zip(prompts.tolist(), outputs.tolist(), strict=True)) <= {row[:2] for row in rows}
    weights = np.array([row[2] for row in rows])
    for drawn, column in ((prompts, 0), (outputs, 1)):
        mean = weights @ np.array([row[column] for row in rows]) / weights.sum()
        assert abs(drawn.mean() - mean) <= 6 * drawn.std() / DRAWN**0.5 + 0.02 * mean


def test_a_histogram_loads_both_kinds_of_loop() -> None:
    histogram = Histogram(((100, 7, 1.0), (2000, 90, 3.0)))
    for load in (closed_loop(2, 50, histogram, None, seed=4), open_loop(1.0, 50, histogram, None, seed=4)):
        pairs = [(request.prompt_tokens, request.output_tokens) for request in load.requests]
        assert set(pairs) == {(100, 7), (2000, 90)} and pairs.count((2000, 90)) > pairs.count((100, 7))


def test_a_file_of_lengths(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("output_tokens,input_tokens,weight,comment\n5,100,2.5,usual\n9,400,0,never\n 7 , 30 ,1\n")
    assert read_histogram(path).rows == ((100, 5, 2.5), (30, 7, 1.0))
    path.write_text("input_tokens,output_tokens\n3,4\n3,4\n")
    assert read_histogram(path).rows == ((3, 4, 1.0), (3, 4, 1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column input_tokens"),
        ("input_tokens\n5\n", "no column output_tokens"),
        ("input_tokens,output_tokens\n", "no row"),
        ("input_tokens,output_tokens\n5,0\n", "row 1: output_tokens is '0'"),
        ("input_tokens,output_tokens\n5,3\n5.5,3\n", "row 2: input_tokens is '5.5'"),
        ("input_tokens,output_tokens\n-5,3\n", "input_tokens is '-5'"),
        ("input_tokens,output_tokens\n5\n", "output_tokens is ''"),
        ("input_tokens,output_tokens\n999999999999,3\n", "100,000,000"),
        ("input_tokens,output_tokens,weight\n5,3,nan\n", "weight is 'nan'"),
        ("input_tokens,output_tokens,weight\n5,3,-1\n", "weight is '-1'"),
        ("input_tokens,output_tokens,weight\n5,3,0\n", "no row with a weight above zero"),
        ("input_tokens,input_tokens\n5,3\n", "stands twice"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=said) as refused:
        read_histogram(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
