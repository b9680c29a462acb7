"""Measures ops of the graph whose time no matrix product tells: routed experts, attention over a selection, the
selection, and the scores that it is made by.

Each is run as the backend lowers it, inside a compiled program, at a few sizes; `kernel_fit.py` makes kernels of them.
The ops of a named model, at its own shapes, join them (`calibrate_model.py`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from backends.interface import Backend
from model.ops import OPS
from runtime.porting.calibrate_sizes import DTYPES, PAGE, SOURCE, loaded, random_buffers
from runtime.porting.kernel_fit import FitBasis, Measurement, fitted

_EXPERTS, _TOP_K, _SELECTED = 32, 4, 128
_INDEX_HEADS, _INDEX_DIM = 16, 32
_HEADS = ((4, 64, 48), (8, 160, 128))
"""Heads of attention, and how wide their keys and values are. What a score takes beside its products, as its mask and
exponential, is as much whatever it is made of, so that narrow heads take longer than by their FLOP."""
_WIDTHS = (64, 256, 512)  # of the experts, and of the model around them: the smallest says what a launch takes
_LAYERS, _MOST_LAYERS = 4, 32
_LEAST_SHARE = 0.1  # of a call's time that is its program's at the least: rounds differ, and no op takes no time
_ROUND_S = 1e-3
_FEWEST_ROUNDS = 3
_AS_IN_A_STEP = 1 << 20  # weights in turn: as many as the model's step reads before it comes back to one
_LEAST_PART = 0.02  # of selection and attention together, that each of them takes at the least
FORMAT_OF_DTYPE = {"float32": "f32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class OpClock:
    """How ops are timed: rounds of each program, fewer where they take `most_s` together; dispatch_s, launch_s and
    vector_launch_s as of `Calibration`. layers: of an op in one program, so many that what they take is clear of what
    the call does, where each takes a few launches' time."""

    rounds: int
    dispatch_s: float = 0.0
    launch_s: float = 1.0
    vector_launch_s: float = 0.0
    most_s: float = math.inf

    @property
    def layers(self) -> int:
        return max(_LAYERS, min(_MOST_LAYERS, round(self.dispatch_s / self.launch_s / 4)))


KernelPoints = Mapping[str, tuple[str, Sequence[Measurement]]]
"""By a kernel's key in a price file: its family (`runtime.pricing.work`), and what was measured of it."""


def measure_kernels(
    backend: Backend,
    dtype: str,
    peak_flops_per_s: float,
    bandwidth_bytes_per_s: float,
    clock: OpClock,
    tokens: Sequence[int],
    chunks: Sequence[int],
    of_model: KernelPoints = MappingProxyType({}),
    narrow_flops_per_s: float | None = None,
) -> dict[str, Any]:
    """The body of a coefficients file (`hw_profiles/prices/`): kernels `moe`, `mla_decode`, `select_topk`,
    `index_scores`, `index_decode`, and `sparse_prefill`, or `masked_prefill` where a backend's chunks attend to all
    that is cached, through a mask; and those of `of_model`, whose points join the others. tokens, chunks: as of
    `Effort`. narrow_flops_per_s: what prices take for the peak of 8-bit matrices, where it is not that of the rest."""
    points = _points(backend, dtype, clock, tokens, chunks)
    kernels = {}
    for key in sorted({**points, **of_model}):
        family, _ = points.get(key) or of_model[key]
        ours, theirs = (list(found[key][1]) if key in found else [] for found in (points, of_model))
        peak = narrow_flops_per_s if narrow_flops_per_s and "/fp8-block/" in key else peak_flops_per_s
        axes = AXES[key.partition("/")[0]] if theirs else ()
        body = fitted(family, ours + theirs, FitBasis(peak, bandwidth_bytes_per_s), SOURCE, axes)
        kernels[key] = {**body, "rotated": _AS_IN_A_STEP if theirs else clock.layers}
    return {"schema": 1, "kernels": kernels}


AXES: Mapping[str, tuple[str, ...]] = {
    "gemm": ("k", "n", "m"),
    "bmm": ("k", "n", "m"),
    "moe": ("hidden", "inter", "rows"),
    "memory": ("bytes",),
    "select_topk": ("tokens", "context"),
    **dict.fromkeys(("index_scores", "index_decode"), ("index_dim", "tokens", "context")),
    **dict.fromkeys(("mla_decode", "latent_decode", "gqa_decode"), ("qk", "sequences", "context")),
    **dict.fromkeys(
        ("sparse_prefill", "masked_prefill", "expanded_prefill", "gqa_prefill"), ("qk", "tokens", "context")
    ),
}
"""What the ratios of a kernel go by where a model's shapes are among its points, the shape first."""


def _points(
    backend: Backend, dtype: str, clock: OpClock, tokens: Sequence[int], chunks: Sequence[int]
) -> dict[str, tuple[str, list[Measurement]]]:
    """At small shapes that are no model's."""
    name, size = FORMAT_OF_DTYPE[dtype], DTYPES[dtype].itemsize * 1.0
    few = [count for count in tokens if count <= 16] or [min(tokens)]
    chunk = chunk_kernel(backend, dtype, clock)
    decoding, chosen = _decoding(backend, dtype, size, few, clock)
    prefill, chosen_of_chunks = _chunk(backend, dtype, size, chunks, clock, chunk)
    found = {
        f"moe/{name}/any": ("moe", _experts(backend, dtype, size, tokens, clock)),
        f"mla_decode/{name}/any": ("attention", decoding),
        f"{chunk}_prefill/{name}/any": ("attention", prefill),
        f"select_topk/{name}/any": ("select_topk", [*chosen, *chosen_of_chunks]),
        f"index_scores/{name}/any": ("index_scores", _scores(backend, dtype, size, chunks, clock)),
        f"index_decode/{name}/any": ("index_scores", _next_scores(backend, dtype, size, few, clock)),
    }
    return {key: each for key, each in found.items() if each[1]}


Operands = tuple[Any, ...] | Callable[[int], tuple[Any, ...]]
"""Of a program, or by how often it was called before."""


def timed(
    backend: Backend, name: str, fns: Sequence[Callable[..., Any]], cases: Sequence[Operands], clock: OpClock
) -> list[float]:
    """Median seconds of each function on its arguments, without what a call of a program takes that is given as many
    and does nothing with them; rounds alternate over them. In a round a short one is called again and again: what
    disturbs a machine now and then is long beside it."""
    calls, idles = [], {}
    for number, (fn, case) in enumerate(zip(fns, cases, strict=True)):
        at = case if callable(case) else partial(_same, case)
        run = loaded(backend, f"calibrate {name} {number}", partial(_one, fn), at(0))
        shapes = jax.tree.map(lambda each: (each.shape, str(each.dtype)), at(0))
        if shapes not in idles:  # cases that differ in what is made of their arguments
            idles[shapes] = loaded(backend, f"calibrate {name} {number} call", _nothing, at(0))
        idle = idles[shapes]
        for each in (run, idle):
            backend.get(each(*at(0))[1])
        calls.append((run, idle, at))
    times: list[list[float]] = [[] for _ in cases]
    calling: list[list[float]] = [[] for _ in cases]
    for _ in range(clock.rounds):
        for (run, idle, at), kept, called in zip(calls, times, calling, strict=True):
            if len(kept) >= _FEWEST_ROUNDS and sum(kept) > clock.most_s:
                continue
            spent = 0.0
            while spent < _ROUND_S:
                args = at(len(kept) + 1)
                begin = time.perf_counter()
                backend.get(run(*args)[1])
                kept.append(time.perf_counter() - begin)
                spent += kept[-1]
            args = at(len(kept))
            begin = time.perf_counter()
            backend.get(idle(*args)[1])
            called.append(time.perf_counter() - begin)
    found = ((statistics.median(kept), statistics.median(called)) for kept, called in zip(times, calling, strict=True))
    return [max(seconds - call_s, _LEAST_SHARE * seconds) for seconds, call_s in found]


def _same(args: tuple[Any, ...], _: int) -> tuple[Any, ...]:
    return args


def _one(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """All of a result is made, and one number of it fetched."""
    made = fn(*args)
    return made, jax.tree.leaves(made)[-1].reshape(-1)[0]


def _nothing(*args: Any) -> tuple[Any, Any]:
    """Of each argument one number is read: it has to be there."""
    read = sum(each.reshape(-1)[0].astype(jnp.float32) for each in jax.tree.leaves(args))
    return read, read


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
        times = timed(backend, f"experts {width}", [_expert_layers] * len(cases), cases, clock)
        points += [Measurement(each, seconds / clock.layers) for each, seconds in zip(features, times, strict=True)]
    return points


def _expert_layers(x: Any, experts: Any, weights: Any, layers: Any) -> Any:
    for gate_up, down in layers:
        x = x + OPS["glm.expert_ffn"].call(x, experts, weights, gate_up, down)
    return x


SelectedPoints = tuple[list[Measurement], list[Measurement]]
"""Of attention over a selection, and of the selection."""


def _decoding(backend: Backend, dtype: str, size: float, sequences: Sequence[int], clock: OpClock) -> SelectedPoints:
    """One query a sequence over the chosen of 512 tokens, or of few."""
    cases = [(b, 1, keys, cached) for b in sequences for keys, cached in ((32, 128), (128, 512), (512, 512))]
    features = [{"sequences": float(b), "tokens": float(b), "context": float(keys)} for b, _, keys, _ in cases]
    return _of_all_heads(partial(attention_over_selected, backend, dtype, size, cases, features, clock))


def _chunk(
    backend: Backend, dtype: str, size: float, tokens: Sequence[int], clock: OpClock, how: Literal["sparse", "masked"]
) -> SelectedPoints:
    """A prompt's chunk, each query over the chosen of what stands before it; masked: over all of that, part of which
    may have been there before the chunk."""
    lengths = [(t, t + before) for t in tokens for before in ((0, 2 * t) if how == "masked" else (0,))]
    cases = [(1, t, min(_SELECTED, cached), cached) for t, cached in lengths]
    features = [
        {"sequences": 1.0, "tokens": float(t), "context": float(cached) if how == "masked" else min(t / 2, keys)}
        for _, t, keys, cached in cases
    ]
    return _of_all_heads(partial(attention_over_selected, backend, dtype, size, cases, features, clock))


def _of_all_heads(measured: Callable[[tuple[int, int, int]], SelectedPoints]) -> SelectedPoints:
    found = [measured(heads) for heads in _HEADS]
    attended, chosen = ([point for each in part for point in each] for part in zip(*found, strict=True))
    return attended, chosen


def chunk_kernel(backend: Backend, dtype: str, clock: OpClock) -> Literal["sparse", "masked"]:
    """Masked where what a chunk's attention takes follows from what is cached, not from how much of it is chosen."""
    t, context, (few, most) = 64, 512, (_SELECTED // 4, _SELECTED)
    cases = [(1, t, few, context), (1, t, most, context)]
    steady = dataclasses.replace(clock, rounds=max(5, clock.rounds))
    (fewer, more), chosen = attention_over_selected(
        backend, dtype, DTYPES[dtype].itemsize * 1.0, cases, [{}, {}], steady, _HEADS[-1]
    )
    took = [each.seconds for each in (fewer, more)]
    if chosen:
        took = [attended + each.seconds for attended, each in zip(took, chosen, strict=True)]
    return "masked" if took[1] < math.sqrt(most / few) * took[0] else "sparse"


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
        pages = -(-cached // PAGE)
        given.append(
            (
                backend.put(_normal(rng, (b, t, _INDEX_HEADS, _INDEX_DIM), dtype)),
                backend.put(_normal(rng, (b, t, _INDEX_HEADS), dtype)),
                tuple(backend.put(_normal(rng, (b * pages, PAGE, _INDEX_DIM), dtype)) for _ in range(clock.layers)),
                backend.put(np.arange(b * pages, dtype=np.int32).reshape(b, pages)),
                backend.put(np.tile(np.arange(cached - t, cached, dtype=np.int32), (b, 1))),
            )
        )
        features.append({"sequences": float(b), "tokens": float(b * t), "context": context,
                         "index_heads": float(_INDEX_HEADS), "index_dim": float(_INDEX_DIM),
                         "index_kv_bytes": _INDEX_DIM * size})  # fmt: skip
    times = timed(backend, "index scores", [_score_layers] * len(given), given, clock)
    return [Measurement(each, seconds / clock.layers) for each, seconds in zip(features, times, strict=True)]


def _score_layers(query: Any, weights: Any, caches: Any, table: Any, positions: Any) -> Any:
    for cache in caches:
        scores = OPS["glm.index_scores"].call(query, weights, cache, table, positions)
        best = jnp.max(scores, axis=-1)  # each query sees itself at least
        query = query + best[:, :, None, None].astype(query.dtype) * 1e-3  # no layer's scores are another's
    return scores


def attention_over_selected(
    backend: Backend,
    dtype: str,
    size: float,
    cases: Sequence[tuple[int, int, int, int]],
    features: Sequence[Mapping[str, float]],
    clock: OpClock,
    dims: tuple[int, int, int],
    filled: float = 1.0,
) -> SelectedPoints:
    """`glm.sparse_attention` and `glm.select_topk` at (sequences, queries of each, keys chosen, tokens that the pages
    of each hold). dims: heads, width of a latent, width of a value. filled: how far the pages are.

    A backend may pass the selection from one to the other in a form of its own, so both are timed in one program, where
    each layer selects and where the first one does for all: the difference is the selection. The index scores they
    start from are random.
    """
    rng, (heads, latent, value) = np.random.default_rng(2), dims
    attributes = {"scale": latent**-0.5, "value_dim": value}

    def fn(keys: int, each: bool, query: Any, caches: Any, table: Any, scores: Any, positions: Any) -> Any:
        selected = None
        for cache in caches:
            if keys == scores.shape[2]:  # the graph selects nothing then
                selected = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            elif each or selected is None:
                selected = OPS["glm.select_topk"].call(scores, k=keys)
            out = OPS["glm.sparse_attention"].call(query, cache, table, selected, positions, **attributes)
            query = jnp.concatenate([out, query[..., value:]], axis=-1)
            scores = scores + query[:, :, :1, 0].astype(scores.dtype)  # no layer's selection is another's
        return query

    most = max(b * -(-context // PAGE) for b, _, _, context in cases)
    held = tuple(random_buffers(backend, (most, PAGE, latent), dtype, clock.layers))
    runs, arguments = [], []
    for b, t, keys, context in cases:
        pages = -(-context // PAGE)
        end = round(filled * context)
        places = np.arange(end - t, end, dtype=np.int32)
        scores = _normal(rng, (b, t, pages * PAGE), "float32")
        scores[np.broadcast_to(np.arange(pages * PAGE) > places[:, None], scores.shape)] = -np.inf
        given = (
            backend.put(_normal(rng, (b, t, heads, latent), dtype)),
            held,
            backend.put(np.arange(b * pages, dtype=np.int32).reshape(b, pages)),
            backend.put(scores),
            backend.put(np.tile(places, (b, 1))),
        )
        for each in (True, False) if _selects(keys, pages) and clock.layers > 1 else (True,):
            runs.append(partial(fn, keys, each))
            arguments.append(given)
    times = iter(timed(backend, f"attention {heads}", runs, arguments, clock))
    fixed = {"heads": float(heads), "kv_bytes": latent * size, "qk": float(latent), "v": float(value)}
    attended, chosen = [], []
    for (b, t, keys, context), feature in zip(cases, features, strict=True):
        both = next(times) / clock.layers
        taken = 0.0
        if _selects(keys, -(-context // PAGE)) and clock.layers > 1:
            shared = next(times) / clock.layers
            taken = (both - shared) * clock.layers / (clock.layers - 1)
            taken = min(max(taken, _LEAST_PART * both), (1 - _LEAST_PART) * both)
            sees = max(filled * context - (t / 2 if t > 1 else 0), 1.0)
            chosen.append(Measurement({"tokens": float(b * t), "context": sees, "index_topk": float(keys)}, taken))
        attended.append(Measurement({**feature, **fixed}, both - taken))
    return attended, chosen


def _selects(keys: int, pages: int) -> bool:
    return keys < pages * PAGE


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(jnp.dtype(dtype))
