"""What the caches of a graph are kept as, where that is not one tensor of the activations' type.

    Halves   latents [pages,s,576] as [pages,s,512] and [pages,s,64], which is how attention reads them
    Packed   latents in int8: a token's row has the integers, then the rotary part as it is, then a float32 for each
             128 integers (`model.formats.ROWS["int8_packed"]`: 656 bytes of 512 + 64 in 16 bits), in the order of
             CANN's own reference for npu_mla_prolog_v3 (ops-transformer, attention/mla_prolog_v3/tests/pytest/
             mla_prolog_v3_cpu_ref.py, `cal_mlaprolog`: kv_quant_mode 3 with both repo modes 1; read 2026-11)
    Scaled   index keys in int8 and a float16 for each (`ROWS["int8_scaled"]`), multiplied by a Hadamard matrix first,
             as queries then are too: that spreads outliers and leaves products as they are

A graph's op that no operator computes is given `whole`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.ascend.constraints import LATENT, ROPE
from backends.toolchains.walker import Port
from model.formats import ROWS

PACKED, SCALED = ROWS["int8_packed"], ROWS["int8_scaled"]
TILE = PACKED.shared or 0
"""Latents that share a scale."""


@dataclasses.dataclass(frozen=True)
class Halves:
    nope: Tensor
    rope: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.nope, self.rope

    @property
    def page_size(self) -> int:
        return self.nope.shape[1]

    @property
    def whole(self) -> Tensor:
        """[pages,s,576]."""
        return torch.cat([self.nope, self.rope], dim=-1)

    def taken(self, index: Tensor) -> Halves:
        """The pages that `index` [n] names."""
        return Halves(*(torch.index_select(part, 0, index) for part in self.parts))


@dataclasses.dataclass(frozen=True)
class Packed:
    """`rows` int8 [pages,s,bytes]; lora, rope: elements of a latent; wide: the type of the rotary part, and of
    activations."""

    rows: Tensor
    lora: int
    rope: int
    wide: torch.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.rows,)

    @property
    def page_size(self) -> int:
        return self.rows.shape[1]

    @property
    def whole(self) -> Tensor:
        """[pages,s,lora+rope] in activations' type."""
        lead, ends = self.rows.shape[:-1], self.lora + self.rope * self.wide.itemsize
        rope = self.rows[..., self.lora : ends].contiguous().view(self.wide)
        scale = self.rows[..., ends:].contiguous().view(torch.float32)
        each = scale.unsqueeze(-1).expand(*scale.shape, TILE).reshape(*lead, -1)[..., : self.lora]
        latent = self.rows[..., : self.lora].to(torch.float32) * each
        return torch.cat([latent.to(self.wide), rope], dim=-1)

    def taken(self, index: Tensor) -> Packed:
        return dataclasses.replace(self, rows=torch.index_select(self.rows, 0, index))


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`values` int8 [pages,s,i], `scale` float16 [pages,s,1]; wide: activations' type."""

    values: Tensor
    scale: Tensor
    wide: torch.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.values, self.scale

    @property
    def page_size(self) -> int:
        return self.values.shape[1]

    @property
    def whole(self) -> Tensor:
        """[pages,s,i] in activations' type: rotated keys."""
        return (self.values.to(torch.float32) * self.scale.to(torch.float32)).to(self.wide)

    def taken(self, index: Tensor) -> Scaled:
        values, scale = (torch.index_select(part, 0, index) for part in self.parts)
        return Scaled(values, scale, self.wide)


KeptCache = Halves | Packed | Scaled


@dataclasses.dataclass(frozen=True)
class CacheForm:
    """How a cache is kept: (what its name ends in, elements of a row, type) of each tensor, and the value they make."""

    tensors: tuple[tuple[str, int, str], ...]
    of: Callable[..., KeptCache]

    def ports(self, port: Port) -> tuple[Port, ...]:
        """Of "cache.latent": "cache.latent_nope" and the like (".out" stays last)."""
        stem, dot, out = port.name.partition(".out")
        return tuple(
            Port(f"{stem}{ending}{dot}{out}", (*port.shape[:2], width), dtype) for ending, width, dtype in self.tensors
        )


def halves(dtype: str) -> CacheForm:
    return CacheForm((("_nope", LATENT, dtype), ("_rope", ROPE, dtype)), Halves)


def packed(width: int, rope: int, dtype: str) -> CacheForm:
    """Of latents of `width` elements, the last `rope` of which are the rotary part."""
    wide, lora = getattr(torch, dtype), width - rope
    bytes_ = lora + rope * wide.itemsize + math.ceil(lora / TILE) * torch.float32.itemsize
    return CacheForm((("", bytes_, "int8"),), lambda rows: Packed(rows, lora, rope, wide))


def scaled(width: int, dtype: str) -> CacheForm:
    """Of index keys of `width` elements."""
    wide = getattr(torch, dtype)
    return CacheForm((("", width, "int8"), ("_scale", 1, "float16")), lambda values, scale: Scaled(values, scale, wide))


def tiles(latent: Tensor) -> Tensor:
    """Latents [n, lora] as the rows that share a scale, [n * tiles, 128], the last filled up with zeros."""
    short = -latent.shape[1] % TILE
    if short:
        latent = torch.cat([latent, torch.zeros((latent.shape[0], short), dtype=latent.dtype)], dim=-1)
    return latent.reshape(-1, TILE)


def packed_rows(values: Tensor, scale: Tensor, rope: Tensor, lora: int) -> Tensor:
    """The rows of `Packed`, int8 [n, bytes]: values int8 and scale float32 of `tiles`, rope [n, rope]."""
    count = rope.shape[0]
    held: Sequence[Tensor] = (
        values.reshape(count, -1)[:, :lora],
        rope.contiguous().view(torch.int8),
        scale.reshape(count, -1).contiguous().view(torch.int8),
    )
    return torch.cat(list(held), dim=-1)
