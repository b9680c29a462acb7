"""Calibration at small sizes: what it writes loads, passes the profile's checks, and prices our own engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from backends import registry
from foundation.errors import UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.api import pace
from runtime.deployment.engines import load
from runtime.deployment.engines.defaults import engine_for
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting import calibrate_ops
from runtime.porting.calibrate import Calibration, Gemm, ServingCost, Stream, measure, prices, profile
from runtime.porting.calibrate_sizes import QUICK, Effort
from runtime.pricing import Chip, open_book
from runtime.pricing.attention import MlaLayer, index_scores, sparse_prefill
from runtime.pricing.work import MlaShape
from runtime.serving.pricing import IDLE_S, WARM_S, BatchShape
from runtime.simulation.build import PriceTables, pricer_of, spec_for
from tests.engine.test_ahead import Apart

SMALL = Effort(widths=(128,), rows=(1, 32), tokens=(1, 8), chunks=(16,), rounds=1, cold_bytes=1e6, program_flops=1e8)


@pytest.fixture(scope="module")
def found() -> Calibration:
    """With kernels of one layer, which are quicker to compile than four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_ops, "_LAYERS", 1)
        patch.setattr(calibrate_ops, "_WIDTHS", (64, 128))
        return measure(registry.usable("cpu"), SMALL)


SERVING_COST = pace.serving_cost  # itself, which tests stand in for
SERVING = ServingCost(front_s=7e-4, request_s=4e-3, step_s=1e-3, row_s=5e-4, idle_s=2e-3, warming_s=2e-4)


@pytest.fixture(autouse=True)
def served_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is measured."""
    monkeypatch.setattr("runtime.api.pace.serving_cost", lambda _: SERVING)


@pytest.fixture
def written(found: Calibration, tmp_path: Path) -> Iterator[hw_profiles.Profile]:
    found = dataclasses.replace(found, serving=SERVING)
    described = profile(found, registry.usable("cpu"), "my-host", "my-host.prices.json")
    (tmp_path / "my-host.toml").write_text(hw_profiles.dumps(described))
    (tmp_path / "my-host.prices.json").write_text(json.dumps(prices(found, described)))
    yield hw_profiles.load(str(tmp_path / "my-host.toml"))


def test_the_profile_loads_and_is_graded_measured(written: hw_profiles.Profile) -> None:
    assert written.weakest_grade == "measured" and written.kind == "host"
    for path in (
        "chip.peak.fp32_flops_per_s",
        "chip.peak.bf16_flops_per_s",
        "chip.memory.capacity_bytes",
        "chip.memory.bandwidth_bytes_per_s",
        "overhead.kernel_launch_s",
        "overhead.vector_launch_s",
        "overhead.serving_row_s",
    ):
        assert written.require(path).source == "glm5 calibrate"
    for path in ("efficiency.compute", "efficiency.memory"):
        assert all(0 < share <= 1 for _, share in written.curve(path).knots)
    assert written.prices_path and written.prices_path.is_file()


def test_what_serving_takes_becomes_the_engines_own_host_times(written: hw_profiles.Profile) -> None:
    cfg = load_config("glm-5")
    engine = engine_for("glm5", cfg, written, Layout())
    assert engine.request_seconds == SERVING.front_s
    assert engine.request_host_seconds == SERVING.request_s and engine.row_host_seconds == SERVING.row_s
    assert engine.idle_host_seconds == SERVING.idle_s and engine.warming_host_seconds == SERVING.warming_s
    assert engine.graph_step_host_seconds == engine.eager_step_host_seconds == SERVING.step_s
    assert engine_for("glm5", cfg, written, Layout(), {"row_host_seconds": 0.0}).row_host_seconds == 0
    assert engine.ahead_step_seconds == 0  # a host is no device of its own
    figures = {**written.figures, "overhead.serving_ahead_s": written.figures["overhead.serving_step_s"]}
    apart = dataclasses.replace(written, figures=figures)
    assert engine_for("glm5", cfg, apart, Layout()).ahead_step_seconds == SERVING.step_s
    assert engine_for("glm5", cfg, apart, Layout(tp=2)).ahead_step_seconds == 0  # several launch nothing ahead
    other = engine_for("vllm", cfg, written, Layout())
    assert (other.request_host_seconds, other.row_host_seconds) == (0.0, 0.0)
    assert other.graph_step_host_seconds == load("vllm").graph_step_host_seconds


@given(
    front=st.floats(1e-4, 1e-2), request=st.floats(1e-4, 1e-2), step=st.floats(1e-5, 1e-2),
    row=st.floats(1e-5, 1e-2), idle=st.floats(1e-5, 1e-2), warming=st.floats(1e-5, 1e-2), programs=st.floats(0, 1e-2),
)  # fmt: skip
def test_what_serving_takes_is_found_beside_the_programs(
    front: float, request: float, step: float, row: float, idle: float, warming: float, programs: float
) -> None:
    """Of a server that takes just so much: what its programs take, in steps that requests share, is none of it."""

    rows_s = 2 * programs  # what a step's program takes longer with all rows than with one

    def ask(streams: int, pause_s: float) -> pace.Seen:
        first = front + streams * (request + row) + step + 3 * programs + (idle if pause_s > IDLE_S else 0)
        token = programs + step + streams * row + (rows_s if streams > 1 else 0)
        came = [first]
        for _ in range(47):
            warm = 0.0 if pause_s <= IDLE_S else warming * max(0.0, 1.0 - came[-1] / WARM_S)
            came.append(came[-1] + token + warm)
        return pace.Seen([came] * streams, [front * (1 + at) for at in range(streams)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "load_engine", lambda *_: None)
        patch.setattr(pace, "_empty", lambda engine: None)
        patch.setattr(pace, "_asked", lambda engine: contextlib.nullcontext(ask))
        patch.setattr(pace, "_programs_s", lambda *_: (3 * programs, programs, programs + rows_s))
        found = SERVING_COST(registry.get("cpu"), rounds=1)
    assert found.ahead_s is None
    assert dataclasses.astuple(found)[:5] == pytest.approx((front, request, step, row, idle), rel=1e-6, abs=1e-9)
    alone_s = front + request + row + step + 3 * programs + idle
    if alone_s + 2 * (programs + step + row + warming) < WARM_S / 2:  # later, little is left of it
        assert found.warming_s == pytest.approx(warming, rel=1e-6, abs=1e-6)


@given(step=st.floats(1e-4, 1e-2), row=st.floats(1e-5, 1e-3), programs=st.floats(0, 1))
def test_what_is_launched_ahead_leaves_the_hosts_work_alone(step: float, row: float, programs: float) -> None:
    """Programs shorter than that work do not show; it is found whatever they take."""
    programs *= step

    def ask(streams: int, pause_s: float) -> pace.Seen:
        first = 1e-3 + streams * row + step + 3 * programs
        came = [first + at * max(programs, step + streams * row) for at in range(48)]
        return pace.Seen([came] * streams, [1e-4] * streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "load_engine", lambda *_: None)
        patch.setattr(pace, "_empty", lambda engine: None)
        patch.setattr(pace, "_asked", lambda engine: contextlib.nullcontext(ask))
        patch.setattr(pace, "_programs_s", lambda *_: (3 * programs, programs, 2 * programs))
        found = SERVING_COST(Apart(), rounds=1)
    assert (found.ahead_s, found.step_s, found.row_s) == pytest.approx((step, step, row), rel=1e-6)
    assert found.request_s == pytest.approx(9e-4, rel=1e-6)


def test_what_cannot_be_told_from_nothing_is_a_figure_still(written: hw_profiles.Profile, tmp_path: Path) -> None:
    """On a host that something else slows down as programs are timed alone, and not as the server is."""

    def slow(streams: int) -> pace.Seen:
        return pace.Seen([[0.001, 0.048]] * streams, [0.0] * streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "load_engine", lambda *_: None)
        patch.setattr(pace, "_empty", lambda engine: None)
        patch.setattr(pace, "_asked", lambda engine: contextlib.nullcontext(lambda streams, _: slow(streams)))
        patch.setattr(pace, "_programs_s", lambda *_: (0.1, 0.1, 0.2))
        found = SERVING_COST(registry.get("cpu"), rounds=1)
    figures = dict(written.figures)
    for name, value in dataclasses.asdict(found).items():
        if value is not None:
            path = f"overhead.serving_{name}"
            figures[path] = dataclasses.replace(figures[path], value=value)
    (tmp_path / "slowed.toml").write_text(hw_profiles.dumps(dataclasses.replace(written, prices=None, figures=figures)))
    assert hw_profiles.load(tmp_path / "slowed.toml").figures["overhead.serving_step_s"].value > 0


def test_what_an_executor_takes_is_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Executor:
        def __init__(self, step_s: float):
            self.step_s = step_s

        def step(self, every: bool) -> None:
            now[0] += self.step_s

    monkeypatch.setattr(pace, "_rows", lambda *_: ((), ()))
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    engine: Any = types.SimpleNamespace(executor=Executor(0.005))
    empty: Any = Executor(0.002)
    assert pace._programs_s(engine, empty) == pytest.approx((0.003, 0.003, 0.003))


@pytest.mark.slow
def test_what_serving_takes_on_this_machine() -> None:
    found = SERVING_COST(registry.usable("cpu"), rounds=2)
    assert 0 <= found.row_s < found.request_s < 1 and found.row_s + found.step_s > 0


def test_its_own_rates_price_its_ops(written: hw_profiles.Profile) -> None:
    """The measured curves and kernels are used, and not those of other chips."""
    curves = {path: curve.knots for path, curve in written.curves.items()}
    chip = Chip.from_fields(written.name, written.number, curves)
    book = open_book(chip, "sglang", written.prices_path, "f32")
    assert book.gemm(1, 128, 128, "f32").evidence == "measured"
    assert book.memory(1e6).evidence == "measured"
    kernel, stand_in = book.kernel("moe", "f32")
    assert kernel.source == "glm5 calibrate" and not stand_in
    layer = MlaLayer(MlaShape(1024, 64, 48, 16, 32, 32, 16, 16, 32), 4, latent="f32", index="f32")
    assert index_scores(book, layer, 1, 64, 1, decode=True).evidence == kernel.evidence != "transferred"
    one, many = book.gemm(1, 2048, 2048, "f32"), book.gemm(256, 2048, 2048, "f32")
    assert one.bound == "memory" and many.seconds > one.seconds


@pytest.mark.parametrize("masks", [True, False])
def test_a_chunk_is_priced_by_what_a_backend_attends_to(tmp_path: Path, masks: bool) -> None:
    """All that is cached, through a mask, or what is chosen: a made-up backend's time says which, and comes back."""

    def seconds(tokens: float, keys: float, cached: float, heads: int, widths: int) -> float:
        pairs = tokens * (cached if masks else keys) * heads
        return 1e-6 + pairs * (2 * widths / 1e10 + 2e-8)  # what a score takes, whatever it is made of

    def attention(backend: object, dtype: str, size: float, cases: list[tuple[int, int, int, int]],
                  features: list[dict[str, float]], clock: object, dims: tuple[int, int, int],
                  ) -> calibrate_ops.SelectedPoints:  # fmt: skip
        heads, qk, v = dims
        fixed = {"heads": float(heads), "kv_bytes": 4.0 * qk, "qk": float(qk), "v": float(v)}
        taken = [seconds(b * t, min(keys, cached - t / 2), cached, heads, qk + v) for b, t, keys, cached in cases]
        return [calibrate_ops.Measurement({**each, **fixed}, s) for each, s in zip(features, taken, strict=True)], []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_ops, "attention_over_selected", attention)
        for other in ("_experts", "_index"):
            patch.setattr(calibrate_ops, other, lambda *_: [])
        body = calibrate_ops.measure_kernels(
            registry.get("cpu"), "float32", 1e11, 1e10, calibrate_ops.OpClock(1), QUICK.tokens, QUICK.chunks
        )
    (tmp_path / "made-up.json").write_text(json.dumps(body))
    book = open_book(Chip("made-up", {"fp32": 1e11, "bf16": 1e11}, 1e10), "sglang", tmp_path / "made-up.json", "f32")
    for rank, heads in ((128, 8), (48, 4), (64, 16)):
        layer = MlaLayer(MlaShape(1024, 64, rank, 16, 32, 32, 16, 16, 32), heads, latent="f32", index="f32")
        for tokens, before in ((64, 0), (128, 0), (64, 128), (128, 256)):
            price = sparse_prefill(book, layer, tokens, before + tokens / 2)
            asked = seconds(tokens, 32, before + tokens, heads, rank + 16 + rank)
            assert price.seconds == pytest.approx(asked, rel=0.15)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("overhead.kernel_launch_s", 1e-6, 1e-3), ("overhead.vector_launch_s", 1e-6, 1e-3),
     ("efficiency.memory", 0.9, 0.1), ("efficiency.compute", 0.9, 0.1), ("chip.peak.fp32_flops_per_s", 1e12, 1e9)],
)  # fmt: skip
def test_a_figure_set_beside_its_own_counts(written: hw_profiles.Profile, field: str, low: float, high: float) -> None:
    """On a calibrated machine too: measured kernels and carried ones are slower with the worse figure."""
    assert written.path
    cfg = load_config("glm-4.7-flash")
    shapes = BatchShape(np.full(4, 512), decode_rows=4), BatchShape(prefill_chunks=[(512, 0)])

    def took(value: float) -> list[float]:
        set_by_hand = hw_profiles.load(str(written.path), {field: value})
        made = spec_for(cfg, set_by_hand, Layout(), "f32", engine="glm5")
        pricer = pricer_of(made, PriceTables(coarse=True))
        return [pricer.seconds(shape) for shape in shapes]

    good, bad = took(low), took(high)
    assert all(a <= b for a, b in zip(good, bad, strict=True)) and good[1] < bad[1]


def test_only_a_small_model_decodes_from_the_cache(written: hw_profiles.Profile) -> None:
    cached = {"chip.memory.cache_bytes": 16e6, "chip.memory.cache_bandwidth_bytes_per_s": 1e13}
    shape = BatchShape(np.full(1, 128), decode_rows=1)

    def took(model: str, settings: dict[str, float]) -> float:
        described = hw_profiles.load(str(written.path), {"chip.memory.cache_bytes": 1.0, **settings})
        made = spec_for(load_config(model), described, Layout(), "f32", engine="glm5")
        return pricer_of(made, PriceTables(coarse=True)).seconds(shape)

    embedded = str(embedded_checkpoint())
    assert took(embedded, cached) < 0.9 * took(embedded, {})
    assert took("glm-4.7-flash", cached) >= took("glm-4.7-flash", {})


def model_calibration(peak: float, bandwidth: float, launch: float) -> Calibration:
    """What a machine of exactly these rates would have measured."""
    gemms = []
    for k in (256, 1024, 2048):
        for m in (1, 32, 256):
            gemm = Gemm("float32", m, k, 4, 1.0, 0.0)
            busy = math.cbrt((gemm.flops / peak) ** 3 + (gemm.bytes / bandwidth) ** 3)
            gemms.append(dataclasses.replace(gemm, seconds=launch + busy))
    stream = Stream(1e8, 1e8 / bandwidth)
    return Calibration("float32", 5e-6, 4e-5, launch, launch, tuple(gemms), (stream,))


def test_the_curves_return_what_went_in() -> None:
    """Measured times of a known machine, through the profile's figures and the price book, come back."""
    made = model_calibration(3e11, 2e10, 2e-6)
    assert made.bandwidth_bytes_per_s == pytest.approx(2e10, rel=0.02)
    assert made.peak_flops_per_s("float32") == pytest.approx(3e11, rel=0.05)
    chip = Chip(
        "known",
        {"fp32": made.peak_flops_per_s("float32"), "bf16": 1e11},
        made.bandwidth_bytes_per_s,
        kernel_launch_s=made.kernel_launch_s,
        vector_launch_s=made.vector_launch_s,
        compute_curve=made.compute_knots(),
        memory_curve=made.memory_knots(),
    )
    book = open_book(chip, "sglang", wide="f32")
    for gemm in made.gemms:
        assert book.gemm(gemm.m, gemm.k, gemm.k, "f32").seconds == pytest.approx(gemm.seconds, rel=0.1)


def test_more_bandwidth_is_never_slower() -> None:
    made = model_calibration(3e11, 2e10, 2e-6)
    knots: dict[str, Any] = {"compute_curve": made.compute_knots(), "memory_curve": made.memory_knots()}
    slow, fast = (
        open_book(Chip("known", {"fp32": 3e11, "bf16": 1e11}, rate, kernel_launch_s=2e-6, **knots), wide="f32")
        for rate in (2e10, 4e10)
    )
    for m in (1, 8, 64, 512):
        assert fast.gemm(m, 1024, 1024, "f32").seconds <= slow.gemm(m, 1024, 1024, "f32").seconds
        assert fast.memory(m * 1e4).seconds <= slow.memory(m * 1e4).seconds


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"widths": ()}, "widths"), ({"widths": (0,)}, "widths"), ({"rows": (8, 32)}, "rows"), ({"rows": (1, 8)}, "rows"),
     ({"rounds": 0}, "rounds"), ({"tokens": ()}, "tokens")],
)  # fmt: skip
def test_absurd_efforts_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Effort(**wrong)  # type: ignore[arg-type]


def command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from runtime.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command_writes_a_profile_that_passes_its_check(
    found: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Effort] = []
    monkeypatch.setattr("runtime.porting.calibrate_steps.measure", lambda _, effort, *__: asked.append(effort) or found)
    out = tmp_path / "box.toml"
    code, text, _ = command(["calibrate", "--quick", "--out", str(out), "--json"], capsys)
    assert code == 0 and asked == [QUICK]
    said = json.loads(text)
    assert said["profile"] == str(out) and said["dispatch_s"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box.prices.json", "box.toml"]
    loaded = hw_profiles.load(str(out))
    assert loaded.value("chip.memory.bandwidth_bytes_per_s") == said["figures"]["chip.memory.bandwidth_bytes_per_s"]
    assert np.isfinite(list(said["figures"].values())).all()
    code, text, err = command(["profiles", "check", str(out)], capsys)
    assert "Traceback" not in err and code in (0, 2)  # rates of matrices this small may look implausible
    assert code == 0 or all("expected" in line for line in (text + err).strip().splitlines())


def test_a_profile_is_not_used_with_the_prices_of_another_run(
    found: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run was killed after the first of the two files."""
    out, beside = tmp_path / "box.toml", tmp_path / "box.prices.json"

    def calibrate(measured: Calibration) -> int:
        monkeypatch.setattr("runtime.porting.calibrate_steps.measure", lambda *_: measured)
        return command(["calibrate", "--quick", "--out", str(out)], capsys)[0]

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        if target == out:
            raise Killed
        os.rename(source, target)

    assert calibrate(found) == 0
    profile_before, prices_before = out.read_text(), beside.read_text()
    with monkeypatch.context() as killing, pytest.raises(Killed):
        killing.setattr(os, "replace", killed)
        calibrate(dataclasses.replace(found, kernels={**found.kernels, "another": "run"}))
    assert out.read_text() == profile_before and beside.read_text() != prices_before
    for words in (["simulate", "--profile", str(out)], ["plan", "--profile", str(out)]):
        code, _, err = command(words, capsys)
        assert code == 2
        assert err == (
            "glm5: box.toml: prices: box.prices.json is not the file that this profile was written with; calibrate "
            "again, or take out `prices_sha256` to use it as it is\n"
        )
    beside.unlink()
    with pytest.raises(hw_profiles.InvalidProfile, match=r"box\.prices\.json: No such file"):
        hw_profiles.load(out)
    assert calibrate(found) == 0 and hw_profiles.load(out).prices_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.prices.json", "box.toml"]
    out.write_text("\n".join(line for line in out.read_text().splitlines() if "prices_sha256" not in line))
    beside.write_text(prices_before + " ")  # a file that somebody keeps by hand
    assert hw_profiles.load(out).prices == "box.prices.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "host.json"],
        ["--out", "/absent-folder/host.toml"],
        ["--backend", "abacus"],
    ],
)
def test_bad_input_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(["calibrate", *arguments], capsys)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1


def test_float32_is_twice_sixteen_bits() -> None:
    from model.hf_config import load_config
    from model.split import Layout
    from runtime.deployment.ledger import stage_kv_bytes_per_token, stage_weight_bytes
    from tests.plans import formats

    cfg, layout = load_config("glm-4.7-flash"), Layout()
    wide, narrow = formats("f32"), formats("bf16")
    assert wide.kv == "f32" and wide.wide == "f32"
    held = [stage_weight_bytes(cfg, layout, each, 0, False) for each in (wide, narrow)]
    for component in ("experts", "attention", "head", "norms"):
        assert held[0][component] == 2 * held[1][component]
    cache = [stage_kv_bytes_per_token(cfg, layout, each, 0, False) for each in (wide, narrow)]
    assert cache[0] == 2 * cache[1]


def test_float32_needs_its_own_peak() -> None:
    """The 16-bit rate of a matrix unit says nothing about float32."""
    from runtime.pricing import PriceError

    with pytest.raises(PriceError, match=r"--set chip.peak.fp32_flops_per_s"):
        Chip("half", {"bf16": 1e14}, 1e12).peak("f32")


def test_answers_that_come_in_one_piece_are_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client sees them that has to wait for a processor: such a round counts for nothing."""
    whole, apart = (pace.Seen([came], [0.01]) for came in ([0.2], [0.1 + 0.01 * token for token in range(48)]))
    answers = iter([])

    @contextlib.contextmanager
    def asked(engine: object) -> Iterator[pace.Burst]:
        yield lambda streams, pause_s: next(answers)

    monkeypatch.setattr(pace, "load_engine", lambda *given: None)
    monkeypatch.setattr(pace, "_empty", lambda engine: None)
    monkeypatch.setattr(pace, "_asked", asked)
    monkeypatch.setattr(pace, "_programs_s", lambda *_: (0.05, 0.004, 0.004))
    busy, calm = [*6 * [apart], whole], 9 * [apart]
    answers = iter([apart, *busy, *calm])
    assert SERVING_COST(registry.usable("cpu"), rounds=2).step_s == pytest.approx(0.006)
    answers = iter([apart, *busy])
    with pytest.raises(UsageError, match="too busy"):
        SERVING_COST(registry.usable("cpu"), rounds=1)
