"""Compiles for an H200 that is not here a layer of each type, and whole steps as the engine has them, and prints what
came of it as JSON. A process of its own: JAX's CUDA plugin is asked for, which the other checks must not have.

    python -m tests.kernels.deviceless layers|decompositions|models|steps|spread
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.pop("JAX_PLATFORMS", None)
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from backends.cuda import CudaBackend
from backends.kernels import table
from backends.orders import laid
from backends.spmd.cluster import Cluster, Plain
from backends.spmd.stages import Hosts
from bench.rank import RANK
from model import abstract, graph, ops
from model.config import ModelConfig
from model.formats import E4M3, CacheFormats
from model.graph import Batch, Mode
from model.hf_config import from_hf, load_config
from model.split import Grid, Layout
from model.weights import Quantized, Weight, layer_weights, outer_weights
from runtime.execution.local.programs import Programs
from runtime.serving.executor import TokenChoice

H200 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
OPERATIONS = "fusion|custom-call|copy|transpose|sort|dot|while|call|scatter|gather"
STEPS = {"b1": (1, 1, 130), "b64": (64, 1, 130), "t2048": (1, 2048, 128), "first2048": (1, 2048, 32)}
"""Sequences, tokens, pages of 64. The first 2,048 tokens are all that they see, so attention expands the latents."""

MODELS = ("glm-4.7-flash", "glm-4.5-air")
"""Whole on one device: of latent attention, and of grouped queries."""


def figures(
    cfg: ModelConfig, kind: Any, step: tuple[int, int, int], kernels: bool, sharding: Any, fp8: bool = True
) -> dict[str, Any]:
    sequences, tokens, pages = step
    shape = abstract.StepShape(sequences, tokens, pages)
    mode = Mode("expanded" if tokens > 1 else "absorbed")

    def layer(w: Any, cache: Any, x: Any, view: Any) -> Any:
        return graph.layer(cfg, kind, w, x, cache, view, None, mode)

    at = jax.ShapeDtypeStruct((sequences, tokens), jnp.int32)
    view = graph.View(at, at, jax.ShapeDtypeStruct((sequences, pages), jnp.int32))
    x = jax.ShapeDtypeStruct((sequences, tokens, cfg.hidden_size), jnp.bfloat16)
    weights = abstract.abstract_weights(cfg, kind, keep_fp8=fp8)
    args: Any = (weights, abstract.abstract_cache(cfg, kind, shape.pages, 64), x, view)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    run = ops.substitute(layer, table.lowerings((9, 0)) if kernels else {})
    compiled = jax.jit(run, donate_argnums=(1,)).lower(*args).compile(CudaBackend.compiler_options)
    return counted(compiled)


def counted(compiled: Any) -> dict[str, Any]:
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    found = Counter(
        called[1] if (called := re.search(r'custom_call_target="([^"]+)"', line)) else match[1]
        for line in entry.splitlines()
        if (match := re.search(rf"= \S+.* ({OPERATIONS})\(", line))
    )
    aliases = re.search(r"input_output_alias=\{(.*?) \}, ", text)
    memory = compiled.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes,
        "largest_bytes": max(map(made_bytes, entry.splitlines())), "kernels": dict(found),
        "launches": sum(found.values()), "aliased": len(re.findall("-alias", aliases[1])) if aliases else 0,
        "host": len(re.findall(r"\b(infeed|outfeed|send|recv|custom-call\S*callback)\b", entry)),
        "collectives": dict(Counter(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-permute)-start\(", entry))),
    }  # fmt: skip


def made_bytes(line: str) -> int:
    """Of the largest array that a line's launch makes."""
    if not (made := re.search(rf"= (.*?) ({OPERATIONS})\(", line)):
        return 0
    shapes = re.findall(r"(pred|bf16|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]", made[1])
    sizes = {"pred": 8, "bf16": 16}
    return max(
        (sizes.get(name) or int(bits)) // 8 * math.prod(map(int, filter(None, dims.split(","))))
        for name, bits, dims in shapes
    )


class Compiled(Exception):
    """What came of a program that cannot be run here."""

    def __init__(self, compiled: Any):
        super().__init__()
        self.compiled = compiled


class Deviceless(CudaBackend):
    """The adapter as far as a program can be taken without a device."""

    def __init__(self, sharding: Any):
        self._sharding = sharding

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def _shardings(self, artifact: Any, exported: Any, devices: Any) -> Any:
        return [self._sharding] * len(exported.in_avals)

    def load(self, artifact: Any, devices: Any = ()) -> Any:
        raise Compiled(super().load(artifact, devices))


NARROW = CacheFormats("fp8_ds_mla", "fp8_scaled")


def step_figures(
    rows: int, drawn: bool, sharding: Any, kept: CacheFormats | None = None, lying: str | None = None
) -> dict[str, Any]:
    """A decode step of two layers with embedding and head, by the engine's own road from graph to executable. lying:
    matrices of `glm.linear` are in bfloat16 and lie as the graph ("[in, out]") or checkpoints ("[out, in]") have them.
    """
    cfg = from_hf({**RANK, "num_hidden_layers": 2, "first_k_dense_replace": 1})
    weights = {
        "outer": {w.name: jax.ShapeDtypeStruct(w.shape, "float32" if w.float32 else "bfloat16")
                  for w in outer_weights(cfg)},
        "layers": [abstract.abstract_weights(cfg, kind, keep_fp8=True) for kind in cfg.layers], "mtp": [],
    }  # fmt: skip
    if lying:
        layers = zip(weights["layers"], (layer_weights(cfg, kind) for kind in cfg.layers), strict=True)
        for held, described in [(weights["outer"], outer_weights(cfg)), *layers]:
            for w in described:
                if w.op == "glm.linear":
                    place = laid(sharding, w.out_in if lying == "[out, in]" else None)
                    held[w.name] = jax.ShapeDtypeStruct(w.shape, "bfloat16", sharding=place)
    programs = Programs(Deviceless(sharding), cfg, weights, rows * 130, 64, "bfloat16", rows=kept)
    ones = np.ones(rows, np.int32)
    batch = Batch(ones[:, None], ones, ones, np.ones((rows, 130), np.int32))
    try:
        programs.launch(batch, Mode(), [TokenChoice(1.0)] * rows if drawn else None)
    except Compiled as found:
        return {**counted(found.compiled), "caches": len(jax.tree.leaves(programs.caches))}
    raise AssertionError("nothing was compiled")


class Placed(jax.ShapeDtypeStruct):
    """A value that would be placed."""

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class OverMesh(Deviceless):
    """The same over several devices."""

    def __init__(self) -> None:
        pass

    _shardings = CudaBackend._shardings


class AbsentHosts(Hosts):
    """A stage of devices that are not here."""

    def _put(self, value: Any, *spec: Any, order: Any = None) -> Any:
        return Placed(value.shape, value.dtype, sharding=self._sharding(*spec))

    def batch(self, value: Any) -> Any:
        return jax.tree.map(lambda leaf: self._put(leaf, "dp"), value)


SPREAD = {
    "tp8 b1": (Layout(tp=8), 1, CacheFormats()),
    "tp8 b64": (Layout(tp=8), 64, CacheFormats()),
    "tp8, FP8 caches b64": (Layout(tp=8), 64, NARROW),
    "dp8 ep8 b16": (Layout(dp=8, ep=8), 16, CacheFormats()),
}
"""Layouts of eight devices, sequences a rank, and what caches are kept in."""


def spread_figures(layout: Layout, rows: int, kept: CacheFormats) -> dict[str, Any]:
    """A decode step of GLM-5's first two types of layer in FP8, by the road of a plan over several processes."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{layout.devices}")
    cfg = load_config("glm-5-fp8")
    cfg = dataclasses.replace(cfg, layers=tuple(dict.fromkeys(cfg.layers)), mtp_layers=0)
    grid = Grid.of(cfg, layout)

    def empty(weight: Weight) -> Any:
        if weight.stays_narrow:
            return Quantized(np.zeros(weight.shape, E4M3), np.zeros(weight.scale_shape, np.float32))
        return np.zeros(weight.shape, np.float32 if weight.float32 else jnp.bfloat16)

    weights = {
        "outer": {w.name: empty(w) for w in outer_weights(cfg)},
        "layers": [{w.name: empty(w) for w in layer_weights(cfg, kind)} for kind in cfg.layers], "mtp": [],
    }  # fmt: skip
    stage = AbsentHosts(grid, topology.devices)
    cluster = Cluster(cfg, grid, weights, OverMesh(), [stage], Plain("bfloat16"), rows=kept)
    server, count = cluster.server(rows * 130, 64), rows * layout.dp
    ones = np.ones(count, np.int32)
    try:
        server.launch(Batch(ones[:, None], ones, ones, np.ones((count, 130), np.int32)))
    except Compiled as found:
        return {**counted(found.compiled), "caches": len(jax.tree.leaves(server.caches))}
    raise AssertionError("nothing was compiled")


def main() -> None:
    if sys.argv[1] == "spread":
        print(json.dumps({name: spread_figures(*how) for name, how in SPREAD.items()}, indent=1))
        return
    described = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(described, (1,), ("x",)), PartitionSpec())
    if sys.argv[1] == "steps":
        report = {
            f"{'drawn' if drawn else 'greedy'} b{rows}": step_figures(rows, drawn, sharding)
            for drawn in (False, True)
            for rows in (1, 64)
        }
        report["greedy, FP8 caches b64"] = step_figures(64, False, sharding, NARROW)
        for lying in ("[in, out]", "[out, in]"):
            report[f"greedy, bfloat16 {lying} b64"] = step_figures(64, False, sharding, lying=lying)
    elif sys.argv[1] == "models":
        report = {
            f"{model} {kind.name} {'fp8' if fp8 else 'bf16'} {name}": figures(cfg, kind, step, True, sharding, fp8)
            for model in MODELS
            for cfg in [load_config(model)]
            for kind in cfg.layer_counts
            if not kind.mtp
            for fp8 in (True, False)
            for name, step in STEPS.items()
            if name != "first2048"
        }
    else:
        cfg = from_hf(RANK)
        report = {
            f"{kind.name} {name}": figures(cfg, kind, step, sys.argv[1] == "layers", sharding)
            for kind in cfg.layer_counts
            if not kind.mtp
            for name, step in STEPS.items()
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
