"""What kind of prediction a report is, and the bands of its figures."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping

import numpy as np

from runtime.pricing.bands import FEW, Band, PredictionKind, band, band_of_own
from runtime.pricing.pricer import relative_error
from runtime.serving import Report, Speculation
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import Built

_UNLIKE = 1.5
"""By how much a load may lie outside those that an engine was fitted to, and still be like them."""


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
    found = {figure: band(figure, kind, error, report.extrapolated) for figure, error in errors.items()}
    return _drafting(_of_own(found, built, report, isl, errors), deployment.speculation, report.sent_per_s is None)


def of_older_engine(found: dict[str, Band]) -> dict[str, Band]:
    """The bands where the engine is older than every described release: it may well be slower, by as much as is taken
    where there is nothing to go by."""
    words = "the engine is older than every described release, so up to twice as slow"
    slower = {"tpot": (0.0, math.log(2)), "ttft": (0.0, math.log(2)), "throughput": (math.log(2), 0.0)}
    return found | {name: found[name].wider(*ends, words) for name, ends in slower.items()}


def _drafting(found: dict[str, Band], speculation: Speculation | None, closed: bool) -> dict[str, Band]:
    """The bands, as much wider as it is uncertain how many drafts are taken: a token takes as much longer as steps make
    fewer of them, and where clients wait for their answers (`closed`), as many fewer are served."""
    if speculation is None or not speculation.ranges:
        return found
    low, high = speculation.mean_range
    fewer, more = (abs(math.log(end / speculation.mean_tokens)) for end in (low, high))
    words = f"{low:.2f} to {high:.2f} tokens a step with drafts widen it"
    wider = {"tpot": (more, fewer)} | ({"throughput": (fewer, more)} if closed else {})
    return found | {name: found[name].wider(*ends, words) for name, ends in wider.items()}


def _of_own(
    found: dict[str, Band], built: Built, report: Report, isl: int, errors: Mapping[str, float]
) -> dict[str, Band]:
    """The bands where the engine was fitted: of that deployment's own measurements, if this is one like it."""
    fitted = built.spec.engine.fitted
    if fitted is None:
        return found
    spec = built.spec
    if (fitted.model, fitted.chip, fitted.layout) != (spec.cfg.name, spec.profile.name, spec.layout.name):
        of = f"{fitted.model} on {fitted.chip}, {fitted.layout}"
        return {
            name: dataclasses.replace(each, basis=f"constants fitted to another deployment ({of}); {each.basis}")
            for name, each in found.items()
        }
    loads = ((report.mean_in_system, fitted.in_flight), (isl, fitted.prompt_tokens))
    beyond = any(not low / _UNLIKE <= value <= high * _UNLIKE for value, (low, high) in loads)
    own = {name: rows for name, rows in fitted.residuals.items() if len(rows) >= FEW}
    return found | {name: band_of_own(own[name], errors[name], beyond) for name in found if name in own}
