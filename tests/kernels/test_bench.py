"""`bench/cuda.sh`, which waits for a card: what it measures is what there is, and it runs as far as a CPU can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bench import cuda_shapes
from bench.cuda import Dry, measure, results_file, without_time
from bench.cuda_sizes import DRY, Sizes
from model.hf_config import from_hf, load_config
from model.ops import OPS
from model.weights import parameter_counts


@pytest.mark.parametrize("sizes", [Sizes(), DRY], ids=["card", "dry"])
def test_its_ops_are_calls_of_the_contract(sizes: Sizes) -> None:
    """Every op at every step traces at its shapes, which are those of the layer that is measured whole."""
    cfg = from_hf(dict(sizes.rank))
    asked = set()
    for sequences, tokens, start in (next(iter(sizes.steps.values())), list(sizes.steps.values())[-1]):
        context = -(-(start + tokens) // cuda_shapes.PAGE) * cuda_shapes.PAGE
        for name, (operands, attributes) in cuda_shapes.op_calls(cfg, sequences, tokens, context).items():
            out = jax.eval_shape(lambda *args, n=name, a=attributes: OPS[n].call(*args, **a), *operands)
            assert all(np.prod(leaf.shape) > 0 for leaf in jax.tree.leaves(out))
            asked.add(name)
    attention = {"glm.sparse_attention", "glm.latent_attention", "glm.expanded_attention"}
    assert asked == attention | {"glm.linear", "glm.index_scores", "glm.select_topk", "glm.route", "glm.expert_ffn"}


def test_the_model_that_is_measured_whole_is_the_preset() -> None:
    own, preset = from_hf(dict(Sizes().flash)), load_config("glm-4.7-flash")
    assert parameter_counts(own) == parameter_counts(preset) and own.layers == preset.layers


@pytest.mark.slow
def test_a_model_is_measured_whole_in_a_dry_run() -> None:
    """Programs and the engine around them, with FP8 weights, on the CPU in the card's place."""
    with jax.default_device(jax.devices("cpu")[0]):
        found = cuda_shapes.whole(Dry(), True, 1e9, DRY)
    assert found["tokens_per_s"].keys() == DRY.flash_steps.keys()
    assert all(value > 0 for value in found["tokens_per_s"].values())
    assert found["engine_step_ms"].keys() == {"b1"} and found["engine_step_ms"]["b1"].keys() == {"ahead", "waiting"}


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """What there is is kept after each part, and results have the device's name."""

    def fails() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand more")

    found: dict[str, Any] = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-29"}
    kept: list[list[str]] = []
    failed = measure({"a": fails, "b": lambda: 2.0}, found, lambda: kept.append(list(found)))
    assert failed == ["a"] and found["b"] == 2.0 and "no memory" in found["a"]["error"]
    assert kept == [["device", "date", "a"], ["device", "date", "a", "b"]]
    assert results_file(tmp_path, found) == tmp_path / "h100-80gb-hbm3_2026-11-29.json"
    assert results_file(tmp_path / "own.json", found) == tmp_path / "own.json"


def test_an_op_that_did_not_run_is_a_failure_and_a_decomposition_without_memory_is_none() -> None:
    ops = {
        "a b1": {"kernel": 1.0, "decomposition": "RESOURCE_EXHAUSTED"},
        "b b1": {"kernel": "INTERNAL", "decomposition": 2.0},
    }
    assert without_time(ops) == ["b b1"] and without_time({"error": "all of it"}) == []


def test_what_is_bound_by_memory_may_take_longer_on_an_h100() -> None:
    here, there = cuda_shapes.to_reach("NVIDIA H200"), cuda_shapes.to_reach("NVIDIA H100 80GB HBM3")
    for who, steps in here.items():
        for step, ms in steps.items():
            assert there[who][step] == pytest.approx(ms * (4.8 / 3.35 if step.startswith("b") else 1.0), abs=1e-3)


def test_timed_ops_read_pages_of_their_own() -> None:
    """Sequences that shared pages would find them in a card's cache."""
    seen: list[np.ndarray] = []

    class Recording(Dry):
        def load(self, artifact: Any, devices: Any = ()) -> Any:
            return lambda *arrays: seen.append(np.asarray(arrays[2]))

        def export(self, program: Any) -> Any:
            return None

    call = cuda_shapes.op_calls(from_hf(dict(DRY.rank)), 3, 1, 128)["glm.sparse_attention"]
    cuda_shapes.op_ms(Recording(), "glm.sparse_attention", call, 128, 4, 1)
    assert len(np.unique(seen[0])) == seen[0].size and seen[0].min() == 1 and seen[0].max() < call[0][1].shape[0]
