"""`bench/cuda.sh`, which waits for a card: what it measures is what there is, and it runs as far as a CPU can say."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bench import cuda_shapes
from bench.cuda import Dry
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
