"""The engine as a generator: what it says of its tokens is what the model says of them, whichever version drew them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from backends.registry import usable
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.module import Model
from runtime.execution.local.load import embedded_checkpoint
from runtime.serving.delays import Delay
from runtime.training import config, export, steps
from runtime.training.data import Exercise
from runtime.training.params import named, put
from runtime.training.rl.config import Generation
from runtime.training.rl.episodes import Episode, Questions, Rollout
from runtime.training.rl.generators import nested
from runtime.training.rl.rollouts import Asked, RolloutEngine
from tests.training import small
from tests.training.test_trainer import FEWER

LONGEST = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that was taught nothing, with its tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    read = config.read(small.write(folder, *FEWER, stages=("dense",)))
    made = export.make_tokenizer(read)
    model = steps.initial_model(export.raw_config(read, made), seed=1)
    export.write(folder / "checkpoint", read, model, made, "small.toml")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def questions(checkpoint: Path) -> Questions:
    return Questions.load(checkpoint, 0)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return Model.load(checkpoint)


def another(model: Model, seed: int) -> Model:
    """The model, moved a little."""
    moved = nnx.clone(model)
    rng = np.random.default_rng(seed)
    put(moved, {name: a + 0.05 * jnp.asarray(rng.normal(size=a.shape), a.dtype) for name, a in named(model).items()})
    return moved


@pytest.fixture(scope="module")
def engine(checkpoint: Path, model: Model, questions: Questions) -> RolloutEngine:
    return RolloutEngine(
        Checkpoint(checkpoint).config, nested(named(model)), usable("cpu"), Generation(max_tokens=8),
        questions.generator.tokenizer, LONGEST, running=4,
    )  # fmt: skip


def asked(questions: Questions, number: int, size: int = 4, temperature: float = 1.0) -> Asked:
    exercise = questions.of(0, number, {"arithmetic": 1.0})
    return Asked(number, exercise, size, LONGEST, lambda member, turn: (number, member, turn), temperature=temperature)


def drawn(rollout: Rollout) -> np.ndarray:
    return np.flatnonzero(rollout.made)


def said_by(model: Model, rollout: Rollout) -> np.ndarray:
    """Log-probability of every token, from the module's logits."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : rollout.length] = rollout.ids
    logs = jax.nn.log_softmax(model(padded)[0], axis=-1)
    return np.array([0.0] + [float(logs[i - 1, rollout.ids[i]]) for i in range(1, rollout.length)])


def test_log_probabilities_are_the_models(engine: RolloutEngine, model: Model, questions: Questions) -> None:
    engine.load(nested(named(model)), 3)
    found = engine.generate([asked(questions, number) for number in range(3)])  # more than run at once
    assert [group.number for group in found] == [0, 1, 2]
    for rollout in (each for group in found for each in group.rollouts):
        at = drawn(rollout)
        assert len(at) and {rollout.versions[i] for i in at} == {3}
        np.testing.assert_allclose(np.array(rollout.logprobs)[at], said_by(model, rollout)[at], atol=2e-5)
    answers = {rollout.ids for group in found for rollout in group.rollouts}
    assert len(answers) > 6, "members draw on their own"


def test_they_are_a_function_of_their_seeds_whoever_runs_beside_them(
    engine: RolloutEngine, model: Model, questions: Questions
) -> None:
    engine.load(nested(named(model)), 0)
    alone = engine.generate([asked(questions, 5, 2)])[0]
    beside = engine.generate([asked(questions, 4, 3), asked(questions, 5, 2)])[1]
    assert [each.ids for each in alone.rollouts] == [each.ids for each in beside.rollouts]


def test_a_policy_may_change_while_answers_are_made(engine: RolloutEngine, model: Model, questions: Questions) -> None:
    """Each token says which version drew it; from a change on the others draw, over the cache that was there."""
    engine.load(nested(named(model)), 7)
    engine.begin(asked(questions, 9))
    moved, groups, steps_made = another(model, 2), [], 0
    while not groups:
        groups += engine.advance()
        steps_made += 1
        if steps_made == 6:
            engine.load(nested(named(moved)), 8)
    mixed = [each for each in groups[0].rollouts if {each.versions[i] for i in drawn(each)} == {7, 8}]
    assert mixed
    for rollout in mixed:
        versions = [rollout.versions[i] for i in drawn(rollout)]
        assert versions == sorted(versions)
        old = drawn(rollout)[np.array(versions) == 7]
        np.testing.assert_allclose(np.array(rollout.logprobs)[old], said_by(model, rollout)[old], atol=2e-5)
        new = drawn(rollout)[np.array(versions) == 8]
        assert np.abs(np.array(rollout.logprobs)[new] - said_by(model, rollout)[new]).max() > 1e-3


def test_a_question_without_room_is_one_line(engine: RolloutEngine, questions: Questions) -> None:
    long = Exercise("copy", "Repeat: " + "lamp " * 60, "lamp")
    with pytest.raises(UsageError, match="raise the stage's `length`"):
        engine.begin(Asked(1, long, 2, LONGEST, lambda member, turn: (0,)))
    assert engine.idle


# --- episodes


@pytest.fixture(scope="module")
def known() -> Questions:
    return Questions.load(embedded_checkpoint(), 0)


@pytest.mark.parametrize("task", ["thinking", "tools", "tool-answers", "tool-chains", "sentences"])
def test_who_answers_right_is_rewarded(known: Questions, task: str) -> None:
    exercise = known.of(0, 1, {task: 1.0})
    rollout = known.right(exercise)
    tokenizer = known.generator.tokenizer
    assert rollout.reward == 1.0
    made = [token for token, own in zip(rollout.ids, rollout.made, strict=True) if own]
    assert len([token for token in made if token in tokenizer.stop_token_ids]) == len(exercise.turns)
    spelt = exercise.prompt + "".join(
        turn.answer + (turn.then.prompt if turn.then else "<|user|>") for turn in exercise.turns
    )
    assert tokenizer.decode(rollout.ids) == spelt


def test_a_wrong_turn_ends_an_episode_without_reward(known: Questions) -> None:
    exercise = known.of(0, 2, {"tool-chains": 1.0})
    tokenizer, episode = known.generator.tokenizer, Episode(exercise, known.generator.tokenizer)
    ids = [*tokenizer.encode(exercise.answer), tokenizer.token_id("<|observation|>")]
    assert episode.say(ids, [0.0] * len(ids), [0] * len(ids), "stop")
    assert not episode.say([ids[0], ids[-1]], [0.0] * 2, [0] * 2, "stop")
    assert episode.done.reward == 0.0


@pytest.mark.parametrize("ending", ["<|user|>", None])
def test_a_call_that_ends_otherwise_is_not_answered(known: Questions, ending: str | None) -> None:
    """The token that ends a turn says who speaks next, and is the policy's own."""
    exercise = known.of(0, 3, {"tool-answers": 1.0})
    tokenizer, episode = known.generator.tokenizer, Episode(exercise, known.generator.tokenizer)
    ids = [*tokenizer.encode(exercise.answer), *([tokenizer.token_id(ending)] if ending else [])]
    assert not episode.say(ids, [0.0] * len(ids), [0] * len(ids), "length")
    assert episode.done.reward == 0.0


def test_questions_are_of_facts_that_are_not_held_out_and_imitated_ones_are_others(known: Questions) -> None:
    asked_of = {known.of(0, i, {"thinking": 1.0}).prompt for i in range(40)}
    held = {question.prompt for question in known.generator.questions("thinking", 100)}
    imitated = {known.of(0, i, {"thinking": 1.0}, imitated=True).prompt for i in range(40)}
    assert not asked_of & held and asked_of != imitated


def test_delays_have_the_mean_and_are_the_members_own(known: Questions) -> None:
    found = np.array([known.delay_s(0, 0, member, Delay(2.0, 4.0)) for member in range(4000)])
    assert abs(found.mean() - 2.0) < 0.15 and found.min() > 0 and found.max() > 6
    assert known.delay_s(0, 0, 1, Delay()) == 0.0
