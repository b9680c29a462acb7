"""Bytes of one device, and of packages, with the MTP layer, are the memory ledger's (see `counted`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from backends.emulation.host import Converted, EmulatedCpu
from backends.emulation.number_formats import NumberFormats
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.formats import scheme
from model.ops import dequantise
from model.split import Layout
from model.weights import Quantized, Weight, layer_weights, outer_weights
from runtime.deployment.ledger import stage_kv_bytes_by_cache, stage_weight_bytes
from runtime.deployment.manifest import Layer, Manifest, PackageModel
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.porting.export import shares
from runtime.porting.export.units import Cut, weight_refs
from runtime.porting.quantize import quantize
from tests.deployment.counted import Leaf, count_leaves, formats, merged, placed
from tests.engine.conftest import CONFIGS
from tests.marks import slow_but


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


SCHEMES = [("fp8", "dsa"), ("bf16", "mla"), ("fp8", "gqa"), ("w8a8", "dsa"), ("w4a8", "gqa"), ("w4a16-g16", "mla")]
LAYOUTS = [(Layout(tp=2, ep=2, pp=2), 1), (Layout(tp=2, dp=2), 0)]


@pytest.mark.parametrize(
    ("name", "family", "layout", "redundant"),
    slow_but(
        [(*SCHEMES[at], *LAYOUTS[at % 2]) for at in (0, 1, 3, 4)],
        [(*scheme, *layout) for scheme in SCHEMES for layout in LAYOUTS],
    ),
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
