"""The ops of a training step on a chip: forward and backward price of each op of the traced list.

Unlike in serving, an attention block is priced op by op, for training frameworks run its kernels one after another.
What is left out of the trace's list: writes to a cache, which training has none of. What is added: rounding the
operands of narrow products, float32 accumulation of weight gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from model.config import Mla
from model.formats import matrix_format
from runtime.pricing import attention
from runtime.pricing.attention import GqaLayer, MlaLayer
from runtime.pricing.book import STAND_IN_ERROR
from runtime.pricing.oplist import Sizes, TracedOp
from runtime.pricing.price import Price, total, weakest
from runtime.pricing.prices import Context, collective, price
from runtime.pricing.training import backward
from runtime.pricing.training.sequences import Attended
from runtime.pricing.work import MlaShape

Takes = Literal["compute", "tensor", "exchange"]
"""What an op's time is: computing, sums over tp ranks, tokens to and from experts."""
NOT_TRAINED = ("glm.cache_write",)
_SPARSE_BACK_ERROR = 0.6
"""Of 4,096 queries of 64 heads and 2,048 keys on B200 this makes 6.8 ms; cuDNN's kernel takes 4.0 to 4.5 ms with heads
of 512 (cudnn-frontend pull 318), which are 4.3 to 4.8 of these."""
_ROUNDED_BYTES = 4.0
"""Of an element of a narrow product's operand: read in 16 bits, written twice in 8, as it is and transposed, for the
products forward and of the weight's gradient."""


def part_of(op: TracedOp) -> Takes:
    if not op.axes:
        return "compute"
    return "tensor" if op.axes == ("tp",) else "exchange"


@dataclasses.dataclass(frozen=True)
class OpPrices:
    """Prices of the ops of one device's program. context: of the `shard` of a layout, on a book."""

    context: Context

    # --- forward

    def forward(self, op: TracedOp, seen: Attended) -> Price | None:
        """The price of an op over the tokens of `seen`; None for what costs nothing here."""
        if op.name in NOT_TRAINED:
            return None
        tokens = max(1, math.ceil(seen.tokens))
        if op.axes:
            return self._collective(op, tokens, sent_narrow="dispatch")
        special = _FORWARD.get(op.name)
        if special:
            return special(self, op, seen, tokens)
        return price(op, Sizes(tokens, 1, 1), self.context)

    def backward(self, op: TracedOp, seen: Attended) -> Price | None:
        """The price of an op's gradient; None where there is none or it costs nothing."""
        if op.name in NOT_TRAINED or not backward.differentiated(op):
            return None
        tokens = max(1, math.ceil(seen.tokens))
        if op.axes:  # each is the transpose of one of the same size
            return self._collective(op, tokens, sent_narrow="combine")
        special = _BACKWARD.get(op.name)
        if special:
            found = special(self, op, seen, tokens)
        elif op.name in backward.ELEMENTWISE:
            found = self.context.book.memory(float(backward.passed_bytes(op, Sizes(tokens, 1, 1))))
        else:
            return price(op, Sizes(tokens, 1, 1), self.context)  # sums, and what is fused away
        return found and _derived(found)

    def recomputed(self, op: TracedOp, seen: Attended) -> Price | None:
        """The price of computing an op, or part of it, again under selective recompute."""
        tokens = max(1, math.ceil(seen.tokens))
        if op.name == "glm.expert_ffn":
            return self._activation(op, tokens)
        if op.name == "glm.expanded_attention":
            return total(self._expansion(op, tokens))
        return self.forward(op, seen) if backward.repeated(op) else None

    def _collective(self, op: TracedOp, tokens: int, sent_narrow: str) -> Price:
        """sent_narrow: the stage whose tokens go in 8 bits where experts compute in them: dispatch forward, and what
        goes to the same experts backward, the transpose of combine."""
        if op.stage in ("dispatch", "combine") and self.context.layout.dispatches:
            eight = op.stage == sent_narrow and self._narrow_experts
            op = dataclasses.replace(op, stage="dispatch" if eight else "combine")  # which go in 8 bits, and in 16
        return collective(op, Sizes(tokens, 1, 1), self.context)

    @property
    def _narrow_experts(self) -> bool:
        return matrix_format(self.context.held("experts_gate_up")).activations.bytes_per_element < 2

    # --- products

    def _gemm(self, tokens: float, n: int, k: int, fmt: str) -> list[Price]:
        book = self.context.book
        found = [book.gemm(tokens, n, k, fmt)]
        if matrix_format(fmt).activations.bytes_per_element < 2 and not book.rounds(fmt):
            found.append(book.memory(_ROUNDED_BYTES * tokens * k))
        return found

    def _linear(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        x, w = op.inputs[0].at(Sizes(tokens, 1, 1)), op.inputs[1].at(Sizes(tokens, 1, 1))
        return total(self._gemm(math.prod(x[:-1]), math.prod(w[1:]), w[0], self.context.format_of(op)))

    def _linear_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        x, w = op.inputs[0].at(Sizes(tokens, 1, 1)), op.inputs[1].at(Sizes(tokens, 1, 1))
        rows, n, k, fmt = math.prod(x[:-1]), math.prod(w[1:]), w[0], self.context.format_of(op)
        into_x = self._gemm(rows, k, n, fmt)  # which rounds the gradient once for both
        return total([*into_x, self.context.book.gemm(rows, n, k, fmt), self._accumulated(n * k)])

    def _head_linear(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        heads, inner, outer = op.inputs[1].at(Sizes(tokens, 1, 1))
        return self.context.book.bmm(tokens, heads, outer, inner)

    def _head_linear_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        heads, inner, outer = op.inputs[1].at(Sizes(tokens, 1, 1))
        book = self.context.book
        products = [book.bmm(tokens, heads, inner, outer), book.bmm(tokens, heads, outer, inner)]
        return total([*products, self._accumulated(heads * inner * outer)])

    def _accumulated(self, elements: float) -> Price:
        return self.context.book.memory(backward.ACCUMULATE_BYTES * elements)

    # --- experts

    def _routed(self, op: TracedOp, tokens: int) -> tuple[float, float]:
        """(rows of the busiest rank, its experts that have some) where `tokens` are on each device."""
        moe = self.context.cfg.moe
        assert moe is not None
        met = op.inputs[0].at(Sizes(tokens, 1, 1))[0]  # of all ranks that share the experts
        rows, active = self.context.load.busiest_rank(met, moe.top_k, self.context.layout.ep)
        return float(rows), float(active)

    def _expert_matrices(self, op: TracedOp) -> list[tuple[int, int]]:
        """(contracted, given) of one expert's two products on a device."""
        sizes = Sizes(1, 1, 1)
        half = (len(op.inputs) - 3) // 2
        (_, d, two, f), (_, f_down, out) = op.inputs[3].at(sizes), op.inputs[3 + half].at(sizes)
        return [(d, two * f), (f_down, out)]

    def _experts(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        """A product an expert and matrix, as Transformer Engine's GroupedLinear has them; serving engines' kernels are
        made for few rows. Rows are put in order and summed back into tokens."""
        rows, active = self._routed(op, tokens)
        fmt, book = self.context.held("experts_gate_up"), self.context.book
        products = [
            part.times(active) for k, n in self._expert_matrices(op) for part in self._gemm(rows / active, n, k, fmt)
        ]
        return total([*products, book.memory(8.0 * rows * self.context.cfg.hidden_size), self._activation(op, tokens)])

    def _experts_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        rows, active = self._routed(op, tokens)
        fmt, book = self.context.held("experts_gate_up"), self.context.book
        parts = []
        for k, n in self._expert_matrices(op):
            parts += [part.times(active) for part in self._gemm(rows / active, k, n, fmt)]
            parts.append(book.gemm(rows / active, n, k, fmt).times(active))
            parts.append(self._accumulated(op.inputs[3].at(Sizes(1, 1, 1))[0] * k * n))
        moved = book.memory(8.0 * rows * self.context.cfg.hidden_size)
        return total([*parts, moved, self._activation(op, tokens).times(5 / 3)])

    def _activation(self, op: TracedOp, tokens: int) -> Price:
        """SwiGLU of the routed rows: gate and up read, the product written; backward its gradient read, theirs
        written."""
        rows, _ = self._routed(op, tokens)
        width = self._expert_matrices(op)[1][0]
        return self.context.book.memory(3 * 2.0 * rows * width)

    def _route_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        (rows, width), (_, experts) = op.inputs[0].at(Sizes(tokens, 1, 1)), op.inputs[1].at(Sizes(tokens, 1, 1))
        book = self.context.book
        products = book.gemm(rows, experts, width, book.wide), book.gemm(rows, width, experts, book.wide)
        return total([*products, book.memory(3 * 4.0 * rows * experts), self._accumulated(width * experts)])

    def _embed_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        """Rows of the gradient are read, and added to those of the table."""
        return self.context.book.memory((2.0 + backward.ACCUMULATE_BYTES) * op.outputs[0].elements(Sizes(tokens, 1, 1)))

    # --- attention

    def _mla(self, heads: int, mode: Literal["index", "dense"]) -> MlaLayer:
        mla, index = self.context.cfg.attention, self.context.cfg.indexer
        assert isinstance(mla, Mla)
        shape = MlaShape(
            self.context.cfg.hidden_size, mla.q_lora_rank or 0, mla.kv_lora_rank, mla.rope_dim, mla.nope_dim, mla.v_dim,
            *((index.heads, index.head_dim, index.topk) if index else ()),
        )  # fmt: skip
        return MlaLayer(shape, heads, mode, "bf16", self.context.book.wide)

    def _expanded_kernel(self, op: TracedOp, seen: Attended) -> Price:
        layer = self._mla(op.inputs[3].shape[0].coefficient, "dense")
        return attention.mla_prefill(
            self.context.book, layer, seen.tokens, seen.keys, _bucket(seen.sequences), tables=attention.RATED
        )

    def _expanded_sizes(self, op: TracedOp) -> list[tuple[int, int, int]]:
        """(heads, contracted, given) of the key and value halves that expand latents."""
        sizes = Sizes(1, 1, 1)
        (h, nope, lora), (_, _, v) = op.inputs[3].at(sizes), op.inputs[4].at(sizes)
        return [(h, lora, nope), (h, lora, v)]

    def _expanded(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        return total([*self._expansion(op, tokens), self._expanded_kernel(op, seen)])

    def _expansion(self, op: TracedOp, tokens: int) -> list[Price]:
        """Keys and values of each head from the latents."""
        book = self.context.book
        return [book.gemm(tokens, heads * out, lora, book.wide) for heads, lora, out in self._expanded_sizes(op)]

    def _expanded_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        book = self.context.book
        parts = []
        for heads, lora, out in self._expanded_sizes(op):
            parts += [book.gemm(tokens, lora, heads * out, book.wide), book.gemm(tokens, heads * out, lora, book.wide)]
            parts.append(self._accumulated(heads * out * lora))
        qk, v = op.inputs[0].at(Sizes(1, 1, 1))[-1], op.outputs[0].at(Sizes(1, 1, 1))[-1]
        kernel = self._expanded_kernel(op, seen).times(backward.attention_factor(qk, v))
        return total([*parts, kernel])

    def _sparse(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        layer = self._mla(op.inputs[0].at(Sizes(1, 1, 1))[2], "index")
        return attention.sparse_prefill(self.context.book, layer, seen.tokens, seen.selected, _bucket(seen.sequences))

    def _sparse_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        qk, v = op.inputs[0].at(Sizes(1, 1, 1))[-1], op.attributes["value_dim"]
        found = self._sparse(op, seen, tokens).times(backward.attention_factor(qk, v))
        return dataclasses.replace(found, relative_error=max(found.relative_error, _SPARSE_BACK_ERROR))

    def _index_scores(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        layer = self._mla(1, "index")
        return attention.index_scores(self.context.book, layer, seen.tokens, seen.keys, float(_bucket(seen.sequences)))

    def _select_topk(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        return attention.select_topk(self.context.book, self._mla(1, "index").shape, seen.tokens, seen.keys)

    def _paged(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        _, _, heads, width = op.inputs[0].at(Sizes(1, 1, 1))
        layer = GqaLayer(heads, op.inputs[1].at(Sizes(1, 1, 1))[2], width)
        return attention.gqa(
            self.context.book, "prefill", layer, seen.tokens, seen.keys, float(_bucket(seen.sequences))
        )

    def _paged_back(self, op: TracedOp, seen: Attended, tokens: int) -> Price:
        width = op.inputs[0].at(Sizes(1, 1, 1))[-1]
        return self._paged(op, seen, tokens).times(backward.attention_factor(width, width))


_Own = Callable[[OpPrices, TracedOp, Attended, int], Price]
_FORWARD: dict[str, _Own] = {
    "glm.linear": OpPrices._linear,
    "glm.head_linear": OpPrices._head_linear,
    "glm.expert_ffn": OpPrices._experts,
    "glm.expanded_attention": OpPrices._expanded,
    "glm.sparse_attention": OpPrices._sparse,
    "glm.index_scores": OpPrices._index_scores,
    "glm.select_topk": OpPrices._select_topk,
    "glm.paged_attention": OpPrices._paged,
}
_BACKWARD: dict[str, _Own] = {
    "glm.linear": OpPrices._linear_back,
    "glm.head_linear": OpPrices._head_linear_back,
    "glm.expert_ffn": OpPrices._experts_back,
    "glm.route": OpPrices._route_back,
    "glm.embed": OpPrices._embed_back,
    "glm.expanded_attention": OpPrices._expanded_back,
    "glm.sparse_attention": OpPrices._sparse_back,
    "glm.paged_attention": OpPrices._paged_back,
}


def _bucket(sequences: float) -> int:
    """The power of two at or below a number of sequences: tables are made for those."""
    return 2 ** int(math.log2(max(sequences, 1.0)))


def _derived(found: Price) -> Price:
    """A gradient's price, taken from the forward kernel of the same products."""
    return dataclasses.replace(
        found,
        evidence=weakest((found.evidence, "transferred")),
        relative_error=max(found.relative_error, STAND_IN_ERROR),
    )
