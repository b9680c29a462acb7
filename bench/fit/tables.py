"""Reads operator tables of aiconfigurator-core and turns rows into `Points` per kernel.

Only operator tables are read. The package's end-to-end table is never opened: it is the exam.
Table units: latency in milliseconds (DeepEP columns in microseconds); `message_size` counts elements of
the row's type, not bytes (int8 and half rows at equal bytes take equal time). `step` is the KV length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import hw_profiles
from bench.fit.solve import Points
from model.formats import ROWS, matrix_format
from runtime.pricing.book import element_bytes
from runtime.pricing.chip import rate_of
from runtime.pricing.eras import order
from runtime.pricing.work import MEASURED_BLOCKS, MlaShape

PACKAGE = "aiconfigurator-core"


@dataclass(frozen=True)
class System:
    """A chip of the package and the datasheet figures its efficiencies are relative to."""

    profile: str
    folder: str
    peaks: dict[str, float]
    bandwidth: float
    newest: dict[str, str]
    """Engine -> the newest release that was measured throughout; older ones are read where a table has them."""


CURRENT = {"sglang": "0.5.14", "vllm": "0.24.0", "trtllm": "1.3.0rc20"}
OLD = {"sglang": "0.5.10", "vllm": "0.14.0", "trtllm": "1.0.0"}
SYSTEMS = (
    System("h200-sxm", "h200_sxm", {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}, 4.8e12, CURRENT),
    System("h100-sxm", "h100_sxm", {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}, 3.35e12, CURRENT),
    System("b200-sxm", "b200_sxm", {"bf16": 2250e12, "fp8": 4500e12, "fp4": 9000e12}, 8e12, CURRENT),
    System("b300-sxm", "b300_sxm", {"bf16": 2250e12, "fp8": 4500e12, "fp4": 14000e12}, 8e12, CURRENT),
    System("gb200-nvl72", "gb200", {"bf16": 2500e12, "fp8": 5000e12, "fp4": 10000e12}, 8e12, CURRENT),
    System("gb300-nvl72", "gb300", {"bf16": 2500e12, "fp8": 5000e12, "fp4": 15000e12}, 8e12, CURRENT),
    System("a100-sxm-80gb", "a100_sxm", {"bf16": 312e12, "int8": 624e12}, 2.039e12, OLD),
)
GEMM_FORMATS = {"bfloat16": "bf16", "fp8_block": "fp8-block", "fp8": "fp8-tensor", "nvfp4": "nvfp4", "sq": "w8a8-int8"}
MOE_FORMATS = {"bfloat16": "bf16", "fp8_block": "fp8-block", "fp8": "fp8-tensor", "nvfp4": "nvfp4",
               "int4_wo": "w4a16-g128"}  # fmt: skip
KV_FORMATS = {"bfloat16": "bf16", "fp8": "fp8"}
MODELS = {
    "zai-org/GLM-5": "glm5",
    "zai-org/GLM-5-FP8": "glm5",
    "zai-org/GLM-5.2": "glm5",
    "zai-org/GLM-5.2-FP8": "glm5",
    "nvidia/GLM-5.2-NVFP4": "glm5",  # its attention is in 16 bits
    "deepseek-ai/DeepSeek-V3.2": "dsv32",
    "deepseek-ai/DeepSeek-V3": "dsv3",
}
SHAPES: dict[str, MlaShape] = {name: shape for shape, name in MEASURED_BLOCKS.items()}

GEMM_AXES = {"m": [1, 4, 16, 64, 256, 1024, 4096, 32768], "n": [32, 256, 1024, 4096, 16384, 65536],
             "k": [128, 512, 2048, 8192, 65536]}  # fmt: skip
MOE_AXES = {"rows_per_expert": [1, 4, 16, 64, 256, 1024, 8192], "active": [1, 4, 16, 64, 256],
            "inter": [64, 256, 1024, 2048], "hidden": [2048, 7168], "spread": [1, 32]}  # fmt: skip
DECODE_AXES = {"sequences": [1, 4, 16, 64, 256, 1024], "context": [16, 128, 512, 2048, 8192, 32768, 131072],
               "heads": [4, 16, 64, 128]}  # fmt: skip
BLOCK_AXES = {"tokens": [16, 128, 512, 2048, 8192, 32768], "context": [64, 512, 2048, 8192, 32768, 131072],
              "heads": [4, 16, 64, 128], "sequences": [1, 8, 64]}  # fmt: skip
POOL_TOKENS = 2_000_000  # more cached tokens than any served pool of these models: rows beyond are dropped
PREFILL_AXES = {"tokens": [16, 128, 512, 2048, 8192, 32768], "context": [8, 64, 512, 2048, 8192, 32768],
                "heads": [4, 16, 64, 128]}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One kernel to fit."""

    key: str
    release: str
    family: str
    points: Points
    free: tuple[str, ...]
    axes: dict[str, list[float]]
    source: str
    note: str = ""
    fixed: dict[str, float] = field(default_factory=dict)
    """Constants taken as given."""
    skewed: pd.DataFrame | None = None
    """Rows of the same kernel under skewed load, for a check only."""


def data_root() -> Path:
    """Folder of the operator tables. Raises ModuleNotFoundError when the package is absent."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"pip install {PACKAGE} pyarrow pandas scipy  (about 82 MB)")
    return Path(spec.origin).parent / "systems" / "data"


def package_version() -> str:
    return metadata.version(PACKAGE)


class Tables:
    """Table access for one system."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.root = data_root() / system.folder
        self.family = hw_profiles.load(system.profile).family

    def read(self, relative: str) -> pd.DataFrame | None:
        path = self.root / relative
        return pd.read_parquet(path) if path.exists() else None

    def per_engine(self, family: str, name: str) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
        """(engine, release, source, table), each engine's newest release first."""
        for engine in self.system.newest:
            for release in self.releases(family, engine, name):
                relative = f"{family}/{engine}/{release}/{name}.parquet"
                table = self.read(relative)
                assert table is not None
                yield engine, release, f"{self.system.folder}/{relative}", table

    def releases(self, family: str, engine: str, name: str) -> list[str]:
        """Releases of an engine that have a table, newest first, up to the newest that was measured throughout."""
        last = order(self.system.newest[engine])
        found = {path.parent.name for path in (self.root / family / engine).glob(f"*/{name}.parquet")}
        kept = [(at, release) for release in found if (at := order(release)) is not None and last and at <= last]
        return [release for _, release in sorted(kept, reverse=True)]

    def superseded(self, family: str, engine: str, release: str, name: str) -> bool:
        """Whether a later release of the engine has the same table."""
        return release != self.releases(family, engine, name)[0]

    def points(self, features: dict[str, Any], milliseconds: pd.Series, groups: Any, weight_format: str) -> Points:
        peak = self.system.peaks.get(rate_of(weight_format)) or self.system.peaks["bf16"]
        seconds = milliseconds.to_numpy(float) * 1e-3
        columns = {k: v.to_numpy(float) if isinstance(v, pd.Series) else v for k, v in features.items()}
        return Points(columns, seconds, np.asarray(groups), peak, self.system.bandwidth)


def gemm_jobs(t: Tables) -> Iterator[Job]:
    for engine, release, source, table in t.per_engine("gemm", "gemm_perf"):
        for dtype, rows in table.groupby("gemm_dtype"):
            name = GEMM_FORMATS.get(str(dtype))
            if name is None or len(rows) < 2000:
                continue
            small = rows[(rows.m == 1) & (rows.n * rows.k < 2**22)]
            if len(small) and small.latency.median() > 0.04:
                continue  # measured by launching from Python: a host floor, not a kernel
            features = {"m": rows.m, "n": rows.n, "k": rows.k, **element_bytes(name)}
            points = t.points(features, rows.latency, rows.n * 100003 + rows.k, name)
            free = ("launch_s", "compute_efficiency", "memory_efficiency", "step_s")
            yield Job(f"gemm/{name}/{engine}", release, "gemm", points, free, GEMM_AXES, source)


def bmm_jobs(t: Tables) -> Iterator[Job]:
    """Absorbed W_UK (n=512, k=128) and W_UV (n=128, k=512) products of DeepSeek-V3, one per head."""
    for engine, release, source, table in t.per_engine("mla_bmm", "mla_bmm_perf"):
        rows = table[table.bmm_dtype == "bfloat16"]
        features = {"m": rows.num_tokens, "heads": rows.num_heads, "n": 512.0, "k": 128.0}
        points = t.points(features, rows.latency, rows.num_heads, "bf16")
        axes = {"m": [1, 16, 128, 1024, 16384], "heads": [1, 8, 32, 128]}
        free = ("launch_s", "compute_efficiency", "memory_efficiency")
        yield Job(f"bmm/bf16/{engine}", release, "bmm", points, free, axes, source)


ALL_CHOICES = ("sglang_fused_moe_triton", "sglang_marlin_moe")
"""Kernels that the SGLang benchmark gave every choice of a token with a local expert, up to the release below."""
ALL_CHOICES_UNTIL = "0.5.10"


def chose_all(rows: pd.DataFrame, engine: str, release: str) -> pd.Series:
    """Rows of a table whose rank computed all of a token's `topk` rows as soon as one of its experts was local.

    At 8,192 balanced tokens the FLOP/s per expected row fall to 1/ep up to ep = topk and stay there, for Triton and
    Marlin, on A100, H100 and H200, with topk 2, 6, 8 and 22 alike; tables of 0.5.14 and of other engines do not.
    """
    old = engine == "sglang" and (order(release) or ()) <= (order(ALL_CHOICES_UNTIL) or ())
    return rows.kernel_source.isin(ALL_CHOICES) & old


UNLIKE_SERVERS = ("sglang_fused_moe_triton",)
"""Kernels that those benchmarks ran with parts that no server of the time ran, and that later tables do not have: they
gave no number of experts, which took the activation that skips experts of other ranks (fused_moe.py: filter_expert),
and summed up to 32 tokens eagerly. A later table of the same kernel is nearer, and its answer says that it is later."""


def moe_features(rows: pd.DataFrame, weight_format: str, all_choices: Any = False) -> dict[str, Any]:
    """Features of 'balanced' rows: every local expert gets the same number of rows, or one or none.

    all_choices: see `chose_all`; the choices of one token then fall on the same local expert, so that no more experts
    are active than if each had its own."""
    pairs = (rows.num_tokens * rows.topk).astype(float)
    local = rows.num_experts / rows.moe_ep_size
    mine = np.maximum(pairs / rows.moe_ep_size, 1.0)
    active = np.minimum(local, np.maximum(mine, 1.0))
    repeated = np.where(all_choices, np.minimum(rows.moe_ep_size, rows.topk), 1)
    computed = np.minimum(mine * repeated, pairs)
    return {"rows": computed, "touched": pairs, "active": active, "rows_per_expert": computed / active,
            "spread": pairs / computed, "hidden": rows.hidden_size.astype(float),
            "inter": rows.inter_size / rows.moe_tp_size, **element_bytes(weight_format)}  # fmt: skip


def usable_moe(table: pd.DataFrame) -> pd.DataFrame:
    """Gated experts of the sizes served here.

    (7168, 2048, 256 experts, top 8) is left out: its router limits groups, so that 'balanced' rows touch
    about half of the experts they claim (they run faster than memory could be read).
    """
    grouped = (table.hidden_size == 7168) & (table.inter_size == 2048) & (table.num_experts == 256)
    sized = (table.num_experts >= 64) & table.topk.between(4, 8) & (table.hidden_size >= 2048)
    other = table.kernel_source.str.contains("nongated|min_latency|situ", regex=True)
    return table[sized & ~grouped & ~other]


def moe_jobs(t: Tables) -> Iterator[Job]:
    for engine, release, source, table in t.per_engine("moe", "moe_perf"):
        for dtype, rows in usable_moe(table).groupby("moe_dtype"):
            name = MOE_FORMATS.get(str(dtype))
            if t.superseded("moe", engine, release, "moe_perf") and chose_all(rows, engine, release).any():
                rows = rows[~rows.kernel_source.isin(UNLIKE_SERVERS)]
            glm = rows[(rows.hidden_size == 6144) & (rows.num_experts == 256)]
            if len(glm):  # the kernels that engine picks for GLM-5's experts, not those of other models
                rows = rows[rows.kernel_source.isin(set(glm.kernel_source))]
            skewed, rows = rows[rows.distribution != "balanced"], rows[rows.distribution == "balanced"]
            if name is None or len(rows) < 300:
                continue
            split = {"": rows}
            sharded = rows[rows.moe_tp_size > 1]
            whole = rows[rows.moe_tp_size == 1]
            if set(sharded.kernel_source) != set(whole.kernel_source) and min(len(sharded), len(whole)) > 300:
                split = {"": whole, "/tp": sharded}
            for suffix, part in split.items():
                shape = part.hidden_size * 10**9 + part.inter_size * 10**5 + part.num_experts * 10
                groups = shape + part.moe_tp_size * 1000003 + part.moe_ep_size * 7919
                features = moe_features(part, name, chose_all(part, engine, release))
                points = t.points(features, part.latency, groups, name)
                free = ("launch_s", "compute_efficiency", "memory_efficiency", "step_s")
                note = "permute, two GEMMs, activation and weighted sum; no router, no collective"
                same = skewed[skewed.kernel_source.isin(set(part.kernel_source))]
                same = same[~(chose_all(same, engine, release) & (same.moe_ep_size > 1))]
                key = f"moe/{matrix_format(name).base}/{engine}{suffix}"
                yield Job(key, release, "moe", points, free, MOE_AXES, source, note, skewed=same)


def _latent(kv: str, scaled: bool = False) -> float:
    """Bytes of latent KV a token and layer, of 512 and 64 dims; scaled: FlashMLA's sparse record of FP8."""
    return float(ROWS["fp8_ds_mla" if scaled and kv == "fp8" else kv].bytes(576, 64))


def attention_jobs(t: Tables) -> Iterator[Job]:
    """Attention kernels alone: GQA with head size 128, and MLA, decode and prefill."""
    free = ("launch_s", "compute_efficiency", "memory_efficiency")
    for phase, name in (("decode", "generation"), ("prefill", "context")):
        axes = DECODE_AXES if phase == "decode" else PREFILL_AXES
        for engine, release, source, table in t.per_engine("attention", f"{name}_attention_perf"):
            ratio = table.num_heads / table.num_key_value_heads
            full = table["window_size"] == 0 if "window_size" in table else True
            rows = table[(table.head_dim == 128) & full & ratio.between(4, 16)]
            rows = rows[rows.attn_dtype.isin(["bfloat16", "float16"])]
            for kv, part in rows.groupby("kv_cache_dtype"):
                fmt = KV_FORMATS[str(kv)]
                if fmt == "fp8" and phase == "prefill":
                    continue  # within noise of bf16
                per_token = part.num_key_value_heads * 256.0 * (2.0 if fmt == "bf16" else 1.0)
                features = _attention_features(part, phase, per_token, 128.0, 128.0)
                points = t.points(features, part.latency, _shape_groups(part), "bf16")
                yield Job(f"gqa_{phase}/{fmt}/{engine}", release, "attention", points, free, axes, source)
        for engine, release, source, table in t.per_engine("mla", f"{name}_mla_perf"):
            for kv, part in table.groupby("kv_cache_dtype"):
                fmt = KV_FORMATS[str(kv)]
                dims = (576.0, 512.0) if phase == "decode" else (192.0, 128.0)
                per_token = _latent(fmt) if phase == "decode" else part.num_heads * 640.0
                features = _attention_features(part, phase, per_token, *dims)
                points = t.points(features, part.latency, _shape_groups(part), "bf16")
                yield Job(f"mla_{phase}/{fmt}/{engine}", release, "attention", points, free, axes, source)


def _attention_features(rows: pd.DataFrame, phase: str, kv_bytes: Any, qk: float, v: float) -> dict[str, Any]:
    size = rows.batch_size.astype(float)
    if phase == "decode":
        tokens, context = size, np.maximum(rows.step, 1).astype(float)
    else:
        tokens, context = size * rows.isl, np.maximum(rows.step + rows.isl / 2.0, 1.0)
    return {"sequences": size, "tokens": tokens, "context": context, "heads": rows.num_heads.astype(float),
            "kv_bytes": kv_bytes, "qk": qk, "v": v}  # fmt: skip


def _shape_groups(rows: pd.DataFrame) -> pd.Series:
    """Unseen shapes: a batch size and head count held out with all its lengths."""
    return rows.batch_size * 1009 + rows.num_heads


def block_features(
    rows: pd.DataFrame, phase: str, model: str, latent_bytes: float, weight: str, dense: bool, indexer: bool
):
    """Features of `mla_block` rows."""
    shape = SHAPES[model]
    base = _attention_features(rows, phase, latent_bytes, 0.0, 0.0)
    selected = float(shape.index_topk) if shape.index_heads and not dense else 1e12
    return {**base, **shape.features(), **element_bytes(weight), "selected": selected, "index_kv_bytes": 132.0,
            "indexer": float(indexer), "absorbed": float(phase == "decode" or not dense)}  # fmt: skip


def block_jobs(t: Tables) -> Iterator[Job]:
    """Whole attention blocks, projections included."""
    names = (("sparse_attention", "dsa_generation_module_perf", "decode"),
             ("sparse_attention", "dsa_context_module_perf", "prefill"),
             ("mla", "mla_generation_module_perf", "decode"),
             ("mla", "mla_context_module_perf", "prefill"))  # fmt: skip
    for folder, name, phase in names:
        for engine, release, source, table in t.per_engine(folder, name):
            dense = table.kernel_source.str.contains("dense_mha")
            table = table[~(dense & table.model.str.contains("5.2"))]  # a second run with another host floor
            yield from _blocks(t, table.assign(model=table.model.map(MODELS)), phase, engine, release, source)
    for name, phase in (("wideep_generation_mla_perf", "decode"), ("wideep_context_mla_perf", "prefill")):
        for engine, release, source, table in t.per_engine("mla", name):
            rows = table[table.kernel_source.isin(["fa3", "trtllm_mla"])]
            rows = rows if len(rows) else table
            if phase == "decode":
                rows = rows.assign(step=rows.isl)
            # The tables say fp8 in every row, but these engines run MLA with a 16-bit cache unless told otherwise.
            rows = rows.assign(model="dsv3", kv_cache_dtype="bfloat16")
            if "gemm_type" not in rows:  # the checkpoint's own, as in later tables
                rows = rows.assign(gemm_type="fp8_block")
            yield from _blocks(t, rows, phase, engine, release, source)


def _blocks(t: Tables, table: pd.DataFrame, phase: str, engine: str, release: str, source: str) -> Iterator[Job]:
    table = table[table.model.notna() & table.gemm_type.isin(["bfloat16", "fp8_block"])]
    if phase == "decode" and engine == "sglang":
        table = table[table.batch_size <= 256]  # larger batches fall out of the captured graph and jump 8x
    if phase == "prefill":
        table = table[table.batch_size * (table.step + table.isl) <= POOL_TOKENS]
    skip = table.kernel_source.str.contains("skip_indexer")
    dense = table.kernel_source.str.contains("dense_mha") | ((table.model == "dsv3") & (phase == "prefill"))
    free = ("launch_s", "compute_efficiency", "memory_efficiency")
    fixed: dict[str, float] = {}
    if phase == "prefill":  # measured by launching from Python: a host floor, over a device time of its own
        free, fixed = ("floor_s", "compute_efficiency", "memory_efficiency"), {"launch_s": 6e-5}
    axes = DECODE_AXES if phase == "decode" else BLOCK_AXES
    keys = ["model", "kv_cache_dtype", "gemm_type", skip.rename("skip"), dense.rename("dense")]
    for (model, kv, weights, skips, is_dense), rows in table.groupby(keys):
        fmt, weight = KV_FORMATS[str(kv)], GEMM_FORMATS[str(weights)]
        if len(rows) < 60 or (weight == "bf16" and model != "glm5"):
            continue
        sparse = model != "dsv3"
        mode = "dense" if is_dense else ("skip" if skips else "index" if sparse else "dense")
        latent_bytes = _latent(fmt, scaled=sparse and t.family == "hopper" and engine in ("sglang", "vllm"))
        features = block_features(rows, phase, str(model), latent_bytes, weight, mode == "dense", mode == "index")
        points = t.points(features, rows.latency, _shape_groups(rows) * 7 + rows.isl, weight)
        key = f"block_{phase}/{model}/{mode}/{fmt}/{weight}/{engine}"
        yield Job(key, release, "mla_block", points, free, axes, source,
                  "normed input to output projection; no norm, no collective", fixed)  # fmt: skip


def dsa_kernel_jobs(t: Tables) -> Iterator[Job]:
    """Prefill kernels of the sparse path alone, used to share a block's time out and for other shapes."""
    release = t.system.newest["sglang"]
    folder = f"sparse_attention/sglang/{release}"
    shape = SHAPES["glm5"]
    axes = {"tokens": [256, 1024, 4096, 16384], "context": [64, 512, 2048, 8192, 32768, 131072]}
    for name, family in (("glm5_mqa_logits", "index_scores"), ("glm5_topk", "select_topk"),
                         ("glm5_dsa_attn", "attention")):  # fmt: skip
        source = f"{folder}/{name}_module_perf.parquet"
        table = t.read(source)
        if table is None:
            continue
        table = table[(table.batch_size * table.isl >= 256) & (table.latency > 0)]
        if "score_mode" in table:
            table = table[table.score_mode == "flat"]
        features = {**shape.features(), **_attention_features(table, "prefill", 1152.0, 576.0, 512.0),
                    "index_kv_bytes": 132.0}  # fmt: skip
        if family == "attention":
            features["context"] = np.minimum(features["context"], 2048.0)
            axes = {**axes, "context": [4, 64, 512, 2048]}
        points = t.points(features, table.latency, table.batch_size * 100003 + table.isl, "fp8-block")
        free = ("launch_s", "compute_efficiency", "memory_efficiency")
        key = {"attention": "sparse_prefill"}.get(family, family)
        yield Job(f"{key}/fp8/sglang", release, family, points, free, axes, f"{t.system.folder}/{source}")


def all_jobs(t: Tables) -> Iterator[Job]:
    for maker in (gemm_jobs, bmm_jobs, moe_jobs, attention_jobs, block_jobs, dsa_kernel_jobs):
        yield from maker(t)
