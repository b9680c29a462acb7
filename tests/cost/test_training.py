"""Training steps: laws that hold whatever kernels cost, memory that adds up, and weights that all arrive."""

from __future__ import annotations

import csv
import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from bench import training_steps
from foundation.errors import CapacityError, UsageError
from model.formats import Formats
from model.hf_config import load_config
from model.split import Layout
from model.weights import parameter_counts
from runtime.deployment.ledger import DeviceMemory, stage_weight_bytes
from runtime.pricing import Chip, Price, PriceBook, PriceError, open_book
from runtime.pricing.training import (
    Sequences,
    TrainLayout,
    best_layouts,
    train_layouts,
    training_formats,
    training_memory,
    training_step,
    weight_sync,
)
from runtime.pricing.training.layout import spans_on
from runtime.pricing.training.step import pipelined
from runtime.pricing.training.weights import stage_weights
from tests.cost.chips import CHIPS, UNMEASURED
from tests.plans import formats

ROOT = Path(__file__).resolve().parents[2]
AIR, GLM5 = load_config("glm-4.5-air"), load_config("glm-5")
LAYOUT = TrainLayout(tp=2, pp=4, dp=8, ep=8, micro_batch_tokens=8192)
WIDE = TrainLayout(tp=1, pp=16, dp=4, cp=4, ep=16, micro_batch_tokens=16384)
BATCH = Sequences.equal(64, 4096)


@cache
def book(name: str = "h200-sxm") -> PriceBook:
    return open_book(CHIPS[name])


def other(**changes: Any) -> PriceBook:
    return open_book(dataclasses.replace(CHIPS["h200-sxm"], **changes))


def step(layout: TrainLayout = LAYOUT, batch: Sequences = BATCH, of: PriceBook | None = None, **more: Any) -> Any:
    return training_step(AIR, of or book(), layout, batch, **more)


# --- seconds


@settings(max_examples=8)
@given(st.lists(st.sampled_from([1, 200, 3000, 8192]), min_size=1, max_size=40), st.sampled_from([1, 900, 8192]))
def test_more_tokens_are_never_cheaper(lengths: list[int], more: int) -> None:
    assert step(batch=Sequences.of([*lengths, more])).seconds >= step(batch=Sequences.of(lengths)).seconds * (1 - 1e-9)


def test_a_rank_has_the_longest_sequence() -> None:
    """Which takes as long alone as among few others, and longer than its tokens in short ones."""
    alone = step(batch=Sequences.of([8192]))
    assert step(batch=Sequences.of([8192, 1, 1])).seconds == pytest.approx(alone.seconds)
    assert step(batch=Sequences.equal(64, 128)).seconds < alone.seconds


def test_parts_are_the_step_and_grade_it() -> None:
    found = step(scored=1)
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts.values()), rel=1e-12)
    assert found.price.seconds == pytest.approx(found.seconds, rel=1e-12)
    assert found.evidence in ("transferred", "assumed"), "gradients have no tables of their own"
    assert {"forward", "backward", "recompute", "tensor", "exchange", "stages", "bubble", "optimizer"} <= set(
        found.parts
    )
    assert found.tokens_per_s == pytest.approx(BATCH.tokens / found.seconds)


@pytest.mark.parametrize("what", ["memory", "scale_up", "scale_out", "peak"])
def test_a_faster_chip_is_never_slower(what: str) -> None:
    chip = CHIPS["h200-sxm"]
    assert chip.scale_up and chip.scale_out
    faster = {
        "memory": {"memory_bandwidth_bytes_per_s": 2 * chip.memory_bandwidth_bytes_per_s},
        "peak": {"peak_flops_per_s": {name: 2 * rate for name, rate in chip.peak_flops_per_s.items()}},
    } | {
        name: {name: dataclasses.replace(link, bandwidth_bytes_per_s=2 * link.bandwidth_bytes_per_s)}
        for name, link in (("scale_up", chip.scale_up), ("scale_out", chip.scale_out))
    }
    layout = dataclasses.replace(LAYOUT, overlap_gradients=False)
    assert step(layout, of=other(**faster[what])).seconds < step(layout).seconds


def test_a_step_is_linear_in_micro_batches_and_waits_once_for_the_pipeline() -> None:
    one, two, three = (step(batch=Sequences.equal(64 * n, 4096)) for n in (1, 2, 3))
    assert two.seconds - one.seconds == pytest.approx(three.seconds - two.seconds, rel=1e-9)
    assert one.parts["bubble"] == two.parts["bubble"]
    runs = step(dataclasses.replace(LAYOUT, interleave=3))
    assert runs.parts["bubble"].seconds < 0.5 * one.parts["bubble"].seconds
    assert runs.parts["stages"].seconds == pytest.approx(3 * one.parts["stages"].seconds)


def played(forward: list[float], backward: list[float], count: int) -> float:
    """Seconds of 1F1B: each stage warms up with as many micro-batches forward as stages follow it, then takes turns."""
    stages = len(forward)
    orders = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, count)
        order = [("f", i) for i in range(warm)]
        for i in range(count):
            order += [("f", warm + i)] if warm + i < count else []
            order.append(("b", i))
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    free, at = [0.0] * stages, [0] * stages
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                way, i = orders[stage][at[stage]]
                before = stage - 1 if way == "f" else stage + 1
                needed = [(way, i, before)] if 0 <= before < stages else []
                needed += [("f", i, stage)] if way == "b" else []
                if any(each not in done for each in needed):
                    break
                begin = max([free[stage], *(done[each] for each in needed)])
                done[way, i, stage] = free[stage] = begin + (forward if way == "f" else backward)[stage]
                at[stage] += 1
    return max(free)


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(0, 8), st.floats(0.5, 2.0), st.lists(st.floats(0.2, 1.0), min_size=6, max_size=6))
def test_the_bubble_is_that_of_a_played_pipeline(stages: int, more: int, ratio: float, scales: list[float]) -> None:
    """Exactly where stages are equal; else it is no less, nor more than all stages' first micro-batch."""
    count = stages + more

    def priced(units: list[float]) -> float:
        return sum(
            part.seconds
            for part in pipelined(
                [{"forward": Price(unit, "compute", "measured", 0.0)} for unit in units], float(count)
            )[1].values()
        )

    even = [1.0 + ratio] * stages
    assert priced(even) == pytest.approx(played([1.0] * stages, [ratio] * stages, count))
    scale = scales[:stages]
    real = played(scale, [ratio * each for each in scale], count)
    found = priced([(1 + ratio) * each for each in scale])
    assert real <= found * (1 + 1e-9) and found <= real + (1 + ratio) * sum(scale)


def test_recompute_trades_memory_for_time() -> None:
    device = DeviceMemory.of(hw_profiles.load("h200-sxm"), LAYOUT.devices)
    ways = [dataclasses.replace(LAYOUT, recompute=way) for way in ("none", "selective", "full")]
    seconds = [step(way).seconds for way in ways]
    kept = [training_memory(AIR, way, device).parts["activations"] for way in ways]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    whole, again = (step(way).parts for way in (ways[0], ways[2]))
    assert whole["recompute"].seconds == 0
    layers = again["forward"].seconds - again["recompute"].seconds
    assert 0 <= layers < 0.2 * again["forward"].seconds, "all but embedding, head and loss is done again"


def test_what_is_hidden_is_not_waited_for() -> None:
    plain, hidden = step(), step(dataclasses.replace(LAYOUT, overlap_exchange=True))
    assert plain.parts["exchange"].seconds > hidden.parts["exchange"].seconds
    both = hidden.parts["exchange"].seconds + hidden.hidden["exchange"].seconds
    assert both == pytest.approx(plain.parts["exchange"].seconds)
    shown = step(dataclasses.replace(LAYOUT, overlap_gradients=False))
    for name in ("gradients", "weights"):
        assert shown.parts[name].seconds == pytest.approx(plain.parts[name].seconds + plain.hidden[name].seconds)


def test_scoring_is_a_forward_pass_of_each_micro_batch() -> None:
    plain, scored = step(), step(scored=2)
    one = scored.parts["scoring"].seconds / 2
    assert plain.parts["forward"].seconds < one < plain.parts["forward"].seconds + plain.parts["backward"].seconds
    assert scored.seconds == pytest.approx(plain.seconds + 2 * one)


def test_long_sequences_go_over_ranks_of_context() -> None:
    """Half the tokens a device, and keys that go around; narrow selections cost less than reading all."""
    alone, spread = (training_step(GLM5, book(), at, Sequences.equal(16, 16384)) for at in
                     (dataclasses.replace(WIDE, cp=1, dp=16), WIDE))  # fmt: skip
    assert "context" not in alone.parts and spread.parts["context"].seconds > 0
    assert spread.parts["bubble"].seconds < alone.parts["bubble"].seconds, "micro-batches are a quarter as large"
    dense = dataclasses.replace(
        GLM5, indexer=None, layers=tuple(dataclasses.replace(kind, indexer="none") for kind in GLM5.layers)
    )
    with_all = training_step(dense, book(), WIDE, Sequences.equal(4, 16384))
    assert training_step(GLM5, book(), WIDE, Sequences.equal(4, 16384)).seconds < with_all.seconds


def test_groups_of_experts_lie_whole_in_a_rack() -> None:
    rack = dataclasses.replace(CHIPS["gb200-nvl72"])
    found = spans_on(TrainLayout(pp=4, dp=64, ep=64), rack)
    assert found.dense.domains == 1 and found.stages_across_domains
    assert spans_on(TrainLayout(pp=4, dp=16, ep=16), CHIPS["h200-sxm"]).dense.domains == 2


def test_what_a_step_cannot_be() -> None:
    with pytest.raises(UsageError, match="longest sequence has 9000 tokens, and a micro-batch 8192"):
        step(batch=Sequences.of([9000]))
    with pytest.raises(UsageError, match="at least one token"):
        Sequences.of([5, 0])
    with pytest.raises(UsageError, match="ep must divide tp x cp x dp = 2 x 1 x 8 = 16, not 3"):
        TrainLayout(tp=2, dp=8, ep=3)
    with pytest.raises(UsageError, match="pp x interleave = 4 x 20"):
        dataclasses.replace(LAYOUT, interleave=20).check(AIR)
    with pytest.raises(UsageError, match="in bf16, fp8 or mxfp8, not w4a16"):
        training_formats("w4a16")
    with pytest.raises(UsageError, match="some-npu multiplies nothing in fp8-block: train in bf16"):
        step(of=open_book(UNMEASURED), formats="fp8")
    with pytest.raises(UsageError, match="tp = 16 is more than its 8 KV heads"):
        TrainLayout(tp=16, ep=16).check(AIR)


def test_a_published_step_is_met() -> None:
    """DeepSeek-V3 on 256 GB300, whose experts exchange tokens inside a rack: nothing of it went into a price."""
    with (ROOT / "bench" / "training_steps.csv").open(encoding="utf-8") as file:
        (said,) = (row for row in csv.DictReader(file) if row["chip"] == "gb300-nvl72" and row["formats"] == "bf16")
    assert 1 / 1.2 < training_steps.row(said).ratio < 1.2


# --- memory


@pytest.mark.parametrize("layout", [LAYOUT, dataclasses.replace(LAYOUT, tp=1, dp=16, ep=4), WIDE])
def test_every_weight_is_held_and_trained_once(layout: TrainLayout) -> None:
    """Copies left out, the devices' shares are the model; in 16 bits they are what the ledger of serving counts."""
    cfg = AIR if layout.pp == 4 else GLM5
    stages = stage_weights(cfg, layout)
    counts = parameter_counts(cfg)["total"]
    if layout.tp == 1:
        groups = layout.shard.stage_devices
        held = sum(stage.dense + stage.frozen + stage.experts * groups for stage in stages)
        assert held == sum(size for part, size in counts.items() if part != "mtp")
    for number, stage in enumerate(stages):
        ledger = sum(stage_weight_bytes(cfg, layout.shard, Formats(), number, mtp=False).values())
        assert 2 * (stage.all + stage.frozen) == pytest.approx(ledger, rel=1e-5)  # routers' biases are in 32 bits


def test_zero_shards_the_optimizer_alone() -> None:
    device = DeviceMemory.of(hw_profiles.load("h200-sxm"), LAYOUT.devices)
    sharded, whole = (training_memory(AIR, dataclasses.replace(LAYOUT, zero=zero), device) for zero in (True, False))
    assert sharded.total_bytes < whole.total_bytes
    for held, copies in ((sharded, (8, 2)), (whole, (1, 1))):
        weights = stage_weights(AIR, LAYOUT)[held.stage]
        assert held.parts["optimizer"] == 12 * (weights.dense / copies[0] + weights.experts / copies[1])
        assert held.parts["gradients"] == 4 * weights.all


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    device = DeviceMemory.of(hw_profiles.load("h200-sxm"), 64)
    layout = dataclasses.replace(LAYOUT, recompute="none")
    one, two, all_of_them = (training_memory(AIR, layout, device, micro_batches=count) for count in (1, 2, math.inf))
    assert all_of_them.stage == 0 and two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.1)
    assert all_of_them.parts["activations"] == pytest.approx(4 * one.parts["activations"], rel=0.1)
    assert training_memory(AIR, layout, device, "fp8").parts["activations"] < all_of_them.parts["activations"]
    runs = training_memory(AIR, dataclasses.replace(layout, interleave=3), device)
    assert runs.parts["activations"] == pytest.approx(5 / 4 * all_of_them.parts["activations"])


def test_layouts_fill_the_devices_and_fit() -> None:
    profile = hw_profiles.load("h200-sxm")
    flash, device = load_config("glm-4.7-flash"), DeviceMemory.of(profile, 8)
    found = train_layouts(flash, profile, 8, longest=8192)
    assert found and len(set(found)) == len(found)
    for layout in found:
        layout.check(flash)
        assert layout.devices == 8 and layout.micro_batch_tokens >= 8192 and training_memory(flash, layout, device).fits
    fastest = best_layouts(flash, profile, book(), 8, Sequences.equal(64, 8192), count=3)
    seconds = [found.seconds for _, found in fastest]
    assert seconds == sorted(seconds) and {layout for layout, _ in fastest} <= set(found)


def test_devices_that_cannot_train_say_why() -> None:
    profile = hw_profiles.load("h200-sxm")
    with pytest.raises(UsageError, match="12 devices are no whole servers of 8: use 8"):
        train_layouts(AIR, profile, 12)
    with pytest.raises(CapacityError, match=r"GB a device of 150.1 GB usable.*\n.*usable"):
        train_layouts(GLM5, profile, 32)
    with pytest.raises(CapacityError, match=r"training glm-5 on 16 devices \(tp1 pp16 dp1 ep1, recompute full\) takes"):
        training_memory(GLM5, TrainLayout(pp=16), DeviceMemory.of(profile, 16)).check()
    training_memory(AIR, LAYOUT, DeviceMemory.of(profile, 64)).check()


# --- weights to rollouts


@pytest.mark.parametrize("schedule", ["sharded", "broadcast"])
def test_new_weights_arrive_in_the_rollouts_format(schedule: Any) -> None:
    rollout = Layout(tp=8, dp=2, ep=16)
    wide, narrow = (
        weight_sync(GLM5, WIDE, book(), rollout, book(), formats(name), 2, schedule) for name in ("bf16", "fp8")
    )
    assert wide.bytes == sum(stage_weight_bytes(GLM5, Layout(), formats("bf16"), 0, mtp=False).values())
    assert narrow.bytes < 0.52 * wide.bytes and narrow.seconds < 0.6 * wide.seconds
    assert narrow.device_bytes == sum(stage_weight_bytes(GLM5, rollout, formats("fp8"), 0, mtp=False).values())
    assert narrow.seconds == pytest.approx(sum(part.seconds for part in narrow.parts.values()))


def test_no_port_takes_more_than_it_can() -> None:
    """Each server of a replica takes what its devices hold; all of the model goes through one port where it is
    broadcast from there."""
    chip = CHIPS["h200-sxm"]
    assert chip.scale_out
    rate = chip.scale_out.bandwidth_bytes_per_s * chip.scale_out.efficiency
    rollout = Layout(tp=8, dp=2, ep=16)
    found = {
        way: weight_sync(GLM5, WIDE, book(), rollout, book(), formats("bf16"), 4, way)  # type: ignore[arg-type]
        for way in ("sharded", "broadcast")
    }
    assert found["broadcast"].parts["transfer"].seconds == pytest.approx(found["broadcast"].bytes / rate, rel=1e-4)
    least = found["sharded"].bytes / 16 / rate
    assert least < found["sharded"].parts["transfer"].seconds < 1.2 * least
    more = weight_sync(GLM5, WIDE, book(), rollout, book(), formats("bf16"), 64, "sharded")
    assert 0 < more.seconds - found["sharded"].seconds < 1e-3, "a chain of replicas adds hops"
    faster = dataclasses.replace(chip, scale_out=dataclasses.replace(chip.scale_out, bandwidth_bytes_per_s=4 * 50e9))
    assert weight_sync(GLM5, WIDE, open_book(faster), rollout, book(), formats("bf16")).seconds == pytest.approx(
        weight_sync(GLM5, WIDE, book(), rollout, book(), formats("bf16")).seconds
    ), "the slower side binds"


def test_what_a_servers_devices_all_hold_enters_it_once() -> None:
    """Attention data parallelism: eight copies of the dense weights on a server, and eight times other experts."""
    chip, rollout = CHIPS["h200-sxm"], Layout(tp=1, dp=16, ep=16)
    assert chip.scale_out
    share = stage_weight_bytes(GLM5, rollout, formats("bf16"), 0, mtp=False)
    dense = sum(share.values()) - share["experts"]
    found = weight_sync(GLM5, WIDE, book(), rollout, book(), formats("bf16"))
    rate = chip.scale_out.bandwidth_bytes_per_s * chip.scale_out.efficiency
    assert found.parts["transfer"].seconds == pytest.approx((share["experts"] + dense / 8) / rate, rel=1e-4)


def test_pools_without_a_network_are_refused() -> None:
    alone = open_book(dataclasses.replace(UNMEASURED, scale_out=None))
    with pytest.raises(PriceError, match=r"some-npu has no link.scale_out.bandwidth_bytes_per_s, which weights take"):
        weight_sync(GLM5, WIDE, alone, Layout(tp=8), alone, formats("bf16"))


def test_chips_that_nobody_measured_are_priced_too() -> None:
    assert isinstance(UNMEASURED, Chip)
    found = step(of=open_book(UNMEASURED))
    assert found.seconds > step().seconds and found.evidence in ("transferred", "assumed")
