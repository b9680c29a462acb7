"""The Ascend lists, forms, plugin and adapter."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from backends import registry
from backends.ascend import adapter, atc, catalog, om, plugin
from backends.ascend.operators import cann_form
from backends.errors import ArtifactError, BackendUnavailable, Unsupported
from backends.interface import Artifact, Program
from model import ops
from model.ops import OPS
from tests.export.ascend_runtimes import FakeAcl, fake_atc

DOCS = Path(__file__).parents[2] / "docs" / "ascend.md"


# --- the lists -----------------------------------------------------------------------------------


def test_atc_has_what_facts_say_it_has():
    """Golden rows, read in the sources named in the file."""
    known = catalog.atc_operators()
    assert 18 in known["ai.onnx", "MatMul"].opsets and 18 in known["ai.onnx", "TopK"].opsets
    assert known["ai.onnx", "Where"].cann == "SelectV2"
    assert known["npu", "NPURmsNorm"].opsets == {1}
    assert max(known["ai.onnx", "QuantBatchMatMul"].opsets) == 16
    assert max(known["ai.onnx", "ReduceL2"].opsets) == 17
    for absent in ("Loop", "Scan", "Sort", "RMSNormalization", "Attention"):
        assert ("ai.onnx", absent) not in known
    assert len(known) == 287


def test_every_entry_names_its_source():
    short = set(catalog.sources())
    for operator in catalog.atc_operators().values():
        repository, _, file = operator.source.partition(": ")
        assert repository in short and file.endswith(".cpp"), operator
    for operator in catalog.cann_operators().values():
        assert operator.source.partition(":")[0] in short and operator.constraint and operator.chips
    for source in catalog.sources().values():
        assert source["title"] and source["url"].startswith("https://") and source["date"]
    limits = catalog.limits()
    named = [part["source"] for key, part in limits.items() if key != "sources" and "source" in part]
    assert set(named) <= short


def test_nodes_of_cann_itself_are_registered_and_the_plugins_are_not():
    known = catalog.atc_operators()
    for operator in catalog.cann_operators().values():
        assert ((operator.domain, operator.type) in known) == operator.shipped
        assert not operator.shipped or operator.domain == catalog.SHIPPED


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_a_cann_form_or_a_reason(op: str):
    form = cann_form(op)
    assert bool(form.operators) != bool(form.reason)
    assert form.text.startswith("`") or form.text.startswith("decomposed: ")


def test_the_operators_that_recipes_for_these_models_fuse_have_rows():
    assert [o.name for o in cann_form("glm.index_scores").operators] == ["LightningIndexer"]
    assert [o.name for o in cann_form("glm.sparse_attention").operators] == ["SparseFlashAttention"]
    assert [o.name for o in cann_form("glm.route").operators] == ["MoeGatingTopK"]
    assert "GroupedMatmul" in [o.name for o in cann_form("glm.expert_ffn").operators]
    assert "QuantBatchMatmulV3" in [o.name for o in cann_form("glm.linear").operators]
    assert "FRACTAL_NZ" in catalog.cann_operators()["MlaPrologV3"].unused


def test_the_page_lists_the_operators_as_the_data_has_them():
    page = DOCS.read_text()
    for operator in catalog.cann_operators().values():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{operator.node}` "))
        assert operator.constraint.partition(";")[0] in row and operator.source.partition(":")[0] in row


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_page_says_what_each_op_becomes(op: str):
    assert f"| `{op}` | {cann_form(op).text} |" in DOCS.read_text()


def test_chips_by_their_names():
    assert catalog.family("Ascend910B3") == catalog.family("Ascend910B4-1") == "ascend910b"
    assert catalog.family("Ascend910_9392") == "ascend910_93" and catalog.family("Ascend950PR_9599") == "ascend950"
    assert catalog.family("Ascend310P3") is None
    assert (catalog.most_gears("Ascend910B3"), catalog.most_gears("Ascend950PR_9599"), catalog.most_gears(None)) == (
        100, 256, 100,
    )  # fmt: skip


@pytest.mark.parametrize("soc", ["910B3", "Ascend 910B3", "Ascend910B9", "Ascend310P3", "Ascend910_9999", ""])
def test_a_chip_that_atc_does_not_know_is_one_line(soc: str):
    with pytest.raises(Unsupported, match="npu-smi info") as caught:
        atc.check_soc(soc)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_line():
    assert atc.line(atc.command("a b.onnx", "om/x", "Ascend910B3")) == (
        "atc --framework=5 '--model=a b.onnx' --output=om/x --soc_version=Ascend910B3 --input_format=ND "
        "--precision_mode_v2=origin"
    )


# --- the plugin ----------------------------------------------------------------------------------


def test_the_plugin_registers_what_our_nodes_name():
    text = plugin.source()
    found = set(re.findall(r'OriginOpType\("(\w+)::1::(\w+)"\)', text))
    assert found == {(o.domain, o.type) for o in plugin.registered()}
    assert text.count("{") == text.count("}") and "{{" not in text.replace('{{"', "").replace("({{made", "")
    for operator in plugin.registered():
        for attribute in operator.attributes:
            assert f'{{"{attribute}", k' in text


def test_dynamic_inputs_are_placed_by_name():
    """GroupedMatmul's inputs are lists in CANN: a node's order cannot place them."""
    text = plugin.source([catalog.cann_operators()["GroupedMatmul"]])
    names = re.search(r"kInputs\[\] = \{(.+)\};", text)
    flags = re.search(r"kDynamic\[\] = \{(.+)\};", text)
    assert names and flags
    placed = dict(zip(re.findall(r'"(\w+)"', names[1]), re.findall("true|false", flags[1]), strict=True))
    assert placed == {"x": "true", "weight": "true", "scale": "true", "group_list": "false", "per_token_scale": "false"}


# --- the adapter ---------------------------------------------------------------------------------


def test_it_is_listed_and_says_what_it_lacks():
    assert "ascend" in registry.names()
    backend = registry.get("ascend")
    reason = backend.unavailable()
    assert reason and "set_env.sh" in reason and "--backend sim" in reason and len(reason.splitlines()) == 1
    assert backend.capabilities().devices == ()
    with pytest.raises(BackendUnavailable, match="backend ascend cannot be used here"):
        registry.usable("ascend")


class Pair(NamedTuple):
    first: Any
    rest: Any


def _program() -> Program:
    def step(weights: dict[str, Any], x: Any) -> Pair:
        hidden = ops.rms_norm(x, weights["norm"], eps=1e-6)
        return Pair(ops.linear(hidden, weights["w"]), [{"b": hidden, "a": x + 1}])

    args = ({"norm": jax.ShapeDtypeStruct((8,), jnp.float32), "w": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
            jax.ShapeDtypeStruct((2, 8), jnp.float32))  # fmt: skip
    return Program("step", step, args, needs=frozenset({"float32"}))


def test_export_needs_no_chip_and_atc_would_take_it():
    artifact = Artifact.from_bytes(registry.get("ascend").export(_program()).to_bytes())
    size = int.from_bytes(artifact.payload[:8], "little")
    model = onnx.load_model_from_string(artifact.payload[8 + size :])
    known = catalog.atc_operators()
    for node in model.graph.node:
        assert (node.domain or "ai.onnx", node.op_type) in known, "needs a plugin that nobody builds"
    with pytest.raises(BackendUnavailable):
        registry.get("ascend").load(artifact)


def test_it_refuses_what_it_does_not_offer_and_other_platforms_artifacts():
    backend = registry.get("ascend")
    with pytest.raises(Unsupported, match="fp8_weights"):
        backend.export(Program("step", lambda x: x, (), needs=frozenset({"fp8_weights"})))
    other = Artifact("x", "cpu", "stablehlo-jax-export", (), {}, b"")
    with pytest.raises(ArtifactError, match="loads onnx-atc for ascend"):
        backend.load(other)


def test_a_program_runs_through_pyacl(tmp_path: Path, monkeypatch: Any):
    """With a fake `acl` and `atc`: trees in, trees out, results as JAX has them."""
    fake_atc(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    acl = FakeAcl()
    monkeypatch.setattr(om, "find_acl", lambda: (acl, ""))
    backend = adapter.AscendBackend()
    assert backend.unavailable() is None
    assert [device.kind for device in backend.capabilities().devices] == ["Ascend910B3"]
    program = _program()
    run = backend.load(backend.export(program))
    rng = np.random.default_rng(0)
    weights = {"norm": rng.random(8, np.float32), "w": rng.random((8, 4), np.float32)}
    x = rng.random((2, 8), np.float32)
    got = run({name: backend.put(value) for name, value in weights.items()}, x)
    want = program.fn(weights, x)
    assert type(got) is Pair and list(got.rest[0]) == ["a", "b"]
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(backend.get(mine), np.asarray(theirs), rtol=1e-5)
    assert backend.get(backend.zeros((2, 3), "bfloat16")).dtype == jnp.bfloat16


def test_device_memory_is_freed_with_its_last_reference():
    acl = FakeAcl()
    session = om.Session(acl=acl)
    tensor = session.put(np.ones(16, np.float32))
    assert tensor.pointer in acl.memory
    assert session.put(np.float32(3)).shape == ()
    pointer = tensor.pointer
    del tensor
    assert pointer not in acl.memory


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(BackendUnavailable, match="Ascend device 7: acl.rt.set_device returned error 107001"):
        om.Session(7, FakeAcl())
