"""Fits operator prices to the open tables of aiconfigurator-core and writes hw_profiles/prices/*.json.

    pip install aiconfigurator-core pyarrow pandas scipy
    python bench/fit_prices.py [PROFILE ...] [--report]

Reads operator tables only. The end-to-end table of that package is what the simulator is examined on.
`--report` prints one line a kernel with its errors. A chip takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.fit.eras import add_era  # noqa: E402
from bench.fit.network import collective_tables  # noqa: E402
from bench.fit.skew import skew_error  # noqa: E402
from bench.fit.solve import RATIO_UNIT, cross_validate  # noqa: E402
from bench.fit.tables import (  # noqa: E402
    PACKAGE,
    SYSTEMS,
    Job,
    System,
    Tables,
    all_jobs,
    attention_jobs,
    gemm_jobs,
    package_version,
)
from bench.fit.transfer import CHIPS, transfer_jobs  # noqa: E402
from hw_profiles import load  # noqa: E402
from runtime.pricing.adjust import stated  # noqa: E402
from runtime.pricing.kernel import kernel_from_json  # noqa: E402

SMOOTH = 0.5


def trimmed(axis: list[float], values: Any) -> list[float]:
    """Knots inside the data plus the nearest one beyond each end."""
    low, high = float(np.min(values)), float(np.max(values))
    kept = [
        k for i, k in enumerate(axis) if (i + 1 == len(axis) or axis[i + 1] > low) and (i == 0 or axis[i - 1] < high)
    ]
    return kept or axis[:1]


def fit_job(job: Job, tables: Tables) -> dict[str, Any]:
    axes = {n: trimmed(k, job.points.features[n]) for n, k in job.axes.items()}
    final, errors = cross_validate(job.family, job.points, job.free, axes, SMOOTH, job.fixed)
    assert final.grid is not None
    if job.skewed is not None and (skew := skew_error(tables, final, job.skewed, job.key.split("/")[1])):
        errors["power_law_rows"] = skew
    constants = {k: v for k, v in asdict(final.constants).items() if k in job.free or k in job.fixed}
    ranges = {n: [float(np.min(job.points.features[n])), float(np.max(job.points.features[n]))] for n in axes}
    return {
        "family": job.family,
        "constants": constants,
        "axes": axes,
        "ratio_unit": RATIO_UNIT,
        "ratio": [int(round(v / RATIO_UNIT)) for v in final.grid.values.ravel()],
        "range": ranges,
        "points": len(job.points.seconds),
        "error": errors,
        "source": job.source,
        **({"note": job.note} if job.note else {}),
    }


def difference(job: Job, older: dict[str, Any], newer: dict[str, Any]) -> float:
    """Mean |ln ratio| of two fits over the points of the older one."""
    seconds = [
        kernel_from_json(job.key, body).time(job.points.features, job.points.peak, job.points.bandwidth).seconds
        for body in (older, newer)
    ]
    return float(np.mean(np.abs(np.log(seconds[0] / seconds[1]))))


def fit_system(system: System, report: bool) -> dict[str, Any]:
    tables = Tables(system)
    kernels: dict[str, Any] = {}
    for job in all_jobs(tables):
        body = fit_job(job, tables)
        add_era(kernels, job.key, job.release, body, lambda older, newer, job=job: difference(job, older, newer))
        if report:
            line = "  ".join(f"{n} {100 * v[0]:5.1f}/{100 * v[1]:5.1f} %" for n, v in body["error"].items())
            name = f"{job.key} {job.release}"
            print(f"{system.profile:14s} {name:54s} {len(job.points.seconds):6d}  {line}", flush=True)
    return {
        "schema": 1,
        "profile": system.profile,
        "data": {"package": PACKAGE, "version": package_version(), "licence": "Apache-2.0", "system": system.folder},
        "date": date.today().isoformat(),
        "relative_to": {
            "peak_flops_per_s": system.peaks,
            "memory_bandwidth_bytes_per_s": system.bandwidth,
            "figures": stated(load(system.profile).number)["figures"],
        },
        "error_meaning": "[median, 90th percentile] of |predicted / measured - 1|",
        "kernels": {**kernels, "memory/any/any": memory_kernel(kernels, tables)},
        "collectives": collective_tables(tables),
    }


def memory_kernel(kernels: dict[str, Any], tables: Tables) -> dict[str, Any]:
    """Elementwise kernels have no table: the shortest captured kernel, at the streaming rate of attention."""
    newest = {j.key: j for j in reversed(list(gemm_jobs(tables)))}
    shortest = min(j.points.seconds.min() for j in newest.values())
    decode = [
        b["constants"]["memory_efficiency"]
        for k, b in kernels.items()
        if k.startswith("gqa_decode/bf16") and "@" not in k
    ]
    return {
        "family": "memory",
        "constants": {"launch_s": float(f"{shortest:.3g}"), "memory_efficiency": float(np.median(decode))},
        "range": {},
        "error": {"held_out_shapes": [0.15, 0.35]},
        "evidence": "transferred",
        "source": "shortest kernel of the GEMM tables; streaming rate of GQA decode",
        "note": "error assumed: no elementwise table to hold out",
    }


def fit_transfer(report: bool) -> dict[str, Any]:
    kernels = {}
    for key, (job, fit, errors) in transfer_jobs().items():
        assert fit.grid is not None
        worst = [round(float(np.mean([e[i] for e in errors.values()])), 4) for i in (0, 1)]
        kernels[key] = {
            "family": job.family,
            "constants": {k: v for k, v in asdict(fit.constants).items() if k in job.free},
            "axes": job.axes,
            "ratio_unit": RATIO_UNIT,
            "ratio": [int(round(v / RATIO_UNIT)) for v in fit.grid.values.ravel()],
            "range": {},
            "error": {"held_out_shapes": worst, "left_out_chip": errors},
            "source": f"joint fit over {', '.join(errors)}",
        }
        if report:
            print(f"transfer       {key:44s} {errors}", flush=True)
    memory = [memory_kernel_of(s) for s in SYSTEMS if s.profile in CHIPS]
    launch, rate = (float(f"{np.median([m[i] for m in memory]):.3g}") for i in (0, 1))
    kernels["memory/any/any"] = {
        "family": "memory", "constants": {"launch_s": launch, "memory_efficiency": rate}, "range": {},
        "error": {"held_out_shapes": [0.2, 0.4]}, "source": "median of the measured chips; error assumed",
    }  # fmt: skip
    return {
        "schema": 1,
        "profile": "transfer",
        "data": {"package": PACKAGE, "version": package_version(), "licence": "Apache-2.0", "system": list(CHIPS)},
        "date": date.today().isoformat(),
        "error_meaning": "mean over left-out chips of [median, 90th percentile] of |predicted / measured - 1|",
        "kernels": kernels,
        "collectives": {},
    }


def memory_kernel_of(system: System) -> tuple[float, float]:
    tables = Tables(system)
    kernels = {}
    for j in attention_jobs(tables):
        if j.key.startswith("gqa_decode/bf16") and j.key not in kernels:  # the newest release comes first
            kernels[j.key] = fit_job(j, tables)
    body = memory_kernel(kernels, tables)["constants"]
    return body["launch_s"], body["memory_efficiency"]


def write(body: dict[str, Any], path: Path) -> None:
    """One line a kernel: small, and a readable diff."""
    head = {k: v for k, v in body.items() if k not in ("kernels", "collectives")}
    lines = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ","
    for name in ("kernels", "collectives"):
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in body[name].items())
        lines += f'\n "{name}": {{\n{rows}\n }}' + ("," if name == "kernels" else "\n}\n")
    path.write_text(lines, encoding="utf-8")
    json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", help="default: all; 'transfer' is the joint fit for other chips")
    parser.add_argument("--report", action="store_true", help="print one line a kernel")
    parser.add_argument("--out", type=Path, default=ROOT / "hw_profiles" / "prices")
    args = parser.parse_args(argv)
    known: dict[str, System | None] = {**{s.profile: s for s in SYSTEMS}, "transfer": None}
    if unknown := set(args.profiles) - set(known):
        parser.error(f"no operator tables for {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.profiles or known:
        path = args.out / f"{name}.json"
        system = known[name]
        write(fit_system(system, args.report) if system else fit_transfer(args.report), path)
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
