"""GLM-5's shapes on an NVIDIA GPU: single ops, whole layers as a TP8 rank, and GLM-4.7-Flash whole.

Each op and layer beside XLA's decompositions on the same card, and layers beside what the best engines take. Run by
bench/cuda.sh.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backends.cuda import CudaBackend
from backends.interface import Backend, Program
from bench.rank import RANK
from model.config import ModelConfig
from model.graph import Batch, Mode
from model.hf_config import from_hf, load_config
from model.ops import OPS
from model.weights import Quantized, Weight, layer_weights, outer_weights
from runtime.execution.local.programs import Programs

ENGINES_LAYER_MS = {"b1": 0.14, "b16": 0.32, "b64": 0.57, "t2048": 1.75}
"""A GLM-5 MoE layer as a TP8 rank on an H200 at 8K: attention, experts and the rest of aiconfigurator 0.12's tables."""
STEPS = {"b1": (1, 1, 8100), "b16": (16, 1, 8100), "b64": (64, 1, 8100), "t2048": (1, 2048, 6144)}
"""Sequences, new tokens of each, and where they begin."""
PAGE = 64


class Decompositions(CudaBackend):
    """The adapter without kernels of its own."""

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return {}


def median_s(run: Callable[[], Any], repeats: int = 30) -> float:
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


def step_ms(backend: Backend, cfg: ModelConfig, weights: dict[str, Any], steps: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a step of the whole stack, by name."""
    found = {}
    for name, (sequences, tokens, start) in steps.items():
        pages = -(-(start + tokens) // PAGE)
        programs = Programs(backend, cfg, weights, sequences * pages, PAGE, "bfloat16")
        table = np.arange(1, 1 + sequences * pages, dtype=np.int32).reshape(sequences, pages)
        ones = np.ones(sequences, np.int32)
        ids = np.random.default_rng(0).integers(1, cfg.vocab_size, (sequences, tokens)).astype(np.int32)
        batch, mode = Batch(ids, ones * start, ones * tokens, table), Mode("expanded" if tokens > 1 else "absorbed")
        found[name] = 1e3 * median_s(lambda p=programs, b=batch, m=mode: p.step(b, m)[1])
    return found


def layers(backend: Backend, fp8: bool, raw: Mapping[str, Any] = RANK, steps: Mapping[str, Any] = STEPS) -> Any:
    """Milliseconds of one MoE layer, from stacks of 2 and of 6 of them."""
    stacks = {}
    for depth in (2, 6):
        cfg = from_hf({**raw, "num_hidden_layers": depth, "first_k_dense_replace": 0})
        stacks[depth] = step_ms(backend, cfg, random_weights(cfg, fp8), steps)
    return {name: (stacks[6][name] - stacks[2][name]) / 4 for name in steps}


def op_calls(sequences: int, tokens: int, context: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Operands and attributes of the ops with kernels, as a TP8 rank of GLM-5 has them."""
    n, pages, bf16, f8, i32 = sequences * tokens, context // PAGE, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32
    s = jax.ShapeDtypeStruct
    lead, cache = (sequences, tokens), (1 + sequences * pages, PAGE)
    table, at = s((sequences, pages), i32), s(lead, i32)
    latent = {"scale": 0.06, "value_dim": 512}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "glm.linear": ((s((*lead, 6144), bf16), s((6144, 2048), f8), s((48, 16), jnp.float32)), {}),
        "glm.index_scores": (
            (s((*lead, 32, 128), bf16), s((*lead, 32), bf16), s((*cache, 128), bf16), table, at),
            {},
        ),
        "glm.select_topk": ((s((*lead, context), jnp.float32),), {"k": 2048}),
        "glm.sparse_attention": (
            (s((*lead, 8, 576), bf16), s((*cache, 576), bf16), table, s((*lead, 2048), i32), at),
            latent,
        ),
        "glm.route": (
            (s((n, 6144), bf16), s((6144, 256), jnp.float32), s((256,), jnp.float32)),
            {"top_k": 8, "n_group": 1, "topk_group": 1, "normalise": True, "scale": 2.5},
        ),
        "glm.expert_ffn": (
            (s((n, 6144), bf16), s((n, 8), i32), s((n, 8), jnp.float32), s((256, 6144, 2, 256), f8),
             s((256, 48, 2, 2), jnp.float32), s((256, 256, 6144), f8), s((256, 2, 48), jnp.float32)),
            {},
        ),
    }  # fmt: skip
    if tokens == 1:
        calls["glm.latent_attention"] = ((s((*lead, 8, 576), bf16), s((*cache, 576), bf16), table, at), latent)
    else:
        up = (s((8, 192, 512), bf16), s((8, 512, 256), bf16))
        attended = (s((*lead, 8, 256), bf16), s((*cache, 576), bf16), table, *up, at)
        calls["glm.expanded_attention"] = (attended, {"scale": 0.06})
    return calls


def op_ms(backend: Backend, name: str, operands: tuple[Any, ...], attributes: dict[str, Any], context: int) -> float:
    """Milliseconds of one op, dispatch included; indices are random ones in range."""

    def fn(*args: Any) -> Any:
        return OPS[name].call(*args, **attributes)

    run = backend.load(backend.export(Program(name, fn, operands)))
    below = {"glm.expert_ffn": 256}.get(name, context // PAGE)
    arrays = []
    for index, spec in enumerate(operands):
        if spec.dtype == jnp.int32:
            values = jax.random.randint(jax.random.key(index), spec.shape, 0, below, jnp.int32)
            arrays.append(jnp.full_like(values, context - 1) if index == len(operands) - 1 else values)
        else:
            arrays.append(random_array(spec.shape, spec.dtype, index))
    return 1e3 * median_s(lambda: run(*arrays))


def report(cuda: Backend, copy_bandwidth_bytes_per_s: float) -> dict[str, Any]:
    """All figures, JSON-ready."""
    plain = Decompositions()
    ops: dict[str, Any] = {}
    found: dict[str, Any] = {"op_ms": ops, "layer_ms": {"engines": ENGINES_LAYER_MS}}
    for step, (sequences, tokens, start) in STEPS.items():
        context = -(-(start + tokens) // PAGE) * PAGE
        for name, (operands, attributes) in op_calls(sequences, tokens, context).items():
            ops[f"{name} {step}"] = {
                kind: op_ms(backend, name, operands, attributes, context)
                for kind, backend in (("kernel", cuda), ("decomposition", plain))
            }
    for fp8 in (True, False):
        name = "fp8" if fp8 else "bf16"
        found["layer_ms"][name] = layers(cuda, fp8)
        found["layer_ms"][f"{name} decompositions"] = layers(plain, fp8)
        found[f"glm-4.7-flash {name}"] = whole(cuda, fp8, copy_bandwidth_bytes_per_s)
    return found


def whole(cuda: Backend, fp8: bool, copy_bandwidth_bytes_per_s: float) -> dict[str, Any]:
    """GLM-4.7-Flash's full shape, without its MTP layer: tokens/s, and of batch 1 the share of a copy's bandwidth."""
    cfg = load_config("glm-4.7-flash")
    weights = random_weights(cfg, fp8)
    steps = {"b1": (1, 1, 4000), "b16": (16, 1, 4000), "b64": (64, 1, 4000), "t2048": (1, 2048, 0)}
    times = step_ms(cuda, cfg, weights, steps)
    rates = {name: 1e3 * sequences * tokens / times[name] for name, (sequences, tokens, _) in steps.items()}
    read = read_bytes(cfg, weights)
    return {
        "tokens_per_s": rates,
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
