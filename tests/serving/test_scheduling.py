"""What goes into a step, engine by engine, on cases small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.deployment.engines import Engine
from runtime.serving import Deployment, Disaggregated, Request, Speculation, Workload, simulate
from runtime.serving.kv_pool import KvPool
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.scheduler import plan
from runtime.serving.simulation import Simulation
from tests.serving.helpers import plain_engine, run_checked
from tests.serving.pricers import LinearPricer


def make_rank(engine: Engine, pool_tokens: int = 100_000) -> Rank:
    return Rank(engine, KvPool(pool_tokens, engine.page_tokens), None, np.random.default_rng(0))


def queue(rank: Rank, *prompts: int, output: int = 100) -> list[Request]:
    requests = [Request(i, prompt, output, visible_at=0.0) for i, prompt in enumerate(prompts)]
    rank.waiting.extend(requests)
    return requests


def chunks(step: StepPlan) -> list[tuple[int, int, int]]:
    return [(request.id, new, before) for request, new, before in step.chunks]


def finish(rank: Rank, step: StepPlan, now: float) -> None:
    """Carries a planned step out."""
    if step.decode:
        rank.grow(1)
        rank.decode(np.array([now]))
    for request, new, before in step.chunks:
        request.computed = before + new
        if request.computed == request.target:
            rank.end_prefill(request, now)


def sglang(**overrides: Any) -> Engine:
    return plain_engine("sglang", **{"chunked_prefill_tokens": 1024, "page_tokens": 64, **overrides})


def test_sglang_fills_prefill_batches_across_requests_and_decodes_only_then() -> None:
    rank = make_rank(sglang())
    queue(rank, 700, 700, 700)
    first = plan(rank, 0.0, 0.0)
    assert chunks(first) == [(0, 700, 0), (1, 320, 0)]  # 1024 - 704 (11 pages) leaves 5 pages
    finish(rank, first, 1.0)
    second = plan(rank, 1.0, 1.0)
    assert chunks(second) == [(1, 380, 320), (2, 640, 0)]
    assert not second.decode
    finish(rank, second, 2.0)
    third = plan(rank, 2.0, 2.0)
    assert chunks(third) == [(2, 60, 640)]
    finish(rank, third, 3.0)
    assert plan(rank, 3.0, 3.0).decode and len(rank.running) == 3


def test_vllm_decodes_in_every_step_and_gives_prompts_the_rest_of_the_budget() -> None:
    rank = make_rank(plain_engine("vllm", max_step_tokens=512, chunked_prefill_tokens=512))
    queue(rank, 500, 700)
    finish(rank, plan(rank, 0.0, 0.0), 1.0)  # 500 of the first, 12 of the second
    step = plan(rank, 1.0, 1.0)
    assert step.decode and chunks(step) == [(1, 511, 12)]
    assert rank.shape(step).tokens == 512


def test_in_flight_batching_does_not_cut_prompts() -> None:
    rank = make_rank(plain_engine("trtllm", max_step_tokens=1000))
    queue(rank, 600, 600)
    first = plan(rank, 0.0, 0.0)
    assert chunks(first) == [(0, 600, 0)]
    finish(rank, first, 1.0)
    second = plan(rank, 1.0, 1.0)
    assert second.decode and chunks(second) == [(1, 600, 0)]


def test_trtllm_admits_only_what_can_run_to_its_end() -> None:
    rank = make_rank(plain_engine("trtllm", page_tokens=1), 1500)
    queue(rank, 600, 600, output=200)
    assert chunks(plan(rank, 0.0, 0.0)) == [(0, 600, 0)]  # 2 x 800 > 1500
    assert rank.blocked == "kv-pool"
    vllm = make_rank(plain_engine("vllm", page_tokens=1), 1500)
    queue(vllm, 600, 600, output=200)
    assert len(plan(vllm, 0.0, 0.0).chunks) == 2  # the prompts fit; answers may be preempted


def by_chunk(prefix_cache: bool, pool_tokens: int = 960, **overrides: Any) -> Rank:
    sizes = {"max_step_tokens": 400, "chunked_prefill_tokens": 400, "page_tokens": 16}
    engine = plain_engine("vllm@0.17", prefix_cache=prefix_cache, **{**sizes, **overrides})
    return Rank(engine, KvPool(pool_tokens, 16, keeps_left=engine.prefix_cache), None, np.random.default_rng(0))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_vllm_before_0_19_admits_by_the_first_chunk_and_puts_back_whom_no_page_is_left_for(prefix_cache: bool) -> None:
    rank = by_chunk(prefix_cache)
    first, second = queue(rank, 600, 600, output=20)
    finish(rank, plan(rank, 0.0, 0.0), 1.0)
    step = plan(rank, 1.0, 1.0)
    assert chunks(step) == [(0, 200, 400), (1, 200, 0)]  # 1,200 tokens will not fit 960, but those do
    finish(rank, step, 2.0)
    step = plan(rank, 2.0, 2.0)
    assert step.decode and not step.chunks and rank.waiting[0] is second  # 22 pages left, 25 asked for
    while first in rank.running:
        finish(rank, step, 3.0)
        step = plan(rank, 3.0, 3.0)
    again = 192 if prefix_cache else 0  # whole pages of its 200 tokens, which nobody took; the answer took free ones
    assert chunks(step) == [(1, 400, again)] and second.preemptions == 1
    rank.pool.check(rank.holders())
    whole = make_rank(plain_engine("vllm", max_step_tokens=400, chunked_prefill_tokens=400, page_tokens=16), 960)
    queue(whole, 600, 600)
    finish(whole, plan(whole, 0.0, 0.0), 1.0)
    assert chunks(plan(whole, 1.0, 1.0)) == [(0, 200, 400)] and whole.blocked == "kv-pool"


def test_what_a_preempted_request_left_is_taken_from_its_end() -> None:
    rank = by_chunk(True, 320)
    (request,) = queue(rank, 160)
    finish(rank, plan(rank, 0.0, 0.0), 1.0)
    rank.preempt(request)
    assert (rank.pool.free, rank.pool.available, rank.pool.cached_tokens(request)) == (10, 20, 160)
    rank.pool.take(14)
    assert (rank.pool.available, rank.pool.cached_tokens(request)) == (6, 96)
    rank.pool.give(14)
    assert chunks(plan(rank, 1.0, 1.0)) == [(0, 65, 96)]
    rank.pool.check(rank.holders())
    rank.preempt(request)
    rank.drop(request)
    assert rank.pool.free == rank.pool.total


def test_sglang_estimates_with_its_ratio_and_gives_up_until_something_ends() -> None:
    rank = make_rank(sglang(prefix_cache=True, page_tokens=1, new_token_ratio=0.5), 2000)
    queue(rank, 600, 600, 100, output=400)
    step = plan(rank, 0.0, 0.0)
    # first: 1000 of 2000. second: 600 + 400 against 2000 - 600 - 400 (its own batch, in full): no.
    assert chunks(step) == [(0, 600, 0)] and rank.blocked == "kv-pool"
    finish(rank, step, 1.0)
    rank.blocked = ""
    # now the first counts 0.5 x 399: 1000 < 1400 - 199.5
    assert chunks(plan(rank, 1.0, 1.0)) == [(1, 600, 0)]


def test_sglang_looks_ahead_when_lengths_are_known() -> None:
    """Without a prefix cache: 600 + 400 now and 300 + 400 later fit only because the first ends in time."""
    rank = make_rank(sglang(prefix_cache=False, page_tokens=1), 1450)
    first, second = queue(rank, 600, 300, output=400)
    step = plan(rank, 0.0, 0.0)
    # Together they grow by 800 and 1450 - 900 = 550 is left: refused while both are new.
    assert chunks(step) == [(0, 600, 0)]
    finish(rank, step, 1.0)
    for now in range(2, 260):
        finish(rank, StepPlan(decode=True), float(now))
    rank.blocked = ""
    # 141 left for the first: 292 free - 2 x 141 > 2 tokens, and the end of the first gives back 859.
    assert first.pages == 600 and int(rank.left[0]) == 141
    assert chunks(plan(rank, 300.0, 300.0)) == [(1, 300, 0)]
    assert second in rank.prefilling


def test_preemption_takes_the_engines_victim_and_recomputes() -> None:
    """Two answers outgrow the pool; the victim waits, is prefilled again with what it had made, and ends."""
    for name, victim in (("vllm", 1), ("sglang", 0)):
        overrides = {
            "page_tokens": 1,
            "admission": "prompt",
            "preemption_victim": {0: "least-output", 1: "last"}[victim],
        }
        engine = plain_engine(name, **overrides)
        requests = [Request(0, 50, 60, sent_at=0.03), Request(1, 40, 60, sent_at=0.0)]
        requests.sort(key=lambda request: request.sent_at)
        simulation = Simulation(Workload(requests), Deployment(engine, LinearPricer(), 140))
        report = run_checked(simulation)
        preempted = {request.id: request.preemptions for request in report.requests}
        assert report.preemptions == preempted[0] > 0 and preempted[1] == 0  # 0 came last and has made less
        assert all(request.emitted == 60 for request in report.requests)


def test_overlap_makes_an_arrival_wait_for_the_end_of_the_next_step() -> None:
    """Decode steps of 10 ms from 0.02 on; a request arriving in the middle of one."""
    prompt, lasting = Request(1, 10, 1, sent_at=0.0552), Request(0, 400, 50, sent_at=0.0)
    waits = {}
    for overlap in (False, True):
        engine = plain_engine("sglang", overlap_scheduling=overlap)
        pricer = LinearPricer(fixed=0.010, per_decode=0.0, per_context=0.0)
        workload = Workload([lasting, prompt])
        second = simulate(workload, Deployment(engine, pricer, 10_000)).requests[1]
        waits[overlap] = second.admitted_at - second.queued_at
    assert waits[False] == pytest.approx(0.0048) and waits[True] == pytest.approx(0.0148)


def test_host_time_hides_behind_the_device_only_with_overlap() -> None:
    pricer = LinearPricer(fixed=0.010, per_decode=0.0, per_context=0.0)
    for overlap, host, step in ((True, 0.004, 0.010), (True, 0.030, 0.030), (False, 0.004, 0.014)):
        engine = plain_engine("sglang", overlap_scheduling=overlap, graph_step_host_seconds=host)
        report = simulate(Workload([Request(0, 10, 100)]), Deployment(engine, pricer, 10_000))
        assert report.tpot.mean == pytest.approx(step)
        assert report.itl.p99 == pytest.approx(step, rel=0.01)
        assert sum(report.seconds_by_bound.values()) == pytest.approx(report.duration_s)


def test_graph_padding_reaches_the_pricer() -> None:
    engine = plain_engine("sglang", graph_batch_sizes=(1, 2, 4))
    assert [engine.decode_rows(n) for n in (1, 3, 4, 5)] == [(1, True), (4, True), (4, True), (5, False)]
    pricer = LinearPricer(fixed=0.0, per_decode=0.001, per_prompt=0.0, per_context=0.0)
    requests = [Request(i, 10, 20) for i in range(3)]
    report = simulate(Workload(requests), Deployment(engine, pricer, 10_000))
    assert report.tpot.mean == pytest.approx(0.004)


def test_lock_step_ranks_go_at_the_pace_of_the_slowest() -> None:
    pricer = LinearPricer(fixed=0.0, per_decode=0.0, per_prompt=0.0, per_context=1e-5)
    requests = [Request(0, 100, 50), Request(1, 1000, 50)]
    engine = plain_engine(chunked_prefill_tokens=2048, max_step_tokens=2048)  # prompts whole
    apart = simulate(Workload(requests), Deployment(engine, pricer, 5000, replicas=2)).requests
    together = simulate(Workload(requests), Deployment(engine, pricer, 5000, ranks=2)).requests
    assert apart[0].finished_at < 0.2 * apart[1].finished_at
    assert together[0].finished_at == pytest.approx(apart[1].finished_at)
    assert together[1].finished_at == pytest.approx(apart[1].finished_at)


def test_speculation_yields_its_mean_and_costs_its_queries() -> None:
    speculation = Speculation.from_mean(3, 2.76)
    assert speculation.mean_tokens == pytest.approx(2.76)
    pricer = LinearPricer(fixed=0.010, per_decode=0.0, per_context=0.0)
    requests = [Request(i, 10, 4000) for i in range(8)]
    deployment = Deployment(plain_engine(), pricer, 100_000, speculation=speculation)
    report = simulate(Workload(requests), deployment, seed=5)
    assert report.tpot.mean == pytest.approx(0.010 / 2.76, rel=0.02)
    assert simulate(Workload(requests), deployment, seed=6).tpot != report.tpot


def test_disaggregation_pays_for_the_transfer_and_frees_decode_from_prompts() -> None:
    pricer = LinearPricer(per_context=0.0)
    engine = plain_engine("sglang")
    server = Deployment(engine, pricer, 50_000)
    requests = [Request(i, 1000, 100, sent_at=0.5 * i) for i in range(4)]
    split = Disaggregated(server, server, 1e6, 1e10, 0.002)
    report = simulate(Workload(requests), split)
    prefill, transfer = 0.010 + 1000 * 25e-6, 0.002 + 1000 * 1e6 / 1e10
    assert report.ttft.mean == pytest.approx(prefill + transfer, abs=0.0102)  # up to a decode step of waiting
    assert min(r.first_token_at - r.sent_at for r in report.requests) == pytest.approx(prefill + transfer)
    assert report.itl.p99 < 0.0125  # decode steps never wait for a prompt
    small = Disaggregated(Deployment(engine, pricer, 1100), server, 1e6, 1e10)
    assert simulate(Workload([Request(0, 1000, 500)]), small).measured_requests == 1
    burst = [Request(i, 1000, 2) for i in range(3)]
    queued = simulate(Workload(burst), split).requests
    gaps = np.diff([request.first_token_at for request in queued])
    assert (gaps >= transfer - 0.02).all()  # transfers leave one replica one after another


def test_prefix_cache_skips_what_it_holds() -> None:
    engine = plain_engine("sglang", prefix_cache=True)
    shared = tuple(range(4))
    requests = [Request(0, 2100, 10, shared), Request(1, 2100, 10, shared, sent_at=5.0)]
    report = simulate(Workload(requests), Deployment(engine, LinearPricer(fixed=0.0), 50_000))
    first, second = (request.first_token_at - request.sent_at for request in report.requests)
    assert (first, second) == (pytest.approx(2100 * 25e-6), pytest.approx(52 * 25e-6))
    assert report.prefix_hit_rate == pytest.approx(2048 / 4200)
