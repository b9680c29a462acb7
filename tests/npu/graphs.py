"""Graphs of ops for the tests of torch_npu's target, with inputs that reach their corners."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from backends.ascend.target import NpuOptions
from backends.ascend.writer import NpuGraph
from backends.toolchains.torch_device import host_tensor
from backends.toolchains.walker import Graph, port
from model import ops
from runtime.porting.export.ascend_run import addressed

F32 = NpuOptions(dtypes=frozenset({"float16", "bfloat16", "float32"}))
"""Operators in float32 too, to compare what graphs mean and not how they round."""
C8 = dataclasses.replace(F32, int8_rope=64)
"""The same, with caches in int8."""
B, T, HEADS, PAGE, PAGES = 2, 3, 4, 16, 4
Inputs = dict[str, np.ndarray]
Layer = Callable[..., tuple[Any, ...]]


def normal(*shape: int, dtype: Any = np.float32, scale: float = 1.0, seed: int = 5) -> np.ndarray:
    return (np.random.default_rng((seed, *shape)).standard_normal(shape) * scale).astype(dtype)


def graph(fn: Layer, inputs: Mapping[str, Any], outputs: list[str], axes: ops.Across = ()) -> Graph:
    """axes: mesh axes of the devices, of which `inputs` are one's."""
    traced = jax.make_jaxpr(lambda *args: fn(**dict(zip(inputs, args, strict=True))), axis_env=list(axes) or None)
    closed = traced(*inputs.values())
    names = [port(name, var.aval) for name, var in zip(inputs, closed.jaxpr.invars, strict=True)]
    results = [port(name, aval) for name, aval in zip(outputs, closed.out_avals, strict=True)]
    aliases = {name: name.removesuffix(".out") for name in outputs if name.startswith("cache.")}
    return Graph("test", closed, tuple(names), tuple(results), aliases)


def program(made: NpuGraph) -> torch.export.ExportedProgram:
    return torch.export.load(io.BytesIO(made.archive))


def operators(made: NpuGraph) -> set[str]:
    """torch_npu's, by name."""
    return {str(node.target).split(".")[1] for node in program(made).graph.nodes if str(node.target).startswith("npu.")}


def run(made: NpuGraph, inputs: Mapping[str, np.ndarray]) -> Inputs:
    """On the CPU, with `references.py`. A latent cache is given as one and its halves are made of it; caches in int8
    are given as they are."""
    from tests.npu.references import register

    register()
    results = program(made).module()(*(tensor(given(inputs, each.name)).reshape(each.shape) for each in made.inputs))
    return {each.name: array(value) for each, value in zip(made.outputs, results, strict=True)}


def run_ranks(made: NpuGraph, shares: Sequence[Mapping[str, np.ndarray]]) -> list[Inputs]:
    """A graph that talks to other devices, on a thread for each: what each returns."""
    from tests.npu import references

    references.register()
    group = f"threads-{id(made)}"
    references.MEETINGS[group] = references.Meeting(len(shares))

    modules = [program(made).module() for _ in shares]
    assert all(addressed(module, (group, rank)) for rank, module in enumerate(modules))

    def one(rank: int) -> Inputs:
        module = modules[rank]
        results = module(*(tensor(given(shares[rank], each.name)).reshape(each.shape) for each in made.inputs))
        return {each.name: array(value) for each, value in zip(made.outputs, results, strict=True)}

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(one, range(len(shares))))


def given(inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name.endswith(".bias"):  # eight times the sum of the weights, for the half of an int8 that is taken less 8
        values, scale = (inputs[name.removesuffix(".bias") + part].astype(np.float32) for part in (".values", ".scale"))
        return np.float32(8) * (values * scale).sum(1)
    stem, _, half = name.rpartition("_")
    if name not in inputs and half in ("nope", "rope"):
        return inputs[stem][..., :512] if half == "nope" else inputs[stem][..., 512:]
    return inputs[name]


def tensor(x: np.ndarray) -> torch.Tensor:
    x = np.array(x)
    if x.dtype == ml_dtypes.int4:
        return host_tensor(x)
    return (
        torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
    )


def array(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float32).numpy() if x.dtype == torch.bfloat16 else x.numpy()


# --- layers -------------------------------------------------------------------------------------


def attention_inputs(dtype: Any = np.float32, heads: int = HEADS) -> Inputs:
    """Two sequences of different length, a chunk of 3 tokens each, pages out of order."""
    pool = 2 * PAGES + 1
    start = np.array([40, 11], np.int32)
    return {
        "query": normal(B, T, heads, 576, dtype=dtype, scale=0.3),
        "index_query": normal(B, T, 8, 128, dtype=dtype),
        "index_weights": normal(B, T, 8, dtype=dtype),
        "rows": normal(B, T, 576, dtype=dtype),
        "keys": normal(B, T, 128, dtype=dtype),
        "slots": np.array([[17, 18, 19], [33, 34, 35]], np.int32),
        "cache.latent": normal(pool, PAGE, 576, dtype=dtype),
        "cache.index": normal(pool, PAGE, 128, dtype=dtype),
        "page_table": np.random.default_rng(2).permutation(np.arange(1, pool)).astype(np.int32).reshape(B, PAGES),
        "positions": (start[:, None] + np.arange(T, dtype=np.int32)[None, :]).astype(np.int32),
    }


def sparse(k: int, keys: bool = False) -> Layer:
    """keys: of the new tokens too."""

    def layer(**x: Any) -> tuple[Any, ...]:
        cache = ops.cache_write(x["cache.latent"], x["rows"], x["slots"], cache="latent")
        index = ops.cache_write(x["cache.index"], x["keys"], x["slots"], cache="index") if keys else x["cache.index"]
        scores = ops.index_scores(x["index_query"], x["index_weights"], index, x["page_table"], x["positions"])
        selected = ops.select_topk(scores, k=k)
        out = ops.sparse_attention(
            x["query"], cache, x["page_table"], selected, x["positions"], scale=0.06, value_dim=512
        )
        return (out, cache, selected, index) if keys else (out, cache, selected)

    return layer


SPARSE_OUTPUTS = ["out", "cache.latent.out", "selected.out"]


def int8_caches(inputs: Mapping[str, np.ndarray], dtype: Any = np.float32) -> Inputs:
    """Inputs with their caches as rows in int8: random integers, each row's largest 127, and scales of their own."""
    rng, made = np.random.default_rng(11), dict(inputs)
    pages, size = inputs["cache.latent"].shape[:2]

    def integers(*shape: int) -> np.ndarray:
        found = rng.integers(-127, 128, shape).astype(np.int8)
        found[..., 0] = 127
        return found

    latent = integers(pages, size, 4, 128).reshape(pages, size, 512)
    scale = (rng.random((pages, size, 4)) / 60 + 1e-3).astype(np.float32)
    rope = inputs["cache.latent"][..., 512:].astype(dtype)
    made["cache.latent"] = np.concatenate([latent, rope.view(np.int8), scale.view(np.int8)], axis=-1)
    made["cache.index"], made["cache.index_scale"] = integers(pages, size, 128), scale[..., :1].astype(np.float16)
    return made


def widened(made: Mapping[str, np.ndarray], suffix: str = "", dtype: Any = np.float32) -> Inputs:
    """What such caches mean, as the emulation of them has it: rotated index keys, latents in activations' type."""
    rows = made[f"cache.latent{suffix}"]
    rope, scale = (np.ascontiguousarray(x) for x in (rows[..., 512:-16], rows[..., -16:]))
    latent = rows[..., :512].astype(np.float32) * np.repeat(scale.view(np.float32), 128, axis=-1)
    index = made[f"cache.index{suffix}"] * made[f"cache.index_scale{suffix}"].astype(np.float32)
    whole = np.concatenate([latent.astype(dtype), rope.view(dtype)], axis=-1)
    return {"cache.latent": whole, "cache.index": index.astype(dtype)}


def projection_inputs(dtype: Any = np.float32, hidden: int = 1024, int8: bool = False) -> Inputs:
    """Of the projections before attention, of the least sizes that their operator takes: two heads of 128 + 64."""
    drawn = {"w.q_a": (hidden, 1536), "w.q_b": (1536, 2 * 192), "w.kv_a": (hidden, 576)}
    made = {k: v for k, v in attention_inputs(dtype).items() if k in ("slots", "positions", "cache.latent")}
    made |= {"x": normal(B, T, hidden, dtype=dtype), "w.k_up": normal(2, 128, 512, dtype=dtype, scale=0.1)}
    made |= {f"w.{name}_norm": normal(w, dtype=dtype) for name, w in (("q_a", 1536), ("kv_a", 512))}
    for name, (rows, columns) in drawn.items():
        if int8:
            made[f"{name}.values"] = np.random.default_rng(rows).integers(-127, 128, (rows, columns)).astype(np.int8)
            made[f"{name}.scale"] = np.abs(normal(1, columns)) / np.float32(127 * rows**0.5)
        else:
            made[name] = normal(rows, columns, dtype=dtype, scale=rows**-0.5)
    return made


def projections(linear: Layer = ops.linear) -> Layer:
    """As `model.graph` has them. linear: of the number format."""

    def layer(**x: Any) -> tuple[Any, ...]:
        def product(rows: Any, name: str) -> Any:
            return linear(rows, *(x[f"w.{name}{part}"] for part in ("", ".values", ".scale") if f"w.{name}{part}" in x))

        def rotated(rows: Any) -> Any:
            frequencies = jnp.asarray(rope_inputs()["inv_freq"])
            return ops.rope(rows, x["positions"], frequencies, interleaved=True, factor=1.0)

        q_latent = ops.rms_norm(product(x["x"], "q_a"), x["w.q_a_norm"], eps=1e-6)
        query = product(q_latent, "q_b").reshape(*x["x"].shape[:2], 2, 192)
        kv = product(x["x"], "kv_a")
        latent = ops.rms_norm(kv[..., :512], x["w.kv_a_norm"], eps=1e-6)
        row = jnp.concatenate([latent, rotated(kv[..., None, 512:])[..., 0, :]], axis=-1)
        pages = ops.cache_write(x["cache.latent"], row, x["slots"], cache="latent")
        absorbed = ops.head_linear(query[..., :128], x["w.k_up"])
        return jnp.concatenate([absorbed, rotated(query[..., 128:])], axis=-1), q_latent, pages

    return layer


PROJECTED = ["query", "q_latent", "cache.latent.out"]


def dense_inputs(expanded: bool) -> Inputs:
    inputs = {k: v for k, v in attention_inputs().items() if k in ("query", "cache.latent", "page_table", "positions")}
    if expanded:
        inputs |= {"k_up": normal(HEADS, 48, 512, scale=0.05), "v_up": normal(HEADS, 512, 32, scale=0.05)}
        inputs["query"] = inputs["query"][..., : 48 + 64]
    return inputs


def dense(expanded: bool) -> Layer:
    def layer(**x: Any) -> tuple[Any, ...]:
        pages, table, at = x["cache.latent"], x["page_table"], x["positions"]
        if expanded:
            return (ops.expanded_attention(x["query"], pages, table, x["k_up"], x["v_up"], at, scale=0.06),)
        return (ops.latent_attention(x["query"], pages, table, at, scale=0.06, value_dim=512),)

    return layer


def route_inputs() -> Inputs:
    return {"x": normal(5, 24), "router": normal(24, 16), "bias": normal(16, scale=0.1)}


def route(groups: int, kept: int, normalise: bool = True) -> Layer:
    def layer(**x: Any) -> tuple[Any, ...]:
        return ops.route(x["x"], x["router"], x["bias"], top_k=3, n_group=groups, topk_group=kept,
                         normalise=normalise, scale=2.5)  # fmt: skip

    return layer


def expert_inputs(local: int, dtype: Any = np.float32) -> Inputs:
    """Six local experts; ids from `local` to 8 for the choices, so that with 6 none of them lives here."""
    return {
        "x": normal(7, 32, dtype=dtype),
        "experts": np.random.default_rng(3).integers(local, 9, (7, 3)).astype(np.int32),
        "weights": np.random.default_rng(4).random((7, 3)).astype(np.float32),
        "gate_up": normal(6, 32, 2, 16, dtype=dtype, scale=0.3),
        "down": normal(6, 16, 32, dtype=dtype, scale=0.3),
    }


def int4(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(-8, 8, shape).astype(ml_dtypes.int4)


def narrow_experts(name: str, dtype: Any = np.float32) -> Inputs:
    """`expert_inputs` with 4-bit matrices: a scale a column, or in w4a16 one for 32 rows."""
    inputs = {k: v for k, v in expert_inputs(0, dtype).items() if k not in ("gate_up", "down")}
    inputs["x"] = normal(7, 64, dtype=dtype)
    groups = {"w4a8": (1, 1), "w4a16": (2, 1)}[name]
    scales = (groups[0], 2, 32), (groups[1], 64)
    for part, shape, scale in zip(("gate_up", "down"), ((64, 2, 32), (32, 64)), scales, strict=True):
        inputs |= {f"{part}.values": int4(6, *shape), f"{part}.scale": np.abs(normal(6, *scale)) / 20}
    return inputs


def experts(**x: Any) -> tuple[Any, ...]:
    return (ops.expert_ffn(x["x"], x["experts"], x["weights"], x["gate_up"], x["down"]),)


def rope_inputs(dtype: Any = np.float32, width: int = 64) -> Inputs:
    """Far positions too: the angles of a context of GLM-5's length."""
    at = np.array([[3, 4, 5], [0, 777, 131_000]], np.int32)
    frequencies = (1e6 ** (-np.arange(32) / 32)).astype(np.float32)
    return {"x": normal(2, 3, 4, width, dtype=dtype), "positions": at, "inv_freq": frequencies}


def rope(interleaved: bool = True) -> Layer:
    def layer(**x: Any) -> tuple[Any, ...]:
        return (ops.rope(x["x"], x["positions"], x["inv_freq"], interleaved=interleaved, factor=1.25),)

    return layer


EXCHANGE = (("dp", 2), ("tp", 2))


def exchange_inputs(scheme: str = "", dtype: Any = np.float32) -> tuple[Inputs, list[Inputs]]:
    """Of four devices that hold two experts each: all experts on one, and each device's share of everything. Three
    tokens a device, of the least width that operators send, for two experts each."""
    rng, width, inner = np.random.default_rng(7), 1024, 16
    experts = np.stack([rng.permutation(8)[:2] for _ in range(12)]).astype(np.int32)
    whole = {"x": normal(12, width, dtype=dtype), "experts": experts, "weights": rng.random((12, 2)).astype(np.float32)}
    if scheme:
        make = int4 if scheme.startswith("w4") else lambda *shape: rng.integers(-127, 128, shape).astype(np.int8)
        for name, shape, scale in (("gate_up", (width, 2, inner), (1, 2, inner)), ("down", (inner, width), (1, width))):
            whole[f"{name}.values"] = make(8, *shape)
            whole[f"{name}.scale"] = (np.abs(normal(8, *scale)) / 100).astype(np.float32)
    else:
        whole |= {"gate_up": normal(8, width, 2, inner, dtype=dtype, scale=0.03)}
        whole |= {"down": normal(8, inner, width, dtype=dtype, scale=0.3)}
    return whole, [{name: np.split(value, 4)[rank] for name, value in whole.items()} for rank in range(4)]


def exchange(call: Layer = ops.expert_ffn, across: ops.Across = EXCHANGE) -> Layer:
    def layer(x: Any, experts: Any, weights: Any, **matrices: Any) -> tuple[Any, ...]:
        return (call(x, experts, weights, *matrices.values(), **({"across": across} if across else {})),)

    return layer
