"""`NumberFormats`: one scheme as weights to load and ops to replace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backends.emulation import rounding
from backends.emulation.products import product
from foundation.errors import UsageError
from model import quantised
from model.config import Mla, ModelConfig
from model.formats import BF16, F32, INT4, Formats, MatrixFormat, Scheme, matrix_format
from model.ops import OPS, full_scale, swiglu_body
from model.quantised import Matrix
from model.split import scale_shape
from model.weights import Quantized, Weight, as_matrix, from_matrix

Lowering = Callable[..., Any]
_PLAIN = {"float32": F32, "bfloat16": BF16}


@dataclasses.dataclass(frozen=True)
class NumberFormats:
    """What a chip's number formats do to a model: `weight` as it is loaded, `lowerings` of the ops.

    float32: what the scheme leaves in 16 bits is in float32, as for a runtime that has no bfloat16.
    """

    cfg: ModelConfig
    formats: Formats
    float32: bool = False

    @property
    def scheme(self) -> Scheme:
        return self.formats.scheme

    @property
    def dtype(self) -> str:
        """What activations and unquantised weights are held in."""
        return "float32" if self.float32 or self.formats.wide == "f32" else "bfloat16"

    @property
    def name(self) -> str:
        """The scheme, and the cache's format where it is narrower than the activations."""
        kv = self.formats.kv
        return self.scheme.name if kv == self.formats.wide else f"{self.scheme.name}, {kv} cache"

    def weight(self, weight: Weight, value: np.ndarray | Quantized, mtp: bool = False) -> np.ndarray | Quantized:
        """One whole weight on the host, as the checkpoint has it, to what the graph is given.

        A matrix that the checkpoint stores in the scheme's own format keeps its values and scales; any other is
        dequantised and rounded. `mtp`: it belongs to the MTP layer.
        """
        fmt = self.scheme.stored(weight, mtp)
        if not fmt.narrow:
            plain = _widen(value) if isinstance(value, Quantized) else value
            return plain.astype(np.float32 if weight.float32 else _PLAIN[self.dtype], copy=False)
        if isinstance(value, Quantized) and _is_stored_as(fmt, weight, value):
            held = value
        else:
            matrix = _widen(value) if isinstance(value, Quantized) else np.asarray(value)
            try:
                held = _from_matrix(weight, quantised.quantise(fmt, as_matrix(weight, matrix)))
            except ValueError as error:
                raise UsageError(f"{weight.name} in {fmt.name}: {error}") from None
        if not weight.stays_narrow:  # the halves of kv_b_proj, which are widened when loaded
            return _widen(held).astype(_PLAIN[self.dtype])
        return held

    def lowerings(self, base: Mapping[str, Lowering] | None = None) -> dict[str, Lowering]:
        """Ops by name that compute as the chip does. `base`: the backend's own kernels, used for what is left."""
        out = dict(base or {})
        if self.scheme.formats != (self.scheme.wide,):
            plain_experts = out.get("glm.expert_ffn", OPS["glm.expert_ffn"].meaning)
            out["glm.linear"] = self._linear
            out["glm.expert_ffn"] = lambda *args: self._experts(*args) if len(args) > 5 else plain_experts(*args)
        cache, index = self.formats.cache, self.formats.cache.of("index")
        narrow = [row for row in (cache.of("latent"), index, cache.of("key")) if row.narrow]
        if narrow:
            write = out.get("glm.cache_write", OPS["glm.cache_write"].meaning)
            out["glm.cache_write"] = lambda pages, rows, slots, *, cache="": write(
                pages, self._cache_row(rows, cache), slots, cache=cache
            )
        if index.narrow:
            score = out.get("glm.index_scores", OPS["glm.index_scores"].meaning)
            out["glm.index_scores"] = lambda query, *rest: score(rounding.index_row(query, index), *rest)
        return out

    def _product(self, x: Array, values: Array, scale: Array, fmt: MatrixFormat) -> Array:
        """x [.., k] times values [k, ..] -> [.., ..] in x's type."""
        outer = values.shape[1:]
        for axis in range(1, values.ndim - 1):  # gate and up: one column dim, each column with its own scale
            if scale.shape[axis] != values.shape[axis]:
                scale = jnp.repeat(scale, values.shape[axis], axis)
        if values.ndim > 2:
            scale = full_scale(scale.astype(jnp.float32), values.shape, values.ndim - 1).astype(scale.dtype)
        flat = product(
            x.reshape(-1, x.shape[-1]), values.reshape(values.shape[0], -1),
            scale.reshape(scale.shape[0], -1), fmt,
        )  # fmt: skip
        return flat.astype(x.dtype).reshape(*x.shape[:-1], *outer)

    def _linear(self, x: Array, *weight: Array) -> Array:
        """See `model.ops.linear`."""
        if len(weight) != 2:
            return OPS["glm.linear"].meaning(x, *weight)
        return self._product(x, *weight, matrix_format(self.scheme.dense))

    def _experts(self, x: Array, experts: Array, weights: Array, *matrices: Array) -> Array:
        """See `model.ops.expert_ffn`: experts one after another, each over all tokens. An expert's result is rounded
        to 16 bits before the weighted sum over the choices, as it is where experts live on other devices."""
        ids = jnp.arange(matrices[0].shape[0], dtype=experts.dtype)
        fmt = matrix_format(self.scheme.experts)

        def add(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
            index, gate_up, gate_up_scale, down, down_scale = expert
            share = jnp.sum(jnp.where(experts == index, weights, 0.0), axis=1, dtype=jnp.float32)
            hidden = swiglu_body(self._product(x, gate_up, gate_up_scale, fmt))
            out = self._product(hidden, down, down_scale, fmt)
            return total + out.astype(jnp.float32) * share[:, None], None

        start = jnp.zeros(x.shape, jnp.float32) + 0.0 * x.astype(jnp.float32)  # varies over a mesh as x does
        total, _ = lax.scan(add, start, (ids, *matrices))
        return total.astype(x.dtype)

    def _cache_row(self, row: Array, cache: str) -> Array:
        fmt = self.formats.cache.of(cache)
        if not fmt.narrow:
            return row
        if cache == "index":
            return rounding.index_row(row, fmt)
        if cache == "latent":
            assert isinstance(self.cfg.attention, Mla)
            return rounding.latent_row(row, self.cfg.attention.kv_lora_rank, fmt)
        return rounding.head_row(row, fmt)


# --- weights in the graph's layout ------------------------------------------------------------------------


def _from_matrix(weight: Weight, held: Matrix) -> Quantized:
    scale = held.scale
    if held.factor is not None:
        scale = scale.astype(np.float32) * held.factor[..., None, None]
    values, scale = from_matrix(weight, held.values), from_matrix(weight, scale)
    return Quantized(quantised.carried(np.ascontiguousarray(values)), np.ascontiguousarray(scale))


def _widen(held: Quantized) -> np.ndarray:
    """float32 in the graph's layout."""
    values, scale = np.asarray(held.values), np.asarray(held.scale).astype(np.float32)
    for axis in range(values.ndim):
        scale = quantised.spread(scale, values.shape[axis], axis)
    return values.astype(np.float32) * scale


def _is_stored_as(fmt: MatrixFormat, weight: Weight, held: Quantized) -> bool:
    """Whether a matrix of a checkpoint has the types of a format, and its scales the format's sharing."""
    values, scale = np.asarray(held.values), np.asarray(held.scale)
    scale_type = F32 if fmt.factor is not None else fmt.scale  # the factor has been multiplied into the scales
    if (values.dtype, scale.dtype) != (quantised.CARRIER.get(fmt.values, fmt.values), scale_type):
        return False
    least, most = (-15, 15) if fmt.zero is not None else (-8, 7)  # less a zero point of 4 bits
    if fmt.values == INT4 and (values.min() < least or values.max() > most):
        return False
    return scale.shape == scale_shape(weight, fmt, values.shape)
