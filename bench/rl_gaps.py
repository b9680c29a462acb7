"""How far the learner lies from an engine in other number formats, on the same tokens with and without replay.

One batch is drawn in a format with every choice recorded; the learner's log-probabilities of it are then computed with
no choice replayed, with those of experts, and with all. So rows of the table differ in nothing else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backends.registry import usable
from model.module import Model
from runtime.execution.local.load import embedded_checkpoint
from runtime.training.forward import forward
from runtime.training.rl.config import Correction, Generation, PolicyObjective, Replay
from runtime.training.rl.episodes import Questions, RolloutGroup
from runtime.training.rl.objective import LearnerBatch, batch, log_probabilities, token_losses
from runtime.training.rl.replay import widths
from runtime.training.rl.rollouts import Asked, RolloutEngine

TASKS = {"long-copy": 1.0}
GROUPS, SIZE, LENGTH, MOST_TOKENS = 4, 8, 48, 24
"""Of a batch: lists of 9 to 19 words to repeat, with which episodes get longer than what an indexer selects (32)."""
CORRECTIONS: tuple[Correction, ...] = ("ppo-clip", "tis", "icepop", "double-sided")


@cache
def _model() -> Model:
    return Model.load(embedded_checkpoint())


@cache
def _engine(formats: str) -> RolloutEngine:
    questions = Questions.load(embedded_checkpoint(), 0)
    return RolloutEngine(
        _model().config, _model().weights(), usable("cpu"), Generation(formats, MOST_TOKENS, replay="all"),
        questions.generator.tokenizer, LENGTH, GROUPS * SIZE,
    )  # fmt: skip


@cache
def _drawn(formats: str, seed: int) -> list[RolloutGroup]:
    questions = Questions.load(embedded_checkpoint(), seed)

    def asked(number: int) -> Asked:
        exercise = questions.of(0, number, TASKS)
        return Asked(number, exercise, SIZE, LENGTH, lambda member, turn: questions.draw_seed(0, number, member, turn))

    return _engine(formats).generate([asked(number) for number in range(GROUPS)])


@cache
def _learner() -> Any:
    def run(model: Model, given: LearnerBatch) -> Array:
        tokens = jnp.asarray(given.tokens)
        return log_probabilities(forward(model, tokens, "sparse", chosen=given.choices).logits, tokens)

    return jax.jit(run)


def gap(formats: str, replay: Replay, seed: int) -> dict[str, Any]:
    """Of drawn tokens: mean, 99th percentile and largest distance of log-probabilities; the share that each correction
    would cut; drawn tokens."""
    given = batch(_drawn(formats, seed), LENGTH, True, widths(_model().config, replay, LENGTH))
    made = given.made > 0
    learner = np.asarray(_learner()(_model(), given))
    found = np.abs(learner - given.logprobs)[made]
    advantage = np.broadcast_to(given.advantages[:, None], learner.shape)
    cut = {
        how: float(
            np.asarray(token_losses(PolicyObjective(how), *map(jnp.asarray, (learner, given.logprobs, advantage)))[1])[
                made
            ].mean()
        )
        for how in CORRECTIONS
    }
    return {
        "gap": float(found.mean()),
        "gap_99": float(np.quantile(found, 0.99)),
        "gap_max": float(found.max()),
        "cut": cut,
        "drawn_tokens": int(made.sum()),
    }
