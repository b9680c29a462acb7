"""What the memory ledger is held to: bytes counted one by one on arrays, with nothing of it or of `model.formats`.

What a matrix of each format takes is written down here from the published formats (docs/number_formats.md); how many
values and scales there are is read off the arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck

from backends.emulation import rounding
from backends.emulation.backend import EmulatedDevices, SimBackend
from backends.emulation.number_formats import NumberFormats
from backends.interface import Order
from backends.spmd import stages
from backends.spmd.cluster import Cluster, Server
from backends.spmd.stages import Held
from model.config import ModelConfig
from model.formats import CacheFormats, Formats, scheme
from model.hf_config import from_hf
from model.split import Grid, Layout, Slots, moe_layers
from model.weights import Quantized, Weight, layer_weights, outer_weights
from tests.engine.conftest import CONFIGS, random_weights


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
        yield from _leaves(held, described, part)


def mtp_leaves_of(cluster: Cluster) -> Iterator[Leaf]:
    """What each device of the last stage holds of the MTP layer, which drafts."""
    described = {w.name: w for w in layer_weights(cluster.cfg, cluster.cfg.mtp_type)}
    (held,) = cluster.mtp_weights["mtp"]
    return _leaves(held, described, own)


def _leaves(held: dict[str, Any], described: dict[str, Weight], part: Any) -> Iterator[Leaf]:
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

    def weight(self, weight: Weight, value: Any, mtp: bool = False) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = (
                value,
                self._formats.weight(weight, value, mtp),
            )  # the value is kept: ids are its own
        return self._made[id(value)][1]


once = cache(Once)


class InMemory(EmulatedDevices):
    """Keeps arrays as they are."""

    def put(self, array: Any, order: Order | None = None) -> Any:
        return array


def cluster_of(
    cfg: ModelConfig,
    weights: dict[str, Any],
    name: str,
    grid: Grid,
    mapped: bool = True,
    rows: Any = CacheFormats(),
    drafts: int = 0,
) -> Cluster:
    """mapped: arrays are cut as the emulation's axes are and stay in host memory, so that nothing is compiled."""
    whole = {"outer": dict(weights["outer"])}
    whole |= {part: [dict(layer) for layer in weights[part]] for part in ("layers", "mtp")}
    if not mapped:
        return SimBackend(mapped=False).cluster(cfg, grid, whole, once(cfg, formats(name, rows)))
    devices = InMemory(None)
    held = [stages.Mapped(grid, devices) for _ in grid.stages]
    return Cluster(cfg, grid, whole, devices, held, once(cfg, formats(name, rows)), drafts)


def server_of(cluster: Cluster) -> Server:
    return cluster.server(3, 4)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


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
