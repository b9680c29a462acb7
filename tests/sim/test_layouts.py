"""Any layout gives the CPU backend's tokens and logits: split heads, widths, experts, sequences and layers, copies
of experts in shuffled slots, ragged prompts cut into chunks, uneven ranks, and a cache too small for everybody."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.split import Layout
from tests.sim.servers import assert_same, emulated, plan_of, prompts_of, reference

Checkpoints = dict[str, Checkpoint]
slow = pytest.mark.slow


def run(checkpoint: Checkpoint, layout: Layout, lengths: list[int], most: list[int], **plan: object) -> None:
    cfg = checkpoint.config
    requests = prompts_of(cfg, lengths, most, seed=sum(lengths))
    found = emulated(checkpoint, plan_of(cfg, layout, **plan), requests)  # type: ignore[arg-type]
    assert_same(found.outcome.completions, reference(checkpoint, requests))


@pytest.mark.parametrize(
    ("family", "layout", "redundant"),
    [
        ("dsa", Layout(tp=2, dp=2, ep=4, pp=2), 1),
        pytest.param("gqa", Layout(tp=2, dp=4, ep=8), 1, marks=slow),
        pytest.param("mla", Layout(tp=4, ep=4), 1, marks=pytest.mark.slow),
        pytest.param("mla", Layout(tp=2, dp=4), 0, marks=pytest.mark.slow),
    ],
)
def test_layouts(checkpoints: Checkpoints, family: str, layout: Layout, redundant: int) -> None:
    """Three sequences over the ranks, of which some then have none; contexts on both sides of the selection."""
    run(checkpoints[family], layout, [37, 5, 21], [4, 1, 6], redundant=redundant)


def test_a_small_cache_preempts_and_the_tokens_stay(checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints["dsa"]
    requests = prompts_of(checkpoint.config, [30, 28, 31, 20], [12, 20, 30, 8])
    plan = plan_of(checkpoint.config, Layout(dp=2, ep=2), pages=3, engine="glm5", page_tokens=32)
    found = emulated(checkpoint, plan, requests)
    assert found.outcome.report.preemptions > 0
    assert_same(found.outcome.completions, reference(checkpoint, requests))


def test_an_answer_may_stop_early(checkpoints: Checkpoints) -> None:
    """Where a token is a stop token, there the simulation learns that the answer ends, and goes on with the others."""
    checkpoint = checkpoints["gqa"]
    lengths, most = [9, 12, 9], [6, 6, 6]  # one page each
    asked = [dataclasses.replace(r, keep_logits=False) for r in prompts_of(checkpoint.config, lengths, most)]
    whole = reference(checkpoint, asked)
    stop = frozenset({whole[0].token_ids[3], whole[1].token_ids[0]})
    requests = [dataclasses.replace(r, stop_ids=stop) for r in asked]
    expected = reference(checkpoint, requests)
    assert {c.finish_reason for c in expected} >= {"stop"}
    found = emulated(checkpoint, plan_of(checkpoint.config, Layout(tp=2)), requests)
    assert_same(found.outcome.completions, expected)


degrees = st.sampled_from([1, 2, 4, 8])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, dp, pp = draw(degrees), draw(degrees), draw(st.sampled_from([1, 2, 3]))
    return Layout(tp, dp, tp * dp if draw(st.booleans()) else 1, pp)


def check_any(checkpoints: Checkpoints, data: st.DataObject, families: tuple[str, ...] = ("dsa", "gqa", "mla")) -> None:
    checkpoint = checkpoints[data.draw(st.sampled_from(families), "family")]
    layout = data.draw(layouts().filter(lambda each: admitted(checkpoint, each)), "layout")
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=6), "prompts")
    most = data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)), "max tokens")
    redundant = data.draw(st.integers(0, 2), "redundant") if layout.by_expert else 0
    engine = data.draw(st.sampled_from(["sglang", "vllm", "glm5"]), "engine")
    chunk = data.draw(st.sampled_from([16, 64, 8192]), "chunk")
    run(checkpoint, layout, lengths, most, redundant=redundant, seed=len(lengths), engine=engine,
        chunked_prefill_tokens=chunk)  # fmt: skip


def admitted(checkpoint: Checkpoint, layout: Layout) -> bool:
    try:
        layout.check(checkpoint.config)
        layout.require_mesh(checkpoint.config)
    except UsageError:
        return False
    return True


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
@settings(max_examples=6, **QUIET)
@given(data=st.data())
def test_random_layouts(checkpoints: Checkpoints, data: st.DataObject) -> None:
    check_any(checkpoints, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [("w8a8", 4 / 127 / 12**0.5), ("fp8", 2**-4 / 3**0.5 * (3 / 8 / np.log(2)) ** 0.5)],
)
def test_number_formats_reach_every_device(checkpoints: Checkpoints, scheme: str, rounding: float) -> None:
    """Split weights with their scales, in the chip's formats: as far from float32's logits as rounding takes them.

    rounding: RMS of what one rounding moves a value by, relative to the values. INT8: a step of a 127th of the
    largest, which is about four times the RMS, is off by its 12^-1/2: 0.9 %. e4m3: half a step of 2^-3, relative to
    values spread evenly over an octave: 2.7 %. A product has two rounded operands, and a token passes five of them a
    layer (to heads, from heads, gate, up, down) and the head; their errors add up as independent ones do.
    """
    checkpoint = checkpoints["gqa"]
    requests = prompts_of(checkpoint.config, [21, 9], [1, 1])
    plan = plan_of(checkpoint.config, Layout(tp=2, dp=2, ep=4), redundant=1, scheme=scheme)
    found = emulated(checkpoint, plan, requests).outcome.completions
    for ours, exact in zip(found, reference(checkpoint, requests), strict=True):
        assert ours.logits is not None and exact.logits is not None
        error = np.linalg.norm(ours.logits[:-1] - exact.logits[:-1]) / np.linalg.norm(exact.logits[:-1])
        bound = rounding * (2 * (5 * checkpoint.config.num_layers + 1)) ** 0.5
        assert bound / 10 < error < bound
