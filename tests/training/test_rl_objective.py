"""Corrections against the formulas written out in NumPy, and what their gradients must be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.training.rl.config import Correction, PolicyObjective, RlStage
from runtime.training.rl.episodes import Rollout, RolloutGroup
from runtime.training.rl.learner import adam, rates
from runtime.training.rl.objective import advantages, batch, log_probabilities, loss, row_length, token_losses

RNG = np.random.default_rng(0)
LEARNER, DRAWN = (RNG.normal(-1.5, 0.7, (6, 9)).astype(np.float32) for _ in range(2))
ADVANTAGE = RNG.normal(0, 1, (6, 9)).astype(np.float32)
ALL: tuple[Correction, ...] = ("none", "ppo-clip", "tis", "icepop", "double-sided")


def slope(how: PolicyObjective, learner: float, drawn: float, advantage: float) -> float:
    """d loss / d log p of one token, from the definitions."""
    r = float(np.exp(np.float64(learner) - drawn))
    low, high = 1 - how.clip_low, 1 + how.clip_high
    match how.correction:
        case "none":
            return -advantage
        case "ppo-clip":
            clipped = (r > high and advantage > 0) or (r < low and advantage < 0)
            return 0.0 if clipped else -r * advantage
        case "tis":
            return -min(r, how.cap) * advantage
        case "icepop":
            return -r * advantage if 1 / how.icepop <= r <= how.icepop else 0.0
        case "double-sided":
            return -r * advantage if low <= r <= high else 0.0


@pytest.mark.parametrize("correction", ALL)
def test_gradients_are_those_of_the_definitions(correction: Correction) -> None:
    how = PolicyObjective(correction)
    found = jax.grad(lambda p: jnp.sum(token_losses(how, p, jnp.asarray(DRAWN), jnp.asarray(ADVANTAGE))[0]))(
        jnp.asarray(LEARNER)
    )
    wanted = np.vectorize(lambda p, q, a: slope(how, p, q, a))(LEARNER, DRAWN, ADVANTAGE)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    cut = np.asarray(token_losses(how, jnp.asarray(LEARNER), jnp.asarray(DRAWN), jnp.asarray(ADVANTAGE))[1])
    assert 0 < cut.mean() < 1 if correction != "none" else not cut.any()


@pytest.mark.parametrize("correction", ALL)
def test_on_policy_all_are_the_policy_gradient(correction: Correction) -> None:
    how, same = PolicyObjective(correction), jnp.asarray(LEARNER)
    found = jax.grad(lambda p: jnp.sum(token_losses(how, p, same, jnp.asarray(ADVANTAGE))[0]))(same)
    np.testing.assert_allclose(found, -ADVANTAGE, rtol=1e-6)


def rollout(reward: float, ids: tuple[int, ...], made: tuple[bool, ...]) -> Rollout:
    return Rollout(
        "copy", ids, made, tuple(-float(m) for m in made), tuple(0 if m else -1 for m in made), reward, "stop"
    )


def test_a_group_is_its_own_baseline() -> None:
    np.testing.assert_allclose(advantages(np.array([1.0, 0, 0, 1]), False), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(advantages(np.array([1.0, 0, 0, 0]), True), np.array([3, -1, -1, -1]) / np.sqrt(3))
    assert not advantages(np.ones(5), True).any()


def test_a_batch_has_what_was_drawn_and_nothing_behind_it() -> None:
    group = RolloutGroup(0, (rollout(1, (5, 6, 7), (False, True, True)), rollout(0, (5, 8), (False, True))))
    found = batch([group], 4, scale=False)
    assert found.tokens.tolist() == [[5, 6, 7, 0], [5, 8, 0, 0]]
    assert found.made.tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert found.advantages.tolist() == [0.5, -0.5]


def test_log_probabilities_are_those_of_the_token_given_what_is_before_it() -> None:
    logits, tokens = RNG.normal(size=(2, 5, 7)).astype(np.float32), RNG.integers(0, 7, (2, 5))
    found = np.asarray(log_probabilities(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32)))
    share = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    wanted = [[np.log(share[r, t - 1, tokens[r, t]]) if t else 0.0 for t in range(5)] for r in range(2)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_was_given_teaches_nothing() -> None:
    """Tokens of prompts and environments have no part in the loss, whatever stands in their place."""
    group = RolloutGroup(0, (rollout(1, (5, 6, 3), (False, True, False)), rollout(0, (5, 2, 1), (False, True, False))))
    logits = jnp.asarray(RNG.normal(size=(2, 3, 9)).astype(np.float32))
    given = batch([group], 3, scale=False)
    slopes = np.asarray(jax.grad(lambda x: loss(PolicyObjective(), x, given)[0])(logits))
    assert slopes[:, 0].any() and not slopes[:, 1:].any()


def test_distilling_pulls_to_the_teacher() -> None:
    """With no reward, a token that the teacher likes more becomes likelier."""
    group = RolloutGroup(0, (rollout(0, (5, 6), (False, True)), rollout(0, (5, 7), (False, True))))
    logits, given = jnp.zeros((2, 2, 9)), batch([group], 2, scale=True)
    teacher = jnp.asarray([[0.0, -0.1], [0.0, -5.0]], jnp.float32)
    how = PolicyObjective("none", distill=1.0)
    slopes = np.asarray(jax.grad(lambda x: loss(how, x, given, teacher)[0])(logits))
    assert slopes[0, 0, 6] < 0 < slopes[1, 0, 7]


def test_rows_are_as_long_as_the_longest_episode_needs() -> None:
    """Never shorter, never beyond what the stage allows, and in four lengths at most."""
    for most in (2, 7, 24, 64, 100):
        found = set()
        for longest in range(1, most + 1):
            pair = tuple(rollout(0, (1,) * length, (False,) * length) for length in (1, longest))
            found.add(length := row_length([RolloutGroup(0, pair)], most))
            assert longest <= length <= most
        assert len(found) <= 4 and max(found) == most


def test_a_rate_that_decays() -> None:
    """Adam's steps along one gradient are as long as the rate: level, then down in a line, none of them 0."""
    stage = RlStage(steps=10, tasks={"copy": 1.0}, rate=0.5, clip=1e9, decay=0.4)
    by, params, lengths = adam(rates(stage), stage), {"w": jnp.ones(3)}, []
    moments = by.init(params)
    for _ in range(stage.steps):
        updates, moments = by.update({"w": jnp.ones(3)}, moments, params)
        lengths.append(-float(jax.tree.leaves(updates)[0][0]))
    np.testing.assert_allclose(lengths, [0.5] * 7 + [0.375, 0.25, 0.125], rtol=1e-4)
