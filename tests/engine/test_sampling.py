"""Sampling draws from the distribution it says, and drafts do not change it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UsageError
from runtime.serving.answer import Answer
from runtime.serving.sampling import Sampling, choose, probabilities
from runtime.serving.service import Job

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))


def frequencies(draw, n: int = 20_000) -> np.ndarray:
    return np.bincount([draw() for _ in range(n)], minlength=5) / n


def verified(rows: np.ndarray, drafts: list[int], sampling: Sampling, *seed: int) -> list[int]:
    """The tokens that a run of drafts yields: those accepted, then one more."""
    answer = Answer(Job((0,), len(drafts) + 2, sampling), 0, seed)
    made = answer.extend(rows, drafts)
    assert made == answer.generated
    return answer.tokens[1:]


def test_temperature_scales_the_logits() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0)), np.exp(LOGITS), atol=1e-6)
    flat = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(2.0)), flat, atol=1e-6)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    kept = probabilities(LOGITS, Sampling(1.0, top_p=0.8))
    np.testing.assert_allclose(kept, np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9, atol=1e-6)


def test_top_k_keeps_the_best() -> None:
    kept = probabilities(LOGITS, Sampling(1.0, top_k=2))
    np.testing.assert_allclose(kept, np.array([2, 1, 0, 0, 0]) / 3, atol=1e-6)


def test_min_p_drops_what_is_far_below_the_best() -> None:
    kept = probabilities(LOGITS, Sampling(1.0, min_p=0.2))
    np.testing.assert_allclose(kept, np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9, atol=1e-6)


def test_biases_and_masks_come_before_everything() -> None:
    rng, biased = np.random.default_rng(0), Sampling(bias=((4, 10.0),))
    assert choose(LOGITS, biased, rng) == 4 and choose(LOGITS, Sampling(), rng) == 0
    assert choose(LOGITS, biased, rng, np.array([False, True, True, False, False])) == 1
    drawn = {choose(LOGITS, Sampling(5.0), rng, np.arange(5) == 3) for _ in range(20)}
    assert drawn == {3}


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert choose(np.array([1.0, 3.0, 3.0]), Sampling(), np.random.default_rng(0)) == 1


def test_draws_follow_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(frequencies(lambda: choose(LOGITS, Sampling(1.0), rng)), np.exp(LOGITS), atol=0.012)


@pytest.mark.parametrize("draft", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 4))])
def test_a_draft_does_not_change_the_distribution(draft: int) -> None:
    """The first token after verification is distributed as without drafts, whatever was drafted."""
    rows, number = np.stack([LOGITS, LOGITS]), itertools.count()
    found = frequencies(lambda: verified(rows, [draft], Sampling(1.0), draft, next(number))[0])
    np.testing.assert_allclose(found, np.exp(LOGITS), atol=0.012)


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.integers(0, 2**32))
def test_greedy_verification_yields_the_models_own_choices(drafts: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((len(drafts) + 1, 5))
    own = list(rows.argmax(-1))
    out = verified(rows, drafts, Sampling(), 0)
    agreed = next((i for i, (d, o) in enumerate(zip(drafts, own, strict=False)) if d != o), len(drafts))
    assert out == own[: agreed + 1]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)
