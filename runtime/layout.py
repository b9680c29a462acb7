"""How a model is spread over devices, and in which number formats: the nouns every answer depends on.

Free of JAX. A `Layout` is tp x dp x pp devices: `tp` splits heads, dense width and vocabulary; `dp` splits
sequences (attention data parallelism); `pp` splits the layers into stages. Routed experts are spread over
the tp x dp devices of a stage, by tensor (ep = 1) or by expert (ep = tp x dp).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from foundation.errors import UsageError
from model.cache import CacheFormat
from model.config import Gqa, Mla, ModelConfig
from model.weights import Weight


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Raises `UsageError` for degrees that do not go together."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, degree in vars(self).items():
            if degree < 1:
                raise UsageError(f"{name} must be at least 1, not {degree}")
        if self.ep not in (1, self.tp * self.dp):
            raise UsageError(
                f"ep must be 1 (experts split by tensor) or tp x dp = {self.tp} x {self.dp} = {self.tp * self.dp} "
                f"(split by expert), not {self.ep}"
            )

    @property
    def devices(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def stage_devices(self) -> int:
        """Devices that hold one pipeline stage."""
        return self.tp * self.dp

    @property
    def by_expert(self) -> bool:
        return self.ep > 1

    @property
    def name(self) -> str:
        return f"tp{self.tp} dp{self.dp} ep{self.ep} pp{self.pp}"

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UsageError` with the equation where the model does not divide."""
        divisions = [("attention heads", cfg.heads, "tp", self.tp), ("vocabulary", cfg.vocab_size, "tp", self.tp)]
        divisions.append(("dense width", cfg.dense_intermediate, "tp", self.tp))
        if isinstance(cfg.attention, Gqa):
            divisions.append(("KV heads", cfg.attention.kv_heads, "tp", self.tp))
        if cfg.moe:
            if cfg.moe.shared_experts:
                divisions.append(("shared expert width", cfg.moe.shared_experts * cfg.moe.intermediate, "tp", self.tp))
            if self.by_expert:
                divisions.append(("experts", cfg.moe.experts, "ep", self.ep))
            else:
                divisions.append(("expert width", cfg.moe.intermediate, "tp x dp", self.stage_devices))
        for what, size, degree, parts in divisions:
            if size % parts:
                raise UsageError(f"{cfg.name}: {what} / {degree} = {size} / {parts} = {size / parts:.3f}: not whole")
        if self.pp > cfg.num_layers:
            raise UsageError(f"{cfg.name}: {cfg.num_layers} layers cannot be cut into pp = {self.pp} stages")

    def local_shape(self, weight: Weight) -> tuple[int, ...]:
        """The share of a weight that one device holds."""
        routed = weight.expert_count > 0
        parts = {"heads": self.tp, "kv_heads": self.tp, "vocab": self.tp, "expert": 1, "ffn": self.tp}
        if routed:
            parts["expert"] = self.ep
            parts["ffn"] = 1 if self.by_expert else self.stage_devices
        return tuple(
            size // parts[axis] if axis else size for size, axis in zip(weight.shape, weight.axes, strict=True)
        )

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each stage: contiguous, as even as whole layers allow, the longer stages first."""
        least, longer = divmod(num_layers, self.pp)
        sizes = [least + 1] * longer + [least] * (self.pp - longer)
        ends = [sum(sizes[: i + 1]) for i in range(self.pp)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


# Bytes of one stored weight, scales included: 32-bit; 16-bit; FP8 with one float32 scale a 128 x 128 block; INT8
# with a float32 scale an output channel (below 0.1 %); INT4 with a 16-bit scale for each 128 weights; MX formats with
# a byte of scale for 32 weights, NVFP4 with one for 16.
WEIGHT_BYTES: Mapping[str, float] = {
    "f32": 4.0,
    "bf16": 2.0,
    "fp8-block": 1.0 + 4.0 / (128 * 128),
    "fp8-tensor": 1.0,
    "mxfp8": 1.0 + 1.0 / 32,
    "mxfp4": 0.5 + 1.0 / 32,
    "nvfp4": 0.5 + 1.0 / 16,
    "w8a8-int8": 1.0,
    "w4a8": 0.5 + 2.0 / 128,
    "w4a16": 0.5 + 2.0 / 32,
}


@dataclasses.dataclass(frozen=True)
class Formats:
    """Number formats of a deployment: of the quantisable matrices, of routed experts, and of the cache.

    `kv` is "f32", "bf16", "fp8" or "int8"; the index keys of a sparse model are kept in 8 bits beside any of them,
    as engines do. With "f32" everything is float32, as on a host CPU.
    """

    weights: str = "bf16"
    experts: str = "bf16"
    kv: str = "bf16"

    def of(self, weight: Weight) -> str:
        """The format that a weight is stored and multiplied in."""
        if not weight.quantised:
            return self.wide
        return self.experts if weight.component == "experts" else self.weights

    def weight_bytes(self, weight: Weight) -> float:
        """Bytes of one element as stored. The halves of kv_b_proj are widened to 16 bits when loaded."""
        if weight.float32:
            return 4.0
        return WEIGHT_BYTES[self.of(weight) if weight.can_stay_fp8 else self.wide]

    @property
    def wide(self) -> str:
        """The format of what no scheme quantises."""
        return "f32" if self.weights == "f32" else "bf16"

    @property
    def cache(self) -> CacheFormat:
        """The byte layout of the cache; INT8 caches take FP8's bytes, float32 ones `cache_factor` times 16 bits'."""
        if self.kv == "f32":
            return "bf16"
        return "bf16_kv_fp8_index" if self.kv == "bf16" else "fp8"

    @property
    def cache_factor(self) -> int:
        """Bytes of the cache as held over those of its layout."""
        return 2 if self.kv == "f32" else 1


SCHEMES: Mapping[str, tuple[str, str]] = {
    "f32": ("f32", "f32"),
    "bf16": ("bf16", "bf16"),
    "fp8": ("fp8-block", "fp8-block"),
    "w8a8": ("w8a8-int8", "w8a8-int8"),
    "w4a8": ("w8a8-int8", "w4a8"),
    "w4a16": ("bf16", "w4a16"),
}
"""Scheme -> (dense matrices, routed experts). W4A8 keeps attention and dense matrices in W8A8, as
msModelSlim's GLM-5 checkpoints do."""


def formats(scheme: str, kv: str = "bf16") -> Formats:
    """Formats by scheme name; caches are as wide as the activations. Raises `UsageError` for unknown names."""
    if scheme not in SCHEMES:
        raise UsageError(f"unknown formats {scheme!r}; known: {', '.join(SCHEMES)}")
    if kv not in ("bf16", "fp8", "int8"):
        raise UsageError(f"unknown KV format {kv!r}; known: bf16, fp8, int8")
    weights, experts = SCHEMES[scheme]
    return Formats(weights, experts, "f32" if (scheme, kv) == ("f32", "bf16") else kv)


def checkpoint_scheme(cfg: ModelConfig) -> str:
    """The scheme a model's own checkpoint is stored in."""
    stored = {"plain": "bf16", "fp8-block": "fp8", "int4-experts": "w4a16"}
    return stored.get(cfg.weight_format, cfg.weight_format)


def is_sparse(cfg: ModelConfig) -> bool:
    return cfg.indexer is not None and isinstance(cfg.attention, Mla)
