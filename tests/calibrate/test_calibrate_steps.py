"""Whole steps beside their ops: what a machine took for a step is what the step is then priced at."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from backends import registry
from foundation.errors import CapacityError
from model.config import ModelConfig
from model.formats import Formats
from model.hf_config import load_config
from model.split import Layout
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting import calibrate_steps
from runtime.porting.calibrate import prices, profile
from runtime.porting.calibrate_calls import ModelRank
from runtime.porting.calibrate_sizes import Effort
from runtime.porting.calibrate_steps import StepClock, few_layers, random_weights
from runtime.pricing.price import PriceError
from runtime.pricing.pricer import GraphPricer
from runtime.pricing.whole_steps import LEAST, MOST, knots, model_key, whole_steps
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, pricer_of, spec_for
from tests.calibrate.test_calibrate import model_calibration

SMALL = Effort(widths=(128,), rows=(1, 32), tokens=(1, 8), chunks=(16, 64), rounds=1, cold_bytes=1e6)
F32 = Formats("f32", "f32")
LINK = {"link.scale_up.bandwidth_bytes_per_s": 1e11, "link.scale_up.latency_s": 1e-6}
STEPS = (
    BatchShape(np.full(1, 192), decode_rows=1, graphed=True),
    BatchShape(np.full(8, 192), decode_rows=8, graphed=True),
    BatchShape(prefill_chunks=[(16, 0)]),
    BatchShape(prefill_chunks=[(64, 0)]),
)


def machine() -> tuple[hw_profiles.Profile, dict[str, Any]]:
    """Made up: its rates are known, and no op of it was measured."""
    found = dataclasses.replace(model_calibration(3e11, 2e10, 2e-6), kernels={"schema": 1, "kernels": {}})
    described = profile(found, registry.get("cpu"), "made-up", "made-up.prices.json")
    peak = described.figures["chip.peak.fp32_flops_per_s"]
    figures = {**described.figures, "chip.peak.bf16_flops_per_s": peak}
    described = dataclasses.replace(described, figures=figures)
    return described, prices(found, described)


def pricer(
    folder: Path, cfg: ModelConfig, steps: Any, layout: Layout = Layout(), scheme: str = "f32", **more: Any
) -> GraphPricer:
    described, tables = machine()
    name = f"made-up-{len(list(folder.iterdir()))}"
    (folder / f"{name}.json").write_text(json.dumps({**tables, "steps": steps} if steps else tables))
    (folder / f"{name}.toml").write_text(hw_profiles.dumps(dataclasses.replace(described, prices=f"{name}.json")))
    loaded = hw_profiles.load(str(folder / f"{name}.toml"), {"node.devices": 8.0, **LINK})
    spec = spec_for(cfg, loaded, layout, scheme, engine="glm5", expert_load="uniform", **more)
    return pricer_of(spec, PriceTables(coarse=True))


def tiny() -> ModelConfig:
    return load_config(str(embedded_checkpoint()))


def test_a_step_is_priced_at_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that take known times, of which a call is a part: prices of the same steps are those times."""
    taken = {(1, 1): 3e-4, (8, 1): 9e-4, (1, 16): 2e-3, (1, 64): 5e-3}
    call_s = 1e-4

    def seconds(programs: object, step: Any) -> float:
        empty = isinstance(programs, calibrate_steps.EmptyPrograms)
        return call_s + (0.0 if empty else taken[step.batch.tokens.shape])

    monkeypatch.setattr(calibrate_steps, "_VISIT_S", 1e-3)

    monkeypatch.setattr(calibrate_steps, "_seconds", seconds)
    clock = StepClock(registry.usable("cpu"), ModelRank(tiny()), SMALL)
    for _ in range(3):
        clock.visit()
    shares = clock.shares(*machine())
    priced = pricer(tmp_path, few_layers(tiny()), shares)
    for shape, asked in zip(STEPS, taken.values(), strict=True):
        assert priced.seconds(shape) == pytest.approx(asked, rel=0.05)
    deep = dataclasses.replace(few_layers(tiny()), layers=few_layers(tiny()).layers * 10)
    for shape, asked in zip(STEPS, taken.values(), strict=True):  # ten times the layers, and the head once
        assert pricer(tmp_path, deep, shares).seconds(shape) == pytest.approx(10 * asked, rel=0.2)


def test_nothing_is_timed_of_what_no_device_holds_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_steps, "host_bytes", lambda: 24e9)
    for rank in (ModelRank(tiny(), Layout(tp=2)), ModelRank(load_config("glm-5"))):
        clock = StepClock(registry.usable("cpu"), rank, SMALL)
        clock.visit()
        assert clock.shares(*machine()) is None


def test_a_device_without_room_for_a_step_times_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits at first, and not with the next program: a calibration goes on without."""
    left = [5]

    def seconds(*_: object) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise CapacityError("no memory left")
        return 1e-3

    monkeypatch.setattr(calibrate_steps, "_seconds", seconds)
    clock = StepClock(registry.usable("cpu"), ModelRank(tiny()), SMALL)
    clock.visit()
    assert clock.shares(*machine()) is None


SHARES = st.lists(
    st.tuples(st.floats(1e-6, 1.0), st.floats(LEAST, MOST)), min_size=1, max_size=8, unique_by=lambda knot: knot[0]
).map(lambda found: [list(knot) for knot in sorted(found)])


@given(decode=SHARES, prefill=SHARES, ops_s=st.floats(1e-7, 10.0), layers=st.integers(1, 99))
def test_shares_lie_between_their_knots(
    decode: list[list[float]], prefill: list[list[float]], ops_s: float, layers: int
) -> None:
    found = whole_steps({"model": "x", "decode": decode, "prefill": prefill})
    assert found
    for line, prompts in ((decode, False), (prefill, True)):
        got = found.share(ops_s, layers, prompts)
        at = [each for seconds, each in line if seconds == min(max(ops_s / layers, line[0][0]), line[-1][0])]
        assert min(each for _, each in line) * (1 - 1e-9) <= got <= max(each for _, each in line) * (1 + 1e-9)
        if at:
            assert got == pytest.approx(at[0])


@given(SHARES)
def test_knots_rise_and_keep_to_what_was_found(points: list[list[float]]) -> None:
    made = knots([(seconds, share) for seconds, share in points])
    assert whole_steps({"model": "x", "decode": made, "prefill": made})
    assert all(LEAST <= share <= MOST for _, share in made)
    for found, low, high in ((0, points[0][0], points[-1][0]), (1, LEAST, MOST)):
        assert all(low * 0.999 <= knot[found] <= high * 1.001 for knot in made)


def test_the_parts_of_a_price_are_the_price(tmp_path: Path) -> None:
    """Of steps of all kinds; its own model's alone take the share, on a device that holds its layers whole."""
    cfg = few_layers(tiny())
    steps = {"model": model_key(tiny(), F32), "decode": [[1e-5, 0.5], [1e-3, 2.0]], "prefill": [[1e-4, 0.25]]}
    mixed = BatchShape(np.full(4, 300), decode_rows=4, prefill_chunks=[(32, 64)])
    plain, own = pricer(tmp_path, cfg, None), pricer(tmp_path, cfg, steps)
    for shape in (*STEPS, mixed):
        price = own.price(shape)
        assert price.seconds == pytest.approx(own.seconds(shape), rel=0.01)
        assert price.by_op["head"] == pytest.approx(plain.price(shape).by_op["head"])
        assert sum(price.by_op.values()) == pytest.approx(price.seconds)
    ops_s = plain.seconds(mixed) - plain.price(mixed).by_op["head"]
    assert own.seconds(mixed) - own.price(mixed).by_op["head"] == pytest.approx(ops_s / 4, rel=0.01)
    assert any("whole steps" in source for part in own.price(mixed).parts for source in part.sources)
    for layout in (Layout(tp=2), Layout(dp=2), Layout(dp=2, ep=2)):
        apart = [pricer(tmp_path, cfg, each, layout).seconds(mixed) for each in (None, steps)]
        assert apart[0] == apart[1]
    for scheme in ("bf16", "w8a8"):
        assert pricer(tmp_path, cfg, steps, scheme=scheme).seconds(mixed) == pytest.approx(
            pricer(tmp_path, cfg, None, scheme=scheme).seconds(mixed)
        )
    drafting = dataclasses.replace(mixed, query_tokens=3)
    model = dataclasses.replace(cfg, mtp_layers=1)
    bare, drafts = (pricer(tmp_path, model, each, drafts=2) for each in (None, steps))
    price = drafts.price(drafting)
    assert price.seconds == pytest.approx(drafts.seconds(drafting), rel=0.01)
    for same in ("mtp", "head"):
        assert price.by_op[same] == pytest.approx(bare.price(drafting).by_op[same])
    other = dataclasses.replace(cfg, vocab_size=2 * cfg.vocab_size)
    assert pricer(tmp_path, other, steps).seconds(mixed) == pricer(tmp_path, other, None).seconds(mixed)


@pytest.mark.parametrize(
    ("steps", "says"),
    [([], "must have"), ({"model": "x", "decode": [[1, 1]]}, "must have"),
     ({"decode": [[1, 1]], "prefill": []}, "must have"),
     ({"model": "x", "decode": [[1, 1]], "prefill": []}, "prefill"),
     ({"model": "x", "decode": 3, "prefill": 3}, "decode"),
     ({"model": "x", "decode": [[1, 99]], "prefill": [[1, 1]]}, "shares"),
     ({"model": "x", "decode": [[math.nan, 1]], "prefill": [[1, 1]]}, "decode"),
     ({"model": "x", "decode": [[2, 1], [1, 1]], "prefill": [[1, 1]]}, "rise"),
     ({"model": "x", "decode": [[1, True]], "prefill": [[1, 1]]}, "decode")],
)  # fmt: skip
def test_steps_that_are_none_are_refused(steps: Any, says: str) -> None:
    with pytest.raises(PriceError, match=says) as caught:
        whole_steps(steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["glm-5", "glm-5.2", "deepseek-v3", "glm-4.5"])
def test_few_layers_are_of_each_type_and_in_order(name: str) -> None:
    cfg = load_config(name)
    kept = few_layers(cfg).layers
    assert set(kept) == set(cfg.layers) and len(kept) <= 2 * len(set(cfg.layers))
    places = iter(cfg.layers)
    assert all(any(kind == each for each in places) for kind in kept)
    assert model_key(few_layers(cfg), F32) == model_key(cfg, F32) != model_key(cfg, Formats())


def test_tokens_fall_on_experts_at_random() -> None:
    """As experts are timed and priced beside it: a batch meets as many as chance says, and layers keep their size."""
    cfg = load_config(str(embedded_checkpoint()))
    assert cfg.moe
    cfg = dataclasses.replace(few_layers(cfg), moe=dataclasses.replace(cfg.moe, experts=64, top_k=4))
    layer = random_weights(registry.usable("cpu"), cfg, "float32")["layers"][-1]
    x = np.random.default_rng(0).standard_normal((16, cfg.hidden_size), np.float32)
    scores = 1 / (1 + np.exp(-x @ np.asarray(layer["router"]))) + np.asarray(layer["router_bias"])
    met = len(np.unique(np.argsort(-scores, axis=1)[:, :4]))
    assert met > 0.8 * 64 * (1 - (1 - 4 / 64) ** 16)
    assert 0.5 < np.std(x * np.asarray(layer["ffn_norm"]) @ np.asarray(layer["q_a"])) < 2
