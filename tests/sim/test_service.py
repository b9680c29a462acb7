"""A plan's deployment as a service: the checkpoint's tokens, when the simulation says."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.emulation.backend import SimBackend
from backends.emulation.memory import OutOfMemory
from foundation.errors import CapacityError, UsageError
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.split import Layout
from runtime.execution.cluster.options import SimOptions
from runtime.execution.cluster.session import prepare
from runtime.execution.services import emulated_service
from runtime.serving.clock import Virtual
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from tests.serving.live import Client, assert_nothing_is_held
from tests.sim.servers import plan_of, prompts_of, reference, ticking


def test_caches_here_are_the_plans_or_said_to_be_fewer(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up tokens are admitted by the plan's pool; the model's own by what this host holds of it."""
    from runtime.execution import services

    checkpoint = checkpoints["gqa"]
    cfg = checkpoint.config
    plan = plan_of(cfg, Layout(), engine="glm5")
    (pool,) = plan.pools
    priced = ticking(cfg, plan)
    token_bytes = 4 * sum(row.width for kind in cfg.layers for row in cache_rows(cfg, kind))
    monkeypatch.setattr(services, "HOST_CACHE_BYTES", 3.5 * pool.page_tokens * token_bytes)
    assert pool.kv_pages > 3 and services.pages_here(cfg, plan) == [3]
    made_up = emulated_service(cfg, plan, next_token=lambda job, place: 1, clock=Virtual(), priced=priced)
    made_up.check(3 * pool.page_tokens, pool.page_tokens)
    made_up.close()
    real = emulated_service(
        cfg, plan, checkpoint=checkpoint, backend=SimBackend(mapped=True), clock=Virtual(), priced=priced
    )
    with pytest.raises(CapacityError):
        real.check(3 * pool.page_tokens, pool.page_tokens)
    real.close()
    monkeypatch.setattr(services, "HOST_CACHE_BYTES", pool.kv_pages * pool.page_tokens * token_bytes)
    assert services.pages_here(cfg, plan) == [pool.kv_pages]


def test_tokens_are_the_checkpoints_and_times_those_of_made_up_ones(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["gqa"]
    cfg = checkpoint.config
    plan = plan_of(cfg, Layout(dp=2, ep=2), engine="glm5")
    priced = ticking(cfg, plan)
    prompts = prompts_of(cfg, [20, 7, 20], [6, 4, 5])
    prompts[2] = prompts[0]
    jobs = [Job(each.prompt_ids, each.max_tokens, Sampling()) for each in prompts]
    expected = [list(each.token_ids) for each in reference(checkpoint, prompts)]
    real = emulated_service(
        cfg, plan, checkpoint=checkpoint, backend=SimBackend(mapped=True), clock=Virtual(), priced=priced
    )
    made_up = emulated_service(cfg, plan, next_token=lambda job, place: job + place, clock=Virtual(), priced=priced)
    told: list[list[Client]] = []
    for served in (real, made_up):
        clients = [Client() for _ in jobs]
        served.submit(jobs, clients)
        told.append([client.wait() for client in clients])
        assert_nothing_is_held(served)
    assert [client.tokens for client in told[0]] == expected
    times = [[[update.at_s for update in client.updates] for client in clients] for clients in told]
    assert times[0] == times[1]
    with pytest.raises(UsageError, match="give a checkpoint whose tokens are real, or a function"):
        emulated_service(cfg, plan)
    with pytest.raises(UsageError, match="--time-scale must be above 0"):
        emulated_service(cfg, plan, next_token=lambda job, place: 1, time_scale=0.0)


def test_a_plan_that_devices_are_not_emulated_for_has_its_pace(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Experts in groups: nobody computes made-up tokens, so that they only take their time."""
    cfg = checkpoints["gqa"].config
    plan, path = plan_of(cfg, Layout(tp=4, ep=2)), tmp_path / "plan.json"
    plan.write(path)
    with pytest.raises(UsageError, match="ep between 1 and tp x dp is planned and simulated alone"):
        prepare(cfg, SimOptions(plan=path))
    assert prepare(cfg, SimOptions(plan=path), computed=False) == plan
    with pytest.raises(OutOfMemory, match=r"--scale-memory 0\.0001"):
        prepare(cfg, SimOptions(plan=path, scale_memory=1e-4), computed=False)
    priced = ticking(cfg, plan)
    served = emulated_service(cfg, plan, next_token=lambda job, place: place, clock=Virtual(), priced=priced)
    client = Client()
    served.submit([Job((1, 2, 3), 4, Sampling())], [client])
    assert client.wait().tokens == [0, 1, 2, 3]
    assert_nothing_is_held(served)
