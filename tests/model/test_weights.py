"""The weights of a model, counted: against what vendors publish, and against transformers' own modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from model.abstract import StepShape, trace_layer
from model.checkpoint import groups
from model.config import ModelConfig
from model.formats import FP8_BLOCK
from model.hf_config import load_config, preset_names
from model.weights import Arrangement, as_matrix, layer_weights, outer_weights, parameter_counts
from tests.model.oracle import CASES, FAMILIES, Oracle
from tests.model.test_config import raw_preset

Oracles = Callable[[str], Oracle]


def totals(cfg: ModelConfig | str) -> tuple[int, int]:
    """Parameters of the main stack, and those active for a token."""
    counts = parameter_counts(load_config(cfg) if isinstance(cfg, str) else cfg)
    total, active = (sum(n for part, n in counts[kind].items() if part != "mtp") for kind in ("total", "active"))
    return total, active


@pytest.mark.parametrize(
    ("name", "total", "active", "source"),
    [
        ("glm-5", 743.9, 40.8, "arXiv 2602.15763: 744B-A40B; exact by its config.json"),
        ("glm-5-fp8", 743.9, 40.8, "the same weights"),
        ("deepseek-v3", 671.0, 36.6, "arXiv 2412.19437: 671B total, 37B activated (embedding included)"),
        ("deepseek-v3.2", 671.9, 37.5, "as V3, with indexers"),
        ("glm-4.5", 352.8, 32.8, "arXiv 2508.06471: 355B-A32B (355 counts the MTP layer)"),
        ("glm-4.5-air", 106.9, 12.8, "arXiv 2508.06471: 106B-A12B"),
        ("glm-4.7-flash", 29.9, 3.6, "zai-org/GLM-4.7-Flash: 30B-A3B"),
        ("kimi-k2", 1026.4, 31.7, "arXiv 2507.20534: 1.04T-A32.6B (1T-A32B)"),
    ],
)
def test_published_sizes(name: str, total: float, active: float, source: str) -> None:
    counted, used = totals(name)
    assert counted / 1e9 == pytest.approx(total, abs=0.06), source
    assert used / 1e9 == pytest.approx(active, abs=0.06), source


# The class in a model's name: what its vendor calls it, in billions.
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("glm-5", 744, 40),
        ("deepseek-v3", 671, 37),
        ("glm-4.5", 355, 32),
        ("glm-4.5-air", 106, 12),
        ("glm-4.7-flash", 30, 3),
        ("kimi-k2", 1000, 32),
    ],
)
def test_size_classes(name: str, total: int, active: int) -> None:
    counted, used = totals(name)
    assert counted / 1e9 == pytest.approx(total, rel=0.03)
    assert math.floor(used / 1e9) in (active, active - 1)


def test_mtp_and_embeddings_are_shown_apart() -> None:
    counts = parameter_counts(load_config("glm-5"))
    assert counts["total"]["embedding"] == counts["total"]["head"] == 154880 * 6144
    assert "embedding" not in counts["active"]
    # facts/glm5.md 1.1: 753-754B counted in the checkpoint, with MTP and embeddings
    assert sum(counts["total"].values()) / 1e9 == pytest.approx(753.9, abs=0.5)
    assert sum(counts["total"].values()) - counts["total"]["mtp"] == totals("glm-5")[0]


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_a_built_model(oracles: Oracles, name: str) -> None:
    oracle = oracles(name)
    theirs = sum(tensor.numel() for tensor in oracle.torch_model.state_dict().values())
    assert totals(oracle.config)[0] == theirs


@pytest.mark.parametrize("name", ["glm-5", "glm-5.2", "deepseek-v3", "deepseek-v3.2", "glm-4.5", "glm-4.7-flash"])
def test_counts_are_those_of_a_full_size_model(name: str) -> None:
    """transformers builds the real thing on its `meta` device, where nothing is allocated."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    raw = raw_preset(name)
    raw.pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert totals(name)[0] == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", FAMILIES)
def test_active_parameters_of_a_token(oracles: Oracles, name: str) -> None:
    """All but the embedding, and of the routed experts only those chosen."""
    oracle = oracles(name)
    moe = oracle.config.moe
    assert moe is not None
    theirs = sum(
        tensor.numel() * moe.top_k // moe.experts if ".mlp.experts." in key else tensor.numel()
        for key, tensor in oracle.torch_model.state_dict().items()
        if "embed_tokens" not in key
    )
    assert totals(oracle.config)[1] == theirs


@pytest.mark.parametrize("name", preset_names())
def test_descriptions_are_consistent(name: str) -> None:
    cfg = load_config(name)
    for weights in (outer_weights(cfg), *(layer_weights(cfg, kind) for kind in cfg.layer_counts)):
        names = [weight.name for weight in weights]
        assert len(set(names)) == len(names)
        for weight in weights:
            assert len(weight.axes) == len(weight.shape)
            assert (weight.expert_count > 0) == all("{e}" in source for source in weight.sources)
            assert len(weight.sources) == (2 if weight.arrangement is Arrangement.GATE_UP else 1)
            projections = {"q", "k", "v", "q_b", "k_up", "v_up"}
            assert bool(weight.heads) == (weight.name.removesuffix("_bias") in projections)
            if weight.matrix_dims:
                rows, columns = (weight.shape[dim] for dim in weight.matrix_dims)
                assert weight.initial == (0.0, rows**-0.5) and weight.size % (rows * columns) == 0
            if weight.stays_narrow:
                # a scale per block of the matrix: rows and columns are the first and the last of its dims
                matrix = weight.shape[1:] if weight.expert_count else weight.shape
                scales = weight.scale_shape[1:] if weight.expert_count else weight.scale_shape
                assert scales[0] == -(-matrix[0] // FP8_BLOCK) and scales[-1] == -(-matrix[-1] // FP8_BLOCK)
                assert len(matrix) == 2 or scales[1] == matrix[1] == 2


def test_full_size_names_are_those_of_the_release() -> None:
    """facts/glm5.md 1.2 and export.md 7: the tensors of GLM-5, the MTP layer stored as layer 78."""
    found = groups(load_config("glm-5"), mtp=True)
    names = {name for part in found.values() for group in part for w in group.weights for name in group.tensors(w)}
    layer = "model.layers.78."
    assert {layer + tail + ".weight" for tail in ("eh_proj", "enorm", "hnorm", "shared_head.norm")} < names
    assert "model.layers.77.mlp.experts.255.up_proj.weight" in names
    assert "model.layers.2.mlp.down_proj.weight" in names
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in names
    shared = groups(load_config("glm-5.2"), mtp=True)
    indexed = {
        index
        for index, group in enumerate(shared["layers"])
        if any("indexer" in name for weight in group.weights for name in group.tensors(weight))
    }
    assert len(indexed) == 21 and {0, 1, 2, 6, 74} < indexed


@pytest.mark.parametrize("name", ["glm-5", "glm-4.5", "deepseek-v3"])
def test_a_weight_names_the_op_that_takes_it(name: str) -> None:
    """As the graph has it: every op of a trace that reads a matrix is the one that the matrix names."""
    cfg, seen = load_config(name), set[str]()
    for kind in cfg.layer_counts:
        if kind.mtp:
            continue
        jaxpr = trace_layer(cfg, kind, StepShape(2, 1, 64)).jaxpr
        for weight in layer_weights(cfg, kind):
            (var,) = (
                v for v, said in zip(jaxpr.invars, jaxpr.debug_info.arg_names, strict=True)
                if said == f"w['{weight.name}']"
            )  # fmt: skip
            readers = {eqn.params["name"] for eqn in jaxpr.eqns if any(v is var for v in eqn.invars)}
            if weight.op:
                assert readers == {weight.op}, weight.name
                seen.add(weight.op)
            else:
                assert not readers & {"glm.linear", "glm.route", "glm.expert_ffn"} or len(weight.shape) == 1
    assert seen == {"glm.linear", "glm.route", "glm.expert_ffn"}


@pytest.mark.parametrize("name", ["glm-5", "glm-4.5"])
def test_out_in_is_how_checkpoints_have_matrices(name: str) -> None:
    """An array of bytes that lies so is the checkpoint's matrix, in its order."""
    cfg = load_config(name)
    for weight in layer_weights(cfg, next(iter(cfg.layer_counts))):
        if weight.matrix_dims:
            small = dataclasses.replace(weight, shape=tuple(range(2, 2 + len(weight.shape))))
            lying = np.arange(small.size).reshape([small.shape[dim] for dim in small.out_in])
            in_graph = lying.transpose(np.argsort(small.out_in))
            assert in_graph.shape == small.shape
            np.testing.assert_array_equal(as_matrix(small, in_graph).ravel(), np.arange(small.size))
