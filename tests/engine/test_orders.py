"""Weights that lie in memory as a backend asks: no shape and no token changes, and programs take them as they lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backends.cpu import CpuBackend
from backends.emulation.backend import EmulatedDevices
from backends.emulation.number_formats import NumberFormats
from backends.errors import Unsupported
from backends.interface import Artifact, Capabilities, Program
from backends.registry import get
from backends.spmd.cluster import Cluster
from backends.spmd.stages import Mapped
from model.checkpoint import Checkpoint, groups
from model.split import Grid, Layout
from model.weights import Weight, as_matrix
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from tests.engine.conftest import SMALL
from tests.engine.test_engine import Engines, prompt
from tests.plans import formats

ASKED = frozenset({"glm.linear", "glm.expert_ffn", "glm.route"})


class Turned(CpuBackend):
    """The CPU, if it wanted all matrices as checkpoints have them."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), out_in=ASKED)


class TurnedDevices(EmulatedDevices):
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), out_in=ASKED)


def assert_lies_as_asked(weight: Weight, held: Any) -> None:
    """A matrix that was asked for is, byte for byte, the checkpoint's [.., out, in]; all else is as its shape says."""
    inside = np.asarray(held)
    assert inside.ndim == len(weight.shape)
    if weight.op in ASKED:
        assert as_matrix(weight, inside).flags.c_contiguous, weight.name
        assert not inside.flags.c_contiguous or min(as_matrix(weight, inside).shape[-2:]) == 1, weight.name
    else:
        assert inside.flags.c_contiguous, weight.name


def test_answers_stay_where_weights_lie_otherwise(checkpoints: dict[str, Path], engines: Engines) -> None:
    """Of dense and routed layers, prompts and answers; every weight of the engine lies as it was asked to."""
    checkpoint = Checkpoint(checkpoints["dsa"])
    turned = load_engine(checkpoint, Turned(), EngineConfig(**vars(SMALL)))
    places = groups(checkpoint.config, mtp=False)
    for group, weights in zip(places["layers"], turned.programs.weights["layers"], strict=True):
        for weight in group.weights:
            assert weights[weight.name].shape == weight.shape
            assert_lies_as_asked(weight, weights[weight.name])
    prompts = [Prompt(prompt(length), 6, keep_logits=True) for length in (20, 3)]
    for found, expected in zip(turned.generate(prompts), engines["dsa", 0].generate(prompts), strict=True):
        assert found.token_ids == expected.token_ids
        assert found.logits is not None and expected.logits is not None
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_shares_of_quantised_weights_lie_as_asked(checkpoints: dict[str, Path]) -> None:
    """Values and scales, cut over devices along either dim."""
    checkpoint = Checkpoint(checkpoints["dsa"])
    cfg, grid = checkpoint.config, Grid.of(checkpoint.config, Layout(tp=2, dp=2))
    numbers, devices = NumberFormats(cfg, formats("fp8")), TurnedDevices(None)
    cluster = Cluster(cfg, grid, checkpoint.load(mtp=False), devices, [Mapped(grid, devices)], numbers)
    kinds = set()
    for group, weights in zip(groups(cfg, mtp=False)["layers"], cluster.weights[0]["layers"], strict=True):
        for weight in group.weights:
            for held in jax.tree.leaves(weights[weight.name], is_leaf=lambda leaf: hasattr(leaf, "axes")):
                share = np.asarray(held.array)[(1,) * len(held.axes)]
                kinds.add((str(share.dtype), len(held.axes)))
                assert_lies_as_asked(weight, share)
    assert len(kinds) > 2, kinds


def test_a_program_takes_a_matrix_as_it_lies() -> None:
    """By its artifact's bytes: the matrix that a kernel reads is not written again, and one that lies otherwise is not
    taken for it."""
    cpu, rng = CpuBackend(), np.random.default_rng(0)
    x, w = rng.standard_normal((2, 256), np.float32), rng.standard_normal((256, 192), np.float32)

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.stack([w.T @ row for row in x])  # of a row XLA's CPU reads either order, and copies one of several

    held = cpu.put(w, (1, 0))
    assert cpu.order_of(held) == (1, 0) and cpu.order_of(cpu.put(w)) is None
    np.testing.assert_array_equal(cpu.get(held), w)
    args = (jax.ShapeDtypeStruct(w.shape, w.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype))
    artifact = cpu.export(Program("product", product, args, orders=(cpu.order_of(held), cpu.order_of(x))))
    run: Any = cpu.load(Artifact.from_bytes(artifact.to_bytes()))
    np.testing.assert_allclose(run(held, x), x @ w, rtol=1e-4, atol=1e-4)
    assert run.memory_analysis().temp_size_in_bytes < w.nbytes
    with pytest.raises(ValueError, match="layout"):
        run(cpu.put(w), x)


def test_who_holds_arrays_as_they_are_says_so() -> None:
    with pytest.raises(Unsupported, match="ascend holds arrays as their shapes have them"):
        get("ascend").put(np.zeros((2, 3), np.float32), (1, 0))
