"""Drafts on emulated devices: the MTP layer, split as the others are, guesses what it guesses on one device, whatever
it guesses changes no token, and the clock counts the tokens that steps really gave."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from backends import registry
from backends.emulation.backend import SimBackend
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.hf_config import from_hf
from model.split import Layout
from runtime.deployment.plan import Plan
from runtime.execution.cluster.session import runnable
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.local.request import Completion, Prompt
from runtime.execution.services import emulated_service
from runtime.serving.clock import Virtual
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from tests.engine.conftest import random_weights
from tests.serving.live import Client, assert_nothing_is_held
from tests.sim.servers import SMALL, emulated, plan_of, prompts_of, ticking
from tests.sim.test_clock import split_plan

DRAFTS = 2


@pytest.fixture(scope="module")
def foreseen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose next token hangs on the last one alone, in the same way for its MTP layer: every draft is right."""
    raw = SMALL["mla"]
    cfg = from_hf(raw)
    weights = random_weights(cfg)
    for layer in weights["layers"] + weights["mtp"]:
        for name, value in layer.items():
            if name == "o" or name.endswith("down"):
                value[:] = 0
            elif name.endswith("norm"):
                value[:] = 1
    mtp = weights["mtp"][0]["embed_hidden"]
    mtp[:] = 0
    mtp[: cfg.hidden_size] = np.eye(cfg.hidden_size)
    weights["outer"]["final_norm"][:] = 1
    folder = tmp_path_factory.mktemp("foreseen")
    save(folder / "model", raw, weights)
    return Checkpoint(folder / "model")


def continued(checkpoint: Checkpoint, token: int, count: int) -> tuple[int, ...]:
    """What the model says, worked out by hand: the head's best for the embedding, which a norm only scales."""
    outer = checkpoint.load("float32")["outer"]
    follows = np.argmax(np.asarray(outer["embed"]) @ np.asarray(outer["head"]), axis=1)
    found = []
    for _ in range(count):
        token = int(follows[token])
        found.append(token)
    return tuple(found)


@pytest.mark.slow
def test_right_drafts_are_all_taken(foreseen: Checkpoint) -> None:
    """Three requests over the ranks, of which one then has none; the clock counts the tokens that steps gave."""
    most = (12, 5, 7)
    asked = [dataclasses.replace(each, keep_logits=False) for each in prompts_of(foreseen.config, (21, 5, 9), most)]
    plan = plan_of(foreseen.config, Layout(tp=2, dp=2, ep=4, pp=2), redundant=1, drafts=DRAFTS, engine="glm5")
    outcome = emulated(foreseen, plan, asked).outcome
    for prompt, answer in zip(asked, outcome.completions, strict=True):
        assert answer.token_ids == continued(foreseen, prompt.prompt_ids[-1], prompt.max_tokens)
        left = prompt.max_tokens - 1
        assert answer.accept_length == left / -(-left // (1 + DRAFTS))
    longest = -(-(max(most) - 1) // (1 + DRAFTS))
    assert 1 + longest <= outcome.steps <= 3 + longest  # prompts may take a step each


def test_a_service_drafts_and_holds_nothing_afterwards(foreseen: Checkpoint) -> None:
    """Every draft is right, and an answer's last step has as many as are left."""
    cfg = foreseen.config
    plan = plan_of(cfg, Layout(tp=2), drafts=DRAFTS, engine="glm5")
    served = emulated_service(
        cfg, plan, checkpoint=foreseen, backend=SimBackend(mapped=True), clock=Virtual(), priced=ticking(cfg, plan)
    )
    clients = [Client(), Client()]
    served.submit([Job((token,), most, Sampling()) for token, most in ((3, 10), (5, 8))], clients)
    told = [tuple(client.wait().tokens) for client in clients]
    assert told == [continued(foreseen, 3, 10), continued(foreseen, 5, 8)]
    counts = served.counts()
    assert counts.accepted == counts.drafted == (2 + 2 + 2) + (2 + 2 + 0)
    assert_nothing_is_held(served)


@cache
def trained() -> Checkpoint:
    """The embedded model: its MTP layer is right now and then."""
    return Checkpoint(embedded_checkpoint())


@cache
def prompts() -> tuple[Prompt, ...]:
    from model.tokenizer import Tokenizer

    texts = ["The quick brown fox", "A mixture of experts", "Hello"]
    encoded = Tokenizer.load(trained().path).encode_each(texts, add_special_tokens=True)
    return tuple(Prompt(tuple(ids), most) for ids, most in zip(encoded, (24, 9, 16), strict=True))


@cache
def on_one_device(drafts: int) -> list[Completion]:
    shapes = EngineConfig(page_size=16, least_batch=4, least_chunk=32, least_context=128, drafts=drafts)
    return load_engine(trained(), registry.usable("cpu"), shapes, "float32").generate(list(prompts()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, dp=2, ep=4, pp=2),
        Layout(dp=4),
    ],
    ids=lambda each: each.name,
)
def test_drafts_are_those_of_one_device_and_change_no_token(layout: Layout) -> None:
    """Three requests over the ranks, of which one then has none."""
    plan = plan_of(trained().config, layout, redundant=int(layout.by_expert), drafts=DRAFTS, engine="glm5")
    found = emulated(trained(), plan, list(prompts()))
    expected, plain = on_one_device(DRAFTS), on_one_device(0)
    for ours, one, without in zip(found.outcome.completions, expected, plain, strict=True):
        assert ours.token_ids == one.token_ids == without.token_ids
        assert ours.accept_length == one.accept_length
    assert max(each.accept_length or 1 for each in expected) > 1.2


def moved() -> Plan:
    plan = split_plan(trained().config, Layout(tp=2), Layout(dp=2, ep=2))
    return dataclasses.replace(plan, pools=tuple(dataclasses.replace(pool, drafts=DRAFTS) for pool in plan.pools))


@pytest.mark.slow
def test_the_mtp_layers_rows_move_with_a_cache() -> None:
    """A decode server's first drafts are those of one device: it has what the prompt left in the MTP layer, too."""
    found = emulated(trained(), moved(), list(prompts()))
    assert [(each.token_ids, each.accept_length) for each in found.outcome.completions] == [
        (each.token_ids, each.accept_length) for each in on_one_device(DRAFTS)
    ]


def test_drafts_that_cannot_be_are_refused() -> None:
    cfg = trained().config
    with pytest.raises(UsageError, match="has no MTP layer to draft with: leave out --mtp"):
        runnable(dataclasses.replace(cfg, mtp_layers=0), moved())
    plan = moved()
    pools = dataclasses.replace(plan.pools[0], drafts=0), plan.pools[1]
    with pytest.raises(UsageError, match="the plan's pools draft 0 and 2 tokens a step"):
        runnable(cfg, dataclasses.replace(plan, pools=pools))
