"""GLM-5's shapes on an NVIDIA GPU: single ops, whole layers as a TP8 rank, and GLM-4.7-Flash whole.

Each op and layer beside XLA's decompositions on the same card, and layers beside what the best engines take. Run by
bench/cuda.sh.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hw_profiles
from backends.cuda import CudaBackend
from backends.interface import Backend, Program
from bench.cuda_sizes import Sizes, Steps
from foundation.errors import first_line
from model.config import Mla, ModelConfig
from model.graph import Batch, Mode
from model.hf_config import from_hf
from model.ops import OPS
from model.weights import Quantized, Weight, layer_weights, outer_weights
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.programs import Programs
from runtime.execution.local.request import Prompt

ENGINES_LAYER_MS = {"b1": 0.14, "b16": 0.32, "b64": 0.57, "t2048": 1.75}
"""A GLM-5 MoE layer as a TP8 rank on an H200 at 8K: attention, experts and the rest of aiconfigurator 0.12's tables."""
OWN_LAYER_MS = {"b1": 0.20, "b16": 0.40, "b64": 0.70, "t2048": 3.5}
"""What ours is to take at the most there."""
PAGE = 64


class Decompositions(CudaBackend):
    """The adapter without kernels of its own."""

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return {}


def to_reach(kind: str) -> dict[str, dict[str, float]]:
    """The two tables above for a device of that kind: an H100's steps of tokens are bound by its memory, chunks by
    computing, in which it is an H200's like."""
    held, here = (
        hw_profiles.load(name).number("chip.memory.bandwidth_bytes_per_s") or math.nan
        for name in ("h200-sxm", "h100-sxm" if "H100" in kind else "h200-sxm")
    )
    slower = held / here
    tables = {"ours": OWN_LAYER_MS, "engines": ENGINES_LAYER_MS}
    return {
        who: {step: round(ms * (slower if step[0] == "b" else 1.0), 3) for step, ms in table.items()}
        for who, table in tables.items()
    }


def median_s(run: Callable[[], Any], repeats: int) -> float:
    """Of a call that waits for its result."""
    times = []
    for index in range(repeats + 3):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        if index >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def random_array(shape: tuple[int, ...], dtype: Any, seed: int, scale: float = 1.0) -> Any:
    """Made on JAX's default device."""
    key = jax.random.key(seed)
    if dtype == jnp.float8_e4m3fn:
        bits = jax.random.randint(key, shape, 0x30, 0x3F, jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, dtype)
    return (jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)).astype(dtype)


def random_weights(cfg: ModelConfig, fp8: bool) -> dict[str, Any]:
    """Random weights on JAX's default device, matrices that a checkpoint has in FP8 so with `fp8`."""

    def make(weight: Weight) -> Any:
        if fp8 and weight.stays_narrow:
            values = random_array(weight.shape, jnp.float8_e4m3fn, weight.size % 997)
            return Quantized(values, jnp.full(weight.scale_shape, 0.01, jnp.float32))
        array = random_array(weight.shape, jnp.float32 if weight.float32 else jnp.bfloat16, weight.size % 997, 0.02)
        return array + jnp.ones((), array.dtype) if "norm" in weight.name else array

    return {
        "outer": {w.name: make(w) for w in outer_weights(cfg)},
        "layers": [{w.name: make(w) for w in layer_weights(cfg, kind)} for kind in cfg.layers],
        "mtp": [],
    }


def step_ms(
    backend: Backend, cfg: ModelConfig, weights: dict[str, Any], steps: Steps, sizes: Sizes
) -> dict[str, float]:
    """Milliseconds of a step of the whole stack, by name: from inputs on the host to ids on it."""
    found = {}
    for name, (sequences, tokens, start) in steps.items():
        pages = -(-(start + tokens) // PAGE)
        programs = Programs(backend, cfg, weights, sequences * pages, PAGE, "bfloat16")
        table = np.arange(1, 1 + sequences * pages, dtype=np.int32).reshape(sequences, pages)
        ones = np.ones(sequences, np.int32)
        ids = np.random.default_rng(0).integers(1, cfg.vocab_size, (sequences, tokens)).astype(np.int32)
        batch, mode = Batch(ids, ones * start, ones * tokens, table), Mode("expanded" if tokens > 1 else "absorbed")
        found[name] = 1e3 * median_s(lambda p=programs, b=batch, m=mode: p.fetch(p.launch(b, m).ids), sizes.repeats)
    return found


def layers(backend: Backend, fp8: bool, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of one MoE layer, from two stacks of them."""
    stacks, (few, many) = {}, sizes.depths
    for depth in sizes.depths:
        cfg = from_hf({**sizes.rank, "num_hidden_layers": depth, "first_k_dense_replace": 0})
        stacks[depth] = step_ms(backend, cfg, random_weights(cfg, fp8), sizes.steps, sizes)
    return {name: (stacks[many][name] - stacks[few][name]) / (many - few) for name in sizes.steps}


def op_calls(
    cfg: ModelConfig, sequences: int, tokens: int, context: int
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Operands and attributes of the ops with kernels, as a layer of the model has them."""
    mla, index, moe, d = cfg.attention, cfg.indexer, cfg.moe, cfg.hidden_size
    assert isinstance(mla, Mla) and index and moe and mla.q_lora_rank
    n, pages, bf16, f8, i32 = sequences * tokens, context // PAGE, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32
    s, lead, cache = jax.ShapeDtypeStruct, (sequences, tokens), (1 + sequences * pages, PAGE)
    table, at = s((sequences, pages), i32), s(lead, i32)
    query, latents = s((*lead, cfg.heads, mla.latent_dim), bf16), s((*cache, mla.latent_dim), bf16)
    latent = {"scale": 0.06, "value_dim": mla.kv_lora_rank}
    up, down = (moe.experts, d, 2, moe.intermediate), (moe.experts, moe.intermediate, d)

    def scales(*shape: int, keep: int = -1) -> Any:
        return s(tuple(n if i == keep else -(-n // 128) for i, n in enumerate(shape)), jnp.float32)

    up_scales = s((moe.experts, -(-d // 128), 2, -(-moe.intermediate // 128)), jnp.float32)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "glm.linear": (
            (s((*lead, d), bf16), s((d, mla.q_lora_rank), f8), scales(d, mla.q_lora_rank)), {},
        ),
        "glm.index_scores": (
            (s((*lead, index.heads, index.head_dim), bf16), s((*lead, index.heads), bf16),
             s((*cache, index.head_dim), bf16), table, at), {},
        ),
        "glm.select_topk": ((s((*lead, context), jnp.float32),), {"k": index.topk}),
        "glm.sparse_attention": ((query, latents, table, s((*lead, index.topk), i32), at), latent),
        "glm.route": (
            (s((n, d), bf16), s((d, moe.experts), jnp.float32), s((moe.experts,), jnp.float32)),
            {"top_k": moe.top_k, "n_group": moe.n_group, "topk_group": moe.topk_group, "normalise": moe.normalise,
             "scale": moe.scale},
        ),
        "glm.expert_ffn": (
            (s((n, d), bf16), s((n, moe.top_k), i32), s((n, moe.top_k), jnp.float32), s(up, f8), up_scales,
             s(down, f8), scales(*down, keep=0)), {},
        ),
    }  # fmt: skip
    if tokens == 1:
        calls["glm.latent_attention"] = ((query, latents, table, at), latent)
    else:
        expand = (s((cfg.heads, mla.nope_dim, mla.kv_lora_rank), bf16),
                  s((cfg.heads, mla.kv_lora_rank, mla.v_dim), bf16))  # fmt: skip
        attended = (s((*lead, cfg.heads, mla.qk_dim), bf16), latents, table, *expand, at)
        calls["glm.expanded_attention"] = (attended, {"scale": 0.06})
    return calls


def op_ms(
    backend: Backend, name: str, call: tuple[tuple[Any, ...], dict[str, Any]], context: int, experts: int, repeats: int
) -> float:
    """Milliseconds of one op, dispatch included; choices and selections are random ones in range."""
    operands, attributes = call

    def fn(*args: Any) -> Any:
        return OPS[name].call(*args, **attributes)

    run = backend.load(backend.export(Program(name, fn, operands)))
    below = {"glm.expert_ffn": experts, "glm.sparse_attention": context}.get(name, 0)
    arrays = []
    for index, spec in enumerate(operands):
        if spec.dtype != jnp.int32:
            arrays.append(random_array(spec.shape, spec.dtype, index))
        elif index == len(operands) - 1:  # positions: the last, which sees all
            arrays.append(jnp.full(spec.shape, context - 1, jnp.int32))
        elif name != "glm.expert_ffn" and index in (1, 2, 3) and spec.shape[-1] == context // PAGE:  # no page is shared
            arrays.append(jnp.arange(1, 1 + spec.size, dtype=jnp.int32).reshape(spec.shape))
        else:
            arrays.append(jax.random.randint(jax.random.key(index), spec.shape, 0, below, jnp.int32))
    return 1e3 * median_s(lambda: run(*arrays), repeats)


def engine_ms(
    backend: Backend, cfg: ModelConfig, weights: dict[str, Any], batch: int, sizes: Sizes
) -> dict[str, float]:
    """Milliseconds of a decode step of the engine, scheduler and all: launched ahead of the host, or waiting for it."""
    found = {}
    for way in ("ahead", "waiting"):
        pool = batch * (sizes.prompt + sizes.answer + 2 * PAGE)
        config = EngineConfig(page_size=PAGE, pool_tokens=pool, max_running=batch, prefix_cache=False)
        programs = Programs(backend, cfg, weights, config.pages, PAGE, "bfloat16")
        programs.apart = way == "ahead"
        engine = LocalEngine(cfg, programs, config)
        prompts = [Prompt((1 + at,) * sizes.prompt, sizes.answer) for at in range(batch)]
        engine.generate(prompts)  # compiles
        done = engine.generate(prompts)[-1]  # whose decoding began last, so that nobody's prompt is among its steps
        found[way] = 1e3 * done.decode_s / (sizes.answer - 1)
    return found


def ops(cuda: Backend, plain: Backend, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Milliseconds of each op at each step, by kernel and by decomposition, or why there are none. plain: the backend
    without kernels of its own."""
    found: dict[str, dict[str, Any]] = {}
    cfg = from_hf(dict(sizes.rank))
    assert cfg.moe
    for step, (sequences, tokens, start) in sizes.steps.items():
        context = -(-(start + tokens) // PAGE) * PAGE
        for name, call in op_calls(cfg, sequences, tokens, context).items():
            row = found[f"{name} {step}"] = {}
            for kind, backend in (("kernel", cuda), ("decomposition", plain)):
                try:
                    row[kind] = op_ms(backend, name, call, context, cfg.moe.experts, sizes.repeats)
                except Exception as error:  # out of memory: a decomposition may want more than a card has
                    row[kind] = first_line(error)[:200]
    return found


def whole(cuda: Backend, fp8: bool, copy_bandwidth_bytes_per_s: float, sizes: Sizes) -> dict[str, Any]:
    """GLM-4.7-Flash's full shape, without its MTP layer: tokens/s, and of batch 1 the share of a copy's bandwidth; what
    the engine around the programs takes a step."""
    cfg = from_hf(dict(sizes.flash))
    weights, steps = random_weights(cfg, fp8), sizes.flash_steps
    times = step_ms(cuda, cfg, weights, steps, sizes)
    rates = {name: 1e3 * sequences * tokens / times[name] for name, (sequences, tokens, _) in steps.items()}
    read = read_bytes(cfg, weights)
    return {
        "tokens_per_s": rates,
        "step_ms": times,
        "engine_step_ms": {
            name: engine_ms(cuda, cfg, weights, batch, sizes)
            for name, (batch, tokens, _) in steps.items()
            if tokens == 1
        },
        "batch1_read_bytes": read,
        "batch1_share_of_copy_bandwidth": read / (times["b1"] * 1e-3) / copy_bandwidth_bytes_per_s,
    }


def read_bytes(cfg: ModelConfig, weights: dict[str, Any]) -> float:
    """What a step of one token reads of the weights: of the experts those chosen, of the embedding nothing."""
    share = cfg.moe.top_k / cfg.moe.experts if cfg.moe else 1.0
    total = 0.0
    layers = [(layer_weights(cfg, kind), held) for kind, held in zip(cfg.layers, weights["layers"], strict=True)]
    for described, held in [(outer_weights(cfg), weights["outer"]), *layers]:
        for weight in described:
            if weight.name != "embed":
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(held[weight.name]))
                total += size * (share if weight.expert_count else 1.0)
    return total
