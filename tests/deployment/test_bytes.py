"""Bytes as they lie in written files, on emulated devices and in packages, counted one by one: the memory ledger's.

Nothing expected here is computed by `model.formats` or the ledger. What a matrix of each format takes is written down
below from the published formats (docs/number_formats.md); how many values and scales there are is read off the arrays.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from backends.emulation import rounding
from backends.emulation.backend import EmulatedDevices, SimBackend
from backends.emulation.host import Converted, EmulatedCpu
from backends.emulation.number_formats import NumberFormats
from backends.spmd import stages
from backends.spmd.cluster import Cluster, Server
from backends.spmd.stages import Held
from foundation.errors import UsageError
from model.checkpoint import Checkpoint, save
from model.config import ModelConfig
from model.formats import BF16, FORMATS, ROWS, SCHEMES, CacheFormats, CheckpointLayout, Formats, matrix_format, scheme
from model.hf_config import from_hf
from model.ops import dequantise
from model.quantised import Matrix, quantise
from model.split import Grid, Layout, Slots, moe_layers, share_bytes
from model.weights import Arrangement, Quantized, Weight, layer_weights, outer_weights
from runtime.deployment.ledger import stage_kv_bytes_by_cache, stage_weight_bytes
from runtime.deployment.manifest import Layer, Manifest, PackageModel
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.porting.export import shares
from runtime.porting.export.units import Cut, weight_refs
from runtime.porting.quantize import layout_of, quantize
from tests.engine.conftest import CONFIGS, random_weights

# --- what the formats are, by hand -----------------------------------------------------------------------


class Stored(NamedTuple):
    """Of a matrix [out, in]: bits of a value, of a scale, and of one more number a matrix; the rows and columns that
    share a scale, None for all of them; and the matrices that checkpoints of the format leave in 16 bits."""

    value: int
    scale: int
    rows: int | None
    columns: int | None
    factor: int = 0
    wide: str = r"kv_b_proj"

    def scales(self, out: int, width: int) -> int:
        return -(-out // (self.rows or out)) * -(-width // (self.columns or width))


_MTP = "|MTP"  # all of that layer
PUBLISHED = {
    "fp8-block": Stored(8, 32, 128, 128, wide="nothing"),
    "fp8-tensor": Stored(8, 32, None, None),
    "fp8-channel": Stored(8, 32, 1, None),
    "w8a8-int8": Stored(8, 32, 1, None, wide=r"kv_b_proj|indexer\.wk" + _MTP),
    "w4a8": Stored(4, 32, 1, None, wide=r"kv_b_proj|indexer\.wk" + _MTP),
    "w4a16": Stored(4, 16, 1, 32, wide=r"kv_b_proj" + _MTP),
    "w4a16-g16": Stored(4, 16, 1, 16, wide=r"kv_b_proj" + _MTP),
    "w4afp8": Stored(4, 16, 1, 128, wide=r"kv_b_proj" + _MTP),
    "mxfp8": Stored(8, 8, 1, 32, wide=r"kv_b_proj|indexer\.wk"),
    "mxfp4": Stored(4, 8, 1, 32, wide=r"kv_b_proj|indexer\.wk"),
    "nvfp4": Stored(4, 8, 1, 16, 32, wide=r"kv_b_proj" + _MTP),
    "nvfp4a16": Stored(4, 8, 1, 16, 32, wide=r"kv_b_proj" + _MTP),
}
NEVER = r"embed_tokens|lm_head|norm|bias|mlp\.gate\.|weights_proj|eh_proj"
"""What no format narrows."""
DENSE_AND_EXPERTS = {
    "f32": ("f32", "f32"),
    "bf16": ("bf16", "bf16"),
    "fp8": ("fp8-block", "fp8-block"),
    "fp8-tensor": ("fp8-tensor", "fp8-tensor"),
    "fp8-channel": ("fp8-channel", "fp8-channel"),
    "w8a8": ("w8a8-int8", "w8a8-int8"),
    "w4a8": ("w8a8-int8", "w4a8"),
    "w4a16": ("bf16", "w4a16"),
    "w4afp8": ("fp8-block", "w4afp8"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp4": ("mxfp8", "mxfp4"),
    "nvfp4": ("bf16", "nvfp4"),
    "nvfp4a16": ("bf16", "nvfp4a16"),
    "w4a16-g16": ("bf16", "w4a16-g16"),
    "w4a8/w4a16": ("w4a8", "w4a16"),
    "nvfp4/mxfp4": ("nvfp4", "mxfp4"),
}
BITS = {
    "int4": 4, "float4_e2m1fn": 4, "int8": 8, "float8_e4m3fn": 8, "float8_e8m0fnu": 8, "float16": 16, "bfloat16": 16,
    "float32": 32,
}  # fmt: skip
CARRIED_IN = {"int8": "int4", "float8_e5m2": "float4_e2m1fn"}
"""What a device of the emulation holds 4-bit values in: the type, and the one that it stands for."""


def formats(name: str, rows: CacheFormats = CacheFormats()) -> Formats:
    found = scheme(name)
    wide = "f32" if found.dense == "f32" else "bf16"
    return Formats(found.dense, found.experts, wide, CacheFormats.plain("f32") if wide == "f32" else rows)


def published(name: str, component: str) -> Stored | None:
    """What a scheme keeps a component's matrices in; None: as they are."""
    dense, experts = DENSE_AND_EXPERTS[name]
    return PUBLISHED.get(experts if component == "experts" else dense)


def test_every_format_is_here() -> None:
    """A format that is added is counted by these tests, or named as missing from them."""
    assert {name for name, fmt in FORMATS.items() if fmt.narrow} == set(PUBLISHED) - {"w4a16-g16"}
    assert set(SCHEMES) <= set(DENSE_AND_EXPERTS)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=12)
@given(data=st.data())
def test_a_matrix_takes_its_values_and_scales(name: str, data: st.DataObject) -> None:
    """Of any shape, alone or stacked as experts' gate and up are: the arrays that rounding makes, bit by bit."""
    out, width = 2 * data.draw(st.integers(1, 150), "half out"), data.draw(st.integers(1, 300), "in")
    experts, stored = data.draw(st.integers(0, 3), "experts"), PUBLISHED[name]
    fmt = matrix_format(name)
    lead = (experts, 2) if experts else ()
    whole = np.random.default_rng(0).standard_normal((*lead, out, width)).astype(np.float32)
    try:
        made = quantise(fmt, whole)
    except ValueError:
        assume(False)
        raise
    matrices = int(np.prod(lead, dtype=int))
    assert (BITS[made.values.dtype.name], BITS[made.scale.dtype.name]) == (stored.value, stored.scale)
    assert (made.values.size, made.scale.size) == (whole.size, matrices * stored.scales(out, width))
    assert (made.factor is not None) == bool(stored.factor)
    shape = (experts, width, 2, out) if experts else (width, out)
    kind = Arrangement.GATE_UP if experts else Arrangement.MATRIX
    weight = Weight("w", shape, (None,) * len(shape), ("w",), kind, "experts", True, expert_count=experts)
    assert share_bytes(weight, fmt, shape) == _matrix_bits(made) / 8


def _matrix_bits(made: Matrix) -> int:
    return sum(array.size * BITS[array.dtype.name] for array in made if array is not None)


# --- models ----------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "q_lora_rank": 96, "kv_lora_rank": 64,
}  # fmt: skip
ODD: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 96, "n_shared_experts": 2,
    "num_hidden_layers": 5, "num_attention_heads": 8, "n_routed_experts": 8, "q_lora_rank": 80, "kv_lora_rank": 160,
    "v_head_dim": 40,
}  # fmt: skip
INDEXERS = ["full", "shared", "full", "shared", "shared"]
OWN: dict[str, dict[str, Any]] = {"dsa": {}, "gqa": {}, "mla": {"tie_word_embeddings": True}}


def raw(family: str, **sizes: Any) -> dict[str, Any]:
    """A small model: "dsa" as GLM-5 with layers that share a selection, "mla" as DeepSeek-V3 with a tied head, "gqa"
    as GLM-4.5; each with an MTP layer."""
    layers = sizes["num_hidden_layers"]
    found = {**CONFIGS[family], **OWN[family], **sizes}
    if family == "dsa":
        found["indexer_types"] = INDEXERS[:layers]
    found["num_key_value_heads"] = found["num_attention_heads"]
    if family == "gqa":
        found |= {"num_attention_heads": 2 * found["num_attention_heads"], "head_dim": sizes.get("v_head_dim", 32)}
    return found


@cache
def weights_of(family: str) -> tuple[ModelConfig, dict[str, Any]]:
    cfg = from_hf(raw(family, **ODD))
    return cfg, random_weights(cfg)


# --- written files ---------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, as its files' headers have it; nothing lies between them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        here = {
            n: Tensor(e["dtype"], tuple(e["shape"]), -int(np.subtract(*e["data_offsets"]))) for n, e in header.items()
        }
        assert sum(tensor.bytes for tensor in here.values()) == path.stat().st_size - 8 - size
        found |= here
    return found


PARTS = r"(?:(_scale_inv|_scale|_packed|_global_scale|_shape|_offset)|(?:\.weight)?(\.scale_bias))?$"
SPARE = ("_shape", "_offset", ".scale_bias")
"""Written beside a matrix for its readers: shapes, zero points that are all 0, and what an integer kernel adds."""
COMPONENTS = (
    (r"embed_tokens", "embedding"), (r"lm_head", "head"), (r"mlp\.gate\.", "router"), (r"norm", "norms"),
    (r"\.indexer\.", "indexer"), (r"self_attn", "attention"), (r"shared_experts", "shared_experts"),
    (r"\.experts\.", "experts"), (r"mlp\.", "dense_ffn"),
)  # fmt: skip


class Counted(NamedTuple):
    """Bytes that a device holds of a file's tensors, by component, and by name what it holds in another size."""

    held: Counter[str]
    differs: dict[str, tuple[int, int]]


def count_file(written: dict[str, Tensor], source: dict[str, Tensor], name: str, layers: int) -> Counted:
    """What one device holds of a checkpoint's file. source: what it was made of, which has each matrix's shape."""
    held: Counter[str] = Counter()
    differs: dict[str, tuple[int, int]] = {}
    rest = dict(written)
    for tensor, plain in source.items():
        bare = tensor.removesuffix(".weight")
        parts = {
            suffix: rest.pop(full)
            for suffix in ("", "_packed", "_scale", "_scale_inv", "_global_scale", *SPARE)
            if (full := bare + suffix if suffix == ".scale_bias" else tensor + suffix) in rest
        }
        found = re.match(r"model\.layers\.(\d+)\.", tensor)
        mtp = bool(found) and int(found[1]) >= layers  # type: ignore[index]
        component = "mtp" if mtp else next(c for pattern, c in COMPONENTS if re.search(pattern, tensor))
        stored = published(name, "experts" if ".experts." in tensor else component)
        wide = stored is None or re.search(NEVER, tensor) or re.search(stored.wide, tensor + " MTP" * mtp)
        if wide or stored is None:
            (only,) = parts.items()  # as it is, nothing beside it
            assert only[0] == "" and only[1].shape == plain.shape, tensor
            of_float32 = name == "f32" or tensor.endswith("e_score_correction_bias")
            size = int(np.prod(plain.shape)) * (4 if of_float32 else 2)
        else:
            out, width = plain.shape
            spare = {suffix: parts.pop(suffix) for suffix in SPARE if suffix in parts}
            differs |= {tensor + suffix: (part.bytes, 0) for suffix, part in spare.items()}
            factor = parts.pop("_global_scale", Tensor("F32", (), 0))
            (values,) = [parts.pop(s) for s in ("", "_packed") if s in parts]
            ((_, scale),) = parts.items()
            assert values.bytes * 8 == out * width * stored.value, tensor
            assert scale.bytes * 8 == stored.scales(out, width) * stored.scale, tensor
            assert factor.bytes * 8 == stored.factor, tensor
            parts = {"values": values, "scale": scale, "factor": factor}
            size = sum(part.bytes for part in parts.values())
            if "kv_b_proj" in tensor:  # its halves are widened when loaded
                size = out * width * 2
        if size != (in_file := sum(part.bytes for part in parts.values())):
            differs[tensor] = (in_file, size)
        held[component] += size
    assert not rest, sorted(rest)
    return Counted(held, differs)


def spellings(name: str) -> list[CheckpointLayout | None]:
    def admitted(layout: CheckpointLayout) -> bool:
        try:
            return layout_of(scheme(name), layout) == layout
        except UsageError:
            return False

    return [layout for layout in get_args(CheckpointLayout) if admitted(layout)] or [None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family as releases have it: bfloat16, the router's bias in float32."""
    folder = tmp_path_factory.mktemp("bytes")
    for family in CONFIGS:
        config = raw(family, **SIZES)
        made = random_weights(from_hf(config))
        for held in (made["outer"], *made["layers"], *made["mtp"]):
            held |= {name: value.astype(BF16) for name, value in held.items() if name != "router_bias"}
        save(folder / family, config, made)
    return {family: folder / family for family in CONFIGS}


def every(fast: dict[str, tuple[str, ...]]) -> list[Any]:
    """Every scheme of every family; slow but for those named."""
    return [
        pytest.param(name, family, marks=() if name in fast[family] else pytest.mark.slow)
        for family in CONFIGS
        for name in DENSE_AND_EXPERTS
    ]


@pytest.mark.parametrize(
    ("name", "family"), every({"dsa": tuple(DENSE_AND_EXPERTS), "mla": ("fp8", "w4a8"), "gqa": ("f32", "nvfp4")})
)
def test_written_bytes_are_the_ledgers(sources: dict[str, Path], tmp_path: Path, name: str, family: str) -> None:
    """A checkpoint that is written in a scheme has the bytes that the ledger says one device holds, MTP included, but
    for what each allowance here names."""
    source = Checkpoint(sources[family])
    before = tensors_in(source.path)
    ledger = stage_weight_bytes(source.config, Layout(), formats(name), 0, mtp=True)
    for layout in spellings(name):
        out = tmp_path / str(layout)
        result = quantize(source, scheme(name), out, layout)
        written = tensors_in(out)
        found = count_file(written, before, name, source.config.num_layers)
        assert found.held == ledger, layout
        assert result.bytes == sum(tensor.bytes for tensor in written.values())
        assert result.bytes - sum(a - b for a, b in found.differs.values()) == sum(ledger.values())
        allowed = {
            "f32": r".*",  # plain tensors keep the source's 16 bits in the file
            "fp8": r".*kv_b_proj\.weight$",
            "w4afp8": r".*kv_b_proj\.weight$",
        }.get(name, "nothing")
        opened = Checkpoint(out)
        for tensor, (in_file, held) in found.differs.items():
            spare = tensor.endswith(SPARE)
            assert spare or re.match(allowed, tensor), (tensor, in_file, held)
            if spare:
                assert held == 0 and (not tensor.endswith("_offset") or not opened.array(tensor).any())
    if source.config.tie_embeddings:
        assert "lm_head.weight" not in before and "head" not in ledger


def test_a_float32_source_leaves_wide_tensors(tmp_path: Path) -> None:
    """Tensors that no format narrows are written as they were: float32 ones take twice what a device holds of them."""
    config = raw("dsa", **SIZES)
    cfg = from_hf(config)
    save(tmp_path / "source", config, random_weights(cfg))
    quantize(Checkpoint(tmp_path / "source"), scheme("w8a8"), tmp_path / "out")
    before, written = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "out")
    found = count_file(written, before, "w8a8", cfg.num_layers)
    assert found.held == stage_weight_bytes(cfg, Layout(), formats("w8a8"), 0, mtp=True)
    plain = {n: (a, b) for n, (a, b) in found.differs.items() if not n.endswith(SPARE)}
    assert plain and all(in_file == 2 * held and before[n].dtype == "F32" for n, (in_file, held) in plain.items())
    assert not any(name.endswith("e_score_correction_bias") for name in plain)


# --- emulated devices ------------------------------------------------------------------------------------

Leaf = tuple[Weight, np.ndarray, np.ndarray | None]
"""A weight as one device holds it: its values, and its scales where it is narrow."""


def weight_bits(name: str, weight: Weight, values: np.ndarray, scale: np.ndarray | None) -> int:
    """Bits of what a device holds of a weight: each element of its arrays once, at the size the chip stores it in."""
    if scale is None:
        return values.size * BITS[values.dtype.name]
    stored = published(name, weight.component)
    assert stored is not None and weight.matrix_dims is not None, weight.name
    if stored.value == 4:  # held in bytes; that four bits are enough is checked here
        narrow = values.astype(np.dtype(getattr(ml_dtypes, CARRIED_IN[values.dtype.name])))
        assert (narrow.astype(np.float32) == values.astype(np.float32)).all(), weight.name
    else:
        assert BITS[values.dtype.name] == stored.value, weight.name
    matrices = values.size // int(np.prod([values.shape[dim] for dim in weight.matrix_dims]))
    if stored.factor:  # which the emulation has multiplied into the scales
        assert scale.dtype == np.float32
    else:
        assert BITS[scale.dtype.name] == stored.scale, weight.name
    return values.size * stored.value + scale.size * stored.scale + matrices * stored.factor


def count_leaves(name: str, leaves: Iterable[Leaf]) -> Counter[str]:
    """Bytes by component; copies of experts are among "experts"."""
    bits: Counter[str] = Counter()
    for weight, values, scale in leaves:
        bits[weight.component] += weight_bits(name, weight, values, scale)
    assert not any(size % 8 for size in bits.values())
    return Counter({component: size // 8 for component, size in bits.items()})


def own(held: Any) -> np.ndarray:
    """One device's part of an array that has a leading dim for each mesh axis."""
    assert isinstance(held, Held)
    return np.asarray(held.array)[(0,) * len(held.axes)]


def leaves_of(cluster: Cluster, number: int, part: Any = own) -> Iterator[Leaf]:
    """What each device of a stage holds; `part(array)` is one device's. The tables of experts' slots are left out:
    4 bytes an expert and copy, which the ledger does not have."""
    placed = cluster.weights[number]
    described = {w.name: w for kind in cluster.cfg.layers for w in layer_weights(cluster.cfg, kind)}
    described |= {w.name: w for w in outer_weights(cluster.cfg)}
    for held in (placed["outer"], *placed["layers"]):
        assert set(held) - set(described) <= {"expert_slots"}
        for key, value in held.items():
            if isinstance(value, Quantized):
                yield described[key], part(value.values), part(value.scale)
            elif key != "expert_slots":
                yield described[key], part(value), None


def merged(ledger: dict[str, float]) -> Counter[str]:
    """The ledger with copies of experts among the experts; every size a whole number of bytes."""
    assert all(size == int(size) for size in ledger.values()), ledger
    found = Counter({component: int(size) for component, size in ledger.items()})
    found["experts"] += found.pop("redundant_experts", 0)
    return +found


def placed(cfg: ModelConfig, layout: Layout, redundant: int) -> Grid:
    """Experts in shuffled slots, with copies of some of them in `redundant` more slots a device."""
    if not layout.by_expert or cfg.moe is None:
        return Grid.of(cfg, layout)
    rng, count = np.random.default_rng(redundant), cfg.moe.experts

    def row() -> tuple[int, ...]:
        copies = rng.integers(0, count, redundant * layout.ep)
        return tuple(int(e) for e in rng.permutation(np.concatenate([np.arange(count), copies])))

    slots = Slots(count // layout.ep + redundant, tuple(row() for _ in moe_layers(cfg)))
    return Grid.of(cfg, layout, slots)


class Once:
    """Number formats that convert each array once, however many clusters it is placed on."""

    def __init__(self, cfg: ModelConfig, wanted: Formats):
        self._formats = NumberFormats(cfg, wanted)
        self.dtype, self.lowerings = self._formats.dtype, self._formats.lowerings
        self._made: dict[int, tuple[Any, Any]] = {}

    def weight(self, weight: Weight, value: Any) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._formats.weight(weight, value))  # the value is kept: ids are its own
        return self._made[id(value)][1]


once = cache(Once)


class InMemory(EmulatedDevices):
    """Keeps arrays as they are."""

    def put(self, array: Any) -> Any:
        return array


def cluster_of(
    cfg: ModelConfig, weights: dict[str, Any], name: str, grid: Grid, mapped: bool = True, rows: Any = CacheFormats()
) -> Cluster:
    """mapped: arrays are cut as the emulation's axes are and stay in host memory, so that nothing is compiled."""
    whole = {"outer": dict(weights["outer"]), "layers": [dict(layer) for layer in weights["layers"]]}
    if not mapped:
        return SimBackend(mapped=False).cluster(cfg, grid, whole, once(cfg, formats(name, rows)))
    devices = InMemory(None)
    held = [stages.Mapped(grid, devices) for _ in grid.stages]
    return Cluster(cfg, grid, whole, devices, held, once(cfg, formats(name, rows)))


def server_of(cluster: Cluster) -> Server:
    return cluster.server(3, 4)


OVER_TP = {
    "q", "q_b", "k_up", "v_up", "o", "k", "v", "q_bias", "k_bias", "v_bias", "gate_up", "down", "shared_gate_up",
    "shared_down", "embed", "head",
}  # fmt: skip


def check_shares(cluster: Cluster, stage: int, leaves: list[Leaf], redundant: int) -> None:
    """Who holds what: heads, widths and vocabulary over tp, experts over all devices of a stage, the rest everywhere;
    the ends of the model on its ends, a tied head's embedding on both; indexers where a layer has its own."""
    cfg, layout = cluster.cfg, cluster.grid.layout
    for weight, values, _ in leaves:
        whole, parts = int(np.prod(weight.shape)), layout.tp if weight.name in OVER_TP else 1
        if weight.name.startswith("experts_"):
            parts = layout.tp * layout.dp
            whole += whole // weight.shape[0] * redundant * parts
        assert values.size * parts == whole, weight.name
    span, ends = cluster.grid.stages[stage], {"embed"} if stage == 0 else set()
    if stage == layout.pp - 1:
        ends |= {"final_norm", "embed" if cfg.tie_embeddings else "head"}
    assert set(cluster.weights[stage]["outer"]) == ends
    own_indexer = [layer for layer in span if cfg.indexer and INDEXERS[layer] == "full"]
    assert sum(weight.name == "index_k" for weight, *_ in leaves) == len(own_indexer)


def check_weights(cfg: ModelConfig, weights: dict[str, Any], name: str, layout: Layout, redundant: int) -> None:
    cluster = cluster_of(cfg, weights, name, placed(cfg, layout, redundant))
    for stage in range(layout.pp):
        ledger = stage_weight_bytes(cfg, layout, formats(name), stage, False, redundant)
        leaves = list(leaves_of(cluster, stage))
        assert count_leaves(name, leaves) == merged(ledger), (name, layout.name, stage)
        check_shares(cluster, stage, leaves, redundant)


LAYOUTS = [
    (Layout(tp=8), 0),  # cuts blocks and groups
    (Layout(tp=2, dp=2), 0),  # experts' width over both
    (Layout(tp=2, dp=2, ep=4, pp=2), 1),  # stages of three and two layers
]


@pytest.mark.parametrize(("layout", "redundant"), LAYOUTS, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_held_bytes_are_the_ledgers(name: str, layout: Layout, redundant: int) -> None:
    """Values and scales that lie on a device, copies of experts and of what every device holds included."""
    families = list(CONFIGS)
    turn = list(DENSE_AND_EXPERTS).index(name) + LAYOUTS.index((layout, redundant))
    family = families[turn % len(families)]  # all of them in the slow suite
    check_weights(*weights_of(family), name, layout, redundant)


MORE = [
    (Layout(), 0),
    (Layout(dp=4, ep=4, pp=3), 0),
    (Layout(tp=4, pp=5), 0),
    (Layout(tp=4, dp=2, ep=8), 2),
    (Layout(dp=8), 0),
    (Layout(tp=8, ep=8, pp=2), 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_held_bytes_of_every_family_and_layout(name: str, family: str) -> None:
    for layout, redundant in (*LAYOUTS, *MORE):
        check_weights(*weights_of(family), name, layout, redundant)


def check_random(data: st.DataObject) -> None:
    eights = st.integers(1, 24).map(lambda n: 8 * n)
    tp, dp = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (2, 4), (1, 4)]), "tp, dp")
    split, family = data.draw(st.booleans(), "by expert"), data.draw(st.sampled_from(sorted(CONFIGS)), "family")
    layout = Layout(tp, dp, tp * dp if split else 1, data.draw(st.integers(1, 2), "pp"))
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    sizes = {**ODD, "num_hidden_layers": 2, "v_head_dim": data.draw(st.sampled_from([8, 24, 32]), "v")}
    cfg = from_hf(raw(family, **{**sizes, **{name: data.draw(eights, name) for name in names}}))
    name = data.draw(st.sampled_from(sorted(DENSE_AND_EXPERTS)), "scheme")
    redundant = data.draw(st.integers(0, 2), "redundant") if layout.by_expert else 0
    try:
        check_weights(cfg, random_weights(cfg), name, layout, redundant)
    except UsageError:  # a width that does not divide into the format's groups
        assume(False)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=10, **QUIET)
@given(data=st.data())
def test_held_bytes_of_random_shapes(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(data=st.data())
def test_held_bytes_of_many_random_shapes(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
def test_host_devices_hold_the_ledgers_bytes() -> None:
    """XLA host devices, one a device of the layout: what each of them has, by itself."""
    words = [sys.executable, "-c", "from tests.deployment.test_bytes import check_hosts; check_hosts()"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def check_hosts() -> None:
    for family, name in (("dsa", "fp8"), ("mla", "w4a8"), ("gqa", "nvfp4")):
        cfg, weights = weights_of(family)
        for layout, redundant in ((Layout(tp=2, dp=2, ep=4, pp=3), 1), (Layout(tp=4, dp=2, pp=2), 0)):
            cluster = cluster_of(cfg, weights, name, placed(cfg, layout, redundant), mapped=False)
            server = server_of(cluster)
            for stage in range(layout.pp):
                ledger = merged(stage_weight_bytes(cfg, layout, formats(name), stage, False, redundant))
                rows = stage_kv_bytes_by_cache(cfg, layout, CacheFormats(), stage, False)
                for device in cluster.stages[stage].mesh.devices.flat:  # type: ignore[attr-defined]

                    def part(array: Any, device: Any = device) -> np.ndarray:
                        (found,) = [s.data for s in array.addressable_shards if s.device == device]
                        return np.asarray(found)

                    assert count_leaves(name, leaves_of(cluster, stage, part)) == ledger
                    assert token_bytes(server, stage, part) == rows


# --- caches ----------------------------------------------------------------------------------------------


def token_bytes(server: Server, stage: int, part: Any = own) -> Counter[str]:
    """Bytes a token that a device's pages take, by cache, at the size in which rows are stored."""
    held: Counter[str] = Counter()
    for layer in server.caches[stage]:
        for name, pages in layer.items():
            array = part(pages)
            tokens = array.shape[0] * array.shape[1]
            assert tokens == (server.pages + 1) * server.page_size
            bits = row_bits(server.cluster.formats, name, array.shape[2:], array.dtype.name)
            assert bits % 8 == 0
            held[name] += bits // 8
    return held


CALIBRATED = {"key", "value"}
"""Caches whose INT8 scales a chip has from calibration, none a token; the emulation finds one a token and head."""


@cache
def row_bits(held: Any, name: str, shape: tuple[int, ...], pages: str) -> int:
    """Bits of a token's row, seen from what writing rows does: how many elements stay as they are in the type of the
    `pages`, what the others are rounded to, and the scales that are made for them."""
    narrow: set[str] = set()
    scales: list[Any] = []
    to_type, restored = rounding.to_type, rounding.restored

    def seen_type(x: Any, dtype: np.dtype) -> Any:
        narrow.add(np.dtype(dtype).name)
        return to_type(x, dtype)

    def seen_scales(rounded: rounding.Rounded, *rest: Any) -> Any:
        scales.append(rounded.scale)
        return restored(rounded, *rest)

    tokens = 24
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, *shape)), jnp.dtype(pages))
    write = held.lowerings({"glm.cache_write": lambda pages, rows, slots, *, cache: rows})["glm.cache_write"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "to_type", seen_type)
        patch.setattr(rounding, "restored", seen_scales)
        traced = jax.jit(lambda rows: write(None, rows, None, cache=name)).lower(rows)
    written = traced.compile({"xla_llvm_disable_expensive_passes": True})(rows)
    kept = (np.asarray(written) == np.asarray(rows))[0].all(axis=0)
    total = int(np.prod(shape))
    assert kept.size == total
    changed = total - int(kept.sum())
    bits = int(kept.sum()) * BITS[pages]
    if changed:
        (dtype,) = narrow
        bits += changed * BITS[dtype]
    for scale in scales:
        if name in CALIBRATED:
            assert scale.size == tokens * shape[0]
        else:
            bits += scale.size // tokens * BITS[scale.dtype.name]
    return bits


CACHES = {
    "bf16": CacheFormats("bf16", "bf16", "bf16"),
    "8-bit index": CacheFormats("bf16", "fp8_scaled", "bf16"),
    "fp8": CacheFormats("fp8", "fp8_scaled", "fp8"),
    "fp8 on Hopper": CacheFormats("fp8_ds_mla", "fp8_scaled", "fp8"),
    "int8": CacheFormats("int8_packed", "int8_scaled", "int8"),
}


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("dsa", form) for form in CACHES),
        *((family, form) for family in ("mla", "gqa") for form in ("bf16", "fp8", "int8")),
    ],
)
def test_cache_rows_are_the_ledgers(family: str, form: str) -> None:
    """A token's rows in the pages of each device: latents and index keys whole, KV heads split, none where a selection
    is shared."""
    cfg, weights = weights_of(family)
    for layout in (Layout(dp=2, pp=3), Layout(tp=4, dp=2, pp=2)):
        cluster = cluster_of(cfg, weights, "bf16", Grid.of(cfg, layout), rows=CACHES[form])
        server = server_of(cluster)
        for stage in range(layout.pp):
            ledger = stage_kv_bytes_by_cache(cfg, layout, CACHES[form], stage, False)
            assert token_bytes(server, stage) == ledger, (layout.name, stage)
            indexed = [layer for layer, caches in zip(cluster.grid.stages[stage], server.caches[stage], strict=True)
                       if "index" in caches]  # fmt: skip
            assert indexed == [n for n in cluster.grid.stages[stage] if family == "dsa" and INDEXERS[n] == "full"]


@pytest.mark.parametrize(
    ("name", "width", "rope", "expected"),
    [
        ("bf16", 576, 64, 1152),
        ("fp8", 576, 64, 576),
        ("fp8_ds_mla", 576, 64, 656),
        ("int8_packed", 576, 64, 656),
        ("fp8_scaled", 128, 0, 132),
        ("int8_scaled", 128, 0, 130),
    ],
)
def test_rows_of_full_size(name: str, width: int, rope: int, expected: int) -> None:
    """GLM-5's own widths: the records that engines document, made by the emulation."""
    rows = CacheFormats("bf16", name, "bf16") if width == 128 else CacheFormats(name, "bf16", "bf16")
    cfg = from_hf(raw("dsa", **{**ODD, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}))
    held = NumberFormats(cfg, Formats(cache=rows))
    assert row_bits(held, "index" if width == 128 else "latent", (width,), "bfloat16") == 8 * expected
    assert ROWS[name].bytes(width, rope) == expected


# --- one device, and packages, with the MTP layer ---------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_single_device_holds_the_ledgers_bytes(sources: dict[str, Path], family: str) -> None:
    """The serving engine on one device, drafting: weights and cache of the MTP layer beside the main stack's."""
    from backends import registry

    cfg, drafting = Checkpoint(sources[family]).config, EngineConfig(drafts=1)
    for name in ("f32", "w8a8", "nvfp4"):
        wanted, numbers = formats(name), NumberFormats(cfg, formats(name))
        if name in ("f32", "bf16"):
            checkpoint, backend = Checkpoint(sources[family]), registry.usable("cpu")
        else:
            checkpoint, backend = Converted(sources[family], numbers), EmulatedCpu(numbers)
        engine = load_engine(checkpoint, backend, drafting, numbers.dtype, keep_fp8=name not in ("f32", "bf16"))
        programs, ledger = engine.programs, stage_weight_bytes(cfg, Layout(), wanted, 0, mtp=True)
        mtp = count_leaves(name, whole_leaves(cfg, programs.weights["mtp"], layer_weights(cfg, cfg.mtp_type)))
        assert sum(mtp.values()) == ledger.pop("mtp"), name
        main = [programs.weights["outer"], *programs.weights["layers"]]
        described = [*outer_weights(cfg), *(w for kind in cfg.layers for w in layer_weights(cfg, kind))]
        assert count_leaves(name, whole_leaves(cfg, main, described)) == ledger, name
        assert programs.mtp_cache is not None
        rows: Counter[str] = Counter()
        for layer in (*programs.caches, programs.mtp_cache):
            for key, pages in layer.items():
                rows[key] += pages.nbytes // (pages.shape[0] * pages.shape[1])
        assert rows == stage_kv_bytes_by_cache(cfg, Layout(), wanted.cache, 0, True)


def whole_leaves(cfg: ModelConfig, held: Iterable[dict[str, Any]], described: Iterable[Weight]) -> Iterator[Leaf]:
    by_name = {weight.name: weight for weight in described}
    for weights in held:
        for key, value in weights.items():
            parts = value if isinstance(value, Quantized) else (value, None)
            yield by_name[key], np.asarray(parts[0]), None if parts[1] is None else np.asarray(parts[1])


def file_bytes(path: Path) -> int:
    """Of the tensors in a safetensors file, tables of expert slots left out."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    ends = {n: each["data_offsets"] for n, each in header.items() if n != "__metadata__" and "expert_slots" not in n}
    return sum(end - begin for begin, end in ends.values())


@pytest.mark.parametrize(("layout", "redundant"), [(Layout(tp=2, ep=2, pp=2), 1), (Layout(tp=2, dp=2), 0)])
@pytest.mark.parametrize(
    ("name", "family"),
    [("fp8", "dsa"), ("bf16", "mla"), ("fp8", "gqa"), ("w8a8", "dsa"), ("w4a8", "gqa"), ("w4a16-g16", "mla")],
)
def test_packages_hold_the_ledgers_bytes(
    sources: dict[str, Path], tmp_path: Path, name: str, family: str, layout: Layout, redundant: int
) -> None:
    """The weights that an exported package gives each device, MTP layer and its copies of experts included."""
    quantize(Checkpoint(sources[family]), scheme(name), tmp_path / name)
    checkpoint = Checkpoint(tmp_path / name)
    cfg, grid = checkpoint.config, placed(checkpoint.config, layout, redundant)
    kept = name == "fp8"
    what = Cut(cfg, grid, "bfloat16", scheme(name), 16, 8)
    manifest = Manifest(
        format="onnx", model=PackageModel("m", "m", "", 1, 1, 1, ()), dtype="bfloat16", formats=name, page_size=16,
        pool_pages=8, axes=what.axes, programs=(), layers=tuple(Layer(i, k.name) for i, k in enumerate(cfg.layers)),
        caches={}, weights={n: weight_refs(what, k) for n, k in {"outer": None, **what.unit_types}.items()},
        devices=shares.devices(cfg, grid), toolchain={}, files={}, mtp=cfg.mtp_type.name,
    )  # fmt: skip
    held: dict[int, list[tuple[str, np.ndarray]]] = {device.index: [] for device in manifest.devices}
    shares.each_share(checkpoint, grid, manifest.devices, manifest, lambda d, n, a: held[d.index].append((n, a)))
    files = shares.write_files(tmp_path, checkpoint, grid, manifest.devices, manifest)
    described = {w.name: w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)}
    described |= {w.name: w for w in outer_weights(cfg)}
    refs = {ref.name.partition(".")[2]: ref for found in manifest.weights.values() for ref in found}
    whole = checkpoint.load()["layers"][0]
    for device in manifest.devices:
        arrays = dict(held[device.index])
        assert all(refs[n.removeprefix("layers.").partition(".")[2]].shape == a.shape for n, a in held[device.index])
        if (
            kept and device.stage == 0
        ):  # blocks that the cut goes through: the scales are those of the share's own values
            values, scale = (arrays[f"layers.0.down.{part}"] for part in ("values", "scale"))
            wide = np.asarray(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32))
            np.testing.assert_array_equal(wide, shares.share(whole["down"], described["down"], grid, device))
        found: Counter[str] = Counter()
        for full, array in held[device.index]:
            owner, key = full.removesuffix(".values").removesuffix(".scale").rsplit(".", 1)
            if key == "expert_slots":
                continue
            component = "mtp" if owner == "mtp" else described[key].component
            found[component] += -(-array.size // 2) if array.dtype == ml_dtypes.int4 else array.nbytes
        assert sum(found.values()) == file_bytes(tmp_path / files[device.index])
        if device.stage < layout.pp - 1:  # every end is given all outer weights, of which the first needs the embedding
            extra = {n: array.nbytes for n, array in held[device.index]}
            found["norms"] -= extra["outer.final_norm"]
            found["head"] -= extra.get("outer.head", 0)
        ledger = merged(stage_weight_bytes(cfg, layout, formats(name), device.stage, True, redundant))
        for sizes in (found, ledger):  # copies of the MTP layer's experts are experts to the ledger
            sizes["experts"] += sizes.pop("mtp", 0)
        assert +found == ledger, device
