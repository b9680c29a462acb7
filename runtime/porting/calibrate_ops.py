"""Measures ops of the graph whose time no matrix product tells: routed experts, attention over a selection, and the
scores that it is made by.

Each is run as the backend lowers it, inside a compiled program, at a few sizes; `kernel_fit.py` makes kernels of them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from backends.interface import Backend, Program
from model.ops import OPS
from runtime.porting.kernel_fit import FitBasis, Measurement, fitted

_EXPERTS, _TOP_K, _PAGE, _SELECTED = 32, 4, 16, 128
_INDEX_HEADS, _INDEX_DIM = 16, 32
_HEADS = ((4, 64, 48), (8, 160, 128))
"""Heads of attention, and how wide their keys and values are. What a score takes beside its products, as its mask and
exponential, is as much whatever it is made of, so that narrow heads take longer than by their FLOP."""
_WIDTHS = (64, 256, 512)  # of the experts, and of the model around them: the smallest says what a launch takes
_LAYERS, _MOST_LAYERS = 4, 32
_LEAST_SHARE = 0.1  # of a call's time that is its program's at the least: rounds differ, and no op takes no time
_ROUND_S = 1e-3
_SOURCE = "glm5 calibrate"
FORMAT_OF_DTYPE = {"float32": "f32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class OpClock:
    """How ops are timed: rounds of each program; dispatch_s and launch_s as of `Calibration`. layers: of an op in one
    program, so many that what they take is clear of what the call does, where each takes a few launches' time."""

    rounds: int
    dispatch_s: float = 0.0
    launch_s: float = 1.0

    @property
    def layers(self) -> int:
        return max(_LAYERS, min(_MOST_LAYERS, round(self.dispatch_s / self.launch_s / 4)))


def measure_kernels(
    backend: Backend,
    dtype: str,
    peak_flops_per_s: float,
    bandwidth_bytes_per_s: float,
    clock: OpClock,
    tokens: Sequence[int],
    chunks: Sequence[int],
) -> dict[str, Any]:
    """The body of a coefficients file (`hw_profiles/prices/`): kernels `moe`, `mla_decode`, `index_scores`,
    `index_decode`, and `sparse_prefill`, or `masked_prefill` where a backend's chunks attend to all that is cached,
    through a mask. tokens, chunks: as of `Effort`."""
    name, size = FORMAT_OF_DTYPE[dtype], 4.0 if dtype == "float32" else 2.0
    basis = FitBasis(peak_flops_per_s, bandwidth_bytes_per_s)
    few = [count for count in tokens if count <= 16] or [min(tokens)]
    chunk = "masked" if _masks(backend, dtype, size, clock) else "sparse"
    kernels = {
        f"moe/{name}/any": fitted("moe", _experts(backend, dtype, size, tokens, clock), basis, _SOURCE),
        f"mla_decode/{name}/any": fitted("attention", _decoding(backend, dtype, size, few, clock), basis, _SOURCE),
        f"{chunk}_prefill/{name}/any": fitted(
            "attention", _chunk(backend, dtype, size, chunks, clock, chunk), basis, _SOURCE
        ),
        f"index_scores/{name}/any": fitted(
            "index_scores", _scores(backend, dtype, size, chunks, clock), basis, _SOURCE
        ),
        f"index_decode/{name}/any": fitted(
            "index_scores", _next_scores(backend, dtype, size, few, clock), basis, _SOURCE
        ),
    }
    return {"schema": 1, "kernels": {key: {**body, "rotated": clock.layers} for key, body in kernels.items()}}


def _timed(
    backend: Backend, name: str, fns: Sequence[Callable[..., Any]], cases: Sequence[tuple[Any, ...]], clock: OpClock
) -> list[float]:
    """Median seconds of each function on its arguments, without what a call takes; rounds alternate over them. In a
    round a short one is called again and again: what disturbs a machine now and then is long beside it."""
    runs = []
    for number, (fn, args) in enumerate(zip(fns, cases, strict=True)):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        run = backend.load(backend.export(Program(f"calibrate {name} {number}", partial(_one, fn), shapes)))
        backend.get(run(*args)[1])
        runs.append(run)
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(clock.rounds):
        for run, args, kept in zip(runs, cases, times, strict=True):
            spent = 0.0
            while spent < _ROUND_S:
                begin = time.perf_counter()
                backend.get(run(*args)[1])
                kept.append(time.perf_counter() - begin)
                spent += kept[-1]
    medians = [statistics.median(kept) for kept in times]
    return [max(seconds - clock.dispatch_s, _LEAST_SHARE * seconds) for seconds in medians]


def _one(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """All of a result is made, and one number of it fetched."""
    made = fn(*args)
    return made, made.reshape(-1)[0]


def _experts(backend: Backend, dtype: str, size: float, tokens: Sequence[int], clock: OpClock) -> list[Measurement]:
    """Routed experts of each width over each number of tokens, every expert as likely as another."""
    points = []
    for width in _WIDTHS:
        rng = np.random.default_rng(1)

        def put(*shape: int, width: int = width, rng: np.random.Generator = rng) -> Any:
            values = rng.standard_normal(shape, dtype=np.float32) / np.float32(width**0.5)
            return backend.put(values.astype(jnp.dtype(dtype)))

        layers = tuple((put(_EXPERTS, width, 2, width), put(_EXPERTS, width, width)) for _ in range(clock.layers))
        cases, features = [], []
        for count in tokens:
            chosen = np.stack([rng.choice(_EXPERTS, _TOP_K, replace=False) for _ in range(count)]).astype(np.int32)
            share = backend.put(np.full((count, _TOP_K), 1 / _TOP_K, np.float32))
            cases.append((put(count, width), backend.put(chosen), share, layers))
            rows, active = float(chosen.size), float(len(np.unique(chosen)))
            features.append({"rows": rows, "active": active, "touched": rows, "rows_per_expert": rows / active,
                             "spread": 1.0, "hidden": float(width), "inter": float(width),
                             "weight_bytes": size, "act_bytes": size})  # fmt: skip
        times = _timed(backend, f"experts {width}", [_expert_layers] * len(cases), cases, clock)
        points += [Measurement(each, seconds / clock.layers) for each, seconds in zip(features, times, strict=True)]
    return points


def _expert_layers(x: Any, experts: Any, weights: Any, layers: Any) -> Any:
    for gate_up, down in layers:
        x = x + OPS["glm.expert_ffn"].call(x, experts, weights, gate_up, down)
    return x


def _decoding(backend: Backend, dtype: str, size: float, sequences: Sequence[int], clock: OpClock) -> list[Measurement]:
    """Attention of one query a sequence over the chosen of 512 tokens, or of few."""
    cases = [(b, 1, keys, cached) for b in sequences for keys, cached in ((32, 128), (128, 512), (512, 512))]
    features = [{"sequences": float(b), "tokens": float(b), "context": float(keys)} for b, _, keys, _ in cases]
    return _attention(backend, dtype, size, cases, features, clock, _HEADS[-1])


def _chunk(
    backend: Backend, dtype: str, size: float, tokens: Sequence[int], clock: OpClock, how: Literal["sparse", "masked"]
) -> list[Measurement]:
    """Attention of a prompt's chunk, each query over the chosen of what stands before it; masked: over all of that,
    part of which may have been there before the chunk."""
    lengths = [(t, t + before) for t in tokens for before in ((0, 2 * t) if how == "masked" else (0,))]
    cases = [(1, t, min(_SELECTED, cached), cached) for t, cached in lengths]
    features = [
        {"sequences": 1.0, "tokens": float(t), "context": float(cached) if how == "masked" else min(t / 2, keys)}
        for _, t, keys, cached in cases
    ]
    return [point for heads in _HEADS for point in _attention(backend, dtype, size, cases, features, clock, heads)]


def _masks(backend: Backend, dtype: str, size: float, clock: OpClock) -> bool:
    """Whether what a chunk's attention takes follows from what is cached, and not from how much of it is chosen."""
    t, context, (few, most) = 64, 512, (_SELECTED // 4, _SELECTED)
    cases = [(1, t, few, context), (1, t, most, context)]
    fewer, more = _attention(
        backend, dtype, size, cases, [{}, {}], dataclasses.replace(clock, rounds=max(5, clock.rounds)), _HEADS[-1]
    )
    return more.seconds < math.sqrt(most / few) * fewer.seconds


def _scores(backend: Backend, dtype: str, size: float, tokens: Sequence[int], clock: OpClock) -> list[Measurement]:
    """Index scores of a prompt's chunk: its queries see half of it on average, and all of what stands before it."""
    cases = [(1, t, before + t) for t in tokens for before in (0, 2 * t)]
    return _index(backend, dtype, size, cases, [cached - t / 2 for _, t, cached in cases], clock)


def _next_scores(
    backend: Backend, dtype: str, size: float, sequences: Sequence[int], clock: OpClock
) -> list[Measurement]:
    """Index scores of one query a sequence, over all that is cached of it."""
    cases = [(b, 1, cached) for b in sequences for cached in (128, 512)]
    return _index(backend, dtype, size, cases, [float(cached) for *_, cached in cases], clock)


def _index(
    backend: Backend,
    dtype: str,
    size: float,
    cases: Sequence[tuple[int, int, int]],
    contexts: Sequence[float],
    clock: OpClock,
) -> list[Measurement]:
    """Index scores at (sequences, queries of each, tokens cached of each); contexts: what a query sees on average."""
    rng = np.random.default_rng(3)
    given, features = [], []
    for (b, t, cached), context in zip(cases, contexts, strict=True):
        pages = -(-cached // _PAGE)
        given.append(
            (
                backend.put(_normal(rng, (b, t, _INDEX_HEADS, _INDEX_DIM), dtype)),
                backend.put(_normal(rng, (b, t, _INDEX_HEADS), dtype)),
                tuple(backend.put(_normal(rng, (b * pages, _PAGE, _INDEX_DIM), dtype)) for _ in range(clock.layers)),
                backend.put(np.arange(b * pages, dtype=np.int32).reshape(b, pages)),
                backend.put(np.tile(np.arange(cached - t, cached, dtype=np.int32), (b, 1))),
            )
        )
        features.append({"sequences": float(b), "tokens": float(b * t), "context": context,
                         "index_heads": float(_INDEX_HEADS), "index_dim": float(_INDEX_DIM),
                         "index_kv_bytes": _INDEX_DIM * size})  # fmt: skip
    times = _timed(backend, "index scores", [_score_layers] * len(given), given, clock)
    return [Measurement(each, seconds / clock.layers) for each, seconds in zip(features, times, strict=True)]


def _score_layers(query: Any, weights: Any, caches: Any, table: Any, positions: Any) -> Any:
    for cache in caches:
        scores = OPS["glm.index_scores"].call(query, weights, cache, table, positions)
        best = jnp.max(scores, axis=-1)  # each query sees itself at least
        query = query + best[:, :, None, None].astype(query.dtype) * 1e-3  # no layer's scores are another's
    return scores


def _attention(
    backend: Backend,
    dtype: str,
    size: float,
    cases: Sequence[tuple[int, int, int, int]],
    features: Sequence[Mapping[str, float]],
    clock: OpClock,
    dims: tuple[int, int, int],
) -> list[Measurement]:
    """Selection and `glm.sparse_attention` at (sequences, queries of each, keys chosen, tokens cached of each). dims:
    one of `_HEADS`.

    The two are measured together, since a backend may pass the selection from one to the other in a form of its
    own; the index scores they start from are random.
    """
    rng, (heads, latent, value) = np.random.default_rng(2), dims
    attributes = {"scale": latent**-0.5, "value_dim": value}

    def fn(keys: int, query: Any, caches: Any, table: Any, scores: Any, positions: Any) -> Any:
        for cache in caches:
            if keys < scores.shape[2]:
                selected = OPS["glm.select_topk"].call(scores, k=keys)
            else:  # the graph selects nothing then
                selected = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            out = OPS["glm.sparse_attention"].call(query, cache, table, selected, positions, **attributes)
            query = jnp.concatenate([out, query[..., value:]], axis=-1)
            scores = scores + query[:, :, :1, 0].astype(scores.dtype)  # no layer's selection is another's
        return query

    runs, arguments = [], []
    for b, t, keys, context in cases:
        pages = -(-context // _PAGE)
        caches = tuple(backend.put(_normal(rng, (b * pages, _PAGE, latent), dtype)) for _ in range(clock.layers))
        places = np.arange(context - t, context, dtype=np.int32)
        scores = _normal(rng, (b, t, pages * _PAGE), "float32")
        scores[np.broadcast_to(np.arange(pages * _PAGE) > places[:, None], scores.shape)] = -np.inf
        runs.append(partial(fn, keys))
        arguments.append(
            (
                backend.put(_normal(rng, (b, t, heads, latent), dtype)),
                caches,
                backend.put(np.arange(b * pages, dtype=np.int32).reshape(b, pages)),
                backend.put(scores),
                backend.put(np.tile(places, (b, 1))),
            )
        )
    times = _timed(backend, f"attention {heads}", runs, arguments, clock)
    fixed = {"heads": float(heads), "kv_bytes": latent * size, "qk": float(latent), "v": float(value)}
    return [
        Measurement({**each, **fixed}, seconds / clock.layers) for each, seconds in zip(features, times, strict=True)
    ]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(jnp.dtype(dtype))
