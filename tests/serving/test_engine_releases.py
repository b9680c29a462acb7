"""Engines by release: which one a name means, what differs between them, and what their defaults come to on a chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment import engines
from runtime.deployment.engines import Engine, described, engine_for, load, names, nearest_release
from runtime.deployment.engines.releases import number
from runtime.deployment.errors import EngineError
from runtime.serving import Deployment, Workload, simulate
from runtime.serving.request import Request
from tests.cli.cli import glm5
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer

RELEASES = [f"{name}@{release}" for name in names() for release in described(name)]


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_is_described_with_sources(name: str) -> None:
    engine = load(name)
    assert engine.release == name.partition("@")[2] and engine.description
    assert engine.kind == "glm5" or engine.released
    for setting, evidence in engine.evidence.items():
        assert evidence.source and evidence.date[:4].isdigit() and evidence.grade in "ABC", setting
    days = list(described(engine.kind).values())
    assert days == sorted(days, reverse=True)


def test_a_name_without_a_release_is_the_newest() -> None:
    for name in names():
        known = list(described(name))
        assert load(name) == load(f"{name}@{known[0]}")
        assert known == sorted(known, key=number, reverse=True)
    assert load("vllm@0.13.0") == load("vllm@0.13")


def test_what_a_release_says_holds_for_older_ones() -> None:
    assert [load(f"vllm@{r}").overlap_scheduling for r in ("0.11", "0.13", "0.14", "0.28")] == [
        False,
        False,
        True,
        True,
    ]
    assert [load(f"vllm@{r}").memory_fraction for r in ("0.11", "0.16", "0.19", "0.23")] == [0.9, 0.9, 0.9, 0.92]
    sized = [load(f"sglang@{r}").cache.sized_latent.cases[0].value for r in ("0.5.3", "0.5.9", "0.5.14")]
    assert sized[0] == sized[1] == "fp8" and load("sglang@0.5.14").cache.sized_latent.cases[1].value == "fp8_ds_mla"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "vllm@0.12",
            "vllm: release '0.12' is not described; described are 0.11, 0.13, 0.14, 0.15, 0.16, 0.17, 0.19, 0.23, 0.28",
        ),
        ("vllm@1.0", "release '1.0' is not described"),
        ("sglang@0.5.6.post1", "described are 0.5.3, 0.5.6, 0.5.9, 0.5.14: name one of them, as sglang@0.5.14"),
        ("trtllm@", "no release behind the @ is not described"),
        ("vllm-ascend@main", "described are 0.20, 0.23"),
        ("vlm@0.13", "unknown engine 'vlm'"),
    ],
)
def test_a_release_that_is_not_described_is_refused(name: str, says: str) -> None:
    with pytest.raises(EngineError) as caught:
        load(name)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    refused = glm5("simulate", "--model", "glm-5-fp8", "--engine", name)
    assert refused.code == 2 and says in refused.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("engine", "version", "release"),
    [
        ("sglang", "0.5.6.post1", "0.5.6"),
        ("sglang", "v0.5.12", "0.5.9"),
        ("sglang", "0.4.6", "0.5.3"),
        ("sglang", "2025-07", "0.5.3"),
        ("sglang", "glm5-hopper 2026-03-19", "0.5.9"),
        ("vllm", "0.11 era", "0.11"),
        ("vllm", "nightly 2026-02-13", "0.15"),
        ("vllm", "0.99", "0.28"),
        ("vllm", "", "0.28"),
        ("trtllm", "main 2026-02", "1.3"),
        ("trtllm", " 2025-11-02", "1.0"),
        ("vllm-ascend", "0.20.2rc1", "0.20"),
    ],
)
def test_a_version_stands_for_the_nearest_release_that_is_not_newer(engine: str, version: str, release: str) -> None:
    assert nearest_release(engine, version) == f"{engine}@{release}"


def test_an_at_of_a_folder_names_no_release(tmp_path: Path) -> None:
    copy = tmp_path / "me@site" / "vllm.toml"
    copy.parent.mkdir()
    copy.write_bytes((Path(engines.__file__).parent / "vllm.toml").read_bytes())
    assert load(str(copy)) == load("vllm") and load(f"{copy}@0.13") == load("vllm@0.13")


def test_a_copy_has_the_releases_too(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_bytes((Path(engines.__file__).parent / "vllm.toml").read_bytes())
    assert load(f"{copy}@0.13") == load("vllm@0.13")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('[releases."0.9"]\npolcy = {value = 1}', "did you mean policy"),
        ('[releases."0.9"]\nkind = "vllm"', "says kind"),
        ('[releases."0.9"]\nmemory_fraction = 0.8', "memory_fraction = 0.8 must be an object"),
        ('[releases."9.9"]\nreleased = "2027-01-01"', "must be the number of a release before 0.28"),
        ('[releases.old]\nreleased = "2025-01-01"', "must be the number of a release"),
        ('[releases."0.9".cache]\nkv = {value = "fp7", source = "s", date = "2026", grade = "C"}', "cache.kv 'fp7'"),
    ],
)
def test_a_malformed_release_is_refused(tmp_path: Path, table: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((Path(engines.__file__).parent / "vllm.toml").read_text() + "\n" + table + "\n")
    with pytest.raises(EngineError) as caught:
        load(f"{path}@0.9")
    assert says in str(caught.value) and "\n" not in str(caught.value)


# --- defaults that depend on chip, layout and drafts -----------------------------------------------------------


def on(engine: str, chip: str, layout: Layout, model: str = "glm-5-fp8", drafts: int = 0, **given: Any) -> Engine:
    return engine_for(engine, load_config(model), hw_profiles.load(chip), layout, given, drafts)


@pytest.mark.parametrize(
    ("engine", "layout", "drafts", "fraction"),
    [
        ("sglang@0.5.9", Layout(8), 0, 0.897),
        ("sglang", Layout(8), 0, 0.886),
        ("sglang@0.5.9", Layout(1, 8, 8), 0, 0.769),
        ("sglang", Layout(1, 8, 8), 0, 0.769),  # no graphs of prompts under DP attention
        ("sglang@0.5.9", Layout(8), 1, 0.883),
    ],
)
def test_sglangs_share_of_memory(engine: str, layout: Layout, drafts: int, fraction: float) -> None:
    """(capacity - reserve) / capacity by hand, MiB: 512 + 1.5 x 8192 + 2 x 512 + 1024, and what layout and release add;
    capacity 144,384."""
    made = on(engine, "h200-sxm", layout, drafts=drafts)
    reserve = 512 + 12288 + 1024 + 1024 + (4.5 * 512 * layout.dp if layout.dp > 1 else 0)
    reserve += 1536 if made.piecewise_step_tokens else 0
    reserve += made.drafting_reserve_mib if drafts else 0
    assert made.memory_fraction == pytest.approx(1 - reserve / 144_384, abs=6e-4)
    assert made.memory_fraction == pytest.approx(fraction, abs=1.5e-3)


def test_sglang_is_less_afraid_of_growth_under_dp_attention() -> None:
    alone, spread = on("sglang", "h200-sxm", Layout(8)), on("sglang", "h200-sxm", Layout(1, 8, 8))
    assert (spread.new_token_ratio, alone.new_token_ratio) == (pytest.approx(0.21), 0.7)
    assert spread.chunked_prefill_tokens == 1024
    assert on("sglang", "h200-sxm", Layout(2)).graph_batch_sizes[-1] == 256
    assert on("sglang", "b200-sxm", Layout(2)).graph_batch_sizes[-1] == 512
    assert on("sglang", "ascend-910c-die", Layout(16)).graph_batch_sizes[-1] == 256


def test_sglang_takes_as_many_requests_as_its_pool_says() -> None:
    engine, cfg = load("sglang"), load_config("deepseek-v3")
    limits = {n: engines.with_pool(engine, cfg, n, {}).max_running_requests for n in (1000, 500_000, 800_000, 10**7)}
    assert limits == {1000: 500, 500_000: 2048, 800_000: 2500, 10**7: 4096}
    assert engines.with_pool(engine, cfg, 10**7, {"max_running_requests": 64}) is engine


@pytest.mark.parametrize(
    ("engine", "chip", "step", "running", "graphs"),
    [
        ("vllm", "h200-sxm", 8192, 1024, 512),
        ("vllm", "b200-sxm", 16384, 1024, 1024),
        ("vllm@0.23", "b200-sxm", 8192, 1024, 512),
        ("vllm", "a100-sxm-80gb", 2048, 256, 512),
        ("vllm@0.11", "a100-sxm-80gb", 2048, 256, 512),
        ("vllm", "h20-96gb", 8192, 1024, 512),
    ],
)
def test_vllms_budgets(engine: str, chip: str, step: int, running: int, graphs: int) -> None:
    made = on(engine, chip, Layout(8))
    assert (made.max_step_tokens, made.chunked_prefill_tokens, made.max_running_requests) == (step, step, running)
    assert made.graph_batch_sizes[-1] == made.piecewise_step_tokens == graphs


def test_vllms_graphs_are_of_tokens() -> None:
    """512 tokens are 128 sequences of 4; with 16 sequences at most 2 x 16 x 4 tokens are captured, 32 sequences."""
    assert on("vllm", "h200-sxm", Layout(8), drafts=3).graph_batch_sizes[-1] == 128
    assert on("vllm", "h200-sxm", Layout(8), drafts=3, max_running_requests=16).graph_batch_sizes[-1] == 32
    assert on("vllm", "h200-sxm", Layout(8), max_running_requests=16).graph_batch_sizes == (1, 2, 4, 8, 16, 24, 32)


def test_trtllm_captures_other_sizes_with_padding() -> None:
    plain, padded = on("trtllm", "h200-sxm", Layout(8)), on("trtllm", "h200-sxm", Layout(8), graph_padding=True)
    assert plain.graph_batch_sizes == (*range(1, 33), 64, 128)
    assert padded.graph_batch_sizes == (1, 2, 4, *range(8, 129, 8))
    assert [plain.decode_rows(n) for n in (31, 33, 64, 129)] == [(31, True), (33, False), (64, True), (129, False)]
    assert padded.decode_rows(33) == (40, True)
    wide = on("trtllm", "h200-sxm", Layout(8), graph_padding=True, graph_max_batch=300)
    assert wide.graph_batch_sizes[-4:] == (128, 192, 256, 300)


# --- how steps are launched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "model", "layer"),
    [
        ("vllm", "glm-5-fp8", 1.65e-3),
        ("vllm@0.11", "glm-5-fp8", 1.65e-3),
        ("sglang@0.5.9", "glm-5-fp8", 1.5e-3),
        ("sglang@0.5.3", "deepseek-v3", 0.97e-3),
        ("trtllm", "glm-4.7", 2e-3),
    ],
)
def test_an_eager_step_is_no_shorter_than_its_launches(engine: str, model: str, layer: float) -> None:
    made, cfg = on(engine, "h200-sxm", Layout(8), model), load_config(model)
    floor = cfg.num_layers * layer
    assert made.eager_launch_seconds == pytest.approx(floor)
    assert floor <= made.step_seconds(0.001, False, False) < floor + 0.05
    assert made.step_seconds(1.0, False, False) == pytest.approx(1.0, abs=0.05)  # launches run beside the device
    halves = on(engine, "h200-sxm", Layout(8, pp=2), model)
    assert halves.eager_launch_seconds == pytest.approx(floor / 2)


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "vllm-ascend", "glm5"])
def test_every_engine_has_every_graph_mode(engine: str) -> None:
    chip = "ascend-910c-die" if engine == "vllm-ascend" else "h200-sxm"
    took = []
    for mode in ("full", "piecewise", "eager"):
        made = on(engine, chip, Layout(8), "deepseek-v3", graph_mode=mode)
        rows, graphed = made.decode_rows(3)
        assert graphed == (mode == "full") and rows == (3 if mode == "eager" or engine == "trtllm" else 4)
        took.append(made.step_seconds(0.01, graphed, not graphed and made.in_pieces(3, 0, 3)))
    assert took == sorted(took) and (engine == "glm5" or took[0] < took[1] < took[2])


def test_vllm_ascend_is_host_bound_unless_decode_is_captured() -> None:
    """61 layers of 0.92 ms; a plan asks for what recipes pass."""
    plain = on("vllm-ascend@0.20", "ascend-910c-die", Layout(16, ep=16), "kimi-k2")
    assert plain.graph_mode == "piecewise" and not plain.decode_rows(1)[1]
    assert plain.step_seconds(0.014, False, True) == pytest.approx(61 * 0.92e-3, abs=0.005)
    full = on("vllm-ascend@0.20", "ascend-910c-die", Layout(16, ep=16), "kimi-k2", graph_mode="full")
    assert full.step_seconds(0.014, *full.decode_rows(1)[1:], False) == pytest.approx(0.014)
    assert not full.in_pieces(0, 100, 100) and plain.in_pieces(0, 100, 100)
    assert plain.planned_graph_mode == "full"


# --- the front end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "ranks", "per_rank", "servers"), [(1, 1, False, 1), (3, 1, False, 3), (1, 4, True, 4)]
)
def test_the_front_end_serves_one_request_at_a_time(replicas: int, ranks: int, per_rank: bool, servers: int) -> None:
    """A burst of 12: each takes 10 ms + 100 tokens of 0.1 ms, then 5 ms that nobody waits for."""
    engine = plain_engine(
        "vllm", request_seconds=0.01, tokenize_seconds_per_token=1e-4, request_delay_seconds=0.005,
        front_end_per_rank=per_rank,
    )  # fmt: skip
    deployed = Deployment(engine, LinearPricer(), 5000, replicas=replicas, ranks=ranks)
    done = simulate(Workload([Request(i, 100, 1) for i in range(12)]), deployed).requests
    assert [r.queued_at for r in done] == pytest.approx([0.02 * (i // servers + 1) + 0.005 for i in range(12)])


WORK = 0.0237
"""No sum of it is a time at which anything arrives."""


@given(bursts=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6)), min_size=1, max_size=6), gathers=st.booleans())
def test_a_front_end_that_gathers_works_as_long_and_lets_nobody_go_before(
    bursts: list[tuple[int, int]], gathers: bool
) -> None:
    """Against an event loop written out: its turn goes to all that are ready as it begins, and none is handed on before
    the turn ends. vLLM PR 20065: of 1,000 requests none was started before all were parsed."""
    sent = sorted(at / 128 for at, count in bursts for _ in range(count))
    engine = plain_engine("vllm", request_seconds=WORK, front_end_gathers=gathers)
    load = Workload([Request(i, 10, 1, sent_at=at) for i, at in enumerate(sent)])
    left = [r.queued_at for r in simulate(load, Deployment(engine, LinearPricer(), 5000)).requests]
    wanted: list[float] = []
    now = 0.0
    while len(wanted) < len(sent):
        now = max(now, sent[len(wanted)])
        ready = sum(at <= now for at in sent) - len(wanted)
        turn = ready if gathers and now > sent[len(wanted)] else 1  # all that came while the turn before it went on
        now += turn * WORK
        wanted += [now] * turn
    assert left == pytest.approx(wanted)


def test_prompts_that_were_gathered_are_tokenized_32_at_a_time_beside_the_front_end() -> None:
    """80 at once and 8 that come meanwhile: 1 ms each in front, 0.1 ms a token in a thread behind it."""
    engine = plain_engine(
        "vllm", request_seconds=0.001, tokenize_seconds_per_token=1e-4, front_end_gathers=True, front_end_per_rank=True
    )
    late = [Request(80 + i, 10, 1, sent_at=0.1) for i in range(8)]
    load = Workload([*(Request(i, 10, 1) for i in range(80)), *late])
    done = simulate(load, Deployment(engine, LinearPricer(), 50000)).requests
    first = 0.001 + 0.001  # nobody else is there yet; the other 79 wait for one another
    wanted = [first, *(0.08 + 0.032,) * 32, *(0.08 + 0.064,) * 32, *(0.08 + 0.079,) * 15]
    assert [r.queued_at for r in done[:80]] == pytest.approx(wanted)
    assert [r.queued_at for r in done[80:]] == pytest.approx([0.08 + 0.079 + 0.001, *(0.08 + 0.08 + 0.007,) * 7])


def test_bursts_to_vllm_reach_the_scheduler_together() -> None:
    """1,000 chats at once: 0.11 parses the template for each (PR 20065: 6 to 8 s before the first is started), 0.13
    has it cached; SGLang hands on one after another."""
    first, last = {}, {}
    for name in ("vllm@0.11", "vllm@0.13", "sglang"):
        made = load(name)
        engine = plain_engine("vllm", **{key: getattr(made, key) for key in ("request_seconds", "front_end_gathers")})
        burst = Workload([Request(i, 10, 1) for i in range(1000)])
        done = simulate(burst, Deployment(engine, LinearPricer(fixed=1e-4, per_prompt=0.0), 50000)).requests
        first[name], last[name] = done[1].queued_at, done[-1].queued_at
    assert first["vllm@0.11"] == last["vllm@0.11"] > 6 and first["vllm@0.13"] == last["vllm@0.13"] < 3
    assert first["sglang"] < 0.1 < last["sglang"]


def test_an_open_load_beyond_the_front_end_waits_there() -> None:
    engine = plain_engine("vllm", request_seconds=0.02)
    quick = LinearPricer(fixed=1e-4, per_prompt=0.0)
    for rate, waits in ((25, 0.02), (100, 0.02 + 99 * 0.01)):
        sent = [Request(i, 10, 1, sent_at=i / rate) for i in range(100)]
        done = simulate(Workload(sent), Deployment(engine, quick, 5000)).requests
        assert done[-1].queued_at - done[-1].sent_at == pytest.approx(waits, rel=1e-6)
