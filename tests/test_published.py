"""Rows as people publish them: which words are which settings, and what cannot be read says which column."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import hw_profiles
from foundation.errors import Failure, UsageError
from model.hf_config import load_config
from runtime.deployment.engines import Circumstances, load
from runtime.deployment.engines.releases import latest_not_newer, older_than_all, same_release
from runtime.pricing.eras import order
from runtime.serving.lengths import Fixed, Uniform
from runtime.simulation import published
from runtime.simulation.mechanisms import MECHANISMS, mechanism
from runtime.simulation.published import MEASURED, model_of, read, scheme_of_words, settings_of

ROW = {
    "id": "r1", "source": "someone/page.md:12#0@abc", "model": "DeepSeek-R1-0528", "formats": "fp8 block",
    "chip": "h200-sxm", "devices": "8", "engine": "vllm", "engine_version": "0.11.0", "tp": "8", "dp": "1", "ep": "1",
    "pp": "1", "kv_dtype": "default", "mtp": "0", "server_flags": "vllm serve deepseek-ai/DeepSeek-R1-0528 -tp 8",
    "isl": "2000", "osl": "100", "length_ratio": "1.0", "concurrency": "all at once", "rate": "inf",
    "num_prompts": "1000", "tpot_mean_ms": "237.02", "ttft_mean_ms": "28911.9",
}  # fmt: skip
HOPPER = Circumstances.of(load_config("glm-5-fp8"), hw_profiles.load("h200-sxm"))


def test_a_row() -> None:
    found = read(ROW)
    assert found.cfg.name.startswith("deepseek-r1") and found.profile.name == "h200-sxm"
    assert (found.scheme, found.kv, found.drafts, found.apart, dict(found.settings)) == ("fp8", None, 0, "", {})
    assert found.load.concurrency == len(found.load.requests) == 1000
    assert found.load.requests[5].prompt_tokens == 2000
    assert found.measured == {"tpot_mean_ms": 237.02, "ttft_mean_ms": 28911.9}


def test_rows_of_one_deployment_are_a_group() -> None:
    other = {**ROW, "id": "r2", "source": "someone/page.md:12#3@abc", "isl": "32000"}
    assert read(ROW).group == read(other).group
    for column, value in (("engine_version", "0.13.0"), ("tp", "4"), ("source", "other/page.md"), ("model", "GLM-4.6")):
        assert read({**other, column: value, "devices": ""}).group != read(ROW).group


@pytest.mark.parametrize(
    ("words", "scheme"),
    [
        ("fp8 block", "fp8"), ("FP8", "fp8"), ("fp8 (modelopt per-tensor)", "fp8-tensor"), ("bf16", "bf16"),
        ("int4 experts (native QAT), rest bf16", "w4a16"), ("NVFP4 (modelopt)", "nvfp4"), ("W8A8", "w8a8"),
        ("w4a8 (msmodelslim)", "w4a8"), ("AWQ 4-bit", "w4a16-g128"), ("fp8 per channel", "fp8-channel"),
    ],
)  # fmt: skip
def test_formats(words: str, scheme: str) -> None:
    assert scheme_of_words(words) == scheme


@pytest.mark.parametrize(
    ("engine", "flags", "settings"),
    [
        ("vllm", "vllm serve M -tp 8 --max-num-seqs 12 --gpu-memory-utilization=0.85",
         {"max_running_requests": 12, "memory_fraction": 0.85}),
        ("vllm-ascend", "max-num-seqs 12, max-num-batched-tokens 8192, util 0.9, no prefix cache",
         {"max_running_requests": 12, "max_step_tokens": 8192, "chunked_prefill_tokens": 8192, "memory_fraction": 0.9,
          "prefix_cache": False}),
        ("vllm", "--enforce-eager", {"graph_mode": "eager"}),
        ("sglang", "--tp 8 --enable-nccl-nvls", {"reduces_in_switches": True}),
        ("vllm", "--max_num_batched_tokens 16k --no-enable-prefix-caching",
         {"max_step_tokens": 16384, "chunked_prefill_tokens": 16384, "prefix_cache": False}),
        ("sglang", "--tp 8 --mem-fraction-static 0.82 --chunked-prefill-size 32768 --disable-radix-cache",
         {"memory_fraction": 0.82, "chunked_prefill_tokens": 32768, "prefix_cache": False}),
        ("trtllm", "TP8 EP8; free_gpu_memory_fraction 0.8", {"memory_fraction": 0.8}),
        ("sglang", "2 nodes, InfiniBand; flags not given (TP16 inferred)", {}),
    ],
)  # fmt: skip
def test_flags(engine: str, flags: str, settings: dict[str, Any]) -> None:
    assert settings_of(flags, engine, HOPPER) == settings


def test_sglang_shares_what_it_is_told_over_ranks_of_attention_data_parallelism() -> None:
    flags = "--dp 8 --enable-dp-attention --chunked-prefill-size 32768 --max-running-requests 256"
    told = {"chunked_prefill_tokens": 32768, "max_running_requests": 256}
    assert settings_of(flags, "sglang", HOPPER, ranks=8) == {name: value // 8 for name, value in told.items()}
    assert settings_of(flags.replace("--enable-dp-attention", ""), "sglang", HOPPER, ranks=8) == told
    assert settings_of("-dp 8 --max-num-seqs 256", "vllm", HOPPER, ranks=8) == {"max_running_requests": 256}


def test_a_rate_over_so_many_prompts_ends_with_them() -> None:
    rated = {**ROW, "concurrency": "", "rate": "10"}
    assert read(rated).load.goes_on is None and len(read(rated).load.requests) == 1000
    assert read({**rated, "num_prompts": ""}).load.goes_on is not None


@pytest.mark.parametrize(
    ("words", "drafts", "length"),
    [
        ("0", 0, None), ("0 (not stated)", 0, None), ("1, acceptance not recorded", 1, None),
        ("3 (acceptance length 2.4)", 3, 2.4), ("1, acceptance 0.8", 1, 1.8), ("2, acceptance 50 %", 2, 1.75),
    ],
)  # fmt: skip
def test_drafts(words: str, drafts: int, length: float | None) -> None:
    found = read({**ROW, "mtp": words})
    assert (found.drafts, found.accept_length) == (drafts, pytest.approx(length) if length else None)
    assert bool(found.apart) == ("not recorded" in words)


@pytest.mark.parametrize(
    ("changed", "clients", "requests"),
    [
        ({"concurrency": "16", "num_prompts": "160"}, 16, 160),
        ({"concurrency": "16", "num_prompts": "not stated"}, 16, 160),
        ({"concurrency": "64", "num_prompts": "8"}, 8, 8),
        ({"concurrency": "", "rate": "2.5", "num_prompts": "300"}, None, 300),
    ],
)
def test_loads(changed: dict[str, str], clients: int | None, requests: int) -> None:
    load = read({**ROW, **changed}).load
    assert (load.concurrency, len(load.requests)) == (clients, requests)


def test_lengths() -> None:
    assert isinstance(published._lengths(100, 1.0), Fixed) and isinstance(published._lengths(100, 0.5), Uniform)
    drawn = [request.prompt_tokens for request in read({**ROW, "length_ratio": "0.0 (1..L)"}).load.requests]
    assert min(drawn) < 100 and max(drawn) > 1900 and abs(sum(drawn) / len(drawn) - 1000) < 60


def test_a_model_by_other_names() -> None:
    for name, model in (
        ("GLM-4.7-FP8", "glm-4.7"),
        ("moonshotai/Kimi-K2-Thinking", "kimi-k2"),
        ("GLM-5-FP8", "glm-5-fp8"),
    ):
        assert model_of(name) == load_config(model)


@pytest.mark.parametrize(
    ("changed", "mentions"),
    [
        ({"tp": "many"}, "tp is 'many'"),
        ({"devices": "16"}, "devices 16: tp x dp x pp is 8"),
        ({"formats": "fast"}, "formats 'fast'"),
        ({"isl": "nan"}, "isl is nan"),
        ({"tpot_mean_ms": "-1"}, "tpot_mean_ms is -1"),
        (dict.fromkeys(MEASURED, ""), "no figure"),
        ({"concurrency": "", "num_prompts": "", "rate": "inf"}, "neither concurrency"),
        ({"chip": "h300"}, "h300"),
        ({"server_flags": "--tp 8 --attn-cp-size 3"}, "tp 8 is not cut over 3 ranks"),
    ],
)
def test_what_cannot_be_read(changed: dict[str, str], mentions: str) -> None:
    with pytest.raises(Failure, match=mentions) as error:
        read({**ROW, **changed})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "tp", "pcp"),
    [("--attn-cp-size 8", 1, 8), ("--enable-nsa-prefill-context-parallel --attn-cp-size 4", 2, 4),
     ("--enable-prefill-cp", 1, 8), ("-pcp 2", 8, 2), ("--prefill-context-parallel-size 1", 8, 1), ("", 8, 1)],
)  # fmt: skip
def test_prompts_that_are_cut_over_ranks(flags: str, tp: int, pcp: int) -> None:
    """SGLang's ranks are some of its tp, vLLM's are beside it."""
    row = {**ROW, "tp": "8", "dp": "1", "ep": "", "devices": str(tp * pcp), "server_flags": flags}
    found = read(row).layout
    assert (found.tp, found.pcp) == (tp, pcp)


def test_a_server_that_was_tuned_has_graphs_for_its_clients() -> None:
    row = {**ROW, "engine": "trtllm", "engine_version": "main 2026-02", "concurrency": "250"}
    assert 250 in read({**row, "server_flags": "max_num_tokens tuned per point"}).settings["graph_batch_sizes"]
    assert "graph_batch_sizes" not in read({**row, "server_flags": "defaults"}).settings


@pytest.mark.parametrize(
    ("engine", "version", "apart"),
    [("sglang", "2025-07", True), ("sglang", "0.4.9", True), ("sglang", "0.5.3", False), ("vllm", "0.9.2", True),
     ("vllm", "0.11 era", False), ("vllm", "nightly 2026-02-13", False), ("vllm", "main", False)],
)  # fmt: skip
def test_what_is_older_than_all_that_is_described_is_scored_apart(engine: str, version: str, apart: bool) -> None:
    assert ("older than every" in read({**ROW, "engine": engine, "engine_version": version}).apart) == apart


def test_causes_are_switched_off_by_what_is_said_of_the_deployment() -> None:
    """A cause that is off is the deployment with other settings, a row's own settings going before; nothing else of
    the row changes, and one that says nothing of it changes nothing."""
    plain = read(ROW).spec()
    off = {each.name: read(ROW, each).spec() for each in MECHANISMS}
    assert not plain.engine.overlap_scheduling and off["overlap"].engine.overlap_scheduling
    assert plain.engine.eager_launch_seconds > 0 == off["launches"].engine.eager_launch_seconds
    assert off["front-end"].engine.front_seconds(1000) == 0 < plain.engine.front_seconds(1000)
    assert plain.profile.number("chip.sustained_clock_fraction") != off["clocks"].profile.number(
        "chip.sustained_clock_fraction"
    )
    assert (plain.engine.release, off["releases"].engine.release) == ("0.11", "0.28")
    assert off["kernels"].engine == dataclasses.replace(plain.engine, release="")
    assert off["padding"].engine.graph_batch_sizes == plain.engine.graph_batch_sizes
    eager = {**ROW, "server_flags": "--enforce-eager"}
    assert read(eager, mechanism("graphs")).spec().engine.graph_mode == "eager"
    with pytest.raises(UsageError, match=r"--without magic: no such cause; there are releases, .*expert-load"):
        mechanism("magic")


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("mtp", "1 tokens a step .", "mtp is '', not a number"),
        ("mtp", "1 tokens a step 1.2.3", "mtp is '1.2.3', not a number"),
        ("mtp", "9" * 1_000, "are taken"),
        ("mtp", "1 " + 330 * "accept", None),
        ("server_flags", "x" * 3_000, r"server_flags: characters: 3,000 is more than the 2,000"),
        ("length_ratio", "0.5.5", "length_ratio is '0.5.5'"),
        ("concurrency", "9" * 1_500, "are taken"),
    ],
)
def test_cells_that_mean_harm(column: str, text: str, expected: str | None) -> None:
    """A line, and soon: patterns that look for words take no more than the square of a cell."""
    if expected is None:
        assert read({**ROW, column: text}).accept_length is None
        return
    with pytest.raises(UsageError, match=expected):
        read({**ROW, column: text})


@pytest.mark.parametrize("text", ["0" * 50_000, "1." + "9" * 50_000, ".0" * 30_000 + "x", "1." * 30_000])
def test_releases_that_mean_harm(text: str) -> None:
    """Named by a plan, an engine's file or a cell: patterns that look for numbers do not go on for ever."""
    known = {"0.9.0": "2025-01-01", "0.2": "2024-01-01"}
    assert latest_not_newer(text, known) in known and older_than_all(text, known) in (True, False)
    assert not same_release(text, "0.9.0") and same_release(text, text)
    assert order(text) is None or order(text)
    with pytest.raises(Failure, match=r"is not described") as caught:
        load(f"vllm@{text}")
    assert len(str(caught.value)) < 500
