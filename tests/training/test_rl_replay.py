"""Choices that come with tokens: those of the graph, made again in training whatever the learner would choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from backends.registry import usable
from model import graph, ops
from model.module import MODE, Model, fresh
from runtime.training.forward import forward, staged
from runtime.training.params import named, put
from runtime.training.rl.config import Generation, Replay
from runtime.training.rl.episodes import Choices, Questions, RolloutGroup
from runtime.training.rl.generators import nested
from runtime.training.rl.objective import batch, log_probabilities
from runtime.training.rl.replay import widths
from runtime.training.rl.rollouts import Asked, RolloutEngine
from tests.training.test_rl_rollouts import another
from tests.training.test_rl_rollouts import checkpoint as checkpoint
from tests.training.test_rl_rollouts import model as model
from tests.training.test_rl_rollouts import questions as questions

LENGTH = 32
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn(model: Model, questions: Questions) -> RolloutGroup:
    """More answers than run at once, longer than what an indexer selects."""
    assert model.config.indexer is not None and model.config.indexer.topk < LENGTH
    engine = RolloutEngine(
        model.config, nested(named(model)), usable("cpu"), Generation(max_tokens=12, replay="all"),
        questions.generator.tokenizer, LENGTH, running=4,
    )  # fmt: skip
    exercise = questions.of(0, 1, {"copy": 1.0})
    return engine.generate([Asked(0, exercise, 6, LENGTH, lambda member, turn: (member, turn))])[0]


def chosen_by(model: Model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """[layers,r,t,width], read off the plain graph."""
    found: dict[str, list[Any]] = {"experts": [], "selections": []}

    def route(*given: Any, **attributes: Any) -> Any:
        experts, weights = ops.route(*given, **attributes)
        found["experts"].append(experts.reshape(*tokens.shape, -1))
        return experts, weights

    def select(scores: Any, *, k: int) -> Any:
        found["selections"].append(ops.select_topk(scores, k=k))
        return found["selections"][-1]

    cfg = staged(model.config, "sparse", tokens.shape[1])
    caches, given = fresh(cfg, cfg.layers, jnp.asarray(tokens), jnp.float32)
    run = ops.substitute(
        lambda w, c, b: graph.step(cfg, w, c, b, MODE), {"glm.route": route, "glm.select_topk": select}
    )
    run(model.weights(), caches, given)
    return {name: np.stack(each) for name, each in found.items()}


def test_what_is_recorded_is_what_the_graph_chooses(model: Model, drawn: RolloutGroup) -> None:
    given = batch([drawn], LENGTH, False, widths(model.config, "all", LENGTH))
    own = chosen_by(model, given.tokens)
    assert set(given.choices) == {"experts", "selections"}
    for row, rollout in enumerate(drawn.rollouts):
        fed = rollout.length - 1  # nothing follows the last token
        np.testing.assert_array_equal(given.choices["experts"][:, row, :fed], own["experts"][:, row, :fed])
        assert (given.choices["experts"][:, row, fed:] == -1).all()
        for position in range(fed):  # of a selection, what lies behind is masked
            pair = (each["selections"][:, row, position] for each in (given.choices, own))
            for mine, theirs in zip(*pair, strict=True):
                assert {*mine[(mine >= 0) & (mine <= position)]} in ({*theirs[theirs <= position]}, set())


def test_replayed_where_they_are_the_learners_own_nothing_changes(model: Model, drawn: RolloutGroup) -> None:
    plain = batch([drawn], LENGTH, False)
    given = batch([drawn], LENGTH, False, widths(model.config, "all", LENGTH))
    one, other = (forward(model, jnp.asarray(plain.tokens), "sparse", chosen=c).logits for c in ({}, given.choices))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("replay", ["experts", "all"])
def test_a_policy_that_would_choose_otherwise_makes_the_choices_it_is_given(
    model: Model, drawn: RolloutGroup, replay: Replay
) -> None:
    """Routers and indexers of another model, replayed: with all else the same, what is said is what was."""
    given = batch([drawn], LENGTH, False, widths(model.config, replay, LENGTH))
    moved = another(model, 3)
    own = {name: array for name, array in named(model).items() if not ("index" in name and replay == "all")}
    put(moved, {name: array for name, array in own.items() if not name.endswith("router_bias")})
    tokens = jnp.asarray(given.tokens)
    said, plain = (
        np.asarray(log_probabilities(forward(moved, tokens, "sparse", chosen=chosen).logits, tokens))
        for chosen in (given.choices, {})
    )
    made = given.made > 0
    np.testing.assert_allclose(said[made], given.logprobs[made], atol=2e-5)
    assert np.abs(plain[made] - given.logprobs[made]).max() > 1e-4


def test_choices_survive_as_text() -> None:
    ids = np.arange(-1, 23, dtype=np.int16).reshape(2, 4, 3)
    np.testing.assert_array_equal(Choices.of(ids).array, ids)
    assert dataclasses.asdict(Choices.of(ids))["width"] == 3
