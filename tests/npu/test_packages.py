"""Whole models in graphs of torch_npu's operators: several steps past the selection, against the JAX step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from model.checkpoint import Checkpoint
from model.split import Layout
from runtime.deployment.manifest import Gear, Manifest
from runtime.execution.local.load import embedded_checkpoint
from runtime.execution.package.runner import Runner, StepBatch, stored_weights
from runtime.execution.package.torch import TorchExecutor
from runtime.porting.export import verify
from tests.export.wide_checkpoint import glm_like
from tests.npu.packages import export, operators, request
from tests.npu.references import register

pytestmark = pytest.mark.slow


def _runner(folder: Path) -> Runner:
    register()
    manifest = Manifest.read(folder)
    weights = stored_weights(folder, manifest)
    assert weights is not None
    return Runner(folder, manifest, TorchExecutor(trusted=True), weights)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, ep=2)], ids=lambda each: each.name)
def test_the_embedded_model(layout: Layout, tmp_path: Path):
    gears = {"decode": [Gear(2, 1, 6)], **({"prefill": [Gear(2, 48, 6)]} if layout == Layout() else {})}
    job = request(embedded_checkpoint(), "f32", gears, layout)  # type: ignore[arg-type]
    manifest = export(job, tmp_path / "package")
    assert {"npu_rms_norm", "npu_grouped_matmul", "npu_moe_gating_top_k"} <= operators(manifest)
    assert job.checkpoint is not None
    runner = _runner(tmp_path / "package")
    reference = verify.Reference(job.checkpoint, runner.manifest)
    for program in runner.manifest.programs:
        found = verify.compare(runner.manifest, program, runner, reference, np.random.default_rng(1))
        assert found.worst <= verify.TOLERANCE
        assert found.context > (runner.manifest.model.index_topk or 0)


@pytest.mark.parametrize(
    ("formats", "layout"),
    [("w8a8", Layout()), ("w4a8", Layout(dp=2, ep=2)), ("w4a16", Layout(tp=2))],
)
def test_the_embedded_model_in_narrow_formats(formats: str, layout: Layout, tmp_path: Path):
    """Against the emulated chip's step, in the measure of graphs that round activations, or not."""
    job = request(embedded_checkpoint(), formats, {"decode": [Gear(2, 1, 6)]}, layout)
    manifest = export(dataclasses.replace(job, wide_dtype="float32"), tmp_path / "package")
    assert "npu_grouped_matmul" in operators(manifest)
    assert ({"npu_dynamic_quant", "npu_quant_matmul"} <= operators(manifest)) == (formats != "w4a16")
    assert job.checkpoint is not None
    runner = _runner(tmp_path / "package")
    reference = verify.Reference(job.checkpoint, runner.manifest)
    (program,) = runner.manifest.programs
    found = verify.compare(runner.manifest, program, runner, reference, np.random.default_rng(1))
    assert found.relative == (formats != "w4a16") and found.worst <= found.tolerance


def test_caches_in_int8_past_the_selection(tmp_path: Path):
    """Chunks and tokens against the emulated chip's step, whose caches are the package's once they are read."""
    checkpoint = Checkpoint(glm_like(tmp_path / "checkpoint"))
    gears = {"prefill": [Gear(2, 32, 6)], "decode": [Gear(2, 1, 6)]}
    job = request(checkpoint.path, "f32", gears, Layout(tp=2))  # type: ignore[arg-type]
    manifest = export(dataclasses.replace(job, options={"kv": "int8"}), tmp_path / "package")
    assert {"npu_quant_lightning_indexer", "npu_kv_quant_sparse_flash_attention"} <= operators(manifest)
    kept = {value.name: value for held in manifest.caches.values() for value in held}
    assert kept["cache.latent"].shape[2] == 512 + 64 * 4 + 16 and kept["cache.index_scale"].dtype == "float16"
    runner = _runner(tmp_path / "package")
    reference = verify.Reference(checkpoint, manifest)
    for program in manifest.programs:
        found = verify.compare(manifest, program, runner, reference, np.random.default_rng(1))
        assert found.relative and found.worst <= found.tolerance
        assert found.context > (manifest.model.index_topk or 0)


def test_projections_as_one_operator(tmp_path: Path):
    """Layers of the sizes that it takes, in w8a8, and tokens past the selection on caches in int8 that it writes in
    place. The MTP layer, whose matrices are in 16 bits, goes without."""
    sizes = {"hidden_size": 1024, "q_lora_rank": 1536, "qk_nope_head_dim": 128}
    checkpoint = Checkpoint(glm_like(tmp_path / "checkpoint", **sizes))
    job = request(checkpoint.path, "w8a8", {"decode": [Gear(2, 1, 6)]})  # type: ignore[arg-type]
    job = dataclasses.replace(job, wide_dtype="float32", options={"kv": "int8"})
    manifest = export(job, tmp_path / "package")
    assert "npu_mla_prolog_v3" in operators(manifest)
    assert [why[-9:] for why in manifest.extra["ascend"]["declined"]] == ["(1 times)"]
    runner = _runner(tmp_path / "package")
    reference = verify.Reference(checkpoint, manifest)
    found = verify.compare(manifest, manifest.programs[0], runner, reference, np.random.default_rng(1))
    assert found.worst <= found.tolerance and found.context > (manifest.model.index_topk or 0)


def test_six_layers_of_the_widths_that_attention_takes(tmp_path: Path):
    """From a prompt to tokens: chunks past the selection, then single tokens, on the caches that the graphs write in
    place. Layers that select, and layers that are handed a selection with -1 in it."""
    changed = {"num_hidden_layers": 6, "indexer_types": ["full", "full", "shared", "full", "shared", "shared"]}
    checkpoint = Checkpoint(glm_like(tmp_path / "checkpoint", **changed))
    gears = {"prefill": [Gear(2, 32, 6)], "decode": [Gear(2, 1, 6)]}
    manifest = export(request(checkpoint.path, "f32", gears), tmp_path / "package")  # type: ignore[arg-type]
    assert {"npu_lightning_indexer", "npu_sparse_flash_attention", "npu_scatter_nd_update_"} <= operators(manifest)
    runner = _runner(tmp_path / "package")
    reference, rng = verify.Reference(checkpoint, manifest), np.random.default_rng(2)
    caches, start, worst = reference.empty(), 0, 0.0
    pages = np.arange(1, 13, dtype=np.int32).reshape(2, 6)[:, ::-1].copy()
    for phase, tokens in (("prefill", 32), ("prefill", 32), *[("decode", 1)] * 4):
        ids = rng.integers(0, manifest.model.vocab_size, (2, tokens)).astype(np.int32)
        batch = StepBatch(ids, np.full(2, start, np.int32), np.full(2, tokens, np.int32), pages)
        (program,) = manifest.program(phase)  # type: ignore[arg-type]
        (found,) = runner.step(program, [batch])
        runner.draft(program, [batch], [found["hidden"]])
        (logits, _), caches = reference.step(caches, batch, phase == "prefill")
        worst = max(worst, float(np.abs(found["logits"].numpy() - logits).max()))
        start += tokens
    assert start > (manifest.model.index_topk or 0) and worst <= verify.TOLERANCE
    for (_, owner), held in runner.caches.items():
        layer = checkpoint.config.num_layers if owner == "mtp" else int(str(owner).partition(".")[2])
        made = {name.removeprefix("cache."): value.numpy() for name, value in held.items()}
        made["latent"] = np.concatenate([made.pop("latent_nope"), made.pop("latent_rope")], axis=-1)
        for name, value in made.items():
            np.testing.assert_allclose(value[1:], np.asarray(caches[layer][name])[1:], atol=verify.TOLERANCE)
