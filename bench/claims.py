"""Published claims about GLM-5 beside what the graph and the simulator say: every figure of docs/claims.md.

python -m bench.claims [sparse | mtp | ascend]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

import hw_profiles
from model.config import LayerType, ModelConfig
from model.hf_config import load_config
from model.split import Layout
from runtime.pricing.oplist import Sizes
from runtime.pricing.trace import PAGE_SIZE, trace
from runtime.serving import Uniform, bench_serving, closed_loop, simulate
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import Built, build, model_override, spec_for

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 200704)
SEARCHED = range(2048, 200705, 2048)


def deployment(
    cfg: ModelConfig,
    chip: str = "h200-sxm",
    layout: Layout = Layout(tp=8),
    scheme: str = "fp8",
    engine: str = "sglang",
    drafts: int = 0,
    accept: float | None = None,
    kv: str = "bf16",
    pool_tokens: int | None = None,
) -> Built:
    """pool_tokens: the KV pool, where only prices of steps are asked for; None: what the memory leaves."""
    profile = hw_profiles.load(chip)
    more = {"drafts": drafts, "accept_length": accept, "pool_tokens": pool_tokens}
    return build(spec_for(cfg, profile, layout, scheme, kv, engine, **more))


def decode(rows: int, context: int) -> BatchShape:
    return BatchShape(np.full(rows, context), decode_rows=rows, graphed=True)


def attention_flops(cfg: ModelConfig, context: int, phase: str) -> float:
    """FLOPs of the attention blocks (projections and indexer included) of one token at the end of a context."""
    pages = max(1, context // PAGE_SIZE)
    sparse = cfg.indexer is not None and context > cfg.indexer.topk
    found = trace(cfg, Layout(), phase, sparse)  # type: ignore[arg-type]
    sizes = Sizes(1, 1, pages)
    stages = {"qkv", "indexer", "attention"}

    def one(kind: LayerType) -> int:
        return sum(op.flops(sizes) for op in found.layers[kind].ops if op.stage in stages)

    return float(sum(n * one(kind) for kind, n in cfg.layer_counts.items() if not kind.mtp))


def sparse() -> None:
    """Sparse attention against its dense twin, and GLM-5.2 with shared indexers, on 8 x H200."""
    for layout in (Layout(tp=8), Layout(dp=8, ep=8)):
        sparse_on(layout)
    cfg = load_config("glm-5-fp8")
    print("attention FLOPs of the last token of a context, GFLOP: GLM-5, dense, dense / sparse")
    for context in CONTEXTS:
        twin = model_override(cfg, "model.index_topk", "0")
        a, b = (attention_flops(c, context, "decode") / 1e9 for c in (cfg, twin))
        print(f"{context:8,} {a:8.1f} {b:8.1f} {b / a:6.2f}")


def sparse_on(layout: Layout) -> None:
    cfg = load_config("glm-5-fp8")
    twin, shared = model_override(cfg, "model.index_topk", "0"), load_config("glm-5.2-fp8")
    # SGLang's table of the dense prefill kernel is three times slower than TensorRT-LLM's, and than its own blocks
    names = ("GLM-5", "dense", "dense, faster kernel", "GLM-5.2")
    ours, dense, fewer = (deployment(c, layout=layout, pool_tokens=1).pricer for c in (cfg, twin, shared))
    other = deployment(twin, layout=layout, engine="trtllm", pool_tokens=1).pricer

    def steps(shape: BatchShape) -> list[tuple[float, float]]:
        """(whole step, its attention) in seconds, in the order of `names`."""
        whole = [(p.seconds, p.by_op["attention"]) for p in (each.price(shape) for each in (ours, dense, fewer))]
        fast = other.price(shape).by_op["attention"]
        return [whole[0], whole[1], (whole[1][0] - whole[1][1] + fast, fast), whole[2]]

    def table(title: str, of: Callable[[int], list[BatchShape]], unit: float) -> None:
        print(f"{layout.name}, {title}: {', '.join(names)}; over GLM-5: dense, faster (attention alone: both)")
        for context in CONTEXTS:
            total = np.sum([steps(shape) for shape in of(context)], axis=0)
            a, b = total[1:3] / total[0]
            seconds = " ".join(f"{unit * x:8.2f}" for x in total[:, 0])
            print(f"{context:8,} {seconds}   {a[0]:5.2f} {b[0]:5.2f} ({a[1]:.2f} {b[1]:.2f})")
        margins = [np.sum([steps(shape) for shape in of(n)], axis=0)[:, 0] for n in SEARCHED]
        for k, name in ((1, "dense"), (2, "dense, faster kernel")):
            dearer = [n for n, m in zip(SEARCHED, margins, strict=True) if m[0] >= m[k]]
            first = next((n for n in SEARCHED if not dearer or n > dearer[-1]), None)
            print(f"  cheaper than {name} from {first:,} tokens on" if first else f"  never cheaper than {name}")

    table("decode step, batch 16, ms", lambda n: [decode(16, n)], 1e3)
    table("prefill of a rank in chunks of 8,192, s", chunked, 1.0)


def chunked(tokens: int) -> list[BatchShape]:
    """The steps of one prompt."""
    return [BatchShape(prefill_chunks=[(min(8192, tokens - n), n)]) for n in range(0, tokens, 8192)]


def mtp() -> None:
    """The speed-up of three drafts at 2.76 tokens a step."""
    cfg = load_config("glm-5-fp8")
    plain, drafting = deployment(cfg), deployment(cfg, drafts=3, accept=2.76)
    print("GLM-5-FP8, 8 x H200, 8192/1024: in flight, TPOT ms without and with drafts, speed-up; output tok/s; step ms")
    for users in (1, 4, 16, 32):
        load = bench_serving(users, 8192, 1024)
        a, b = (simulate(load, found.deployment) for found in (plain, drafting))
        verify = BatchShape(np.full(users, 8704), 4, decode_rows=users, graphed=True)
        took = [1e3 * found.pricer.seconds(each) for found, each in ((plain, decode(users, 8704)), (drafting, verify))]
        figures = f"{1e3 * a.tpot.mean:7.1f} {1e3 * b.tpot.mean:7.1f} {a.tpot.mean / b.tpot.mean:6.2f}"
        rates = f"{a.output_tokens_per_s:7.0f} {b.output_tokens_per_s:7.0f}"
        print(f"{users:4} {figures} {rates} {took[0]:7.1f} {took[1]:7.1f}")


NODES = {
    "Atlas A3, tp16, w4a8": ("ascend-910c-die", Layout(tp=16), "w4a8", "vllm-ascend"),
    "Atlas A3, dp16 ep16, w4a8": ("ascend-910c-die", Layout(dp=16, ep=16), "w4a8", "vllm-ascend"),
    "Atlas A3, tp4 dp4 ep16, w4a8": ("ascend-910c-die", Layout(tp=4, dp=4, ep=16), "w4a8", "vllm-ascend"),
    "1 x 8 H200, tp8, fp8": ("h200-sxm", Layout(tp=8), "fp8", "vllm"),
    "1 x 8 H20 (141 GB), tp8, fp8": ("h20-141gb", Layout(tp=8), "fp8", "vllm"),
    "2 x 8 H200, tp16, fp8": ("h200-sxm", Layout(tp=16), "fp8", "vllm"),
    "2 x 8 H200, tp8 pp2, fp8": ("h200-sxm", Layout(tp=8, pp=2), "fp8", "vllm"),
    "2 x 8 H800, tp8 pp2, fp8": ("h800-sxm", Layout(tp=8, pp=2), "fp8", "vllm"),
    "2 x 8 H20 (96 GB), tp8 pp2, fp8": ("h20-96gb", Layout(tp=8, pp=2), "fp8", "vllm"),
}


def ascend() -> None:
    """One Atlas A3 node of 16 dies in W4A8 beside NVIDIA nodes in FP8, the same load."""
    cfg = load_config("glm-5-fp8")
    for isl, osl, users in ((3500, 1500, 32), (65536, 1024, 4)):
        print(f"{isl}/{osl}, {users} in flight: TTFT ms, TPOT ms, output tok/s, pool tokens, evidence")
        for name, (chip, layout, scheme, engine) in NODES.items():
            found = deployment(cfg, chip, layout, scheme, engine)
            load = closed_loop(users, 4 * users, Uniform(isl, 0.8), Uniform(osl, 0.8))
            r = simulate(load, found.deployment)
            note = f" saturated by {r.saturated_by}" if r.saturated else ""
            print(f"{name:34} {1e3 * r.ttft.mean:8.0f} {1e3 * r.tpot.mean:7.1f} {r.output_tokens_per_s:7.0f}"
                  f" {r.kv.pool_tokens:10,} {r.evidence}{note}")  # fmt: skip


PARTS = {"sparse": sparse, "mtp": mtp, "ascend": ascend}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        if name not in PARTS:
            sys.exit(f"no part {name!r}; known: {', '.join(PARTS)}")
        print(f"== {name}: {PARTS[name].__doc__}")
        PARTS[name]()
