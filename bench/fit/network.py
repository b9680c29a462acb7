"""Collectives: measured curves are stored (bytes, seconds) at their nearest rising ones, with an interpolation error.

Bytes are the full vector of the collective: what an all-reduce reduces, what an all-gather has produced,
what a reduce-scatter starts from, what one rank sends in an all-to-all (its own share included).
DeepEP rows are per rank: `bytes` = tokens * top-k * hidden * element size (dispatch 1, combine 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.fit.eras import add_era
from bench.fit.tables import Tables
from runtime.pricing.grid import rising

NCCL = ("2.29.2", "2.27.5", "2.27.3", "2.27", "2.23")


def collective_tables(t: Tables) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for version in NCCL:
        source = f"comm/nccl/{version}/nccl_perf.parquet"
        if (table := t.read(source)) is not None:
            table = table[table.nccl_dtype == "half"]
            for (name, group), rows in table.groupby(["op_name", "num_gpus"]):
                op = {"alltoall": "all_to_all"}.get(str(name), str(name))
                key = f"{op}/{group}/nccl"
                out[key] = _curve(rows.message_size * 2.0, rows.latency * 1e-3, f"{t.system.folder}/{source}")
            break
    for engine, release, source, table in t.per_engine("comm", "custom_allreduce_perf"):
        mode = table.kernel_source.str.extract("(graph|eager)$")[0].fillna("graph")
        for (how, group), rows in table.groupby([mode, "num_gpus"]):
            curve = _curve(rows.message_size * 2.0, rows.latency * 1e-3, source)
            add_era(out, f"all_reduce/{group}/{engine}-{how}", release, curve, _curves_differ)
    out.update(_deepep(t))
    return out


def _deepep(t: Tables) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for version in ("0.5.12", "0.5.6.post2"):
        for mode in ("ll", "normal"):
            source = f"comm/sglang/{version}/wideep_deepep_{mode}_perf.parquet"
            table = t.read(source)
            if table is None:
                continue
            table = table[(table.num_topk == 8) & (table.num_experts == 256) & table.hidden_size.isin([6144, 7168])]
            if mode == "normal":
                best = 24 if 24 in set(table.dispatch_sms) else 20
                table = table[table.dispatch_sms == best]
            for nodes, rows in table.groupby("node_num"):
                pairs = rows.num_token * 8.0 * rows.hidden_size
                for phase, size in (("dispatch", 1.0), ("combine", 2.0)):
                    key = f"deepep_{mode}_{phase}/{int(nodes) * 8}/any"
                    if key in out:
                        continue
                    if mode == "ll":
                        micros = rows[f"{phase}_avg_t_us"]
                    else:
                        micros = rows[f"{phase}_transmit_us"] + rows[f"{phase}_notify_us"]
                    out[key] = _curve(pairs * size, micros * 1e-6, f"{t.system.folder}/{source}")
    return out


def _curves_differ(older: dict[str, Any], newer: dict[str, Any]) -> float:
    """Mean |ln ratio| of two curves up to 2 MiB, where decode steps are: links, not releases, make the rest."""
    sizes = [size for size in older["bytes"] if size <= 2**21]
    there = np.interp(np.log(sizes), np.log(newer["bytes"]), np.log(newer["seconds"]))
    return float(np.mean(np.abs(np.log(older["seconds"][: len(sizes)]) - there)))


def _curve(sizes: pd.Series, seconds: pd.Series, source: str) -> dict[str, Any]:
    table = pd.DataFrame({"b": sizes, "s": seconds}).groupby("b").s.median().sort_index()
    x, y = np.log(table.index.to_numpy(float)), np.log(rising(table.to_numpy(float)))
    inner = np.arange(1, len(x) - 1)
    guess = [np.interp(x[i], np.delete(x, i), np.delete(y, i)) for i in inner]
    error = np.abs(np.exp(np.asarray(guess) - np.log(table.to_numpy(float))[inner]) - 1.0)
    return {
        "bytes": [int(b) for b in table.index],
        "seconds": [float(f"{s:.4g}") for s in np.exp(y)],
        "error": {"left_out": [round(float(np.median(error)), 4), round(float(np.quantile(error, 0.9)), 4)]},
        "source": source,
    }
