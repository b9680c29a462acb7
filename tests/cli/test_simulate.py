"""`glm5 simulate`: the promised JSON, loads of every kind, what can be set, and one line for each mistake."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.loader import PROFILES
from tests.cli.cli import glm5, refused

pytestmark = pytest.mark.usefixtures("coarse")
ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "mooncake_sample.jsonl"
SMALL = ("--isl", 1024, "--osl", 32, "--concurrency", 4, "--requests", 12)


@functools.cache
def run(*words: object) -> Any:
    """Said once for the same words."""
    return glm5("simulate", *words, "--json").json


def test_the_promised_keys() -> None:
    result = run(*SMALL)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "queue_ms"):
        assert set(result[name]) == {"mean", "p50", "p90", "p99"}
        assert result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"]
    assert {"pool_tokens", "peak_fraction"} <= set(result["kv"]) and 0 < result["kv"]["peak_fraction"] <= 1
    assert result["output_tokens_per_s"] == pytest.approx(8 * result["output_tokens_per_s_per_device"])
    assert result["saturated"] is False and result["bottleneck"] in ("compute", "memory", "network", "overhead")
    assert result["evidence"] in ("measured", "fitted", "datasheet", "assumed")
    for name, (low, high) in result["band"].items():
        assert low < result[name]["mean"] < high
    assert set(result["band"]) == {"ttft_ms", "tpot_ms"}
    assert result["model"] == "glm-5-fp8" and result["devices"] == 8 and result["measured_requests"] == 12
    assert result["ledger"]["free_bytes"] > 0


def test_the_command_of_the_readme_is_the_default() -> None:
    named = run(
        "--model", "glm-5-fp8", "--profile", "h200-sxm", "--devices", 8, "--tp", 8, "--engine", "sglang", *SMALL
    )
    assert named == run(*SMALL)


def test_a_seed_repeats_and_another_differs() -> None:
    words = ("simulate", *SMALL, "--seed", 3, "--json")
    assert glm5(*words).json == glm5(*words).json != run(*SMALL, "--seed", 4)


def test_open_loops() -> None:
    slow, fast = (run("--isl", 1024, "--osl", 32, "--requests", 40, "--rate", rate) for rate in (0.5, 4))
    assert slow["requests_per_s"] == pytest.approx(0.5, rel=0.4)
    assert slow["ttft_ms"]["mean"] < fast["ttft_ms"]["mean"]
    assert run("--isl", 1024, "--osl", 32, "--requests", 40, "--rate", 4, "--burstiness", 4) != fast
    assert slow["sustained"] is True and slow["meets_targets"] is True
    code, out, _ = glm5("simulate", "--isl", 8192, "--osl", 128, "--requests", 120, "--rate", 50, "--json")
    over = json.loads(out)
    assert code == 1 and over["meets_targets"] is False and over["sustained"] is False
    assert "50 requests/s asked" in over["missed"][0] and over["requests_per_s"] < 2
    assert over["saturated"] and over["saturated_by"] in ("arrivals", "kv-pool", "max-running")


def test_a_mooncake_trace() -> None:
    result = run("--trace-file", SAMPLE)
    lines = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert result["measured_requests"] == len(lines)
    assert result["prefix_hit_rate"] > 0.1  # all begin with the same block of 512 tokens
    total = sum(line["output_length"] for line in lines)
    assert result["output_tokens_per_s"] * result["duration_s"] == pytest.approx(total)
    assert run("--trace-file", SAMPLE, "--requests", 5)["measured_requests"] == 5
    assert result["prefix_hit_rate"] > 0
    said = f"prefix cache: {result['prefix_hit_rate']:.1%} of prompt tokens found in it"
    assert said in glm5("simulate", "--trace-file", SAMPLE).out


def test_drafting_helps_and_takes_memory() -> None:
    load = ("--isl", 1024, "--osl", 256, "--concurrency", 4, "--requests", 12)
    plain, drafting = run(*load), run(*load, "--mtp", 3, "--accept", 2.76)
    assert 1.2 < plain["tpot_ms"]["mean"] / drafting["tpot_ms"]["mean"] < 2.76
    assert drafting["kv"]["pool_tokens"] < plain["kv"]["pool_tokens"]
    assert drafting["ledger"]["weights_bytes"]["mtp"] > 0
    assert run(*load, "--mtp", 3, "--accept", 1.2)["tpot_ms"]["mean"] > drafting["tpot_ms"]["mean"]


def test_disaggregation() -> None:
    """A prompt no longer stops other requests' answers; its cache crosses the link first."""
    load = ("--isl", 4096, "--osl", 64, "--concurrency", 8, "--requests", 24)
    mixed, split = run(*load), run(*load, "--prefill-devices", 8)
    assert split["devices"] == 16 and split["tpot_ms"]["mean"] < mixed["tpot_ms"]["mean"]
    assert split["output_tokens_per_s"] == pytest.approx(16 * split["output_tokens_per_s_per_device"])
    slow = run(*load, "--prefill-devices", 8, "--set", "link.scale_out.bandwidth_bytes_per_s=1e8")
    assert slow["ttft_ms"]["mean"] > split["ttft_ms"]["mean"] + 100


def test_a_pool_that_prefills_in_a_layout_of_its_own() -> None:
    """TP8 hands on to DP8 EP16: two copies cross, one for each tp rank, from ranks 0 and 4."""
    load = ("--isl", 4096, "--osl", 16, "--concurrency", 4, "--requests", 8)
    wide = ("--devices", 16, "--tp", 2, "--dp", 8, "--ep", 16, "--prefill-devices", 8)
    result = run(*load, *wide, "--prefill-tp", 8)
    assert [name.partition(" on ")[0] for name in result["pools"]] == [
        "prefill: 1 x tp8 dp1 ep1 pp1", "decode: 1 x tp2 dp8 ep16 pp1",
    ]  # fmt: skip
    assert [(each["source"], each["target"]) for each in result["transfer"]["routes"]] == [(0, 0), (4, 1)]
    assert result["transfer"]["copies"] == pytest.approx(2)
    assert "its layout's 16" in refused("simulate", *load, *wide)
    other = ("--prefill-devices", 8, "--prefill-profile", "b200-sxm")
    assert "must keep it in the same rows" in refused("simulate", *load, *other)  # FP8 where nobody says
    lent = run(*load, *other, "--kv", "bf16")
    assert [name.partition(" on ")[2].partition(",")[0] for name in lent["pools"]] == ["b200-sxm", "h200-sxm"]


def test_prompts_that_fell_out_of_the_devices_come_from_the_host() -> None:
    """Sixteen beginnings of 24,000 tokens in a pool of 340,000, and 100 GB a device for 998,000 more. What is found
    in each tier adds up."""
    load = ("--isl", 30000, "--osl", 4, "--concurrency", 4, "--requests", 60, "--shared-prefix", "0.8:16")
    alone, host = run(*load), run(*load, "--kv-host-gb", 100)
    assert list(alone["prefix_hits"]) == ["device"] and host["prefix_hits"]["host"] > 0.1
    assert sum(host["prefix_hits"].values()) == pytest.approx(host["prefix_hit_rate"])
    assert host["prefix_hit_rate"] > alone["prefix_hit_rate"]
    assert host["ttft_ms"]["mean"] < alone["ttft_ms"]["mean"]
    none = run(*load, "--kv-host-gb", 0)
    assert none == alone
    disk = run(*load, "--kv-disk-gb", 100)
    assert disk["prefix_hits"]["disk"] > 0.1 and any("disk to a device 1 GB/s" in line for line in disk["assumed"])


def test_replicas_and_layouts() -> None:
    one, two = run(*SMALL), run(*SMALL, "--devices", 16, "--tp", 8)
    assert two["devices"] == 16 and two["kv"]["pool_tokens"] == 2 * one["kv"]["pool_tokens"]
    spread = run(*SMALL, "--tp", 1, "--dp", 8, "--ep", 8, "--set", "engine.memory_fraction=0.85")
    assert spread["layout"] == {"tp": 1, "dp": 8, "ep": 8, "pp": 1, "dcp": 1, "pcp": 1}
    staged = run(*SMALL, "--devices", 16, "--pp", 2)
    assert staged["layout"]["tp"] == 8 and "pipeline" in staged["share_by_op"]


def test_what_can_be_set() -> None:
    base = run(*SMALL)
    slow = run(*SMALL, "--profile", "h20-141gb", "--set", "chip.memory.bandwidth_bytes_per_s=1e12")
    fast = run(*SMALL, "--profile", "h20-141gb", "--set", "chip.memory.bandwidth_bytes_per_s=4e12")
    assert slow["tpot_ms"]["mean"] > 1.5 * fast["tpot_ms"]["mean"]
    dense = run(*SMALL, "--set", "model.index_topk=0")
    assert dense["model"] == "glm-5-fp8 (dense)"
    assert dense["ledger"]["kv_bytes_per_token"] == 78 * 1152 < base["ledger"]["kv_bytes_per_token"]
    small = run(*SMALL, "--set", "engine.memory_fraction=0.8")
    assert small["kv"]["pool_tokens"] < base["kv"]["pool_tokens"]
    eager = run(*SMALL, "--set", "engine.graph_batch_sizes=[]")
    assert eager["tpot_ms"]["mean"] > base["tpot_ms"]["mean"]


def test_a_table_for_people() -> None:
    output = glm5("simulate", *SMALL)
    assert output.code == 0
    for words in ("glm-5-fp8 on 8 x h200-sxm, tp8, sglang", "TTFT", "TPOT", "9 in 10", "KV pool", "evidence: "):
        assert words in output.out
    assert "prefix cache" not in output.out  # its requests share nothing
    assert "SATURATED" in glm5("simulate", "--rate", 50, "--requests", 100, "--osl", 64).out


def test_a_backlog_of_half_made_answers_is_one() -> None:
    """Prompts are computed in time, answers are not: first tokens alone do not show it."""
    words = ("simulate", "--tp", 2, "--dp", 4, "--ep", 8, "--kv", "fp8", "--rate", 3, "--requests", 150)
    code, out, _ = glm5(*words)
    assert code == 1 and "SATURATED by kv-pool: the backlog grows" in out
    assert "misses its targets: 3 requests/s asked" in out


def test_answers_of_one_token_have_no_tpot(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("simulate", "--isl", 1024, "--osl", 1, "--concurrency", 4, "--requests", 12)
    shown = glm5(*words, "--html", page)
    assert shown.code == 0 and "a user" not in shown.out
    assert "nan" not in shown.out.lower() and "nan" not in re.sub("<style>.*?</style>", "", page.read_text().lower())
    result = glm5(*words, "--json").json
    assert result["tpot_ms"]["mean"] is None and result["output_tokens_per_s_per_user"] is None
    assert set(result["band"]) == {"ttft_ms"}


def test_the_lengths_that_are_drawn_are_said(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("--isl", 60000, "--osl", 8, "--concurrency", 1, "--requests", 2, "--html", page)
    assert result["load"]["prompt_tokens"] == [48000, 60000] and result["load"]["length_ratio"] == 0.8
    assert "48,000 to 60,000 tokens in and 6 to 8 out" in page.read_text(encoding="utf-8")
    for ratio, said in ((1, "1 requests in flight, 1,000 tokens in and 8 out\n"), (0.5, "500 to 1,000 tokens in")):
        words = ("--isl", 1000, "--osl", 8, "--concurrency", 1, "--requests", 2, "--length-ratio", ratio)
        assert said in glm5("simulate", *words).out


def test_a_trace_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 202750, "output_length": 3}\n')
    assert "are 202,753, and glm-5-fp8 has 202,752 positions" in refused("simulate", "--trace-file", path)


def test_pools_apart_are_named_with_their_memory(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("--isl", 1024, "--osl", 32, "--concurrency", 4, "--requests", 12, "--prefill-devices", 8)
    result = run(*words, "--html", page)
    assert list(result["pools"].values()) == [8, 8] and len(result["ledgers"]) == 2
    assert page.read_text(encoding="utf-8").count("prefill: 1 x tp8") >= 2
    assert "16 x h200-sxm, prefill and decode apart" in glm5("simulate", *words).out


def test_a_chrome_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run(*SMALL, "--trace", path)
    events = json.loads(path.read_text())
    assert len(events["traceEvents"] if isinstance(events, dict) else events) > 12


def test_a_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    result = run(*SMALL, "--html", path)
    assert result["measured_requests"] == 12
    page = path.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and "glm-5-fp8" in page
    assert "s a directory" in refused("simulate", *SMALL, "--html", tmp_path)


def test_planning_imports_no_jax_until_it_traces() -> None:
    modules = (
        "runtime.simulation.validation, runtime.simulation.build, runtime.pricing.pricer, runtime.deployment.ledger"
    )
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_model_that_does_not_fit_prints_its_ledger() -> None:
    code, out, err = glm5("simulate", "--devices", 4)
    assert code == 2 and not out
    assert "does not fit 4 devices" in err.splitlines()[0] and "weights: experts" in err


MISTAKES: list[tuple[str, str]] = [
    ("--devices 7", "64 / 7 = 9.143"),
    ("--tp 3 --devices 3", "64 / 3"),
    ("--tp 4 --dp 3", "8 devices / (tp 4 x dp 3 x pp 1 = 12)"),
    ("--ep 3", "tp x dp = 8 x 1 = 8"),
    ("--pp 100 --devices 800", "78 layers cannot be cut"),
    ("--tp 0", "greater than or equal to 1"),
    ("--dp 0", "greater than or equal to 1"),
    ("--devices 0", "greater than or equal to 1"),
    ("--prefill-devices 3", "--prefill-devices 3"),
    ("--kv-host-gb -1", "--kv-host-gb -1: give GB a device"),
    ("--kv-disk-gb nan", "--kv-disk-gb nan: give GB a device"),
    ("--kv-disk-gb-s 2", "add --kv-disk-gb"),
    ("--profile ascend-910c-die --devices 32 --formats w8a8 --kv-host-gb 5", "--set link.host.bandwidth_bytes_per_s="),
    ("--prefill-tp 4", "--prefill-tp is of a pool that prefills apart: add --prefill-devices"),
    ("--prefill-devices 8 --prefill-tp 3", "--prefill-devices 8 is not a multiple of its layout's 3"),
    ("--engine vllm --prefill-devices 8 --prefill-tp 4 --prefill-pp 2", "pools of one pipeline stage"),
    ("--engine lightllm", "unknown engine 'lightllm'"),
    ("--profile abacus", "no profile named abacus"),
    ("--profile enflame-l600 --formats w8a8 --devices 16", "--set chip.peak.bf16_flops_per_s="),
    ("--set chip.memory.bandwidth_bytes_per_s=-1", "greater than 0"),
    ("--set chip.memory.bandwidth_bytes_per_s=1e30", "bandwidth_bytes_per_s"),
    ("--set chip.memory.bandwidth_bytes_per_s=fast", "must be a number"),
    ("--set chip", "field=value"),
    ("--set model.hidden_size=3", "only model.index_topk"),
    ("--set model.index_topk=-1", "0 (dense) or more"),
    ("--set model.index_topk=few", "not a whole number"),
    ("--set engine.memory_fraction=2", "at most 1"),
    ("--set engine.colour=red", "unknown engine setting"),
    ("--model glm-6", "no model named 'glm-6'"),
    ("--formats int3", "unknown formats"),
    ("--kv fp5", "unknown KV format"),
    ("--rate 0", "give a finite rate above zero"),
    ("--rate -1", "give a finite rate above zero"),
    ("--rate nan", "give a finite rate above zero"),
    ("--rate 1 --burstiness -1", "burstiness"),
    ("--burstiness 1", "--burstiness is of an open loop: add --rate"),
    ("--concurrency 4 --burstiness 2", "--burstiness is of an open loop: add --rate"),
    ("--trace-file t.jsonl --isl 8192", "--isl does not go with --trace-file"),
    ("--trace-file t.jsonl --osl 16", "--osl does not go with --trace-file"),
    ("--trace-file t.jsonl --length-ratio 0.8", "--length-ratio does not go with --trace-file"),
    ("--trace-file t.jsonl --burstiness 2", "--burstiness does not go with --trace-file"),
    ("--concurrency 0", "concurrency is 0"),
    ("--concurrency -2", "concurrency is -2"),
    ("--requests 0", "--requests must be at least 1"),
    ("--rate 1 --concurrency 2", "give one of"),
    ("--mtp 3 --accept 9", "1 to 4 tokens"),
    ("--mtp 3 --accept 0.5", "1 to 4 tokens"),
    ("--mtp -1", "greater than or equal to 0"),
    ("--accept 2", "add --mtp"),
    ("--mtp 2 --model kimi-k2 --devices 16", "no MTP layer"),
    ("--seed -1", "greater than or equal to 0"),
    ("--length-ratio 0", "0.01"),
    ("--expert-load gaussian", "gaussian"),
    (
        "--isl 190000 --tp 1 --dp 8 --ep 8 --concurrency 1 --requests 1 --set engine.memory_fraction=0.85",
        "tokens of KV cache",
    ),
    ("--isl 202752 --osl 1", "202,752 tokens in and 1 out are 202,753, and glm-5-fp8 has 202,752 positions"),
    ("--isl 100 --osl 300000 --rate 1", "100 tokens in and 300,000 out are 300,100"),
    ("--model deepseek-v3 --isl 200000", "has 163,840 positions"),
    ("--trace /none/at/all/trace.json", "no directory /none/at/all"),
]


@pytest.mark.parametrize(("words", "reason"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words: str, reason: str) -> None:
    assert reason in refused("simulate", *words.split())


@pytest.mark.parametrize("verb", ["simulate", "plan"])
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "box.toml: schema: must be 1, got 2"),
        ("schema = 1", 'schema = 2\nsurprise = 1\npackage_devices = "x"', " (and 2 more problems)"),
        ("schema = 1", "schema = 1\n[", "box.toml: is not valid TOML"),
        ('kind = "accelerator"', 'kind = "a\\nb"', "box.toml: kind: must be one line of text"),
    ],
)
def test_a_profile_with_faults_is_one_line(tmp_path: Path, verb: str, old: str, new: str, said: str) -> None:
    path = tmp_path / "box.toml"
    text = (PROFILES / "h200-sxm.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert said in refused(verb, "--profile", path)


def test_two_wrong_settings_are_one_line() -> None:
    line = refused("simulate", "--set", "chip.memory.bandwidth_bytes_per_s=-1", "--set", "chip.surprise=1")
    assert line.startswith("--set chip.memory.bandwidth_bytes_per_s: ") and line.endswith(" (and 1 more problem)")


@pytest.mark.parametrize(
    ("body", "reason"),
    [("", "holds no requests"), ("not json\n", "line 1"), ('{"timestamp": 0}\n', "input_length")],
)
def test_a_malformed_trace(tmp_path: Path, body: str, reason: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(body)
    assert reason in refused("simulate", "--trace-file", path)
    assert "cannot read" in refused("simulate", "--trace-file", tmp_path / "none.jsonl")


def test_the_figures_explained() -> None:
    """Terms and parts of TPOT and TTFT add up to the reported means, and every price names its source."""
    plain, result = run(*SMALL), run(*SMALL, "--explain")
    assert {name: value for name, value in result.items() if name != "explain"} == plain
    for name, figure in result["explain"].items():
        assert figure["mean_ms"] == result[name]["mean"]
        assert sum(figure["terms_ms"].values()) == pytest.approx(figure["mean_ms"])
        assert sum(part["ms"] for part in figure["parts"]) == pytest.approx(figure["mean_ms"])
        assert sum(part["share"] for part in figure["parts"]) == pytest.approx(1)
        assert all(part["sources"] for part in figure["parts"] if part["term"] != "waiting")
    assert list(result["explain"]) == ["tpot_ms", "ttft_ms"]
    parts = {(part["term"], part["part"]): part for part in figure["parts"]}
    assert parts["host", "on the way to the scheduler"]["evidence"] == "fitted"  # a fitted constant is called so
    said = glm5("simulate", *SMALL, "--explain").out
    assert f"TPOT {result['tpot_ms']['mean']:,.2f} ms = " in said and "moe/fp8-block/sglang: " in said
    assert set(run("--isl", 1024, "--osl", 1, "--requests", 3, "--explain")["explain"]) == {"ttft_ms"}
