"""Weights described before they exist: name, shape, logical axes, and where a checkpoint keeps them.

The graph's layout differs from the checkpoint's in three ways, each a `Arrangement` below: matrices are
`[in, out]` (the checkpoint stores `[out, in]`), `kv_b_proj` is split per head into its key half
(absorbed into queries when decoding) and its value half, and experts are stacked. Free of JAX:
parameter counts and byte ledgers need only shapes.

Logical axes name what a dimension means; a plan maps them to mesh axes:
`vocab`, `heads` (attention heads times their width), `kv_heads`, `expert`, `ffn`; None is never split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from model.config import Gqa, LayerType, Mla, ModelConfig
from model.formats import FP8_BLOCK, Role


class Quantized(NamedTuple):
    """A matrix kept quantised: narrow values `[.., in, out]` and the scales of their blocks, groups, columns or all.

    In FP8 as releases have it: e4m3 values and float32 scales, one for each 128 x 128 block. 4-bit values are held in
    bytes (`model.quantised.CARRIER`).
    """

    values: Any
    scale: Any


class Arrangement(Enum):
    """How a weight is made from the checkpoint's tensors."""

    PLAIN = "as stored"
    MATRIX = "[out, in] transposed to [in, out]"
    GATE_UP = "gate and up, [f, d] each, to [d, 2, f]"
    HEAD_KEYS = "key half of kv_b_proj, to [h, nope, lora]"
    HEAD_VALUES = "value half of kv_b_proj, to [h, lora, v]"


_MATRIX_DIMS = {
    Arrangement.MATRIX: (-2, -1), Arrangement.GATE_UP: (-3, -1), Arrangement.HEAD_KEYS: (-1, -2),
    Arrangement.HEAD_VALUES: (-2, -1),
}  # fmt: skip


def as_matrix(weight: Weight, value: Any) -> Any:
    """An array of a matrix in the graph's layout, NumPy's or JAX's, as [.., out, in]."""
    if weight.arrangement is Arrangement.GATE_UP:  # [.., d, 2, f] -> [.., 2, f, d]
        return value.swapaxes(-3, -1).swapaxes(-3, -2)
    return value if weight.arrangement is Arrangement.HEAD_KEYS else value.swapaxes(-1, -2)


def from_matrix(weight: Weight, value: Any) -> Any:
    """The inverse of `as_matrix`."""
    if weight.arrangement is Arrangement.GATE_UP:
        return value.swapaxes(-3, -2).swapaxes(-3, -1)
    return value if weight.arrangement is Arrangement.HEAD_KEYS else value.swapaxes(-1, -2)


_INDEXER = "self_attn.indexer."  # where checkpoints keep an indexer's weights


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the graph.

    `sources` are checkpoint tensor names below the layer's prefix; where `expert_count` is set they hold
    an `{e}` and the graph's weight has a leading expert dimension. `quantised` says that a block-FP8
    checkpoint stores the matrix in FP8. `component` groups it in reports. `float32` weights never narrow.
    `heads`: how many heads a projection to queries, keys or values, or its bias, is of, 0 for all else.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    sources: tuple[str, ...]
    arrangement: Arrangement
    component: str
    quantised: bool = False
    float32: bool = False
    expert_count: int = 0
    heads: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def of_indexer(self) -> bool:
        return self.sources[0].startswith(_INDEXER)

    @property
    def matrix_dims(self) -> tuple[int, int] | None:
        """Of a matrix, the dims from the end that it contracts and that it gives; the others count matrices. None for
        vectors, and for the embedding, a table of rows."""
        return _MATRIX_DIMS.get(self.arrangement)

    @property
    def op(self) -> str | None:
        """The op of the contract whose matrices it is one of, or several. None for vectors, for the embedding, and for
        the halves of `kv_b_proj`, which one op contracts along one dim and another along the other."""
        if self.arrangement not in (Arrangement.MATRIX, Arrangement.GATE_UP):
            return None
        return {"experts": "glm.expert_ffn", "router": "glm.route"}.get(self.component, "glm.linear")

    @property
    def out_in(self) -> tuple[int, ...]:
        """Of a matrix, its dims from the major to the minor where it lies as checkpoints have it, [.., out, in]: that
        which is contracted is the minor one."""
        assert self.matrix_dims
        contracted = len(self.shape) + self.matrix_dims[0]
        return (*(dim for dim in range(len(self.shape)) if dim != contracted), contracted)

    @property
    def initial(self) -> tuple[float, float]:
        """Mean and deviation of random values to begin with: gains 1, biases 0, matrices that keep the size of what
        they are given, embeddings of size 1."""
        if self.matrix_dims:
            return 0.0, self.shape[self.matrix_dims[0]] ** -0.5
        return (0.0, 1.0) if len(self.shape) > 1 else (float(self.sources[0].endswith(".weight")), 0.0)

    @property
    def stays_narrow(self) -> bool:
        """Whether the graph can use a quantised matrix as stored. The halves of `kv_b_proj` cannot: a head's
        rows need not begin on a block, so they are dequantised when loaded (engines do the same)."""
        return self.quantised and self.arrangement in (Arrangement.MATRIX, Arrangement.GATE_UP)

    @property
    def role(self) -> Role:
        """What it is for, as far as number formats care."""
        if not self.quantised:
            return "wide"
        if self.arrangement in (Arrangement.HEAD_KEYS, Arrangement.HEAD_VALUES):
            return "kv_up"
        if self.name == "index_k":
            return "index_key"
        return self.component  # type: ignore[return-value]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the block scales that go with a weight kept in FP8: matrix dims over 128, rounded up."""
        blocks = [math.ceil(n / FP8_BLOCK) for n in self.shape]
        if self.arrangement is Arrangement.GATE_UP:
            blocks[-2] = self.shape[-2]
        if self.expert_count:
            blocks[0] = self.shape[0]
        return tuple(blocks)


def _vector(name: str, size: int, source: str, component: str = "norms", float32: bool = False) -> Weight:
    return Weight(name, (size,), (None,), (source,), Arrangement.PLAIN, component, float32=float32)


def _matrix(
    name: str,
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    source: str,
    component: str,
    quantised: bool = True,
    heads: int = 0,
) -> Weight:
    return Weight(name, shape, axes, (source,), Arrangement.MATRIX, component, quantised, heads=heads)


def _mla(cfg: ModelConfig, mla: Mla) -> Iterator[Weight]:
    d, h, a = cfg.hidden_size, cfg.heads, "self_attn."
    if mla.q_lora_rank is None:
        yield _matrix("q", (d, h * mla.qk_dim), (None, "heads"), a + "q_proj.weight", "attention", heads=h)
    else:
        yield _matrix("q_a", (d, mla.q_lora_rank), (None, None), a + "q_a_proj.weight", "attention")
        yield _vector("q_a_norm", mla.q_lora_rank, a + "q_a_layernorm.weight")
        shape = (mla.q_lora_rank, h * mla.qk_dim)
        yield _matrix("q_b", shape, (None, "heads"), a + "q_b_proj.weight", "attention", heads=h)
    yield _matrix("kv_a", (d, mla.latent_dim), (None, None), a + "kv_a_proj_with_mqa.weight", "attention")
    yield _vector("kv_a_norm", mla.kv_lora_rank, a + "kv_a_layernorm.weight")
    kv_b = (a + "kv_b_proj.weight",)
    yield Weight(
        "k_up",
        (h, mla.nope_dim, mla.kv_lora_rank),
        ("heads", None, None),
        kv_b,
        Arrangement.HEAD_KEYS,
        "attention",
        quantised=True,
        heads=h,
    )
    yield Weight(
        "v_up",
        (h, mla.kv_lora_rank, mla.v_dim),
        ("heads", None, None),
        kv_b,
        Arrangement.HEAD_VALUES,
        "attention",
        quantised=True,
        heads=h,
    )
    yield _matrix("o", (h * mla.v_dim, d), ("heads", None), a + "o_proj.weight", "attention")


def _indexer(cfg: ModelConfig, mla: Mla) -> Iterator[Weight]:
    index, a = cfg.indexer, _INDEXER
    assert index is not None and mla.q_lora_rank is not None
    d = cfg.hidden_size
    yield _matrix(
        "index_q", (mla.q_lora_rank, index.heads * index.head_dim), (None, None), a + "wq_b.weight", "indexer"
    )
    yield _matrix("index_k", (d, index.head_dim), (None, None), a + "wk.weight", "indexer")
    yield _vector("index_k_norm", index.head_dim, a + "k_norm.weight")
    yield _vector("index_k_bias", index.head_dim, a + "k_norm.bias")
    yield _matrix("index_w", (d, index.heads), (None, None), a + "weights_proj.weight", "indexer", quantised=False)


def _gqa(cfg: ModelConfig, gqa: Gqa) -> Iterator[Weight]:
    d, a = cfg.hidden_size, "self_attn."
    for name, heads, axis in (
        ("q", cfg.heads, "heads"),
        ("k", gqa.kv_heads, "kv_heads"),
        ("v", gqa.kv_heads, "kv_heads"),
    ):
        shape = (d, heads * gqa.head_dim)
        yield _matrix(name, shape, (None, axis), f"{a}{name}_proj.weight", "attention", heads=heads)
        if gqa.bias:
            width = heads * gqa.head_dim
            source = (f"{a}{name}_proj.bias",)
            yield Weight(f"{name}_bias", (width,), (axis,), source, Arrangement.PLAIN, "attention", heads=heads)
    if gqa.qk_norm:
        yield _vector("q_norm", gqa.head_dim, a + "q_norm.weight")
        yield _vector("k_norm", gqa.head_dim, a + "k_norm.weight")
    yield _matrix("o", (cfg.heads * gqa.head_dim, d), ("heads", None), a + "o_proj.weight", "attention")


def _ffn(cfg: ModelConfig, prefix: str, name: str, width: int, component: str) -> Iterator[Weight]:
    d = cfg.hidden_size
    sources = (prefix + "gate_proj.weight", prefix + "up_proj.weight")
    yield Weight(
        f"{name}gate_up", (d, 2, width), (None, None, "ffn"), sources, Arrangement.GATE_UP, component, quantised=True
    )
    yield _matrix(f"{name}down", (width, d), ("ffn", None), prefix + "down_proj.weight", component)


def _moe(cfg: ModelConfig) -> Iterator[Weight]:
    moe, d = cfg.moe, cfg.hidden_size
    assert moe is not None
    yield _matrix("router", (d, moe.experts), (None, None), "mlp.gate.weight", "router", quantised=False)
    yield _vector("router_bias", moe.experts, "mlp.gate.e_score_correction_bias", "router", float32=True)
    e = "mlp.experts.{e}."
    yield Weight(
        "experts_gate_up",
        (moe.experts, d, 2, moe.intermediate),
        ("expert", None, None, "ffn"),
        (e + "gate_proj.weight", e + "up_proj.weight"),
        Arrangement.GATE_UP,
        "experts",
        quantised=True,
        expert_count=moe.experts,
    )
    yield Weight(
        "experts_down",
        (moe.experts, moe.intermediate, d),
        ("expert", "ffn", None),
        (e + "down_proj.weight",),
        Arrangement.MATRIX,
        "experts",
        quantised=True,
        expert_count=moe.experts,
    )
    if moe.shared_experts:
        width = moe.intermediate * moe.shared_experts
        yield from _ffn(cfg, "mlp.shared_experts.", "shared_", width, "shared_experts")


def layer_weights(cfg: ModelConfig, kind: LayerType) -> tuple[Weight, ...]:
    """The weights of one layer of type `kind`, in a fixed order."""
    d = cfg.hidden_size
    out: list[Weight] = []
    if kind.mtp:
        out += [_vector("embed_norm", d, "enorm.weight"), _vector("hidden_norm", d, "hnorm.weight")]
        out += [_matrix("embed_hidden", (2 * d, d), (None, None), "eh_proj.weight", "mtp_projection", quantised=False)]
    out.append(_vector("input_norm", d, "input_layernorm.weight"))
    if isinstance(cfg.attention, Mla):
        out += _mla(cfg, cfg.attention)
        if kind.indexer == "full":
            out += _indexer(cfg, cfg.attention)
    else:
        out += _gqa(cfg, cfg.attention)
    out.append(_vector("ffn_norm", d, "post_attention_layernorm.weight"))
    out += _moe(cfg) if kind.ffn == "moe" else _ffn(cfg, "mlp.", "", cfg.dense_intermediate, "dense_ffn")
    if kind.mtp:
        out.append(_vector("head_norm", d, "shared_head.norm.weight"))
    return tuple(out)


def outer_weights(cfg: ModelConfig) -> tuple[Weight, ...]:
    """Embedding, final norm and, unless tied to the embedding, the head."""
    d, v = cfg.hidden_size, cfg.vocab_size
    embed = Weight("embed", (v, d), ("vocab", None), ("model.embed_tokens.weight",), Arrangement.PLAIN, "embedding")
    out = [embed, _vector("final_norm", d, "model.norm.weight")]
    if not cfg.tie_embeddings:
        out.append(_matrix("head", (d, v), (None, "vocab"), "lm_head.weight", "head", quantised=False))
    return tuple(out)


def stage_outer(cfg: ModelConfig, layers: range, mtp: bool = False) -> list[Weight]:
    """The outer weights that the pipeline stage with these layers needs. mtp: the MTP layer, which embeds tokens of its
    own, is behind the last of all layers."""
    first, last = layers.start == 0, layers.stop == cfg.num_layers
    tied = last and (cfg.tie_embeddings or mtp)
    return [w for w in outer_weights(cfg) if (first or tied if w.component == "embedding" else last)]


def parameter_counts(cfg: ModelConfig) -> dict[str, dict[str, int]]:
    """Exact parameter counts.

    Returns `total` and `active` (per token), each by component, over the main stack; the MTP layers are
    the component `mtp` and are in neither sum. Active counts `top_k` of the routed experts, and no
    embedding row lookup (the head is a matrix product, so it counts).
    """
    total: dict[str, int] = {}
    active: dict[str, int] = {}
    moe = cfg.moe

    def add(weight: Weight, times: int, component: str) -> None:
        total[component] = total.get(component, 0) + weight.size * times
        used = weight.size * times
        if weight.component == "experts" and moe:
            used = used // moe.experts * moe.top_k
        if weight.component != "embedding":
            active[component] = active.get(component, 0) + used

    for weight in outer_weights(cfg):
        add(weight, 1, weight.component)
    for kind, count in cfg.layer_counts.items():
        for weight in layer_weights(cfg, kind):
            add(weight, count, "mtp" if kind.mtp else weight.component)
    return {"total": total, "active": active}
