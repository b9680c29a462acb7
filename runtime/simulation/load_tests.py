"""What load testers write of a server, as rows of measured deployments.

    vllm bench serve --save-result      one JSON object a file
    sglang.bench_serving --output-file  JSON Lines, a run a line
    aiperf, genai-perf                  profile_export_*.json, one object a file
    guidellm                            benchmarks.json, a run an entry of `benchmarks`

They record the load and the figures, not the server: its chip, layout and settings are said beside them
(`MeasuredServer`).
Field names: vllm/benchmarks/serve.py, sglang/bench_serving.py, aiperf's profile_export_aiperf.json, and guidellm 0.8's
benchmark/schemas. Lengths are the means of the run, but for SGLang's random ones, whose range is recorded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation.errors import UsageError
from foundation.reading import Unreadable, parse_json, read_text
from runtime.simulation.published import COLUMNS

_MS = {"ttft": "time_to_first_token", "tpot": "inter_token_latency"}
_NO_NUMBER = re.compile(r"(?<=[:\s,\[])-?(?:Infinity|NaN)(?=[\s,\]}])")
"""What Python's writer puts for a rate without a limit (SGLang's) or a mean of nothing, and JSON does not have."""
_MOST = 1e12
"""Any figure of a run is below it."""


@dataclasses.dataclass(frozen=True)
class MeasuredServer:
    """What was measured, as columns of a published row (`runtime.simulation.published.COLUMNS`) have it."""

    model: str
    chip: str
    formats: str
    engine: str = "sglang"
    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    kv_dtype: str = ""
    mtp: int = 0
    accept: float | None = None
    server_flags: str = ""

    def cells(self, accepted: float | None) -> dict[str, str]:
        """accepted: tokens a step, as the run says."""
        name, _, release = self.engine.partition("@")
        length = self.accept or accepted
        drafts = f"{self.mtp}, accept length {length:g}" if self.mtp and length else str(self.mtp)
        layout = {axis: str(getattr(self, axis)) for axis in ("tp", "dp", "ep", "pp")}
        return dict.fromkeys(COLUMNS, "") | layout | {
            "source": "load tests", "model": self.model, "chip": self.chip, "formats": self.formats, "engine": name,
            "engine_version": release, "kv_dtype": self.kv_dtype, "mtp": drafts, "server_flags": self.server_flags,
        }  # fmt: skip


def rows_of(path: Path, server: MeasuredServer) -> tuple[list[dict[str, str]], list[str]]:
    """(a row a run of a file, why runs were left out). Raises `UsageError` for a file that no load tester wrote."""
    rows, skipped = [], []
    for number, run in enumerate(_runs(path), start=1):
        where = f"{path}, run {number}"
        try:
            rows.append(_row(run, server))
        except UsageError as error:
            skipped.append(f"{where}: {error}")
    return rows, skipped


def _runs(path: Path) -> list[Mapping[str, Any]]:
    """The runs of a file: one JSON object, or one a line."""
    try:
        text = _NO_NUMBER.sub("null", read_text(path))
        try:
            found = [parse_json(text)]
        except Unreadable:
            found = [parse_json(line) for line in text.splitlines() if line.strip()]
    except Unreadable as error:
        raise UsageError(f"{path}: no result of a load tester: {error}") from None
    if len(found) == 1 and isinstance(found[0], dict) and isinstance(found[0].get("benchmarks"), list):
        found = found[0]["benchmarks"]  # guidellm's
    if not found or not all(isinstance(run, dict) and _known(run) for run in found):
        raise UsageError(
            f"{path}: no result of vllm bench serve, sglang.bench_serving, aiperf or guidellm: there is no "
            "output_throughput, no output_token_throughput and no benchmarks with metrics in it"
        )
    return found


def _known(run: Mapping[str, Any]) -> bool:
    return "output_throughput" in run or any(isinstance(run.get(key), dict) for key in _OBJECTS)


_OBJECTS = ("output_token_throughput", "metrics")


def _row(run: Mapping[str, Any], server: MeasuredServer) -> dict[str, str]:
    if "output_throughput" in run:
        found = _bench_serving(run)
    else:
        found = _guidellm(run) if isinstance(run.get("metrics"), dict) else _aiperf(run)
    accepted = _number(run, "accept_length")
    measured = {key: f"{value!r}" for key, value in found.items() if value is not None}
    return server.cells(accepted) | measured


def _bench_serving(run: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's and SGLang's, of one descent."""
    done = _whole(run, "completed")
    if not done:
        raise UsageError("no request was completed")
    if failed := _whole(run, "failed") or max(0, (_whole(run, "num_prompts") or done) - done):
        raise UsageError(f"{failed:,} requests failed: what the others saw is of another load")
    means = [(_number(run, f"total_{side}_tokens") or 0.0) / done for side in ("input", "output")]
    lengths = {"isl": round(means[0]), "osl": round(means[1]), "length_ratio": 1.0}
    ratio = _number(run, "random_range_ratio")
    drawn = [_whole(run, f"random_{side}_len") for side in ("input", "output")]
    if ratio is not None and 0 < ratio <= 1 and all(drawn) and run.get("dataset_name") == "random":
        lengths = {"isl": drawn[0], "osl": drawn[1], "length_ratio": ratio}
    return (
        lengths
        | _load(run.get("request_rate"), _whole(run, "max_concurrency"), done)
        | {
            **{
                f"{name}_{column}_ms": _number(run, f"{said}_{name}_ms")
                for name in ("ttft", "tpot")
                for column, said in (("mean", "mean"), ("median", "median"), ("p99", "p99"))
            },
            "output_tok_s": _number(run, "output_throughput"),
        }
    )


def _aiperf(run: Mapping[str, Any]) -> dict[str, Any]:
    """aiperf's, and genai-perf's before it."""
    done = _stat(run, "request_count") or _number(run, "request_count")
    lengths = {column: _stat(run, f"{side}_sequence_length") for column, side in (("isl", "input"), ("osl", "output"))}
    if not done or not all(lengths.values()):
        raise UsageError("it says no request_count or sequence lengths")
    if failed := _stat(run, "error_request_count"):
        raise UsageError(f"{failed:,.0f} requests failed: what the others saw is of another load")
    asked = run.get("input_config")
    asked = asked if isinstance(asked, dict) else {}
    generated = asked.get("loadgen")
    generated = generated if isinstance(generated, dict) else {}
    stimulus = asked.get("perf_analyzer")
    stimulus = stimulus.get("stimulus") if isinstance(stimulus, dict) else None
    stimulus = stimulus if isinstance(stimulus, dict) else {}
    phases = [_part(asked, "phases")] if isinstance(asked.get("phases"), dict) else asked.get("phases")
    of_phase = [each for each in phases or () if isinstance(each, dict)] if isinstance(phases, list) else []
    phase = next((each for each in of_phase if each.get("kind") == "profiling"), {})  # 0.13
    clients = next((found for each in (phase, generated, stimulus) if (found := _whole(each, "concurrency"))), None)
    rate = next(
        (each[key] for each in (phase, generated, stimulus) for key in ("rate", "request_rate") if key in each), None
    )
    figures = {
        f"{name}_{column}_ms": _stat(run, tag, said)
        for name, tag in _MS.items()
        for column, said in (("mean", "avg"), ("median", "p50"), ("p99", "p99"))
    }
    return {
        "isl": round(lengths["isl"] or 0), "osl": round(lengths["osl"] or 0), "length_ratio": 1.0,
        **_load(rate, clients, round(done)), **figures, "output_tok_s": _stat(run, "output_token_throughput"),
    }  # fmt: skip


def _guidellm(run: Mapping[str, Any]) -> dict[str, Any]:
    """guidellm's, of its requests that were answered."""
    metrics = _part(run, "metrics")
    totals = _part(metrics, "request_totals")
    done = _whole(totals, "successful")
    lengths = {
        column: _answered(metrics, f"{side}_token_count") for column, side in (("isl", "prompt"), ("osl", "output"))
    }
    if not done or not all(lengths.values()):
        raise UsageError("it says no answered requests or token counts")
    if failed := _whole(totals, "errored"):
        raise UsageError(f"{failed:,} requests failed: what the others saw is of another load")
    strategy = _part(_part(run, "config"), "strategy")
    kind = strategy.get("kind", strategy.get("type_"))
    clients = {"concurrent": _whole(strategy, "streams"), "synchronous": 1}.get(str(kind))
    rate = strategy.get("rate") if kind in ("constant", "poisson") else None
    if clients is None and rate is None and kind != "throughput":
        raise UsageError(
            f"its strategy is {str(kind)[:40]!r}: concurrent, synchronous, throughput, constant or poisson"
        )
    named = {"ttft": "time_to_first_token_ms", "tpot": "inter_token_latency_ms"}
    figures = {
        f"{name}_{column}_ms": _answered(metrics, tag, said)
        for name, tag in named.items()
        for column, said in (("mean", "mean"), ("median", "median"), ("p99", "p99"))
    }
    return {
        "isl": round(lengths["isl"] or 0), "osl": round(lengths["osl"] or 0), "length_ratio": 1.0,
        **_load(rate, clients, done), **figures, "output_tok_s": _answered(metrics, "output_tokens_per_second"),
    }  # fmt: skip


def _part(run: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = run.get(key)
    return found if isinstance(found, dict) else {}


def _answered(metrics: Mapping[str, Any], key: str, statistic: str = "mean") -> float | None:
    """A statistic over the requests that were answered."""
    found = _part(_part(metrics, key), "successful")
    return _number(_part(found, "percentiles") if statistic == "p99" else found, statistic)


def _load(rate: Any, clients: int | None, done: int) -> dict[str, Any]:
    """How requests were sent: by so many clients, at a rate, or all at once."""
    paced = isinstance(rate, int | float) and not isinstance(rate, bool) and math.isfinite(rate) and rate > 0
    if paced and clients and clients < done:
        raise UsageError("a rate and a limit of requests in flight at once: measure with one of them")
    return {"concurrency": None if paced else clients, "rate": float(rate) if paced else None, "num_prompts": done}


def _number(run: Mapping[str, Any], key: str) -> float | None:
    """A figure above zero; None where there is none. Raises `UsageError` for anything else."""
    value = run.get(key)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        raise UsageError(f"{key} is {str(value)[:40]!r}: a figure is a number above zero")
    return float(value)


def _whole(run: Mapping[str, Any], key: str) -> int | None:
    value = _number(run, key)
    if value is not None and value != int(value):
        raise UsageError(f"{key} is {value:g}: not a whole number")
    return None if value is None else int(value)


def _stat(run: Mapping[str, Any], key: str, statistic: str = "avg") -> float | None:
    """A statistic of one of aiperf's metrics, in milliseconds where it is of time."""
    metric = run.get(key)
    if not isinstance(metric, dict):
        return None
    value = _number(metric, statistic)
    scale = {"s": 1e3, "sec": 1e3, "us": 1e-3, "ns": 1e-6}.get(str(metric.get("unit")), 1.0)
    return None if value is None else value * scale
