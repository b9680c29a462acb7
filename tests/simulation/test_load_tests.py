"""Results of load testers, read as rows of deployments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UsageError
from runtime.simulation.fitting import fit
from runtime.simulation.load_tests import MeasuredServer, rows_of
from runtime.simulation.published import read
from tests.cli.cli import refused
from tests.simulation.test_fitting import measured

SERVER = MeasuredServer("glm-5-fp8", "h200-sxm", "fp8", "vllm@0.28", tp=8)
# Field names as vllm/benchmarks/serve.py writes them with --save-result
VLLM: dict[str, Any] = {
    "date": "20261101-101010", "backend": "vllm", "model_id": "zai-org/GLM-5-FP8", "num_prompts": 160,
    "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 16, "duration": 100.0, "completed": 160, "failed": 0,
    "total_input_tokens": 160 * 1024, "total_output_tokens": 160 * 128, "request_throughput": 1.6,
    "output_throughput": 204.8, "total_token_throughput": 1843.2, "mean_ttft_ms": 800.5, "median_ttft_ms": 700.0,
    "std_ttft_ms": 10.0, "p99_ttft_ms": 1500.0, "mean_tpot_ms": 40.25, "median_tpot_ms": 40.0, "p99_tpot_ms": 60.0,
}  # fmt: skip
# as sglang.bench_serving appends them to --output-file
SGLANG: dict[str, Any] = {
    "backend": "sglang", "dataset_name": "random", "request_rate": float("inf"), "max_concurrency": 8,
    "random_input_len": 4096, "random_output_len": 512, "random_range_ratio": 0.5, "duration": 60.1, "completed": 80,
    "total_input_tokens": 245_000, "total_output_tokens": 30_700, "output_throughput": 510.8, "mean_ttft_ms": 500.0,
    "median_ttft_ms": 450.0, "p99_ttft_ms": 900.0, "mean_tpot_ms": 15.0, "median_tpot_ms": 14.9, "p99_tpot_ms": 20.0,
    "accept_length": 2.5,
}  # fmt: skip
# profile_export_aiperf.json
AIPERF: dict[str, Any] = {
    "request_count": {"unit": "requests", "avg": 100.0}, "request_throughput": {"unit": "requests/sec", "avg": 2.0},
    "time_to_first_token": {"unit": "ms", "avg": 300.0, "p50": 280.0, "p99": 700.0},
    "inter_token_latency": {"unit": "ms", "avg": 20.0, "p50": 19.0, "p99": 33.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 400.0},
    "input_sequence_length": {"unit": "tokens", "avg": 2000.4},
    "output_sequence_length": {"unit": "tokens", "avg": 200},
    "input_config": {"loadgen": {"request_rate": 2.0, "request_count": 100}},
}  # fmt: skip

# an entry of `benchmarks` of guidellm 0.8.1's `--output kind=json`, as it wrote it
GUIDELLM: dict[str, Any] = {
    "type_": "generative_benchmark",
    "config": {"strategy": {"type_": "concurrent", "worker_count": 4, "max_concurrency": 4, "streams": 4}},
    "metrics": {
        "request_totals": {"successful": 12, "errored": 0, "incomplete": 0, "total": 12},
        "prompt_token_count": {"successful": {"mean": 205.0, "median": 205.0, "percentiles": {"p99": 205.0}}},
        "output_token_count": {"successful": {"mean": 32.0, "median": 32.0, "percentiles": {"p99": 32.0}}},
        "time_to_first_token_ms": {"successful": {"mean": 322.6, "median": 305.8, "percentiles": {"p99": 484.9}}},
        "inter_token_latency_ms": {"successful": {"mean": 16.1, "median": 16.0, "percentiles": {"p99": 17.0}}},
        "output_tokens_per_second": {"successful": {"mean": 151.6, "median": 140.0, "percentiles": {"p99": 900.0}}},
    },
}  # fmt: skip


def written(path: Path, *runs: Any) -> Path:
    path.write_text("\n".join(json.dumps(run) for run in runs))
    return path


def one(path: Path, run: Any, server: MeasuredServer = SERVER) -> dict[str, str]:
    rows, skipped = rows_of(written(path, run), server)
    assert not skipped
    return rows[0]


def test_a_result_of_vllm(tmp_path: Path) -> None:
    row = one(tmp_path / "a.json", VLLM)
    asked = read(row)
    assert (row["isl"], row["osl"], row["concurrency"], row["num_prompts"]) == ("1024", "128", "16", "160")
    assert asked.engine.startswith("vllm@") and asked.layout.tp == 8 and asked.load.concurrency == 16
    assert asked.measured == {
        "ttft_mean_ms": 800.5, "ttft_median_ms": 700.0, "ttft_p99_ms": 1500.0, "tpot_mean_ms": 40.25,
        "tpot_median_ms": 40.0, "tpot_p99_ms": 60.0, "output_tok_s": 204.8,
    }  # fmt: skip
    everything = read(one(tmp_path / "b.json", VLLM | {"max_concurrency": None}))
    assert everything.load.concurrency == len(everything.load.requests) == 160  # all at once
    paced = read(one(tmp_path / "c.json", VLLM | {"max_concurrency": None, "request_rate": 2.5}))
    assert paced.load.concurrency is None and "2.5/s" in paced.load.description


def test_runs_of_sglang_a_line_each(tmp_path: Path) -> None:
    """Its rate without a limit is `Infinity`, which is no JSON."""
    second = SGLANG | {"max_concurrency": 16, "dataset_name": "sharegpt"}
    rows, _ = rows_of(written(tmp_path / "s.jsonl", SGLANG, second), dataclasses.replace(SERVER, mtp=3))
    first, other = map(read, rows)
    assert rows[0]["length_ratio"] == "0.5" and (rows[0]["isl"], rows[0]["osl"]) == ("4096", "512")
    assert (rows[1]["isl"], rows[1]["osl"]) == (str(round(245_000 / 80)), str(round(30_700 / 80)))
    assert first.drafts == 3 and first.accept_length == 2.5 and other.load.concurrency == 16


def test_a_result_of_aiperf(tmp_path: Path) -> None:
    row = one(tmp_path / "p.json", AIPERF)
    assert (row["isl"], row["osl"], row["rate"], row["concurrency"]) == ("2000", "200", "2.0", "")
    assert read(row).measured["tpot_median_ms"] == 19.0
    seconds = AIPERF | {"time_to_first_token": {"unit": "s", "avg": 0.3}}
    assert float(one(tmp_path / "q.json", seconds)["ttft_mean_ms"]) == pytest.approx(300.0)
    closed = AIPERF | {"input_config": {"perf_analyzer": {"stimulus": {"concurrency": 8}}}}
    assert one(tmp_path / "r.json", closed)["concurrency"] == "8"
    phase = {"name": "profiling", "kind": "profiling", "type": "concurrency", "requests": 16, "concurrency": 4}  # 0.13
    newer = AIPERF | {"input_config": {"phases": [{"kind": "warmup", "concurrency": 1}, phase]}}
    assert (one(tmp_path / "s.json", newer)["concurrency"], one(tmp_path / "s.json", newer)["rate"]) == ("4", "")


def test_runs_of_guidellm(tmp_path: Path) -> None:
    """Several of one file, each with its own load; one that failed in part is left out."""
    paced = GUIDELLM | {"config": {"strategy": {"type_": "constant", "rate": 2.5}}}
    broken = GUIDELLM | {"metrics": GUIDELLM["metrics"] | {"request_totals": {"successful": 9, "errored": 3}}}
    other = GUIDELLM | {"config": {"strategy": {"type_": "trace"}}}
    rows, skipped = rows_of(written(tmp_path / "g.json", {"benchmarks": [GUIDELLM, paced, broken, other]}), SERVER)
    assert (rows[0]["isl"], rows[0]["osl"], rows[0]["concurrency"], rows[0]["num_prompts"]) == ("205", "32", "4", "12")
    assert read(rows[0]).measured == {
        "ttft_mean_ms": 322.6, "ttft_median_ms": 305.8, "ttft_p99_ms": 484.9, "tpot_mean_ms": 16.1,
        "tpot_median_ms": 16.0, "tpot_p99_ms": 17.0, "output_tok_s": 151.6,
    }  # fmt: skip
    assert (rows[1]["concurrency"], rows[1]["rate"]) == ("", "2.5")
    assert "3 requests failed" in skipped[0] and "its strategy is 'trace'" in skipped[1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"failed": 3}, "3 requests failed"),
        ({"completed": 0}, "no request was completed"),
        ({"mean_tpot_ms": "fast"}, "mean_tpot_ms is 'fast'"),
        ({"mean_tpot_ms": -1}, "mean_tpot_ms is '-1'"),
        ({"mean_tpot_ms": [1]}, "mean_tpot_ms"),
        ({"completed": 1.5}, "not a whole number"),
        ({"request_rate": 2.0}, "a rate and a limit"),
    ],
)
def test_a_run_that_cannot_be_used_says_why(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    rows, skipped = rows_of(written(tmp_path / "a.json", VLLM | change), SERVER)
    assert not rows and why in skipped[0]


KEYS = [*VLLM, *AIPERF, *GUIDELLM, *GUIDELLM["metrics"], "loadgen", "phases", "benchmarks", "successful", "strategy"]


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(KEYS), x), max_leaves=12))  # fmt: skip
def test_any_document_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(document))
    try:
        rows_of(path, SERVER)
    except UsageError as error:
        assert "\n" not in str(error)


def test_what_is_said_of_the_server(tmp_path: Path) -> None:
    path = str(written(tmp_path / "a.json", VLLM))
    out = ("--out", tmp_path / "x.toml")
    assert "give --model" in refused("fit", path, *out)
    assert "give --profile" in refused("fit", path, "--model", "glm-5-fp8", *out)
    served = ("--model", "glm-5-fp8", "--profile", "h200-sxm", "--tp", 8)
    assert "1 rows can be used" in refused("fit", path, *served, *out)
    table = tmp_path / "rows.csv"
    table.write_text("x\n1\n")
    assert "--tp is of load tests" in refused("fit", table, "--tp", 8, *out)
    assert "give it alone" in refused("fit", table, path, *out)
    assert "no result of vllm bench serve" in refused("fit", written(tmp_path / "n.json", {"a": 1}), *served, *out)


@pytest.mark.slow
def test_the_fit_is_that_of_the_same_rows_as_a_table(tmp_path: Path) -> None:
    import csv

    table = measured(tmp_path / "rows.csv", {"kernel_time_factor": 1.25})
    with table.open() as file:
        rows = list(csv.DictReader(file))
    files = []
    for number, row in enumerate(rows):
        done = int(row["num_prompts"])
        run = {
            "completed": done, "max_concurrency": int(row["concurrency"]), "request_rate": "inf",
            "total_input_tokens": done * int(row["isl"]), "total_output_tokens": done * int(row["osl"]),
            "mean_ttft_ms": float(row["ttft_mean_ms"]), "mean_tpot_ms": float(row["tpot_mean_ms"]),
            "output_throughput": float(row["output_tok_s"]),
        }  # fmt: skip
        files.append(written(tmp_path / f"{number}.json", run))
    server = MeasuredServer("glm-4.7-flash", "h200-sxm", "bf16", "vllm@0.16")
    assert fit(files, server=server).values == fit(table).values
