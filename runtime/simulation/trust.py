"""What kind of prediction a report is, and the bands of its figures."""

from __future__ import annotations

import statistics

import numpy as np

from runtime.pricing.bands import Band, PredictionKind, band
from runtime.pricing.pricer import relative_error
from runtime.serving import Report
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import Built


def kind_of(built: Built, report: Report | None = None) -> PredictionKind:
    """The kind of a prediction: of a report, or of a single step."""
    priced = "measured" if built.pricer.book.measured else "carried"
    regime = "steady"
    if report is not None:
        regime = "burst" if report.steady_s is None else "saturated" if report.saturated else "steady"
    return PredictionKind(built.spec.engine.kind, priced, regime)


def report_bands(built: Built, report: Report, replicas: int = 1) -> dict[str, Band]:
    """The bands of a report's "tpot", "ttft" and "throughput": of this kind of prediction, and with the price errors of
    a step as the run had them on average."""
    deployment, kind = built.deployment, kind_of(built, report)
    batch = max(1, round(report.mean_in_system / (deployment.ranks * replicas)))
    rows, _ = deployment.engine.decode_rows(min(batch, deployment.engine.max_running_requests))
    isl, osl = (
        round(statistics.fmean(getattr(r, name) for r in report.requests))
        for name in ("prompt_tokens", "output_tokens")
    )
    queries = deployment.speculation.query_tokens if deployment.speculation else 1
    decode = BatchShape(np.full(rows, isl + osl // 2), queries, decode_rows=rows, graphed=True)
    errors = {
        "tpot": relative_error(built.pricer.price(decode)),
        "ttft": relative_error(built.pricer.price(BatchShape(prefill_chunks=[(isl, 0)]))),
    }
    errors["throughput"] = errors["tpot"]
    return {figure: band(figure, kind, error, report.extrapolated) for figure, error in errors.items()}
