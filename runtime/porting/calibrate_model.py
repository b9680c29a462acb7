"""Measures the ops of a named model at the shapes that one of its ranks gives them (`calibrate_calls.py`).

The model never has to fit: one op's weights and caches do, and of more experts than a device's memory has room for, as
many as it has. Between two uses of the same weights as many bytes of others are read as a step of the model reads, or
as no cache holds: what stays in a cache there stays in it here. What is measured is what the price of a step is made
of:

    gemm, bmm               `glm.linear`, `glm.head_linear`; in FP8 where the model's matrices are and the backend
                            keeps them so
    moe                     `glm.expert_ffn`, with tokens on experts at random
    latent_decode, expanded_prefill     latent attention of answers and of chunks over all that is cached; of a model
                            with an indexer up to the contexts that it would select whole
    mla_decode, select_topk, sparse_prefill or masked_prefill   attention over a selection, and the selection
    index_decode, index_scores          scores that it is made by
    gqa_decode, gqa_prefill `glm.paged_attention`
    memory                  norms, activations, and what the choice of experts takes beside its product

What moves its operands and no more (`NOT_MEASURED`) is priced at the rate of memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from backends.interface import Backend, Order
from foundation.errors import UsageError
from model.config import LayerType
from model.formats import E4M3
from model.ops import OPS
from runtime.porting.calibrate_calls import ModelRank, RankCall, RankStep, answer_steps, calls, chunk_steps, token_steps
from runtime.porting.calibrate_features import filed, over_selected, product
from runtime.porting.calibrate_ops import (
    FORMAT_OF_DTYPE,
    KernelPoints,
    OpClock,
    attention_over_selected,
    chunk_kernel,
    timed,
)
from runtime.porting.calibrate_sizes import DTYPES, Effort, host_bytes, random_buffers
from runtime.porting.kernel_fit import Measurement
from runtime.pricing.work import FAMILIES

NOT_MEASURED = ("glm.embed", "glm.layer_norm", "glm.bias", "glm.rope", "glm.cache_write")
_SHARE = 4  # of a device's memory that a program's operands may take: one of so many parts
_CLEAR = 4.0  # calls' times that a program takes at the least
_MOST_S = 2.0  # of an op at the chip's best rates, beyond which a size is left to the formula
_MOST_COPIES = 512  # of an op's weights
_MOST_TOKENS, _MOST_ANSWERS, _ANSWER_SIZES = 1024, 64, 4
_LEAST_PART = 0.1  # of what was timed that is an op's own, whatever stands beside it

_ROLES: Mapping[str, tuple[str, ...]] = {
    "glm.linear": ("x", "held"),
    "glm.head_linear": ("x", "held"),
    "glm.rms_norm": ("x", "held"),
    "glm.swiglu": ("x",),
    "glm.route": ("x", "held"),
    "glm.expert_ffn": ("x", "experts", "shares", "held"),
    "glm.latent_attention": ("x", "pages", "table", "positions"),
    "glm.expanded_attention": ("x", "pages", "table", "held", "held", "positions"),
    "glm.paged_attention": ("x", "pages", "pages", "table", "positions"),
    "glm.index_scores": ("x", "same", "pages", "table", "positions"),
}
"""What each operand is: `x` goes from one to the next, `held` and `pages` are each one's own, the rest is the same for
all. The last one stands for those that follow."""
_OWN = ("held", "pages")
_STEADY = ("glm.linear", "glm.rms_norm", "glm.paged_attention")
_BY_TOKENS = ("glm.linear", "glm.head_linear", "glm.rms_norm", "glm.swiglu", "glm.route", "glm.expert_ffn")
_BY_CONTEXT = ("glm.latent_attention", "glm.expanded_attention", "glm.paged_attention", "glm.index_scores")


@dataclasses.dataclass(frozen=True)
class _Case:
    """An op with its operands, but those that are each layer's own, and where its seconds go in a price file. steady:
    its result is the next one's operand."""

    call: RankCall
    given: Mapping[int, Any]
    key: str
    family: str
    features: Mapping[str, float]
    layers: int
    steady: bool


def measure_model(
    backend: Backend,
    rank: ModelRank,
    dtype: str,
    peak_flops_per_s: float,
    bandwidth_bytes_per_s: float,
    clock: OpClock,
    effort: Effort,
    squares: Sequence[tuple[int, int, float]] = (),
) -> KernelPoints:
    """Points of the kernels that a step of the model is priced by. squares: (m, k, seconds) of products [m, k] x [k, k]
    that were measured already. Raises `UsageError` where no op of it fits."""
    bench = _Bench(backend, rank, dtype, peak_flops_per_s, bandwidth_bytes_per_s, clock)
    read_bytes = min(effort.cold_bytes, rank.weight_bytes(dtype, bench.keep_fp8))
    bench = dataclasses.replace(bench, read_bytes=read_bytes)
    tokens = sorted({*effort.tokens, min(max(effort.rows), _MOST_TOKENS)})
    few = [count for count in tokens if count <= _MOST_ANSWERS] or [tokens[0]]
    answers = sorted({few[round(i)] for i in np.linspace(0, len(few) - 1, _ANSWER_SIZES)})
    steps = [*answer_steps(rank.cfg, answers), *chunk_steps(rank.cfg, effort.chunks)]
    found = _joined(
        bench.points(token_steps(rank.cfg, tokens), (*rank.kinds, None), _BY_TOKENS),
        bench.points(steps, rank.kinds, _BY_CONTEXT),
        bench.selecting(steps),
    )
    if not found:
        raise UsageError(f"{rank.cfg.name}: no op of a rank under {rank.layout.name} fits this device; use more --tp")
    for m, k, seconds in squares:
        key, family, features = product(m, k, k, dtype)
        if key in found:
            found = _joined(found, {key: (family, [Measurement(features, seconds)])})
    return found


def _joined(*tables: KernelPoints) -> KernelPoints:
    found: dict[str, tuple[str, list[Measurement]]] = {}
    for table in tables:
        for key, (family, points) in table.items():
            found.setdefault(key, (family, []))[1].extend(points)
    return found


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What ops are timed with, and the device's best rates. read_bytes: of weights that are read before an op has the
    same again, as far as a cache may notice."""

    backend: Backend
    rank: ModelRank
    dtype: str
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    clock: OpClock
    read_bytes: float = 0.0

    @property
    def keep_fp8(self) -> bool:
        return self.rank.stored_fp8 and self.backend.capabilities().fp8_weights

    @property
    def most_bytes(self) -> float:
        return (self.backend.capabilities().devices[0].memory_bytes or host_bytes()) / _SHARE

    def calls(self, what: LayerType | None, step: RankStep) -> list[RankCall]:
        return calls(self.rank, what, step, self.dtype, self.keep_fp8)

    def points(
        self, steps: Sequence[RankStep], whats: Sequence[LayerType | None], names: Sequence[str]
    ) -> KernelPoints:
        """Of every op of those names, at each step that it fits in."""
        groups: dict[Any, list[tuple[RankStep, RankCall]]] = {}  # alike in their weights
        seen = set()
        for what in whats:
            for step in steps:
                own = [call for call in self.calls(what, step) if call.name in names]
                own += [_product(call) for call in own if call.name == "glm.route"]
                for call in own:
                    found_at = (call.key, step.end if call.name in _BY_CONTEXT else 0)
                    if found_at not in seen:
                        seen.add(found_at)
                        groups.setdefault(_weights(call), []).append((step, call))
        measured = [each for group in groups.values() for each in self._timed(group)]
        products = {case.call.key: seconds for case, seconds in measured}
        found: dict[str, tuple[str, list[Measurement]]] = {}
        for case, seconds in measured:
            if case.call.name == "glm.route":
                seconds = max(_LEAST_PART * seconds, seconds - products.get(_product(case.call).key, 0.0))
            found.setdefault(case.key, (case.family, []))[1].append(Measurement(case.features, seconds))
        return found

    def selecting(self, steps: Sequence[RankStep]) -> KernelPoints:
        """Of attention over a selection, and of the selection; nothing where the model has no indexer."""
        kind = next((kind for kind in self.rank.kinds if kind.indexer == "full"), None)
        index, size = self.rank.cfg.indexer, float(DTYPES[self.dtype].itemsize)
        if kind is None or index is None:
            return {}
        fmt, how = FORMAT_OF_DTYPE[self.dtype], chunk_kernel(self.backend, self.dtype, self.clock)
        alike: dict[tuple[str, float], list[RankStep]] = {}
        for step in steps:
            if step.context > index.topk:
                key = f"mla_decode/{fmt}/any" if step.tokens == 1 else f"{how}_prefill/{fmt}/any"
                alike.setdefault((key, step.end / step.context), []).append(step)
        tables: list[KernelPoints] = []
        for (key, filled), group in alike.items():
            (call,) = (call for call in self.calls(kind, group[0]) if call.name == "glm.sparse_attention")
            _, _, heads, width = call.operands[0].shape
            dims = heads, width, call.attributes["value_dim"]
            sizes = {"heads": heads, "qk": width, "v": dims[2], "kv_bytes": width * size}
            group = [
                step
                for step in group
                if self._attended_bytes(step, width * size, heads) * self.clock.layers <= self.most_bytes
                and self._least_s("attention", {**over_selected(step, index.topk, how == "masked"), **sizes})
                * self.clock.layers
                <= _MOST_S
            ]
            if not group:
                continue
            cases = [(step.sequences, step.tokens, index.topk, step.context) for step in group]
            features = [over_selected(step, index.topk, how == "masked") for step in group]
            attended, chosen = attention_over_selected(
                self.backend, self.dtype, size, cases, features, self.clock, dims, filled
            )
            tables.append({key: ("attention", attended)})
            if chosen:
                tables.append({f"select_topk/{fmt}/any": ("select_topk", chosen)})
        return _joined(*tables)

    # --- one op

    def _timed(self, group: Sequence[tuple[RankStep, RankCall]]) -> Iterator[tuple[_Case, float]]:
        """Seconds of each op of a group that fits."""
        cases = [case for step, call in group if (case := self._case(step, call))]
        while cases:
            try:
                yield from zip(cases, self._seconds(cases), strict=True)
                return
            except Exception as error:
                if not self.backend.exhausted(error):
                    raise
            cases.remove(max(cases, key=lambda case: sum(map(_bytes, case.call.operands))))

    def _seconds(self, cases: Sequence[_Case]) -> list[float]:
        first, roles = cases[0].call, _roles(cases[0].call)
        places = [place for place, role in enumerate(roles) if role in _OWN]
        largest = [max((case.call.operands[place] for case in cases), key=_bytes) for place in places]
        each = max(1, sum(map(_bytes, largest)))
        room = max(1, int(self.most_bytes / each))
        counts = [min(case.layers, room) for case in cases]
        copies = min(max(*counts, math.ceil(self.read_bytes / each)), room, _MOST_COPIES) if places else 0
        copies = max(copies, *counts)
        held = [
            random_buffers(
                self.backend, most.shape, str(most.dtype), copies, _scale(first, place), self._order(first, place)
            )
            for place, most in zip(places, largest, strict=True)
        ]
        owns = [tuple(buffers[copy] for buffers in held) for copy in range(copies)]

        def operands(case: _Case, count: int, turn: int) -> tuple[Any, ...]:
            mine = (owns[(turn * count + layer) % copies] for layer in range(count))
            return tuple(case.given.values()), tuple(mine)

        fns = [partial(_chain, case.call, case.steady, tuple(case.given)) for case in cases]
        args = [partial(operands, case, count) for case, count in zip(cases, counts, strict=True)]
        found = timed(self.backend, f"{first.name} {first.operands[0].shape}", fns, args, self.clock)
        return [
            self._own_seconds(case.steady, seconds / count, count)
            for case, seconds, count in zip(cases, found, counts, strict=True)
        ]

    def _order(self, call: RankCall, place: int) -> Order | None:
        """How the engine has a matrix lie for this backend (`Capabilities.order`)."""
        contracted = _contracted(call, place)
        if contracted is None or call.name not in self.backend.capabilities().out_in:
            return None
        return (*(dim for dim in range(call.operands[place].ndim) if dim != contracted), contracted)

    def _own_seconds(self, steady: bool, seconds: float, layers: int) -> float:
        """What makes the next one wait, where the result is not its operand, is no op's own."""
        beside = 0.0 if steady else self.clock.vector_launch_s * (layers - 1) / layers
        return max(_LEAST_PART * seconds, seconds - beside)

    def _case(self, step: RankStep, call: RankCall) -> _Case | None:
        """None where its operands do not fit, or it would take too long."""
        call = self._with_fewer_experts(call)
        roles = _roles(call)
        own = sum(_bytes(op) for op, role in zip(call.operands, roles, strict=True) if role in _OWN)
        results = jax.tree.leaves(jax.eval_shape(partial(OPS[call.name].meaning, **call.attributes), *call.operands))
        rest = sum(map(_bytes, call.operands)) - own + 2 * sum(map(_bytes, results))
        for spec in (op for op, role in zip(call.operands, roles, strict=True) if role == "pages"):
            rest += self._attended_bytes(step, _bytes(spec) / spec.shape[0] / spec.shape[1], call.operands[0].shape[2])
        given = self._given(step, call, roles)
        key, family, features = filed(call, step, self.dtype, given)
        least = max(self._least_s(family, features), self.clock.launch_s)
        wanted = min(max(1, math.ceil(_CLEAR * self.clock.dispatch_s / least)), self.clock.layers)
        layers = min(wanted, int(self.most_bytes / max(own + rest, 1)))
        if layers < 1 or least > _MOST_S:
            return None
        return _Case(
            call,
            {place: self.backend.put(array) for place, array in given.items()},
            key,
            family,
            features,
            layers,
            _steady(call, results),
        )

    def _least_s(self, family: str, features: Mapping[str, float]) -> float:
        work = FAMILIES[family](features)
        return max(float(work.flops) / self.peak_flops_per_s, float(work.bytes) / self.bandwidth_bytes_per_s)

    @staticmethod
    def _attended_bytes(step: RankStep, row_bytes: float, heads: int) -> float:
        """What attention may put beside its pages where no kernel does it at once: rows in their order, in a wider
        type, and scores with their weights."""
        return step.sequences * step.context * (2 * row_bytes + 8.0 * step.tokens * heads)

    def _with_fewer_experts(self, call: RankCall) -> RankCall:
        """As many as memory has room for in every layer that is wanted, where that is not all."""
        if call.name != "glm.expert_ffn":
            return call
        count = call.operands[3].shape[0]
        one = sum(map(_bytes, call.operands[3:])) / count
        kept = min(count, int(self.most_bytes / 2 / one))
        if kept < call.operands[1].shape[1]:
            return call  # too few to choose from
        cut = tuple(jax.ShapeDtypeStruct((kept, *op.shape[1:]), op.dtype) for op in call.operands[3:])
        return dataclasses.replace(call, operands=(*call.operands[:3], *cut))

    def _given(self, step: RankStep, call: RankCall, roles: Sequence[str]) -> dict[int, np.ndarray]:
        """Operands that are not each layer's own, by place."""
        rng = np.random.default_rng(0)
        found = {}
        for place, (spec, role) in enumerate(zip(call.operands, roles, strict=True)):
            if role in ("x", "same"):
                found[place] = rng.standard_normal(spec.shape, dtype=np.float32).astype(spec.dtype)
            elif role == "table":
                found[place] = np.arange(spec.size, dtype=np.int32).reshape(spec.shape)
            elif role == "positions":
                found[place] = step.positions
            elif role == "shares":
                found[place] = np.full(spec.shape, 1 / spec.shape[1], np.float32)
            elif role == "experts":
                found[place] = self._chosen(rng, spec.shape, call.operands[3].shape[0])
        return found

    def _chosen(self, rng: np.random.Generator, shape: tuple[int, ...], here: int) -> np.ndarray:
        """Experts of tokens, int32 [tokens, choices]: at random, as the busiest group of ranks numbers them, those of
        other groups as nobody's."""
        groups = self.rank.layout.ep
        chosen = np.stack([rng.choice(here * groups, shape[1], replace=False) for _ in range(shape[0])])
        busiest = int(np.bincount(chosen.ravel() // here, minlength=groups).argmax())
        mine = chosen - busiest * here
        return np.where((mine >= 0) & (mine < here), mine, here).astype(np.int32)


def _chain(
    call: RankCall, steady: bool, places: Sequence[int], given: tuple[Any, ...], owns: Sequence[tuple[Any, ...]]
) -> Any:
    """The op, once with each of `owns`, each waiting for the one before. All of every result is made."""
    operands, roles, made = dict(zip(places, given, strict=True)), _roles(call), []
    for own in owns:
        mine = iter(own)
        args = [next(mine) if role in _OWN else operands[place] for place, role in enumerate(roles)]
        made.append(OPS[call.name].call(*args, **call.attributes))
        last = jax.tree.leaves(made[-1])[-1]
        if steady:
            operands[0] = last
        else:
            x = operands[0]
            corner = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
            number = jax.lax.slice(last, (0,) * last.ndim, (1,) * last.ndim).astype(x.dtype)
            begin = (np.int32(0),) * x.ndim
            operands[0] = jax.lax.dynamic_update_slice(x, corner + number.reshape(corner.shape), begin)
    return made[-1] if steady else made


def _steady(call: RankCall, results: Sequence[Any]) -> bool:
    """Whether a result is the next one's operand as it is, and neither grows nor vanishes from one to the next."""
    x = call.operands[0]
    return call.name in _STEADY and [(each.shape, each.dtype) for each in results] == [(x.shape, x.dtype)]


def _roles(call: RankCall) -> tuple[str, ...]:
    roles = _ROLES[call.name]
    return (*roles, *roles[-1:] * (len(call.operands) - len(roles)))


def _weights(call: RankCall) -> tuple[Any, ...]:
    """What calls are alike in that are timed with the same weights, or with pages of one pool."""
    own = [(role, op) for op, role in zip(call.operands, _roles(call), strict=True) if role in _OWN]
    shapes = ((op.shape[1:] if role == "pages" else op.shape, str(op.dtype)) for role, op in own)
    return (call.name, call.operands[0].shape[-1], *shapes)


def _contracted(call: RankCall, place: int) -> int | None:
    """The dim of a matrix that a product sums over, of its blocks' scales too; None for what is no matrix."""
    if _roles(call)[place] == "pages" or call.operands[place].ndim < 2:
        return None
    return {"glm.linear": 0, "glm.route": 0}.get(call.name, 1)


def _scale(call: RankCall, place: int) -> float:
    """Of random weights, so that sums are about one."""
    contracted = _contracted(call, place)
    if contracted is None:
        return 1.0
    if call.operands[place - 1].dtype == E4M3:  # the scales of blocks
        return 0.01
    return call.operands[place].shape[contracted] ** -0.5


def _product(call: RankCall) -> RankCall:
    """The product that the choice of experts begins with."""
    return RankCall("glm.linear", call.operands[:2], {})


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return spec.size * np.dtype(spec.dtype).itemsize
