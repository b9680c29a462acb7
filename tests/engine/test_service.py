"""A real model as a service: its tokens are those of a list of prompts, whoever else is served."""

from __future__ import annotations

import pytest

from runtime.execution.local.request import Prompt
from runtime.execution.services import engine_service
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from tests.engine.test_engine import Engines, prompt
from tests.serving.live import Client, OnlyMultiples, assert_nothing_is_held


@pytest.mark.parametrize("drafts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_served_model_answers_as_it_does_alone(engines: Engines, drafts: int) -> None:
    engine = engines["gqa", drafts]
    asked = [Prompt(prompt(length, length), max_tokens=8) for length in (33, 5, 20)]
    expected = [completion.token_ids for completion in engine.generate(asked)]
    served = engine_service(engine)
    jobs = [Job(each.prompt_ids, each.max_tokens, Sampling()) for each in asked]
    held = Job(asked[0].prompt_ids, 8, Sampling(temperature=1.0), constraint=_Wide(7))
    for cached in (0, 32):
        clients = [Client() for _ in range(4)]
        served.submit([*jobs, held], clients)
        assert [tuple(client.wait().tokens) for client in clients[:3]] == expected
        assert clients[0].updates[0].cached_tokens == cached
        assert len(clients[3].wait().tokens) == 8 and not any(token % 7 for token in clients[3].tokens)
    assert_nothing_is_held(served)


class _Wide(OnlyMultiples):
    """Over this model's vocabulary."""

    vocab = 160
