"""Work of each kernel family: FLOPs, bytes moved, and the length of its serial chain.

Every function takes one mapping of features (numbers or arrays, broadcast together) and returns `Work`.
This is what the roofline formula needs; it is not a list of the model's layers, which the graph owns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

Features = Mapping[str, Any]


class Work(NamedTuple):
    flops: Any
    bytes: Any
    steps: Any = 0.0
    """Serial steps that no parallelism hides: 128-wide slices of a GEMM's reduction."""
    pieces: Any = 1.0
    """Equal matrix products that the work consists of; an efficiency by size is read at the size of one."""
    launches: Any = 1.0
    """Kernels launched one after another where nobody wrote one kernel for all pieces."""


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Dimensions of a multi-head latent attention block; `index_heads` 0 means no sparse indexer."""

    hidden: int
    q_lora: int
    kv_lora: int
    rope: int
    nope: int
    v: int
    index_heads: int = 0
    index_dim: int = 128
    index_topk: int = 2048

    def features(self) -> dict[str, float]:
        return {k: float(v) for k, v in asdict(self).items()}


GLM5 = MlaShape(6144, 2048, 512, 64, 192, 256, index_heads=32)
DEEPSEEK_V32 = MlaShape(7168, 1536, 512, 64, 128, 128, index_heads=64)
DEEPSEEK_V3 = MlaShape(7168, 1536, 512, 64, 128, 128)
MEASURED_BLOCKS: Mapping[MlaShape, str] = {GLM5: "glm5", DEEPSEEK_V32: "dsv32", DEEPSEEK_V3: "dsv3"}
"""Attention blocks for which whole-block measurements exist."""


def gemm(f: Features) -> Work:
    """[m, k] x [k, n]; `weight_bytes` and `act_bytes` are bytes per element, and `out_bytes` (2 unless given)."""
    m, n, k = f["m"], f["n"], f["k"]
    moved = n * k * f["weight_bytes"] + m * k * f["act_bytes"] + f.get("out_bytes", 2.0) * m * n
    return Work(2.0 * m * n * k, moved, np.ceil(k / 128.0))


def bmm(f: Features) -> Work:
    """`heads` independent [m, k] x [k, n] products, in 16 bits or `out_bytes`: the absorbed W_UK and W_UV of MLA."""
    heads, m, n, k = f["heads"], f["m"], f["n"], f["k"]
    moved = f.get("out_bytes", 2.0) * heads * (n * k + m * k + m * n)
    return Work(2.0 * heads * m * n * k, moved, pieces=heads)


def moe(f: Features) -> Work:
    """Routed experts of one rank: permute, gate+up GEMM, activation, down GEMM, weighted sum.

    `rows` token-expert pairs fall on `active` of this rank's experts. `touched` rows are moved without
    being computed: Triton kernels allocate and reduce every pair of the batch, also those of other ranks.
    """
    rows, hidden, inter = f["rows"], f["hidden"], f["inter"]
    weights = f["active"] * 3.0 * hidden * inter * f["weight_bytes"]
    moved = rows * (hidden * (2.0 * f["act_bytes"] + 4.0) + 8.0 * inter) + f["touched"] * hidden * 8.0
    chain, products = np.ceil((hidden + inter) / 128.0), 2.0 * f["active"]
    return Work(6.0 * rows * hidden * inter, weights + moved, chain, products, products)


def attention(f: Features) -> Work:
    """Scores and weighted values of `tokens` queries over a mean of `context` keys each.

    Keys are read once per sequence (`sequences`), at `kv_bytes` bytes a token over all local KV heads.
    """
    pairs = f["tokens"] * f["context"] * f["heads"]
    moved = f["sequences"] * f["context"] * f["kv_bytes"] + f["tokens"] * f["heads"] * 2.0 * (f["qk"] + f["v"])
    return Work(2.0 * pairs * (f["qk"] + f["v"]), moved)


def index_scores(f: Features) -> Work:
    """ReLU(q·k) summed over the indexer's heads: `tokens` queries over `context` keys each."""
    pairs = f["tokens"] * f["context"]
    flops = 2.0 * pairs * f["index_heads"] * f["index_dim"]
    moved = f["sequences"] * f["context"] * f["index_kv_bytes"] + 4.0 * pairs
    return Work(flops, moved)


def indexer(f: Features) -> Work:
    """Scores and the best `index_topk` of them in one kernel, which keeps scores to itself."""
    flops = 2.0 * f["tokens"] * f["context"] * f["index_heads"] * f["index_dim"]
    queries = 2.0 * f["index_heads"] * f["index_dim"] + 4.0 * f["index_topk"]
    return Work(flops, f["sequences"] * f["context"] * f["index_kv_bytes"] + f["tokens"] * queries)


def select_topk(f: Features) -> Work:
    """Selecting the best `index_topk` of `context` scores: about three passes over 4-byte scores."""
    return Work(0.0, f["tokens"] * (12.0 * f["context"] + 8.0 * f["index_topk"]))


def memory(f: Features) -> Work:
    """Elementwise: bytes read plus bytes written."""
    return Work(0.0, f["bytes"])


def projections(f: Features) -> Work:
    """All GEMMs of an MLA block except the indexer's, absorbed per-head products included."""
    h, t = f["heads"], f["tokens"]
    down = f["hidden"] * (f["q_lora"] + f["kv_lora"] + f["rope"])
    up = f["q_lora"] * h * (f["nope"] + f["rope"]) + h * f["v"] * f["hidden"]
    absorbed = h * f["kv_lora"] * (f["nope"] + f["v"])
    return Work(2.0 * t * (down + up + absorbed), (down + up) * f["weight_bytes"] + 2.0 * absorbed, 0.0)


def mla_prolog(f: Features) -> Work:
    """The projections before absorbed attention in one kernel: of queries and latents, and W_UK; norms, rotations and
    the cache's row on the way are its own."""
    h, t = f["heads"], f["tokens"]
    quantised = f["hidden"] * (f["q_lora"] + f["kv_lora"] + f["rope"]) + f["q_lora"] * h * (f["nope"] + f["rope"])
    absorbed = h * f["nope"] * f["kv_lora"]
    moved = t * (f["hidden"] * f["act_bytes"] + 2.0 * h * (f["kv_lora"] + f["rope"]))
    return Work(2.0 * t * (quantised + absorbed), quantised * f["weight_bytes"] + 2.0 * absorbed + moved)


def index_projections(f: Features) -> Work:
    """wq_b, wk and weights_proj of the indexer; not divided by tensor parallelism."""
    small = f["hidden"] * f["index_heads"]
    large = f["q_lora"] * f["index_heads"] * f["index_dim"] + f["hidden"] * f["index_dim"]
    return Work(2.0 * f["tokens"] * (large + small), large * f["weight_bytes"] + 2.0 * small)


def mla_block(f: Features) -> Work:
    """A whole attention block from the normed input to the output projection; no collective, no norm.

    `absorbed` 1: attention in the latent (decode, sparse prefill); 0: expanded heads (dense prefill).
    `indexer` 1: this layer scores and selects; 0: it reuses an earlier layer's choice or is dense.
    `selected` caps the keys each query attends to (`index_topk`, or a huge number when dense).
    """
    keys = np.minimum(f["context"], f["selected"])
    latent = f["absorbed"] * (2.0 * f["kv_lora"] + f["rope"])
    expanded = (1.0 - f["absorbed"]) * (f["nope"] + f["rope"] + f["v"])
    flops = 2.0 * f["tokens"] * keys * f["heads"] * (latent + expanded)
    moved = f["sequences"] * keys * f["kv_bytes"] + f["tokens"] * f["heads"] * 4.0 * f["kv_lora"]
    parts = [projections(f), Work(flops, moved)]
    index = f["indexer"]
    scored, proj = index_scores(f), index_projections(f)
    parts.append(Work(index * (scored.flops + proj.flops), index * (scored.bytes + proj.bytes)))
    return Work(sum(p.flops for p in parts), sum(p.bytes for p in parts))


FAMILIES: Mapping[str, Callable[[Features], Work]] = {
    f.__name__: f
    for f in (gemm, bmm, moe, attention, index_scores, indexer, select_topk, memory, mla_prolog, mla_block)
}


def weight_bytes(family: str, f: Features) -> Any:
    """Bytes of weights that a kernel reads, of the families that have some."""
    if family == "gemm":
        return f["n"] * f["k"] * f["weight_bytes"]
    if family == "bmm":
        return 2.0 * f["heads"] * f["n"] * f["k"]
    if family == "moe":
        return f["active"] * 3.0 * f["hidden"] * f["inter"] * f["weight_bytes"]
    if family == "mla_prolog":
        return mla_prolog({**f, "tokens": 0.0}).bytes
    if family == "mla_block":
        return projections(f).bytes + f["indexer"] * index_projections(f).bytes
    return 0.0


def least(family: str, f: Features) -> Work:
    """What no kernel of a family gets by with less of: its products, and the bytes that have to come from memory or go
    there. Rows that a grouped product permutes may stay in a cache between its kernels; its weights do not.
    """
    work = FAMILIES[family](f)
    return Work(work.flops, weight_bytes(family, f) if family == "moe" else work.bytes)
