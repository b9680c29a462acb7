"""A price for every op of the contract, by name, read from the traced op list.

The attention of an MLA layer is priced as one measured block (`runtime.pricing.attention`), from the normed
input to the output projection; the ops of the stages "qkv", "indexer" and "attention" are its parts and
are not priced again. Every other op has an entry in `PRICERS`. A sum of two whole activations (the
residual stream, routed and shared experts) is fused into the norm or kernel beside it, and costs what it moves;
other plain primitives between ops (reshapes, casts) cost nothing here. One that is in no list is an error, so that
a new graph cannot be priced by omission.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from model.config import Mla, ModelConfig
from model.formats import Formats
from model.split import Layout
from model.weights import Weight
from runtime.pricing.book import PriceBook, element_bytes
from runtime.pricing.load import ExpertLoad, with_shared
from runtime.pricing.oplist import Sizes, TracedOp
from runtime.pricing.placement import Placement, place
from runtime.pricing.price import Price, PriceError, total

ATTENTION_STAGES = frozenset({"qkv", "indexer", "attention"})
FUSED = frozenset(
    """
    add_any and argmax axis_index broadcast_in_dim clamp concatenate convert_element_type copy div dynamic_slice
    eq exp gather ge gt integer_pow iota le logistic lt max min mul ne neg not or reduce_and reduce_max reduce_or
    reduce_sum rem reshape rsqrt scatter select_n sign slice squeeze stop_gradient sub transpose
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Context:
    """What prices depend on besides shapes. captured_tokens: of the largest step whose kernels are replayed from a
    graph; those of larger ones are launched from the host. rings: NCCL's all-reduces go round a server's devices."""

    cfg: ModelConfig
    layout: Layout
    formats: Formats
    book: PriceBook
    load: ExpertLoad
    weights: Mapping[str, Weight]
    mtp: bool = False
    replicas: int = 1
    captured_tokens: float = math.inf
    rings: bool = False

    @property
    def placement(self) -> Placement:
        """Where the layout's ranks sit."""
        return place(self.layout, self.book.chip.domain, self.book.chip.node, self.replicas)

    def held(self, weight: str) -> str:
        """The format that a weight is multiplied in. mtp: the program is the MTP layer's."""
        return self.formats.held(self.weights[weight], self.mtp).name

    @property
    def fuses_shared(self) -> bool:
        """Whether the engine runs the shared expert in the routed ones' kernels."""
        moe, choice = self.cfg.moe, self.book.fused_shared(self.cfg.model_type)
        if moe is None or choice is None or moe.shared_experts != 1 or self.layout.by_expert:
            return False
        return moe.experts <= choice.most_experts and self.held("experts_gate_up") not in choice.not_formats

    def hides_shared(self, sizes: Sizes) -> bool:
        """Whether the shared expert runs beside the routed ones in such a step: what it adds then is that its weights
        pass through the same memory."""
        choice, tokens = self.book.beside_routed(self.cfg.model_type), sizes.b * sizes.t
        if choice is None or self.layout.dispatches or tokens > choice.most_tokens:
            return False
        return not choice.captured or tokens <= self.captured_tokens

    def format_of(self, op: TracedOp) -> str:
        """The format that an op's matrix is multiplied in."""
        return self.held(op.weights[0]) if op.weights else self.book.wide


Pricer = Callable[[TracedOp, Sizes, Context], Price | None]


def _elementwise(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    moved = op.moved_bytes(sizes) * context.book.wide_bytes / 2.0  # traced in 16 bits
    return context.book.memory(moved, op.name.removeprefix("glm."))


def _sum(op: TracedOp, sizes: Sizes, context: Context) -> Price | None:
    """What adding the residual moves beyond the norm that it is fused with: one more read, one more write. Where adding
    was measured, it is a kernel of its own."""
    rows = op.outputs[0].elements(sizes)
    if op.outputs[0].at(sizes)[-1:] != (context.cfg.hidden_size,) or any(i.elements(sizes) != rows for i in op.inputs):
        return None
    passes = 2.0 * rows * context.book.wide_bytes
    if context.book.named("memory/add/any"):
        return context.book.memory(1.5 * passes, "add")
    alone, fused = context.book.memory(passes), context.book.memory(2 * passes)
    return fused.lasting(fused.seconds - alone.seconds)


def _linear(op: TracedOp, sizes: Sizes, context: Context) -> Price | None:
    if op.weights and context.weights[op.weights[0]].component == "shared_experts" and context.fuses_shared:
        return None  # one more row a token of the routed experts
    x, w = op.inputs[0].at(sizes), op.inputs[1].at(sizes)
    rows, fmt = math.prod(x[:-1]), context.format_of(op)
    alone = context.book.gemm(rows, math.prod(w[1:]), w[0], fmt)
    if op.weights and context.weights[op.weights[0]].component == "shared_experts" and context.hides_shared(sizes):
        weight_bytes = math.prod(w) * element_bytes(fmt)["weight_bytes"]
        return dataclasses.replace(
            alone, seconds=min(alone.seconds, weight_bytes / context.book.chip.memory_bandwidth_bytes_per_s),
            bound="memory",
        )  # fmt: skip
    return alone


def _head_linear(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    x, (heads, inner, outer) = op.inputs[0].at(sizes), op.inputs[1].at(sizes)
    return context.book.bmm(math.prod(x[:2]), heads, outer, inner)


def _embed(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    return context.book.memory(2.0 * op.outputs[0].elements(sizes) * op.outputs[0].element_bytes)


def _route(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    (tokens, width), (_, experts) = op.inputs[0].at(sizes), op.inputs[1].at(sizes)
    scores = context.book.memory(4.0 * tokens * (experts + 2 * op.attributes["top_k"]), "route")
    return total([context.book.gemm(tokens, experts, width, context.book.wide), scores])


def _experts(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    """`tokens` of the traced op are those that meet the device's experts, all of the group's."""
    moe, layout = context.cfg.moe, context.layout
    assert moe is not None
    tokens, width = op.inputs[0].at(sizes)
    spread = {"moe_ep": layout.ep, "moe_tp": layout.expert_tensor_parts}
    fmt = context.held("experts_gate_up")
    dispatched = layout.dispatches
    load = with_shared(context.load, 1) if context.fuses_shared else context.load
    held, mine = moe.experts // layout.ep, moe.intermediate // layout.expert_tensor_parts
    tables = context.book.expert_tables(context.cfg.model_type, fmt, held, mine)
    return context.book.moe(
        tokens, width, moe.intermediate, moe.top_k, load, weight_format=fmt, dispatched=dispatched, tables=tables,
        **spread,
    )  # fmt: skip


def _gqa(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    from runtime.pricing import attention

    b, t, heads, width = op.inputs[0].at(sizes)
    kv_heads, page = op.inputs[1].at(sizes)[2], op.inputs[1].at(sizes)[1]
    keys = op.inputs[3].at(sizes)[1] * page
    layer = attention.GqaLayer(heads, kv_heads, width, context.formats.cache.heads)
    if t == 1:
        return attention.gqa(context.book, "decode", layer, b, keys)
    return attention.gqa(context.book, "prefill", layer, b * t, max(keys - t / 2, 1.0), b)


def _in_block(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    raise PriceError(f"{op.name} is priced with the attention block it belongs to, not alone")


PRICERS: dict[str, Pricer] = {
    "glm.embed": _embed,
    "glm.rms_norm": _elementwise,
    "glm.layer_norm": _elementwise,
    "glm.linear": _linear,
    "glm.head_linear": _head_linear,
    "glm.bias": _elementwise,
    "glm.swiglu": _elementwise,
    "add": _sum,
    "glm.rope": _elementwise,
    "glm.cache_write": lambda op, sizes, c: c.book.memory(4.0 * op.inputs[1].elements(sizes), "cache_write"),
    "glm.paged_attention": _gqa,
    "glm.route": _route,
    "glm.expert_ffn": _experts,
    **dict.fromkeys(
        (
            "glm.index_scores",
            "glm.select_topk",
            "glm.sparse_attention",
            "glm.latent_attention",
            "glm.expanded_attention",
        ),
        _in_block,
    ),
}

_LABELS = {"glm.expert_ffn": "experts", "glm.route": "router", "glm.embed": "embed", "glm.paged_attention": "attention"}


def label(op: TracedOp, context: Context) -> str:
    """The name under which an op's time is reported."""
    if op.axes:
        return op.stage if op.name == "all_to_all" else op.name
    if op.name in _LABELS:
        return _LABELS[op.name]
    if op.weights and op.name != "glm.rms_norm":
        return context.weights[op.weights[0]].component
    return "elementwise"


def collective(op: TracedOp, sizes: Sizes, context: Context) -> Price:
    """A collective of the traced program over the devices of its axes.

    Tokens meeting experts split by expert go by DeepEP-style dispatch and combine, which move each token
    to the devices of its chosen experts only; the traced all-to-all has a place for every token of every group.
    """
    layout, network, placement = context.layout, context.book.network, context.placement
    size = max(op.inputs[0].elements(sizes), op.outputs[0].elements(sizes)) * op.outputs[0].element_bytes
    kind = {"psum": "all_reduce"}.get(op.name, op.name)
    if op.axes == ("dp",) and layout.dispatches and context.cfg.moe:
        moe = context.cfg.moe
        if op.inputs[0].at(sizes)[-1] != context.cfg.hidden_size:
            return Price(0.0, "network", "fitted", 0.0)  # expert ids and weights travel with the dispatch
        tokens = op.inputs[0].elements(sizes) // context.cfg.hidden_size // layout.dp  # of one group
        phase = "combine" if op.stage == "combine" else "dispatch"
        mode = "ll" if tokens <= 256 else "normal"
        share = max(1, tokens // layout.tp)  # each tp rank sends its part of the group's tokens
        return network.deepep(phase, mode, share, context.cfg.hidden_size, moe.top_k, placement.stage)
    span, model = placement.span(op.axes), context.cfg.model_type
    captured = sizes.b * sizes.t <= context.captured_tokens
    plain = network.collective(kind, float(size), span, captured=captured)  # type: ignore[arg-type]
    if kind == "all_reduce" and context.rings:
        plain = plain.lasting(plain.seconds * context.book.reduced_by_rings(float(size), span.devices, span.nodes))
    fused = context.book.fused_reduce(model)
    if fused is None or kind != "all_reduce" or layout.dp > 1 or span.nodes > 1:
        return plain
    tokens = op.inputs[0].elements(sizes) // context.cfg.hidden_size
    if not fused.takes(tokens, float(size), context.book.family, span.devices):
        return plain
    # a release fuses where that is not slower; two fits from different tables can cross before its limit
    return min(plain, network.collective(kind, float(size), span, tables=fused.tables), key=lambda p: p.seconds)  # type: ignore[arg-type]


def price(op: TracedOp, sizes: Sizes, context: Context) -> Price | None:
    """The price of one op outside MLA attention blocks; None for what is fused away.

    Raises `PriceError` for an op or primitive that nobody priced.
    """
    if op.axes:
        return collective(op, sizes, context)
    if op.name in PRICERS:
        return PRICERS[op.name](op, sizes, context)
    if op.name in FUSED:
        return None
    raise PriceError(f"op {op.name} of the traced graph has no price; add one to runtime/pricing/prices.py")


def outside_attention(op: TracedOp, cfg: ModelConfig) -> bool:
    """Whether an op's time depends on the step's tokens alone: all but the attention block's (MLA) or kernel (GQA)."""
    if isinstance(cfg.attention, Mla):
        return op.stage not in ATTENTION_STAGES or bool(op.axes)
    return op.name != "glm.paged_attention"
