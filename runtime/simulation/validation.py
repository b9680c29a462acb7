"""Scoring the simulator against measured deployments.

Three kinds of file, told apart by their columns: deployments as people publish them (`server_flags`, see `published`),
end-to-end rows of one serving benchmark (`ttft_ms`, `tpot_ms`), and single step times (`measured_s`, or the
JSON of an Ascend package's run.py). Each row is
predicted from its columns and, for the benchmark, from the server settings that it is known to pass; nothing is fitted
here. A row that cannot be priced is listed with the reason and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import hw_profiles
from foundation.errors import Failure, UsageError, first_line
from foundation.paths import Outside, inside
from foundation.reading import Unreadable, read_csv
from model.split import Layout
from runtime.deployment.engines import Circumstances, nearest_release
from runtime.deployment.engines import load as load_engine
from runtime.deployment.engines.inferencex import launch_kv, launch_settings
from runtime.pricing.bands import band
from runtime.pricing.pricer import relative_error
from runtime.serving import Report, bench_serving, simulate
from runtime.serving.pricing import BatchShape
from runtime.simulation import package_runs, published
from runtime.simulation.build import Built, PriceTables, build, spec_for
from runtime.simulation.mechanisms import Mechanism
from runtime.simulation.published import PublishedRow, model_of
from runtime.simulation.scores import ScoredRow
from runtime.simulation.trust import kind_of, of_older_engine, report_bands

END_TO_END = (
    "model",
    "system",
    "precision",
    "engine",
    "isl",
    "osl",
    "concurrency",
    "tp",
    "dp",
    "ep",
    "ttft_ms",
    "tpot_ms",
)
STEP = (
    "device",
    "model",
    "num_queries",
    "query_len",
    "context",
    "world",
    "tp",
    "dp",
    "ep",
    "mtp",
    "q_linear",
    "q_attn",
    "measured_s",
)


def read_rows(path: Path) -> tuple[str, list[dict[str, str]]]:
    """("published", "end-to-end" or "step", and the rows). Raises `UsageError` naming what is wrong with the file."""
    if path.suffix == ".json":
        return "step", package_runs.steps(path)
    try:
        columns, rows = read_csv(path)
    except Unreadable as error:
        what = f"not a CSV file ({error})" if error.reason in ("encoding", "syntax") else error
        raise UsageError(f"{path}: {what}") from None
    if not columns:
        raise UsageError(f"{path}: an empty file; its first line must name the columns")
    kind = "step" if "measured_s" in columns else "published" if "server_flags" in columns else "end-to-end"
    needed = {"step": STEP, "published": published.COLUMNS, "end-to-end": END_TO_END}[kind]
    if missing := [column for column in needed if column not in columns]:
        raise UsageError(f"{path}: no column {', '.join(missing)} ({kind} rows need: {', '.join(needed)})")
    if not rows:
        raise UsageError(f"{path}: no rows below the header")
    if all(fault := [_fault(kind, row) for row in rows]):
        raise UsageError(f"{path}: no row can be read; the first: {fault[0]}")
    return kind, [_beside(path, row) for row in rows]


def _beside(path: Path, row: dict[str, str]) -> dict[str, str]:
    """A row whose files of models, chips and engines are found: beside the CSV or below, wherever its author would have
    others read. Raises `UsageError` for one that is not there."""
    found = dict(row)
    for column in {"model", "chip", "system", "device", "engine"} & row.keys():
        if (row[column] or "").strip().endswith((".json", ".toml")):
            try:
                found[column] = str(inside(path.parent, row[column].strip()))
            except Outside as error:
                raise UsageError(
                    f"{path}: {column} {row[column].strip()!r}: {error}; give a name, or a file beside this one"
                ) from None
    return found


def _fault(kind: str, row: Mapping[str, Any]) -> str:
    """What is wrong with a row's cells, or ""; of published ones their reader says it."""
    if kind == "published":
        return ""
    needed, measured = (STEP, ("measured_s",)) if kind == "step" else (END_TO_END, ("ttft_ms", "tpot_ms"))
    for column in needed:
        if not (row[column] or "").strip():
            return f"column {column} is empty"
    for column in measured:
        try:
            value = float(row[column])
        except ValueError:
            return f"{column} is {row[column]!r}, not a number"
        if not (math.isfinite(value) and value > 0):
            return f"{column} is {row[column]}: a measured time is above zero"
    return ""


class _Shared:
    """What rows of one chip share: its profile, and the price tables, which are kept by it."""

    def __init__(self) -> None:
        self.profile = cache(hw_profiles.load)
        self.tables = PriceTables()


def _end_to_end(row: Mapping[str, str], shared: _Shared) -> ScoredRow:
    cfg, profile = model_of(row["model"]), shared.profile(row["system"])
    tp, dp, ep = (int(row[key]) for key in ("tp", "dp", "ep"))
    layout = Layout(tp=tp, dp=dp, ep=ep)
    engine = nearest_release(row["engine"], f"{row.get('engine_version', '')} {row.get('measured', '')}")
    kind = load_engine(engine).kind
    sizes = (int(row[key]) for key in ("concurrency", "isl", "osl"))
    settings = launch_settings(kind, Circumstances.of(cfg, profile), *sizes)
    built = build(spec_for(cfg, profile, layout, row["precision"], launch_kv(kind), engine, settings), shared.tables)
    load = bench_serving(int(row["concurrency"]), int(row["isl"]), int(row["osl"]))
    report = simulate(load, built.deployment)
    predicted = {"ttft_ms": 1e3 * report.ttft.mean, "tpot_ms": 1e3 * report.tpot.mean}
    bands = report_bands(built, report)
    return ScoredRow(
        name=f"{row['model']} {row['system']} {row['engine']} {row['isl']}/{row['osl']} c{row['concurrency']}",
        measured={key: float(row[key]) for key in predicted},
        predicted=predicted,
        bands={key: bands[key.removesuffix("_ms")].around(value) for key, value in predicted.items()},
        kind=kind_of(built, report),
        saturated=report.saturated,
        evidence=report.evidence,
        group=f"{row['model']} {row['system']} {row['engine']} {built.spec.layout.name}",
    )


FIGURES = {"tpot_ms": "tpot", "ttft_ms": "ttft", "output_tok_s": "throughput", "step_s": "step"}
"""Quantities of scored rows -> figures of bands."""


def _as_a_client(asked: PublishedRow, report: Report) -> float:
    """Output tokens a second as load clients print them: over the whole run, the filling and draining of the server
    included. Of a load without end: of its steady window."""
    if asked.load.goes_on is not None:
        return report.output_tokens_per_s
    return sum(request.output_tokens for request in report.requests) / report.duration_s


def beside(asked: PublishedRow, report: Report) -> tuple[dict[str, float], dict[str, float]]:
    """What a row measured and what a report of it says, by quantity: means where there are, else medians."""
    measured: dict[str, float] = {}
    predicted: dict[str, float] = {}
    for quantity, stats in (("tpot_ms", report.tpot), ("ttft_ms", report.ttft)):
        name = FIGURES[quantity]
        for column, value in ((f"{name}_mean_ms", stats.mean), (f"{name}_median_ms", stats.p50)):
            if column in asked.measured and quantity not in measured:
                measured[quantity], predicted[quantity] = asked.measured[column], 1e3 * value
    if "output_tok_s" in asked.measured:
        measured["output_tok_s"] = asked.measured["output_tok_s"]
        predicted["output_tok_s"] = _as_a_client(asked, report)
    return measured, predicted


def _published(row: Mapping[str, str], builds: dict[Any, Built], without: Mechanism | None) -> ScoredRow:
    """builds: what rows of one deployment share."""
    asked = published.read(row, without)
    key = (
        asked.group,
        asked.scheme,
        asked.kv,
        tuple(sorted(asked.settings.items())),
        asked.drafts,
        asked.accept_length,
    )
    if key not in builds:
        builds[key] = build(asked.spec())
    built = builds[key]
    report = simulate(asked.load, built.deployment)
    found = report_bands(built, report)
    if asked.older:
        found = of_older_engine(found)
    measured, predicted = beside(asked, report)
    bands = {key: found[FIGURES[key]].around(value) for key, value in predicted.items()}
    return ScoredRow(
        name=f"{asked.name} {row['isl']}/{row['osl']} c{row['concurrency'] or row['rate']}",
        measured=measured,
        predicted=predicted,
        bands=bands,
        saturated=report.saturated,
        evidence=report.evidence,
        group=asked.group,
        apart=asked.apart,
        kind=kind_of(built, report),
    )


_DEVICES = {"ATLAS_800_A3_560T_128G_DIE": "ascend-910c-die-560t", "ATLAS_800_A3_752T_128G_DIE": "ascend-910c-die"}


def _step(row: Mapping[str, str], shared: _Shared) -> ScoredRow:
    cfg = model_of(row["model"])
    profile = shared.profile(_DEVICES.get(row["device"], row["device"]))
    tp, dp, ep, world, drafts = (int(row[key]) for key in ("tp", "dp", "ep", "world", "mtp"))
    if row["q_linear"] not in package_runs.LINEAR:
        raise UsageError(f"q_linear {row['q_linear']!r}: known are {', '.join(package_runs.LINEAR)}")
    layout = Layout(tp=tp, dp=dp, ep=ep, pp=max(1, world // (tp * dp)))
    kv = {"INT8": "int8", "FP8": "fp8"}.get(row["q_attn"], "bf16")
    drafts = drafts if cfg.mtp_layers else 0  # drafted by something else than the model: verification alone is priced
    linear, cuts = package_runs.LINEAR[row["q_linear"]], {"expert_groups": True}  # as measured, whoever serves so
    # a pool is not part of a single step
    spec = spec_for(cfg, profile, layout, linear, kv, "vllm-ascend", cuts, drafts=drafts, pool_tokens=1_000_000)
    built = build(spec, shared.tables)
    queries, length, context = (int(row[key]) for key in ("num_queries", "query_len", "context"))
    local = math.ceil(queries / dp)
    if context:
        contexts = np.full(local, context)
        shape = BatchShape(decode_contexts=contexts, query_tokens=length, decode_rows=local, graphed=True)
    else:
        shape = BatchShape(prefill_chunks=[(length, int(row.get("start") or 0))] * local)
    price = built.pricer.price(shape)
    found = band("step", kind_of(built), relative_error(price), price.extrapolated)
    return ScoredRow(
        name=row.get("name") or row["model"],
        measured={"step_s": float(row["measured_s"])},
        predicted={"step_s": price.seconds},
        bands={"step_s": found.around(price.seconds)},
        kind=kind_of(built),
        saturated=False,
        evidence=price.evidence,
        group=f"{row['model']} {row['device']} {layout.name}",
    )


def score(path: Path, progress: Any = lambda done, total: None, without: Mechanism | None = None) -> list[ScoredRow]:
    """Scores every row of a file. without: a cause to switch off, of published rows. Raises `UsageError` for a
    malformed file; rows that cannot be priced come back with `skipped` set."""
    kind, rows = read_rows(path)
    if without and kind != "published":
        raise UsageError(f"--without {without.name} is for rows of published deployments, and these are {kind} rows")
    scored: list[ScoredRow] = []
    builds: dict[Any, Built] = {}
    shared = _Shared()
    for number, row in enumerate(rows):
        try:
            if fault := _fault(kind, row):
                raise UsageError(fault)
            if kind == "published":
                scored.append(_published(row, builds, without))
            else:
                scored.append((_step if kind == "step" else _end_to_end)(row, shared))
        except Failure as error:
            reason = first_line(error)
            scored.append(ScoredRow(f"row {number + 1}: {row['model']}", {}, {}, {}, False, "assumed", reason))
        except (ValueError, KeyError) as error:
            reason = f"malformed: {error}"
            scored.append(ScoredRow(f"row {number + 1}: {row['model']}", {}, {}, {}, False, "assumed", reason))
        progress(number + 1, len(rows))
    return scored
