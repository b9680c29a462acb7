"""Constants for chips nobody has measured: one fit over several NVIDIA generations at once.

Efficiencies are shares of each chip's own peaks, so the joint fit is a function of roofline-normalised
work. Its error is what it gets on a chip that was left out of the fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.fit.solve import Fit, Points, fit_constants, fit_grid, relative_errors
from bench.fit.tables import SYSTEMS, Job, Tables, all_jobs
from runtime.pricing.kernel import formula

CHIPS = ("a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200-sxm")
KEYS = ("gemm/bf16/sglang", "gemm/fp8-tensor/sglang", "gemm/fp8-block/sglang", "bmm/bf16/sglang",
        "moe/bf16/sglang", "moe/fp8-block/sglang", "moe/w4a16/sglang", "gqa_decode/bf16/sglang",
        "gqa_prefill/bf16/sglang", "mla_decode/bf16/sglang", "mla_prefill/bf16/trtllm",
        "index_scores/fp8/sglang", "select_topk/fp8/sglang", "sparse_prefill/fp8/sglang")  # fmt: skip
LEFT_OUT = {"moe/bf16/sglang": {"b200-sxm"}, "moe/w4a16/sglang": {"b200-sxm"}}
"""Another kernel altogether on that chip: the joint fit stands for one way of writing the operator."""
SAMPLE = 4000


def joint(parts: list[Points]) -> Points:
    """A sample of each chip's points, with peak and bandwidth per point."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[np.ndarray]] = {k: [] for k in parts[0].features}
    seconds, peaks, bandwidths = [], [], []
    for part in parts:
        count = len(part.seconds)
        kept = rng.choice(count, min(SAMPLE, count), replace=False)
        for name, values in part.features.items():
            columns[name].append(np.broadcast_to(np.asarray(values, float), (count,))[kept])
        seconds.append(part.seconds[kept])
        peaks.append(np.full(len(kept), part.peak))
        bandwidths.append(np.full(len(kept), part.bandwidth))
    total = np.concatenate(seconds)
    features = {k: np.concatenate(v) for k, v in columns.items()}
    rates: Any = np.concatenate(peaks), np.concatenate(bandwidths)
    return Points(features, total, np.arange(len(total)), *rates)


def fit_joint(jobs: list[Job]) -> Fit:
    points = joint([j.points for j in jobs])
    constants = fit_constants(jobs[0].family, points, jobs[0].free, limit=1 << 30)
    predicted, _ = formula(points.features, jobs[0].family, constants, points.peak, points.bandwidth)
    grid = fit_grid(points, np.log(points.seconds / predicted), jobs[0].axes, 1.0)
    return Fit(jobs[0].family, constants, grid)


def transfer_jobs() -> dict[str, tuple[Job, Fit, dict[str, list[float]]]]:
    """Key -> (a job for its axes, the joint fit, errors per left-out chip)."""
    systems = {s.profile: s for s in SYSTEMS}
    jobs: dict[str, dict[str, Job]] = {key: {} for key in KEYS}
    for chip in CHIPS:
        for job in all_jobs(Tables(systems[chip])):
            if job.key in jobs and chip not in LEFT_OUT.get(job.key, ()):
                jobs[job.key].setdefault(chip, job)  # the newest release comes first
    out = {}
    for key, by_chip in jobs.items():
        if len(by_chip) < 2:
            continue
        errors = {}
        for chip, job in by_chip.items():
            others = fit_joint([j for c, j in by_chip.items() if c != chip])
            errors[chip] = relative_errors(others.predict(job.points), job.points.seconds)
        out[key] = (by_chip["h200-sxm"], fit_joint(list(by_chip.values())), errors)
    return out
