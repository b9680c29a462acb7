"""What a model is: `ModelConfig` and its parts, frozen dataclasses. Free of JAX, so that planning and simulation can
import it. `hf_config.py` makes them from a Hugging Face `config.json`.

One config describes every family of the mission: attention is MLA (with or without a lightning
indexer) or GQA, the feed-forward of a layer is dense or a mixture of experts, and the *schedule*
(`ModelConfig.layers`) says which layer type runs at which depth.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import cached_property
from typing import Literal

import numpy as np

from foundation.errors import UsageError
from model.formats import Scheme, scheme
from model.quantization_config import PLAIN, is_scheme

# The most that a model is made of. A layer, an expert and a position are gone through one by one, and a width is the
# length of a vector somewhere; no published model has a fifth of any.
MOST_LAYERS = 1_000
MOST_EXPERTS = 10_000
MOST_WIDTH = 1 << 20
MOST_VOCAB = 100_000_000
MOST_POSITIONS = 100_000_000
MOST_DRAFTS = 16
"""A step: nobody trained for more than a few, and each costs a pass."""

IndexerKind = Literal["full", "shared", "none"]
FfnKind = Literal["dense", "moe"]


@dataclasses.dataclass(frozen=True)
class LayerType:
    """A kind of layer: the unit of tracing, pricing, compilation and export.

    `indexer` is "full" where the layer owns a lightning indexer, "shared" where it reuses the
    selection of the nearest full layer below, "none" where attention is dense.
    """

    attention: Literal["mla", "gqa"]
    indexer: IndexerKind
    ffn: FfnKind
    mtp: bool = False

    @property
    def name(self) -> str:
        parts = [self.attention, *([f"{self.indexer}-indexer"] if self.indexer != "none" else []), self.ffn]
        return "-".join((["mtp"] if self.mtp else []) + parts)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), DeepSeek's parameters. truncate: the ramp begins and ends on whole
    dims."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


def _mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding over `dim` dimensions. `interleaved`: pairs are (0,1), (2,3), ...; otherwise
    (0, dim/2), (1, dim/2+1), ..."""

    dim: int
    theta: float
    interleaved: bool
    yarn: Yarn | None = None

    def inv_freq(self) -> np.ndarray:
        """Inverse frequencies, float32 `[dim / 2]`."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        pos_freqs = np.power(np.float32(self.theta), exponent, dtype=np.float32)
        if self.yarn is None:
            return (1.0 / pos_freqs).astype(np.float32)
        yarn = self.yarn

        def correction_dim(rotations: float) -> float:
            return (self.dim * math.log(yarn.original_max_positions / (rotations * 2 * math.pi))) / (
                2 * math.log(self.theta)
            )

        first, last = correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow)
        if yarn.truncate:
            first, last = math.floor(first), math.ceil(last)
        low, high = max(first, 0), min(last, self.dim - 1)
        # a range that is empty or backwards is as transformers has it
        ramp = (np.arange(self.dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
        keep = 1 - np.clip(ramp, 0, 1)
        return ((1 - keep) / (yarn.factor * pos_freqs) + keep / pos_freqs).astype(np.float32)

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin."""
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor
        if self.yarn.mscale and self.yarn.mscale_all_dim:
            return _mscale(self.yarn.factor, self.yarn.mscale) / _mscale(self.yarn.factor, self.yarn.mscale_all_dim)
        return _mscale(self.yarn.factor)

    @property
    def softmax_factor(self) -> float:
        """Multiplies the softmax scale of MLA (DeepSeek's `mscale_all_dim`)."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return _mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2


@dataclasses.dataclass(frozen=True)
class Mla:
    """Multi-head latent attention. `q_lora_rank` is None where queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached row: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.rope_dim


@dataclasses.dataclass(frozen=True)
class Gqa:
    """Grouped-query attention with an optional bias and per-head RMS norm of queries and keys."""

    kv_heads: int
    head_dim: int
    bias: bool
    qk_norm: bool


@dataclasses.dataclass(frozen=True)
class Indexer:
    """The lightning indexer of DeepSeek sparse attention: `heads` query heads score one shared key."""

    heads: int
    head_dim: int
    topk: int
    rope_interleaved: bool
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Moe:
    """Sigmoid `noaux_tc` routing to `top_k` of `experts`, limited to `topk_group` of `n_group` groups."""

    experts: int
    top_k: int
    shared_experts: int
    intermediate: int
    n_group: int
    topk_group: int
    normalise: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model, by dimensions. `layers` is the schedule of the main stack; `mtp_layers` counts the
    multi-token-prediction layers stored behind it (as layers `num_layers`, ...). `weight_format`: the scheme that a
    checkpoint's matrices are stored in, "plain" for floats, or words for what can be read and is no scheme."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    heads: int
    attention: Mla | Gqa
    rope: Rope
    indexer: Indexer | None
    moe: Moe | None
    dense_intermediate: int
    layers: tuple[LayerType, ...]
    mtp_layers: int
    mtp_carries_norm: bool
    norm_eps: float
    max_positions: int
    eos_token_ids: tuple[int, ...]
    tie_embeddings: bool
    dtype: str
    weight_format: str

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mtp_type(self) -> LayerType:
        """The layer type of an MTP layer: the last layer's, with an indexer of its own."""
        last = self.layers[-1]
        indexer: IndexerKind = "full" if self.indexer else "none"
        return dataclasses.replace(last, indexer=indexer, mtp=True)

    @cached_property
    def layer_counts(self) -> dict[LayerType, int]:
        """Layer types in order of first appearance, with how often each runs; MTP last."""
        counts = dict(Counter(self.layers))
        if self.mtp_layers:
            counts[self.mtp_type] = self.mtp_layers
        return counts

    @property
    def stored_scheme(self) -> Scheme:
        """The number formats of its own checkpoint; plain floats count as 16 bits. Raises `UsageError` where they are
        none that can be planned."""
        if not is_scheme(self.weight_format):
            raise UsageError(f"{self.name}: stored as {self.weight_format}, no scheme: name one with --formats")
        return scheme("bf16" if self.weight_format == PLAIN else self.weight_format)

    @property
    def sparse(self) -> bool:
        """Whether attention selects what it reads."""
        return self.indexer is not None

    @property
    def attention_scale(self) -> float:
        """Softmax scale of the main attention."""
        if isinstance(self.attention, Mla):
            return self.attention.qk_dim**-0.5 * self.rope.softmax_factor
        return self.attention.head_dim**-0.5

    def index_source(self, layer: int) -> int:
        """The layer whose selection layer `layer` uses."""
        while self.layers[layer].indexer == "shared":
            layer -= 1
        return layer
