"""The Flax face: the graph's own logits and transformers', and types, axes and files as the descriptions have them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from model import module
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.errors import CheckpointError
from model.hf_config import from_hf, load_config, preset_names
from model.module import IndexerParam, MatrixParam, Model, PerHeadParam, RouterBias, VectorParam, param_type
from model.weights import layer_weights, outer_weights, parameter_counts
from tests.model.oracle import (
    CASES,
    LENGTH,
    SEQUENCES,
    TOLERANCE,
    TOPK,
    VOCAB,
    Oracle,
    Paged,
    random_weights,
    torch_logits,
)

Oracles = Callable[[str], Oracle]
FAST = ("glm_moe_dsa", "glm4_moe")  # MLA with indexers, own and shared; GQA
RAW = {
    **CASES["glm_moe_dsa"].fields, "model_type": "glm_moe_dsa", "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
    "indexer_types": ["full", "shared"],
}  # fmt: skip

# What each weight is, by its name in the graph.
TYPES = {
    "VocabularyParam": "embed head",
    "VectorParam": "input_norm ffn_norm final_norm q_a_norm kv_a_norm q_norm k_norm q_bias k_bias v_bias embed_norm "
    "hidden_norm head_norm",
    "PerHeadParam": "q k v q_b k_up v_up",
    "MatrixParam": "q_a kv_a o gate_up down shared_gate_up shared_down embed_hidden",
    "ExpertParam": "experts_gate_up experts_down",
    "RouterParam": "router",
    "RouterBias": "router_bias",
    "IndexerMatrix": "index_q index_k index_w",
    "IndexerVector": "index_k_norm index_k_bias",
}


@pytest.fixture(scope="module")
def model() -> Model:
    """A small one: a dense layer, one of experts that shares its selection, and an MTP layer."""
    cfg = from_hf(RAW)
    return Model(cfg, random_weights(cfg), raw_config=RAW)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, 3 * TOPK)).astype(np.int32)


@pytest.fixture(scope="module")
def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    return run(model, tokens)


def run(model: Model, tokens: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t))(model, tokens))


def arrays(tree: Any, wanted: Any = ...) -> dict[str, np.ndarray]:
    """By name: "layers.0.q_b"."""
    flat = nnx.to_flat_state(nnx.state(tree, wanted))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_module_is_the_graph(model: Model, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Past `index_topk`, over shuffled pages that held something else."""
    plain = Paged(model.config, model.weights(), batch=len(tokens))
    paged, _ = plain.feed(tokens, [tokens.shape[1]] * len(tokens), "absorbed")
    assert np.abs(logits - paged).max() < TOLERANCE / 10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]
)  # fmt: skip
def test_transformers_gives_the_same_logits(oracles: Oracles, name: str) -> None:
    oracle = oracles(name)
    ours = run(Model.load(oracle.path), oracle.tokens)
    assert ours.shape == (SEQUENCES, LENGTH, VOCAB) and ours.dtype == np.float32
    assert np.abs(ours - oracle.logits).max() < TOLERANCE


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    raw = {**CASES["glm4_moe"].fields, "model_type": "glm4_moe", "tie_word_embeddings": True, "num_hidden_layers": 1}
    cfg = from_hf(raw)
    tied = Model(cfg, random_weights(cfg), raw_config=raw)
    assert set(tied.outer) == {"embed", "final_norm"}
    outer = {**tied.weights()["outer"], "head": tied.outer["embed"][...].T}
    untied = Model(dataclasses.replace(cfg, tie_embeddings=False), {**tied.weights(), "outer": outer})
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    # Two programs: a transposed head's products may be summed in another order.
    assert np.abs(run(tied, tokens) - run(untied, tokens)).max() < TOLERANCE / 10
    tied.save(tmp_path / "tied")
    assert same(arrays(Model.load(tmp_path / "tied")), arrays(tied))


def test_random_weights_keep_the_size_of_what_they_are_given() -> None:
    cfg = from_hf(RAW)
    cfg = dataclasses.replace(cfg, layers=cfg.layers[1:], mtp_layers=0)
    drawn = jax.jit(lambda: Model(cfg, rngs=nnx.Rngs(0)))()
    layer = {name: np.asarray(variable[...]) for name, variable in drawn.layers[0].items()}
    inputs = np.random.default_rng(0).standard_normal((1000, cfg.hidden_size))
    for matrix in (layer["q_a"], layer["kv_a"], layer["experts_gate_up"][3, :, 1], layer["router"]):
        assert (inputs @ matrix).std() == pytest.approx(1, abs=0.1)
    assert (layer["ffn_norm"] == 1).all() and (layer["router_bias"] == 0).all()
    assert not np.array_equal(layer["experts_down"][0], layer["experts_down"][1])


# --- types and axes ------------------------------------------------------------------------------


def described() -> dict[str, set[type]]:
    """The types that weights of this name have, over every layer type of every preset and test model."""
    cases = [from_hf({**case.fields, "model_type": name.partition("-")[0]}) for name, case in CASES.items()]
    found: dict[str, set[type]] = {}
    for cfg in (*map(load_config, preset_names()), *cases):
        for weights in (outer_weights(cfg), *(layer_weights(cfg, kind) for kind in cfg.layer_counts)):
            for weight in weights:
                found.setdefault(weight.name, set()).add(param_type(weight))
    return found


def test_every_weight_has_one_type() -> None:
    expected = {name: {getattr(module, kind)} for kind, names in TYPES.items() for name in names.split()}
    assert described() == expected


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (nnx.Param, r"(?!.*router_bias)"),
        (RouterBias, r".*\.router_bias"),
        (IndexerParam, r".*\.index_"),
        (nnx.All(nnx.Param, nnx.Not(IndexerParam)), r"(?!.*(router_bias|\.index_))"),
        (PerHeadParam, r".*\.(q_b|k_up|v_up)"),
        (VectorParam, r".*(_norm|k_bias)$"),
        (nnx.All(MatrixParam, nnx.PathContains("mtp")), r"mtp\.0\.(?!.*(_norm|_bias|router)$)"),
    ],
)
def test_filters_choose_by_type(model: Model, wanted: Any, pattern: str) -> None:
    chosen, everything = arrays(model, wanted), arrays(model)
    assert set(chosen) == {name for name in everything if re.match(pattern, name)} and chosen


def test_the_axes_are_those_that_a_plan_splits(model: Model) -> None:
    """Named here a second time, so that none is lost on the way."""
    specs = nnx.get_partition_spec(nnx.state(model))
    found = {".".join(map(str, path)): spec.get_value() for path, spec in nnx.to_flat_state(specs)}
    split = {name: tuple(spec) for name, spec in found.items() if any(spec)}
    assert {tuple(spec) for name, spec in found.items() if name not in split} == {(None,), (None, None)}
    mla = {
        "q_b": (None, "heads"), "k_up": ("heads", None, None), "v_up": ("heads", None, None), "o": ("heads", None),
    }  # fmt: skip
    dense = {"gate_up": (None, None, "ffn"), "down": ("ffn", None)}
    sparse = {f"shared_{name}": axes for name, axes in dense.items()} | {
        "experts_gate_up": ("expert", None, None, "ffn"), "experts_down": ("expert", "ffn", None),
    }  # fmt: skip
    layers = {"layers.0": mla | dense, "layers.1": mla | sparse, "mtp.0": mla | sparse}
    expected = {f"{place}.{name}": axes for place, of in layers.items() for name, axes in of.items()}
    assert split == {**expected, "outer.embed": ("vocab", None), "outer.head": (None, "vocab")}


def test_a_full_size_model_over_a_mesh() -> None:
    """Nothing is allocated: GLM-4.5's shapes, with its axes given to those of a mesh."""
    cfg = load_config("glm-4.5")
    abstract = nnx.eval_shape(lambda: Model(cfg, rngs=nnx.Rngs(0), dtype="bfloat16"))
    state = nnx.state(abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(parameter_counts(cfg)["total"].values())
    rules = (("heads", "tp"), ("kv_heads", "tp"), ("vocab", "tp"), ("expert", "ep"), ("ffn", None))
    with nnx.logical_axis_rules(rules):
        layer = nnx.get_partition_spec(state)["layers"][91]
    assert layer["k"].get_value() == PartitionSpec(None, "tp") and layer["k_bias"].get_value() == PartitionSpec("tp")
    assert layer["experts_down"].get_value() == PartitionSpec("ep", None, None)
    assert abstract.layers[91]["router_bias"].dtype == jnp.float32 and abstract.layers[91]["k"].dtype == jnp.bfloat16


# --- as any module of nnx ------------------------------------------------------------------------


def test_transforms(model: Model, tokens: np.ndarray, logits: np.ndarray) -> None:
    """`nnx.jit` sees changes made inside, gradients are of parameters alone, and split parts merge."""

    @nnx.jit
    def step(model: Model, tokens: jax.Array) -> tuple[jax.Array, Any]:
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(tokens))))(model)
        model.outer["final_norm"][...] *= 2.0
        return value, grads

    merged = nnx.merge(*nnx.split(nnx.clone(model), MatrixParam, RouterBias, ...))
    value, grads = step.lower(merged, tokens).compile()(merged, tokens)
    assert float(value) == pytest.approx(float(np.mean(logits**2)), rel=1e-5)
    np.testing.assert_array_equal(merged.outer["final_norm"], 2 * model.outer["final_norm"][...])
    sizes = {name: float(np.abs(grad).max()) for name, grad in arrays(grads).items()}
    assert sizes.keys() == arrays(model, nnx.Param).keys() and np.isfinite(list(sizes.values())).all()
    idle = {name for name, size in sizes.items() if not size}  # selection has no gradient, drafts are not asked for
    assert idle == {name for name in sizes if ".index_" in name or name.startswith("mtp.")}


def test_batching(model: Model, tokens: np.ndarray, logits: np.ndarray) -> None:
    mapped = jax.jit(jax.vmap(lambda t: model(t)))(tokens[:, None])
    np.testing.assert_allclose(mapped[:, 0], logits, atol=1e-5)


@pytest.mark.slow
def test_orbax_keeps_it(model: Model, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(tmp_path / "state", nnx.state(model))
    other = Model(model.config, random_weights(model.config, seed=1))
    with checkpoint.StandardCheckpointer() as reader:
        nnx.update(other, reader.restore(tmp_path / "state", nnx.state(other)))
    assert same(arrays(other), arrays(model))


# --- checkpoints ---------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "whole")
    assert Checkpoint(tmp_path / "whole").has_mtp
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == RAW
    again = Model.load(tmp_path / "whole")
    assert same(arrays(again), arrays(model))
    again.save(tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    main = Model.load(tmp_path / "whole", mtp=False)
    assert len(main.mtp) == 0
    main.save(tmp_path / "main")
    assert same(arrays(Model.load(tmp_path / "main")), arrays(main))


def test_in_bfloat16(model: Model, tokens: np.ndarray, logits: np.ndarray, tmp_path: Path) -> None:
    model.save(tmp_path / "wide")
    model.save(tmp_path / "narrow", "bfloat16")
    narrow = Model.load(tmp_path / "narrow", "bfloat16")
    assert same(arrays(narrow), arrays(Model.load(tmp_path / "wide", "bfloat16")))
    kinds = {name: array.dtype for name, array in arrays(narrow).items()}
    assert all((kind == np.float32) == name.endswith("router_bias") for name, kind in kinds.items())
    rounded = run(narrow, tokens)
    assert rounded.dtype == np.float32
    assert 0 < np.median(np.abs(rounded - logits)) < 0.05 * logits.std()  # but where rounding selects another position


def test_what_is_stored_quantised_is_not_saved_so(model: Model, tmp_path: Path) -> None:
    save(tmp_path / "fp8", RAW, model.weights(), fp8=True)
    wide = Model.load(tmp_path / "fp8")
    dequantised = arrays(wide)
    for name, array in arrays(model).items():
        np.testing.assert_allclose(dequantised[name], array, rtol=0.07, atol=2e-3, err_msg=name)
    wide.save(tmp_path / "plain")
    assert "quantization_config" in json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == RAW
    assert same(arrays(Model.load(tmp_path / "plain")), arrays(wide))


def test_transformers_reads_what_is_saved(oracles: Oracles, tmp_path: Path) -> None:
    """Trained a little: a doubled final norm doubles the logits and decides nothing."""
    oracle = oracles("glm_moe_dsa")
    model = Model.load(oracle.path)
    model.outer["final_norm"][...] *= 2.0
    model.save(tmp_path / "saved")
    theirs = type(oracle.torch_model).from_pretrained(tmp_path / "saved").eval()
    assert np.abs(torch_logits(theirs, oracle.tokens) - 2 * oracle.logits).max() < TOLERANCE


def test_what_cannot_be_is_one_line(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^.*none: no such checkpoint directory$"):
        Model.load(tmp_path / "none")
    model.save(tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"^weights are held in float32 or bfloat16, not 'float16'$"):
        Model.load(tmp_path / "there", "float16")
    with pytest.raises(CheckpointError, match=r"^.*already exists; choose another directory or remove it$"):
        model.save(tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"^.*made without `raw_config`, the fields of its config.json$"):
        Model(model.config, model.weights()).save(tmp_path / "new")
    with pytest.raises(TypeError, match=r"made of `weights`, or drawn from `rngs`"):
        Model(model.config)
