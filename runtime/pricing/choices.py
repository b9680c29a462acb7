"""Which kernel an engine runs where its releases choose by model, chip family and layout, as data.

A choice holds from its release on, until one of the same engine and kind that is newer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from runtime.pricing.eras import order


@dataclass(frozen=True)
class KernelChoice:
    """What an engine (`engine`) does from a release on (`since`), on chips of some families, for some model types (None
    for any), and where that stands (`source`)."""

    engine: str
    since: str
    families: frozenset[str]
    models: frozenset[str] | None
    source: str


@dataclass(frozen=True)
class FusedReduce(KernelChoice):
    """All-reduces with the next norm fused in, on one server and without DP attention: FlashInfer's kernel, which is
    TensorRT-LLM's (`tables`), for steps of up to `most_tokens`, or of up to `most_mib` by chip family and devices."""

    tables: str = "trtllm"
    most_tokens: int = 2048
    most_mib: Mapping[tuple[str, int], float] | None = None

    def takes(self, tokens: int, total_bytes: float, family: str, devices: int) -> bool:
        """Whether an all-reduce of so many tokens and bytes over so many devices is fused."""
        if self.most_mib is None:
            return tokens <= self.most_tokens
        return total_bytes <= self.most_mib.get((family, devices), 0.0) * 2**20


_VLLM_FUSED_MIB = {
    ("hopper", 2): 64, ("hopper", 4): 2, ("hopper", 8): 0.5,
    ("blackwell", 2): 64, ("blackwell", 4): 32, ("blackwell", 8): 1,
}  # fmt: skip
"""vllm compilation/passes/fusion/allreduce_rms_fusion.py FI_ALLREDUCE_FUSION_MAX_SIZE_MB, of SM90 and SM100 (SM103
takes up to twice as much, from 0.19 on)."""
_BOTH = frozenset({"hopper", "blackwell"})
FUSED_REDUCES = (
    FusedReduce("sglang", "0.5.6", frozenset({"blackwell"}), frozenset({"deepseek_v3", "deepseek_v32"}),
                "sglang 0.5.6.post1 server_args.py, common to all Deepseek MoE models"),
    FusedReduce("sglang", "0.5.7", _BOTH, frozenset({"deepseek_v3", "glm4_moe"}),
                "sglang 0.5.7 server_args.py _handle_model_specific_adjustments; communicator.py for the tokens"),
    FusedReduce("sglang", "0.5.9", _BOTH, frozenset({"deepseek_v3", "glm4_moe", "glm4_moe_lite"}),
                "sglang 0.5.9 server_args.py _handle_model_specific_adjustments"),
    FusedReduce("sglang", "0.5.14", _BOTH,
                frozenset({"deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite"}),
                "sglang 0.5.14 server_args.py _handle_model_specific_adjustments"),
    FusedReduce("vllm", "0.17", _BOTH, None,
                "vllm PR 34299 (2026-02-11): fuse_allreduce_rms by default at -O2, with FlashInfer and tp > 1",
                most_mib=_VLLM_FUSED_MIB),
)  # fmt: skip


@dataclass(frozen=True)
class FusedShared(KernelChoice):
    """The shared expert runs as one more of up to `most_experts` routed ones, which every token picks; not where ranks
    hold whole experts, nor with experts of a format (`not_formats`) that the shared one does not have."""

    most_experts: int = 256
    not_formats: frozenset[str] = frozenset({"w4afp8"})


@dataclass(frozen=True)
class BesideRouted(KernelChoice):
    """The shared expert runs in a stream beside the routed ones, in steps of up to `most_tokens`; `captured`: only in
    those that a graph replays. Not where tokens are dispatched to experts."""

    most_tokens: int = 0
    captured: bool = False


_NVIDIA = frozenset({"ampere", "hopper", "blackwell"})
BESIDE_ROUTED = (
    BesideRouted("sglang", "0.4.7", _NVIDIA, frozenset({"deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe"}),
                 "sglang models/deepseek_v2.py, glm4_moe.py forward_normal_dual_stream: get_is_capture_mode, "
                 "DUAL_STREAM_TOKEN_THRESHOLD 1024", most_tokens=1024, captured=True),
    BesideRouted("vllm", "0.11.1", _NVIDIA, None,
                 "vllm PR 26440 (2025-10-21): DeepSeek-R1 on 8 B200, 32 in flight, from 23.35 to 22.09 ms; PR 28406: "
                 "VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD 256", most_tokens=256),
)  # fmt: skip


@dataclass(frozen=True)
class RingReduce:
    """All-reduces of NCCL on one server that go round its devices, where the tables have them in the switches (NVLS).

    families: of chips where that was measured. devices: from how many on it is slower. ratios: of the two, by bytes of
    the whole vector; from the first on, which is larger than what engines reduce with kernels of their own.
    """

    families: frozenset[str]
    ratios: tuple[tuple[float, float], ...]
    source: str
    devices: int = 8

    def slower(self, total_bytes: float) -> float:
        """The ratio at a size, linear in its logarithm."""
        sizes, ratios = zip(*self.ratios, strict=True)
        return float(np.interp(math.log(total_bytes), np.log(sizes), ratios))


RING_REDUCE = RingReduce(
    frozenset({"hopper"}),
    ((2**24, 1.0), (2**25, 1.10), (2**26, 1.13), (2**27, 1.20), (2**28, 1.22), (2**29, 1.25), (2**30, 1.28)),
    "aiconfigurator-core 0.12, h100_sxm vllm 0.14.0 over 0.19.0 and sglang 0.5.14, eager and captured; sglang PR 3502: "
    "1023 us against 844 on 8 H100; at most 370 and 480 GB/s (nccl-tests issue 212), alike up to 4 devices (nccl issue "
    "1455)",
)
"""On Blackwell nothing was measured; there rings would reach what NVLS does."""
_TRITON = frozenset({"ampere", "hopper"})
"""Where SGLang runs FP8 and 16-bit experts in Triton; flashinfer_trtllm, its choice on Blackwell, turns fusing off."""
FUSED_SHARED = (
    FusedShared("sglang", "0.4.7", _TRITON, frozenset({"deepseek_v3"}),
                "sglang models/deepseek_v2.py determine_num_fused_shared_experts: 256 experts, one shared, no EP"),
    FusedShared("sglang", "0.5.1", _TRITON, frozenset({"deepseek_v3", "glm4_moe"}),
                "sglang models/glm4_moe.py determine_num_fused_shared_experts"),
    FusedShared("sglang", "0.5.9", _TRITON, frozenset({"deepseek_v3", "glm4_moe", "glm_moe_dsa"}),
                "sglang models/glm4_moe.py GlmMoeDsaForCausalLM.determine_num_fused_shared_experts"),
)  # fmt: skip


@dataclass(frozen=True)
class UntunedExperts(KernelChoice):
    """Triton experts of a shape without a file of tuned block sizes, in releases whose default sizes were slow: they
    run at `tables`, the table of an engine that has those defaults still.

    tuned: (experts, width on a rank) that have a file, by chip family. until: the first release that has other
    defaults.
    """

    until: str
    formats: frozenset[str]
    tuned: frozenset[tuple[str, int, int]]
    tables: str = "sglang"


UNTUNED_EXPERTS = (
    UntunedExperts("vllm", "0.5", frozenset({"hopper"}), frozenset({"glm4_moe", "glm4_moe_lite"}),
                   "vllm PR 34846 (2026-02-18): the old defaults matched under 1 % of tuned files, many-expert models "
                   "gain up to 2x; vllm fused_moe/configs has no 16-bit file of 160 experts for H100 or H200",
                   until="0.17", formats=frozenset({"bf16"}),
                   tuned=frozenset({("hopper", 128, 352), ("hopper", 128, 176)})),
)  # fmt: skip


@dataclass(frozen=True)
class TableChoice:
    """Releases of an engine that run another kernel than their table was measured with: what is asked for as `key` is
    the entry `taken` of the price file, measured at a later or earlier release that runs the same kernel. since and
    until: the releases, until left out."""

    engine: str
    since: str
    until: str
    family: str
    key: str
    taken: str
    source: str


_VLLM_FP8 = "moe/fp8-block/vllm"
_ORACLE = (
    "vllm 0.15.1 and 0.16.0 fused_moe/oracle/fp8.py select_fp8_moe_backend: FlashInfer's TensorRT-LLM experts first, "
    "which want SM100, then its CUTLASS ones, which take 128-block FP8 on SM90"
)
_PREFERS = (
    "vllm 0.17.0 to 0.19.0 fused_moe/oracle/fp8.py: on Hopper for Block Fp8, prefer Triton for TP and FI CUTLASS for EP"
)
_VLLM_INT4 = "moe/w4a16/vllm"
_MARLIN = (
    "vllm compressed_tensors_moe.py: CompressedTensorsWNA16MarlinMoEMethod wherever Marlin takes a layer; "
    "aiconfigurator's tables up to 0.22 call fused_experts with int4_w4a16_moe_quant_config, which is Triton "
    "(collect_moe_v2.py, whatever kernel they name), 0.24's the server's own method"
)
TABLE_CHOICES = (
    TableChoice("vllm", "0.8", "0.24", "hopper", _VLLM_INT4, _VLLM_INT4, _MARLIN),
    TableChoice("vllm", "0.8", "0.24", "blackwell", _VLLM_INT4, _VLLM_INT4, _MARLIN),
    TableChoice("vllm", "0.15", "0.24", "blackwell", _VLLM_FP8, _VLLM_FP8, _ORACLE),
    TableChoice("vllm", "0.15", "0.17", "hopper", _VLLM_FP8, _VLLM_FP8, _ORACLE),
    TableChoice("vllm", "0.15", "0.17", "hopper", f"{_VLLM_FP8}/tp", _VLLM_FP8, _ORACLE),
    TableChoice("vllm", "0.17", "0.24", "hopper", _VLLM_FP8, _VLLM_FP8, _PREFERS),
    TableChoice("vllm", "0.17", "0.24", "hopper", f"{_VLLM_FP8}/tp", f"{_VLLM_FP8}@0.19.0", _PREFERS),
)
"""Tables of FP8 and int4 experts up to vLLM 0.22 are of its Triton kernel, whatever its servers chose."""


@dataclass(frozen=True)
class AbsorbedPrefill(KernelChoice):
    """Dense MLA prefill in the latent, as decode attends, where the tokens that a step's sequences have cached already
    are some, but fewer than `below` together; expanded heads otherwise."""

    below: int = 8192


ABSORBED_PREFILLS = (
    AbsorbedPrefill("sglang", "0.4.6", frozenset({"hopper"}), None,
                    "sglang 0.5.9 models/deepseek_common/attention_backend_handler.py: FA3 takes the MLA method unless "
                    "prefixes sum to nothing or to chunked_prefix_cache_threshold; trtllm_mla (Blackwell) never does"),
)  # fmt: skip


@dataclass(frozen=True)
class LatentDecode(KernelChoice):
    """Dense attention of answers in a 16-bit latent by another kernel than the table's, in releases before `until`: it
    takes so many seconds more a call (`more_s`), at any batch and context."""

    until: str
    more_s: float


LATENT_DECODES = (
    LatentDecode("vllm", "0.8", frozenset({"hopper"}), None,
                 "vllm PR 27363 (2025-10-22, in 0.11.1): FlashMLA, the default of Hopper since PR 14451, against "
                 "FlashAttention's, with 16 heads and 1,024 tokens: 43 and 31 us for 1 sequence, 84 and 71 us for 128",
                 until="0.11.1", more_s=13e-6),
)  # fmt: skip


@dataclass(frozen=True)
class DensePrefill(KernelChoice):
    """Sparse attention of prompts that its selection would take whole: with expanded heads and no indexer, as dense
    layers attend, instead of in the latent."""


DENSE_PREFILLS = (
    DensePrefill("sglang", "0.5.5", frozenset({"hopper"}), None,
                 "sglang 0.5.5 models/deepseek_v2.py handle_attention_nsa: MHA_ONE_SHOT up to index_topk keys, SM90"),
    DensePrefill("sglang", "0.5.6", _BOTH, None,
                 "sglang 0.5.6.post1 layers/attention/nsa_backend.py set_nsa_prefill_impl: SM90 and SM100"),
    DensePrefill("vllm", "0.28", _BOTH, None,
                 "vllm 0.28.0 layers/attention/sparse_mla_attention.py use_dense_mha (PR 47327, 2026-07); 0.24.0 and "
                 "older only have the sparse kernel"),
)  # fmt: skip
"""TensorRT-LLM has it behind TRTLLM_MLA_SHORT_SEQ_MHA_THRESHOLD, which is 0 (modules/attention.py)."""


@dataclass(frozen=True)
class UnpackedDecode(KernelChoice):
    """Grouped-query attention whose kernel packs the query heads of a key head into one tile only in calls without
    prompts: beside prompts each head of a decoding sequence fills a tile of `tile` queries alone."""

    tile: int = 64


UNPACKED_DECODES = (
    UnpackedDecode("vllm", "0.8", frozenset({"ampere"}), None,
                   "vllm-project/flash-attention csrc/flash_attn/flash_api.cpp mha_varlen_fwd: seqlenq_ngroups_swapped "
                   "(and split keys) only if max_seqlen_q == 1, and 64 queries a block over a paged cache; vllm "
                   "v1/attention/backends/flash_attn.py has prompts and answers in one call; FlashAttention 3 (Hopper) "
                   "packs paged calls, FlashInfer (Blackwell) splits them"),
)  # fmt: skip

_Choice = TypeVar("_Choice", bound=KernelChoice)


def _chosen(choices: tuple[_Choice, ...], engine: str, release: str, family: str, model: str = "") -> _Choice | None:
    asked = order(release)
    mine = [c for c in choices if c.engine == engine and asked and (order(c.since) or asked) <= asked]
    if not mine or family not in mine[-1].families:
        return None
    return mine[-1] if mine[-1].models is None or model in mine[-1].models else None


def fused_reduce(engine: str, release: str, family: str, model: str) -> FusedReduce | None:
    """What a release chooses; None where its all-reduces stay alone, or none of its releases is known."""
    return _chosen(FUSED_REDUCES, engine, release, family, model)


def fused_shared(engine: str, release: str, family: str, model: str) -> FusedShared | None:
    """What a release chooses; None where the shared expert is computed by itself."""
    return _chosen(FUSED_SHARED, engine, release, family, model)


def beside_routed(engine: str, release: str, family: str, model: str) -> BesideRouted | None:
    """What a release chooses; None where the shared expert waits for the routed ones, or they for it."""
    return _chosen(BESIDE_ROUTED, engine, release, family, model)


def untuned_experts(
    engine: str, release: str, family: str, model: str, weight_format: str, experts: int, width: int
) -> UntunedExperts | None:
    """What a release does with experts of this format, number and width on a rank; None where they are tuned."""
    choice = _chosen(UNTUNED_EXPERTS, engine, release, family, model)
    asked, until = order(release), order(choice.until) if choice else None
    if choice is None or asked is None or until is None or asked >= until:
        return None
    return choice if weight_format in choice.formats and (family, experts, width) not in choice.tuned else None


def table_choices(engine: str, release: str, family: str) -> tuple[TableChoice, ...]:
    """Those that hold for a release."""
    asked = order(release)
    return tuple(
        each
        for each in TABLE_CHOICES
        if (each.engine, each.family) == (engine, family)
        and asked
        and (order(each.since) or asked) <= asked < (order(each.until) or asked)
    )


def absorbed_prefill(engine: str, release: str, family: str) -> AbsorbedPrefill | None:
    """What a release chooses; None where prompts are always computed with expanded heads."""
    return _chosen(ABSORBED_PREFILLS, engine, release, family)


def latent_decode(engine: str, release: str, family: str) -> LatentDecode | None:
    """What a release runs; None where it is what its table was measured with."""
    choice = _chosen(LATENT_DECODES, engine, release, family)
    return choice if choice and (order(release) or ()) < (order(choice.until) or ()) else None


def dense_prefill(engine: str, release: str, family: str) -> DensePrefill | None:
    """What a release chooses, the newest where none is named; None where short prompts are selected from too."""
    return _chosen(DENSE_PREFILLS, engine, release or DENSE_PREFILLS[-1].since, family)


def unpacked_decode(engine: str, release: str, family: str) -> UnpackedDecode | None:
    """What a release does; None where answers are attended to alike in any call, or none of its releases is known."""
    return _chosen(UNPACKED_DECODES, engine, release, family)
