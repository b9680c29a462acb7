"""Number formats, one record each: of matrices, of cache rows, and of a deployment. Free of JAX.

    MatrixFormat   what a matrix is stored in, what its activations become, what stays wide, how checkpoints spell it
    RowFormat      what a token's row of a cache is stored in
    Scheme         the two matrix formats of a deployment: dense matrices, routed experts
    Formats        a deployment's: a scheme, and the row formats of its caches

The ledger, prices, emulation, quantiser, exporter, planner and help texts read these records; a chip's profile lists
by name the matrix formats that it computes in. To add a format: a record and a scheme here, its name and rate in
`hw_profiles/fields.py`, whose kernel stands in for its price in `runtime/pricing/book.py`, and its spelling in
`spelling.py` and `quantization_config.py`; `backends/emulation/products.py` only where scales are applied in a new way.

A matrix `[.., out, in]` becomes values of a narrow type and scales, so that matrix = values * scales. Rounding is to
nearest, ties to even, with saturation; weights are rounded as they are (no smoothing, rotation or search). Sources:

    fp8-block    DeepSeek-V3 `inference/kernel.py` and config.json of GLM-5-FP8: e4m3, 128 x 128, float32 amax / 448
    fp8-tensor,  compressed-tensors 0.20, strategies "tensor" and "channel"; vLLM quantises activations a token
    fp8-channel
    w8a8-int8    Ascend/msmodelslim `lab_practice/glm_5/glm_5_w8a8.yaml`: weights per_channel, activations per_token
    w4a8         `glm_5_w4a8.yaml`: experts per_channel int4; no group scales (so a float32 a row, not 16 bits for 128)
    w4a16        compressed-tensors 0.20, strategy "group": Kimi-K2's releases have groups of 32 (0.5625 bytes a
                 weight); `w4a16-gN` has groups of N (128: 0.5156), as vLLM's and SGLang's tables were measured with;
                 `w4a16-gN-zp` 4 bits more a group (128: 0.5195), compressed-tensors' `symmetric: false`, read only
    w4afp8       SGLang `layers/quantization/w4afp8.py`, vLLM CompressedTensorsW4A8Fp8: int4 in groups of 128,
                 e4m3 activations; dense matrices in FP8 blocks
    mxfp8, mxfp4 OCP Microscaling 1.0, section 6.3: 2^(floor(log2 amax) - emax) for 32 elements
    nvfp4        compressed-tensors 0.20 "nvfp4-pack-quantized": e4m3 amax / 6 for 16 elements, and a float32 a matrix,
                 amax / (448 * 6); `nvfp4a16` keeps activations in 16 bits
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, Protocol

import ml_dtypes
import numpy as np

from foundation.errors import UsageError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
FP8_BLOCK = 128
"""Rows and columns that share one scale in a block-FP8 checkpoint."""
BITS: Mapping[np.dtype, int] = {E4M3: 8, E2M1: 4, E8M0: 8, INT8: 8, INT4: 4, BF16: 16, F16: 16, F32: 32}
"""Of one element as a chip stores it."""

Role = Literal["attention", "indexer", "index_key", "kv_up", "dense_ffn", "shared_experts", "experts", "wide"]
"""What a weight is for, as far as number formats care. kv_up: the halves of kv_b_proj. wide: embedding, head, router,
norms, biases, the indexer's weights_proj and the MTP layer's eh_proj, which no published checkpoint narrows."""
CheckpointLayout = Literal["deepseek", "compressed-tensors", "msmodelslim"]


class Described(Protocol):
    """What of a weight decides its format: see `model.weights.Weight`."""

    @property
    def role(self) -> Role: ...

    @property
    def float32(self) -> bool: ...

    @property
    def stays_narrow(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Activation:
    """What a product's activations are rounded to, with scales found as the program runs.

    shared: elements of a token that share a scale; None: all of them. scale: the scale's type; None where nothing is
    scaled.
    """

    values: np.dtype
    shared: int | None = None
    scale: np.dtype | None = None

    @property
    def bytes_per_element(self) -> float:
        """Stored bytes, scales of groups included (those of whole tokens are below 0.1 %)."""
        per_group = BITS[self.scale] / 8 / self.shared if self.scale and self.shared else 0.0
        return BITS[self.values] / 8 + per_group

    @property
    def text(self) -> str:
        if self.scale is None:
            return self.values.name
        sort = {E8M0: "a power-of-two scale", E4M3: "an e4m3 scale"}.get(self.scale, "a scale")
        each = f"for each token and {self.shared} channels" if self.shared else "a token"
        return f"{_SHORT.get(self.values, self.values.name)}, {sort} {each}"


_SHORT = {E4M3: "e4m3", E2M1: "e2m1"}
_PLAIN_16 = Activation(BF16)


@dataclasses.dataclass(frozen=True)
class MatrixFormat:
    """A number format of a matrix.

    values: the type of its elements. shared: which of them share a scale: "block" (128 x 128), "tensor", "row" (an
    output channel), or a number of consecutive elements of the contracted dim; None: nothing is scaled. scale: the
    scale's type. factor: type of one more scale a matrix. zero: type of the value that stands for 0, stored beside each
    scale; None: 0 does. bound: what a group's largest magnitude is scaled to.
    accumulate: what products are summed in. left_wide: role of weight ("mtp": all of the MTP layer) -> who leaves it in
    16 bits. layouts: the checkpoint layouts that can hold it, the usual first. label: for people.
    any_group: its name with `-gN` behind it is the same with groups of N.
    """

    name: str
    label: str
    values: np.dtype
    shared: Literal["block", "tensor", "row"] | int | None = None
    scale: np.dtype | None = None
    factor: np.dtype | None = None
    bound: float = 0.0
    activations: Activation = _PLAIN_16
    accumulate: Literal["float32", "int32"] = "float32"
    left_wide: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, hash=False)
    layouts: tuple[CheckpointLayout, ...] = ()
    zero: np.dtype | None = None
    any_group: bool = False

    @property
    def narrow(self) -> bool:
        """Whether it is quantised: values and scales."""
        return self.shared is not None

    @property
    def bits(self) -> int:
        """Of one element, its part of the scales left out."""
        return BITS[self.values]

    @property
    def bytes_per_element(self) -> float:
        """Stored bytes, scales and zero points of blocks and groups included; those of rows and whole matrices (below
        0.1 %) are not: they depend on the matrix (see `model.split.share_bytes`)."""
        elements = self.shared if isinstance(self.shared, int) else FP8_BLOCK**2 * (self.shared == "block")
        return self.bits / 8 + (self.scale_bits / 8 / elements if elements else 0.0)

    @property
    def scale_bits(self) -> int:
        """Of what is stored for the elements that share a scale: the scale, and the zero point if there is one."""
        return sum(BITS[each] for each in (self.scale, self.zero) if each is not None)

    def stored_as(self, other: MatrixFormat) -> bool:
        """Whether a matrix of the other format is stored in the same way, whatever its activations become."""
        return (self.values, self.shared, self.scale, self.factor, self.zero) == (
            other.values, other.shared, other.scale, other.factor, other.zero,
        )  # fmt: skip

    @property
    def base(self) -> str:
        """The name that chips list: of `w4a16-g64` and `w4a16-g64-zp` it is `w4a16`."""
        return _GROUPED.sub("", self.name)


_INT8_TOKEN = Activation(INT8, None, F32)
_E4M3_TOKEN = Activation(E4M3, None, F32)
_KV_B = "compressed-tensors and msModelSlim recipes exclude kv_b_proj, which attention reads in two halves"
_WK = "msModelSlim `lab_practice/glm_5/*.yaml` excludes *wk"
_MTP = "msModelSlim `glm_5_w8a8.yaml`, `glm_5_w4a8.yaml` exclude model.layers.78"
_MTP_EXPERTS = "nvidia/GLM-5-NVFP4 and Kimi-K2's releases narrow the main stack's experts only"
_CT, _SLIM = "compressed-tensors", "msmodelslim"
FORMATS: Mapping[str, MatrixFormat] = {
    f.name: f
    for f in (
        MatrixFormat("f32", "float32", F32, activations=Activation(F32)),
        MatrixFormat("bf16", "bfloat16", BF16),
        MatrixFormat("fp16", "float16", F16, activations=Activation(F16)),
        MatrixFormat(
            "fp8-block", "FP8 e4m3, 128 × 128 blocks", E4M3, "block", F32, None, E4M3_MAX,
            Activation(E4M3, FP8_BLOCK, F32), layouts=("deepseek", _CT),
        ),
        MatrixFormat(
            "fp8-tensor", "FP8 e4m3, one scale a matrix", E4M3, "tensor", F32, None, E4M3_MAX, _E4M3_TOKEN,
            left_wide={"kv_up": _KV_B}, layouts=(_CT,),
        ),
        MatrixFormat(
            "fp8-channel", "FP8 e4m3, a scale an output channel", E4M3, "row", F32, None, E4M3_MAX, _E4M3_TOKEN,
            left_wide={"kv_up": _KV_B}, layouts=(_CT,),
        ),
        MatrixFormat(
            "w8a8-int8", "INT8, a scale an output channel", INT8, "row", F32, None, 127.0, _INT8_TOKEN, "int32",
            {"kv_up": _KV_B, "index_key": _WK, "mtp": _MTP}, (_CT, _SLIM),
        ),
        MatrixFormat(
            "w4a8", "INT4, a scale an output channel", INT4, "row", F32, None, 7.0, _INT8_TOKEN, "int32",
            {"kv_up": _KV_B, "index_key": _WK, "mtp": _MTP}, (_SLIM, _CT),
        ),
        MatrixFormat(
            "w4a16", "INT4, a scale for 32 weights", INT4, 32, BF16, None, 7.5,
            left_wide={"kv_up": _KV_B, "mtp": _MTP_EXPERTS}, layouts=(_CT,), any_group=True,
        ),
        MatrixFormat(
            "w4afp8", "INT4, a scale for 128 weights", INT4, 128, BF16, None, 7.5, _E4M3_TOKEN,
            left_wide={"kv_up": _KV_B, "mtp": _MTP_EXPERTS}, layouts=(_CT,), any_group=True,
        ),
        MatrixFormat(
            "mxfp8", "MXFP8, a scale for 32 weights", E4M3, 32, E8M0, None, E4M3_MAX, Activation(E4M3, 32, E8M0),
            left_wide={"kv_up": _KV_B, "index_key": _WK}, layouts=(_SLIM, _CT),
        ),
        MatrixFormat(
            "mxfp4", "MXFP4, a scale for 32 weights", E2M1, 32, E8M0, None, E2M1_MAX, Activation(E2M1, 32, E8M0),
            left_wide={"kv_up": _KV_B, "index_key": _WK}, layouts=(_SLIM, _CT),
        ),
        MatrixFormat(
            "nvfp4", "NVFP4, a scale for 16 weights", E2M1, 16, E4M3, F32, E2M1_MAX, Activation(E2M1, 16, E4M3),
            left_wide={"kv_up": _KV_B, "mtp": _MTP_EXPERTS}, layouts=(_CT,),
        ),
        MatrixFormat(
            "nvfp4a16", "NVFP4, a scale for 16 weights", E2M1, 16, E4M3, F32, E2M1_MAX,
            left_wide={"kv_up": _KV_B, "mtp": _MTP_EXPERTS}, layouts=(_CT,),
        ),
    )
}  # fmt: skip
_GROUPED = re.compile(r"-g([1-9][0-9]{0,4})(-zp)?$")


@lru_cache(maxsize=256)
def matrix_format(name: str) -> MatrixFormat:
    """The format of that name; `w4a16-g64` is `w4a16` with groups of 64, `w4a16-g64-zp` has a zero point for each, as
    asymmetric checkpoints store. Raises `UsageError`."""
    if name in FORMATS:
        return FORMATS[name]
    group = _GROUPED.search(name)
    base = FORMATS.get(_GROUPED.sub("", name))
    if group is None or base is None or not base.any_group:
        known = [f"{each.name}[-gN]" if each.any_group else each.name for each in FORMATS.values()]
        raise UsageError(f"unknown number format {name!r}; known: {', '.join(known)}")
    size, zero = int(group[1]), INT4 if group[2] else None
    if size == base.shared and zero is None:
        return base
    label = base.label.replace(f"a scale for {base.shared}", f"a scale{' and a zero point' if zero else ''} for {size}")
    return dataclasses.replace(base, name=name, shared=size, label=label, zero=zero)


# --- schemes ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The formats of dense matrices and of routed experts, by name."""

    name: str
    dense: str
    experts: str

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats it needs units for."""
        return tuple(dict.fromkeys((self.dense, self.experts)))

    @property
    def wide(self) -> str:
        """The format of what is not quantised."""
        return "f32" if self.dense == "f32" else "bf16"

    @property
    def bits(self) -> int:
        """Of a routed expert's weights, of which nearly all of a model consists."""
        return matrix_format(self.experts).bits

    def narrower_than(self, other: Scheme) -> bool:
        """Whether dense matrices or experts are in fewer bits: a checkpoint in the other would be quantised for it."""
        pairs = ((self.dense, other.dense), (self.experts, other.experts))
        return any(matrix_format(mine).bits < matrix_format(theirs).bits for mine, theirs in pairs)

    def stored(self, weight: Described, mtp: bool = False) -> MatrixFormat:
        """The format that a checkpoint of this scheme stores a weight in. mtp: it belongs to the MTP layer."""
        kind = weight.role
        found = matrix_format(self.experts if kind == "experts" else self.dense)
        if weight.float32:
            return FORMATS["f32"]
        if kind == "wide" or not found.narrow or kind in found.left_wide or (mtp and "mtp" in found.left_wide):
            return FORMATS[self.wide]
        return found

    def held(self, weight: Described, mtp: bool = False) -> MatrixFormat:
        """The format that a device holds and multiplies a weight in: as stored, but for the halves of kv_b_proj, which
        are widened when loaded (a head's rows need not begin on a block)."""
        found = self.stored(weight, mtp)
        return found if weight.stays_narrow or not found.narrow else FORMATS[self.wide]


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("f32", "f32", "f32"),
        Scheme("bf16", "bf16", "bf16"),
        Scheme("fp8", "fp8-block", "fp8-block"),
        Scheme("fp8-tensor", "fp8-tensor", "fp8-tensor"),
        Scheme("fp8-channel", "fp8-channel", "fp8-channel"),
        Scheme("w8a8", "w8a8-int8", "w8a8-int8"),
        Scheme("w4a8", "w8a8-int8", "w4a8"),
        Scheme("w4a16", "bf16", "w4a16"),
        Scheme("w4afp8", "fp8-block", "w4afp8"),
        Scheme("mxfp8", "mxfp8", "mxfp8"),
        Scheme("mxfp4", "mxfp8", "mxfp4"),
        Scheme("nvfp4", "bf16", "nvfp4"),
        Scheme("nvfp4a16", "bf16", "nvfp4a16"),
    )
}
"""W4A8 keeps attention and dense matrices in W8A8, as msModelSlim's GLM-5 checkpoints do."""
_ANY_GROUP = [name for name, each in SCHEMES.items() if FORMATS[each.experts].any_group]
SCHEMES_HELP = (
    f"{', '.join(list(SCHEMES)[:-1])} or {list(SCHEMES)[-1]}; {' and '.join(f'{each}-gN' for each in _ANY_GROUP)} have "
    "groups of N, and DENSE/EXPERTS names the two formats"
)
"""For help texts: what `scheme` takes."""


@lru_cache(maxsize=256)
def scheme(name: str) -> Scheme:
    """The scheme of that name, of a name with another group size (`w4a16-g64`), or of two formats (`bf16/w4a16-g64`).

    Raises `UsageError`.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    base = SCHEMES.get(_GROUPED.sub("", name))
    if base is not None and FORMATS[base.experts].any_group:
        experts = matrix_format(name.replace(base.name, base.experts, 1)).name
        dense = experts if base.dense == base.experts else base.dense
        return base if experts == base.experts else Scheme(name, dense, experts)
    if name.count("/") == 1:
        dense, experts = (matrix_format(part).name for part in name.split("/"))
        return scheme_of(dense, experts)
    if name in FORMATS or _GROUPED.search(name):
        return scheme_of(*[matrix_format(name).name] * 2)
    raise UsageError(f"unknown formats {name!r}; known: {SCHEMES_HELP}")


def scheme_of(dense: str, experts: str) -> Scheme:
    """The scheme of two formats, by its own name where it has one."""
    for known in SCHEMES.values():
        if (known.dense, known.experts) == (dense, experts):
            return known
        with_size = known.name + (_GROUPED.search(experts) or [""])[0]
        if FORMATS[known.experts].any_group and scheme(with_size) == Scheme(with_size, dense, experts):
            return scheme(with_size)
    return Scheme(f"{dense}/{experts}", dense, experts)


# --- caches ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """A number format of a token's row of a cache.

    shared: elements that share a scale, None: all of the row. scale: the scale's type, None where the scale is one of
    the matrix's or of the layer's (no bytes a token). rope: the type of a latent's rotary part; None: as the values.
    """

    name: str
    values: np.dtype
    shared: int | None = None
    scale: np.dtype | None = None
    rope: np.dtype | None = None

    @property
    def narrow(self) -> bool:
        return BITS[self.values] < 16

    @property
    def kind(self) -> str:
        """What a person calls it: "fp8", "int8", "bf16" or "f32"."""
        return {E4M3: "fp8", INT8: "int8", BF16: "bf16", F32: "f32"}[self.values]

    @property
    def label(self) -> str:
        """For people."""
        return {E4M3: "FP8 e4m3", INT8: "INT8", BF16: "bfloat16", F32: "float32"}[self.values]

    def bytes(self, width: int, rope: int = 0) -> int:
        """Of a row of `width` elements, of which the last `rope` are a latent's rotary part."""
        plain = width - rope
        scales = 0 if self.scale is None else -(-plain // (self.shared or plain)) * BITS[self.scale]
        bits = plain * BITS[self.values] + rope * BITS[self.rope or self.values] + scales
        return -(-bits // 8)


ROWS: Mapping[str, RowFormat] = {
    f.name: f
    for f in (
        RowFormat("f32", F32),
        RowFormat("bf16", BF16),
        RowFormat("fp8", E4M3),
        RowFormat("fp8_ds_mla", E4M3, 128, F32, BF16),
        RowFormat("fp8_scaled", E4M3, 128, F32),
        RowFormat("int8", INT8),
        RowFormat("int8_packed", INT8, 128, F32, BF16),
        RowFormat("int8_scaled", INT8, None, F16),
    )
}
"""Rows by name. 576 = kv_lora_rank + rope elements of GLM-5 and DeepSeek:

    fp8          e4m3 throughout, calibrated or unit scale: 576 bytes. Dense MLA and GQA in every engine; sparse MLA in
                 SGLang's trtllm backend and vLLM's FlashInfer one (SGLang `calculate_mla_kv_cache_dim`)
    fp8_ds_mla   FlashMLA's sparse record, 512 + 4 float32 scales + 64 in 16 bits: 656 (vLLM, SGLang on Hopper)
    fp8_scaled   an index key and its scale: 132 (vLLM `mla/indexer.py`, SGLang `DSATokenToKVPool`)
    int8         GQA rows with calibrated scales a channel (vllm-ascend `kv_c8.py`)
    int8_packed  vllm-ascend's packed C8 latent, 512 + 128 of rope + 16 of scales: 656 (`sfa_v1.py`, tiles of 128)
    int8_scaled  vllm-ascend's C8 index key, a float16 scale a row: 130 (`c8_k_scale_cache_dtype`)
"""

KV = ("bf16", "fp8", "int8")
"""What a person can ask a KV cache to be kept in."""


@dataclasses.dataclass(frozen=True)
class CacheFormats:
    """Row formats of a deployment's caches, by name: MLA latents, index keys, keys and values of GQA."""

    latent: str = "bf16"
    index: str = "bf16"
    heads: str = "bf16"

    def of(self, cache: str) -> RowFormat:
        """Of a cache by name: "latent", "index", "key" or "value". Raises `UsageError` for a format that is none."""
        name = {"latent": self.latent, "index": self.index}.get(cache, self.heads)
        if name not in ROWS:
            raise UsageError(f"unknown row format {name!r}; known: {', '.join(ROWS)}")
        return ROWS[name]

    @classmethod
    def plain(cls, name: str) -> CacheFormats:
        """Every row in that format."""
        return cls(name, name, name)


@dataclasses.dataclass(frozen=True)
class Formats:
    """Number formats of a deployment: of dense matrices, of routed experts, what was asked of the KV cache ("f32",
    "bf16", "fp8" or "int8"), and what its rows are thereby stored in, which the engine and the chip decide
    (`runtime.deployment.engines`)."""

    weights: str = "bf16"
    experts: str = "bf16"
    kv: str = "bf16"
    cache: CacheFormats = CacheFormats()

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.weights, self.experts)

    @property
    def wide(self) -> str:
        """The format of what no scheme quantises."""
        return self.scheme.wide

    def held(self, weight: Described, mtp: bool = False) -> MatrixFormat:
        """See `Scheme.held`."""
        return self.scheme.held(weight, mtp)
