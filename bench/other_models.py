"""Predictions beside servers of a model that no constant was set with: MiniMax-M2.5 under vLLM, from InferenceX.

    pip install aiconfigurator-core    (0.12; its table of end-to-end measurements is read, of this model alone)
    python -m bench.other_models

The model is GLM-4.7's graph in MiniMax-M2.5's sizes: its norm over all heads of queries and keys, which takes an
all-reduce, is left out. Prints a line a deployment and how many rows the bands hold.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from importlib.util import find_spec
from pathlib import Path

import hw_profiles
from model.hf_config import from_hf
from model.split import Layout
from runtime.deployment.engines import nearest_release
from runtime.serving import bench_serving, simulate
from runtime.simulation.build import PriceTables, build, spec_for
from runtime.simulation.trust import report_bands

CONFIGS = Path(__file__).resolve().parent.parent / "model" / "configs"
MODEL = "MiniMaxAI/MiniMax-M2.5"
SIZES = {
    "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 1536, "moe_intermediate_size": 1536, "vocab_size": 200064, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 0, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0,
    "attention_bias": False,
}  # fmt: skip
SCHEMES = {"fp8": "fp8", "fp4": "nvfp4"}
NIGHTLY = "0.17.0"
"""What nightly images of the table (2026-03) are taken as."""


def deployments() -> dict[tuple[str, ...], dict[tuple[int, int, int], list[dict[str, str]]]]:
    """Rows by chip, release, precision and widths, and by input and output tokens and requests in flight; those whose
    expert widths contradict the others are left out."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install aiconfigurator-core")
    found: dict[tuple[str, ...], dict[tuple[int, int, int], list[dict[str, str]]]] = {}
    with (Path(spec.origin).parent / "systems" / "silicon_sample.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["model_path"] != MODEL or row["mode"] != "agg" or float(row["attention_dp_size"] or 1) != 1:
                continue
            tp, ep, width = (int(float(row[key])) for key in ("tp_size", "moe_ep_size", "moe_tp_size"))
            if ep * width == tp:
                key = (row["system"], row["backend_version"], row["precision"], str(tp), str(ep))
                load = int(row["isl"]), int(row["osl"]), int(float(row["batch_size"]))
                found.setdefault(key, {}).setdefault(load, []).append(row)
    return found


def main() -> None:
    raw = json.loads((CONFIGS / "glm-4.7.json").read_text(encoding="utf-8"))
    cfg, tables = from_hf({**raw, **SIZES}, MODEL), PriceTables()
    medians: dict[str, list[float]] = {"tpot": [], "ttft": []}
    held: dict[str, list[bool]] = {"tpot": [], "ttft": []}
    for (system, release, precision, tp, ep), loads in sorted(deployments().items()):
        engine = nearest_release("vllm", NIGHTLY if release.startswith("nightly") else release)
        profile, layout = hw_profiles.load(system.replace("_", "-")), Layout(tp=int(tp), ep=int(ep))
        built = build(spec_for(cfg, profile, layout, SCHEMES[precision], None, engine), tables)
        residuals: dict[str, list[float]] = {"tpot": [], "ttft": []}
        for (isl, osl, clients), rows in sorted(loads.items()):
            report = simulate(bench_serving(clients, isl, osl), built.deployment)
            bands = report_bands(built, report)
            for name in residuals:
                measured = statistics.median(float(row[f"silicon_{name}_ms"]) for row in rows)
                residuals[name].append(math.log(measured / 1e3 / getattr(report, name).mean))
                held[name].append(bands[name].low <= residuals[name][-1] <= bands[name].high)
        middle = {name: statistics.median(rows) for name, rows in residuals.items()}
        for name in medians:
            medians[name].append(middle[name])
        print(
            f"{system} vllm {release[:16]} {precision} tp{tp} ep{ep}, {len(loads)} loads: ln(measured / predicted) of "
            f"TPOT {middle['tpot']:+.2f}, TTFT {middle['ttft']:+.2f}"
        )
    for name, each in medians.items():
        off = [abs(value) for value in each]
        print(
            f"{name}: median {statistics.median(off):.1%}, mean {statistics.fmean(off):.1%}, with its sign "
            f"{statistics.median(each):+.1%} over {len(each)} deployments; bands hold "
            f"{statistics.fmean(held[name]):.0%} of {len(held[name])} rows"
        )


if __name__ == "__main__":
    main()
