"""Scores of an engine whose answers are known, and the command on a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from backends.registry import usable
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from runtime.execution.local.engine import LocalEngine
from runtime.execution.local.load import embedded_checkpoint
from runtime.execution.local.request import Completion, Prompt
from runtime.training.data import TASKS, Exercise
from runtime.training.evaluate import RandomIndexer, ask, evaluate
from tests.cli.cli import glm5, refused

PATH = embedded_checkpoint()
TOKENIZER = Tokenizer.load(PATH)


class Scripted:
    """An engine that answers with what `answer` makes of the prompt's last question, four tokens a step."""

    def __init__(self, answer: Callable[[str], str]):
        self.answer = answer

    def generate(self, requests: list[Prompt]) -> list[Completion]:
        out = []
        for request in requests:
            ids = [*TOKENIZER.encode(self.answer(TOKENIZER.decode(request.prompt_ids))), TOKENIZER.token_id("<|user|>")]
            accept = (len(ids) - 1) / -(-(len(ids) - 1) // 4) if len(ids) > 1 else None
            out.append(Completion(request.prompt_ids, tuple(ids), "stop", 0.0, 0.0, accept))
        return out


def scripted(answer: Callable[[str], str]) -> LocalEngine:
    return cast(LocalEngine, Scripted(answer))


def add(prompt: str) -> str:
    a, b = prompt.rpartition("<|user|>")[2].partition("=")[0].split("+")
    return str(int(a) + int(b))


def test_an_engine_that_can_add_scores_full_marks() -> None:
    found = ask(scripted(add), PATH, 20, ["arithmetic"])
    assert (found.tasks["arithmetic"].right, found.tasks["arithmetic"].exact_match) == (20, 1.0)
    assert found.recall_distance is None


def test_an_engine_that_is_off_by_one_scores_nothing_and_shows_it() -> None:
    score = ask(scripted(lambda prompt: str(int(add(prompt)) + 1)), PATH, 20, ["arithmetic"]).tasks["arithmetic"]
    assert score.right == 0
    _, wanted, given = score.wrong[0]
    assert int(given) == int(wanted) + 1


def test_the_accept_length_is_that_of_all_steps_together() -> None:
    """Sums of two digits are 1 token and a stop (one step of 2 after the first), of three digits one step of 3."""
    found = ask(scripted(add), PATH, 40, ["arithmetic"])
    assert found.accept_length is not None and 2.0 < found.accept_length < 3.0


def test_recall_says_how_far_back_it_asks() -> None:
    distance = ask(scripted(lambda prompt: ""), PATH, 30, ["recall"]).recall_distance
    index = Checkpoint(PATH).config.indexer
    assert distance is not None and index is not None and distance >= 64


CALL = "<tool_call>send<arg_key>item</arg_key><arg_value>lamp</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (CALL, True),
        (CALL.replace("lamp", "drum"), False),
        (CALL.replace("send", "add"), False),
        (CALL.replace("</tool_call>", ""), False),
        (CALL + CALL, False),
        ("the lamp", False),
    ],
)
def test_a_call_is_right_in_name_and_arguments(text: str, right: bool) -> None:
    question = Exercise("tools", "", CALL, {"name": "send", "arguments": {"item": "lamp"}})
    assert question.is_right(text) == right


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="no task 'poetry'; there are recall, arithmetic"):
        ask(scripted(add), PATH, 5, ["poetry"])
    assert "no task 'poetry'" in refused("eval", "--task", "poetry")
    assert "no such checkpoint directory" in refused("eval", "--checkpoint", "nowhere")
    assert "--show-wrong prints for a person" in refused("eval", "--show-wrong", "--json")
    assert "--keep-fp8 does not go with --random-indexer" in refused("eval", "--keep-fp8", "--random-indexer")


def test_a_random_indexer_is_the_same_size_and_nothing_else_changes() -> None:
    plain, random = Checkpoint(PATH).load(), RandomIndexer(PATH).load()
    for mine, theirs in zip(random["layers"] + random["mtp"], plain["layers"] + plain["mtp"], strict=True):
        for name in mine:
            if not name.startswith("index_"):
                assert np.array_equal(mine[name], theirs[name])
            elif mine[name].ndim == 2:
                assert not np.array_equal(mine[name], theirs[name])
                assert np.std(mine[name]) == pytest.approx(np.std(theirs[name]), rel=0.1)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.training.evaluate.load_engine", lambda *given: scripted(lambda prompt: "of no use"))
    found = glm5("eval", "--samples", 2, "--task", "copy", "--task", "sentences", "--json").json
    assert set(found["tasks"]) == {"copy", "sentences"}
    assert all(0 <= score["right"] <= score["asked"] == 2 for score in found["tasks"].values())
    assert json.dumps(found)


@pytest.mark.slow
def test_the_embedded_checkpoint_knows_what_its_card_says() -> None:
    """Held-out questions, sparse attention; and the same recall with random indexers."""
    scores: dict[str, Any] = evaluate(PATH, usable("cpu"), samples=60, drafts=3).as_json()
    least = {"recall": 0.95, "arithmetic": 0.9, "copy": 0.9, "tools": 0.95, "sentences": 0.95}
    assert set(least) == set(TASKS)
    assert {
        task: score["exact_match"] for task, score in scores["tasks"].items() if score["exact_match"] < least[task]
    } == {}
    assert scores["accept_length"] >= 1.8 and scores["recall_distance_tokens"] >= 64
    random = evaluate(PATH, usable("cpu"), samples=60, tasks=["recall"], random_indexer=True)
    assert random.tasks["recall"].exact_match < 0.5
