"""Packages cut by a plan: its layout, its placement of experts with copies, its hash."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hw_profiles
from model.checkpoint import Checkpoint
from model.split import Layout
from runtime.deployment.manifest import Manifest
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Experts
from runtime.deployment.tensors import TensorReader
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.plans import formats, plan_for

SLOTS = (3, 1, 0, 2, 0, 3)  # three a device; experts 0 and 3 are on both devices


def make_plan(checkpoint: Path, path: Path) -> Plan:
    cfg = Checkpoint(checkpoint).config
    plan = plan_for(cfg, Layout(tp=2, ep=2), hw_profiles.load("h200-sxm"), formats("bf16"))
    (pool,) = plan.pools
    placed = dataclasses.replace(pool, experts=Experts(3, (SLOTS,)))
    plan = dataclasses.replace(plan, pools=(placed,))
    plan.write(path)
    return plan


def test_a_plan_places_layers_and_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "small")
    plan = make_plan(tmp_path / "small", tmp_path / "plan.json")
    words = (
        "export",
        "--checkpoint",
        tmp_path / "small",
        "--format",
        "onnx",
        "--plan",
        tmp_path / "plan.json",
        "--batch",
        2,
        "--context",
        64,
        "--page-size",
        16,
    )
    code, out, err = glm5(*words, "--verify", "--out", tmp_path / "p")
    assert (code, err) == (0, "") and "verified: decode" in out, err
    manifest = Manifest.read(tmp_path / "p")
    assert manifest.plan_hash == plan.hash and manifest.expert_slots["1"] == SLOTS
    (whole,) = Checkpoint(tmp_path / "small").load("float32", mtp=False)["layers"][1:]
    for device in manifest.devices:
        held = TensorReader(tmp_path / "p" / str(device.weights)).array("layers.1.experts_down")
        rank = device.ranks["tp"]
        assert (held == whole["experts_down"][list(SLOTS[3 * rank : 3 * rank + 3])]).all()
    assert glm5(*words, "--device", 1, "--out", tmp_path / "one").code == 0
    assert [device.index for device in Manifest.read(tmp_path / "one").devices] == [1]


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "small")
    make_plan(tmp_path / "small", tmp_path / "plan.json")
    message = refused("export", "--format", "onnx", "--plan", tmp_path / "plan.json", "--out", tmp_path / "p")
    assert "make a plan for" in message and not (tmp_path / "p").exists()
