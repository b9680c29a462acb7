"""The Ascend package: what it holds, that its graphs mean what the model's do, and what is refused beforehand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.ascend import catalog, lowerings, lowerings_attention, lowerings_dense, lowerings_moe, om
from backends.errors import ArtifactError, BackendUnavailable, Unsupported
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.split import Layout
from runtime.deployment.manifest import Gear, Manifest, check_files
from runtime.deployment.tensors import TensorReader
from runtime.execution.local.load import embedded_checkpoint
from runtime.execution.package.ascend import AscendExecutor
from runtime.execution.package.executor import executor
from runtime.execution.package.runner import Runner, StepBatch, stored_weights
from runtime.porting.export import package, verify
from runtime.porting.export.ascend import AscendWriter
from runtime.porting.export.ascend_files import rank_table
from tests.export.ascend_packages import export, graph_file, request
from tests.export.ascend_runtimes import FakeAcl, ReferenceExecutor, copy_of, fake_atc
from tests.export.wide_checkpoint import glm_like


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with every CANN operator that its shapes allow, chunks and single tokens."""
    gears = {"prefill": [Gear(2, 48, 6)], "decode": [Gear(2, 1, 6)]}
    return export(tmp_path_factory.mktemp("ascend") / "fused", gears=gears, profile="ascend-910b3")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ascend") / "int8"
    return export(folder, scheme="w8a8", layout=Layout(tp=2), profile="ascend-910b2", gears={"decode": [Gear(1, 1, 4)]})


def test_it_holds_what_an_engineer_needs(fused: Path):
    manifest = Manifest.read(fused)
    check_files(fused, manifest)
    assert {"README.md", "build.sh", "plugin/build.sh", "plugin/glm5_onnx_plugin.cc"} <= set(manifest.files)
    assert manifest.format == "ascend" and manifest.extra["ascend"]["soc_version"] == "Ascend910B3"
    script = (fused / "build.sh").read_text()
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    assert set(manifest.extra["ascend"]["commands"]) == set(graphs)
    for name in graphs:
        assert f"build {name.removesuffix('.onnx')}\n" in script
        command = manifest.extra["ascend"]["commands"][name]
        assert f"--model={name}" in command and "--soc_version=Ascend910B3" in command
        assert "--framework=5" in command and "--precision_mode_v2=origin" in command
    readme = (fused / "README.md").read_text()
    assert "glm5 export check" in readme and "sh build.sh" in readme and "| prefill | 2 | 48 | 96 |" in readme


def test_the_scripts_compile_every_graph_once(fused: Path, tmp_path: Path):
    """build.sh with a fake `atc`: our own quoting and paths, not ATC."""
    folder = copy_of(fused, tmp_path / "package")
    (folder / "plugin/framework/onnx").mkdir(parents=True)
    (folder / "plugin/framework/onnx/libglm5_onnx_plugin.so").touch()
    fake_atc(tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(["sh", "build.sh"], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    graphs = [name for name in Manifest.read(folder).files if name.endswith(".onnx")]
    assert all((folder / "om" / name).with_suffix(".om").is_file() for name in graphs)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(graphs)
    wanted = {command.removeprefix("atc ") for command in Manifest.read(folder).extra["ascend"]["commands"].values()}
    assert set(calls) == wanted, "the manifest's commands are not what build.sh runs"


def test_without_a_chip_the_script_asks_for_one(tmp_path: Path):
    folder = export(tmp_path / "any", weights=False, gears={"decode": [Gear(1, 1, 2)]}, cann_ops="none")
    assert not (folder / "plugin").exists()
    script = subprocess.run(["sh", "build.sh"], cwd=folder, capture_output=True, text=True)
    assert script.returncode != 0 and "as Ascend910B3" in script.stderr
    assert "npu-smi info" in (folder / "README.md").read_text()


@pytest.mark.parametrize("phase", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_its_graphs_mean_what_the_model_does(fused: Path, phase: str):
    """Several steps past `index_topk`, caches carried over: logits and cache rows against the JAX step. CANN's
    operators run by their documentation."""
    manifest = Manifest.read(fused)
    checkpoint = Checkpoint(embedded_checkpoint())
    weights = stored_weights(fused, manifest)
    assert weights is not None
    (program,) = manifest.program(phase)  # type: ignore[arg-type]
    runner, reference = Runner(fused, manifest, ReferenceExecutor(), weights), verify.Reference(checkpoint, manifest)
    found = verify.compare(manifest, program, runner, reference, np.random.default_rng(1))
    assert found.worst <= verify.TOLERANCE
    assert found.context > (manifest.model.index_topk or 0)


def test_cann_attention_from_prompt_to_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model of the widths that CANN's attention takes: chunks past the selection, then tokens. With CANN's operators
    and two latent caches, logits and caches are the plain graph's. In float32, which the kernels do not take and their
    NumPy forms do, so that no choice of a token or an expert hangs on rounding."""
    known = {
        name: dataclasses.replace(operator, dtypes=(*operator.dtypes, "float32"))
        for name, operator in catalog.cann_operators().items()
    }
    for module in (catalog, lowerings, lowerings_attention, lowerings_dense, lowerings_moe):
        monkeypatch.setattr(module, "cann_operators", lambda: known)
    checkpoint = glm_like(tmp_path / "checkpoint")
    gears = {"prefill": [Gear(2, 32, 6)], "decode": [Gear(2, 1, 6)]}
    made = {}
    for ops in ("all", "none"):
        made[ops] = export(tmp_path / ops, scheme="f32", checkpoint=checkpoint, gears=gears, cann_ops=ops)
    runners = {}
    for ops, folder in made.items():
        manifest = Manifest.read(folder)
        weights = stored_weights(folder, manifest)
        assert weights is not None
        runners[ops] = Runner(folder, manifest, ReferenceExecutor(), weights)
    fused = runners["all"].manifest
    names = {value.name for value in fused.caches["mla-full-indexer-dense"]}
    assert names == {"cache.latent_nope", "cache.latent_rope", "cache.index"}
    customs = {use.target for p in fused.programs for c in p.units.values() for s in c for use in s.ops}
    assert any("SparseFlashAttention" in each for each in customs)
    assert any("LightningIndexer" in each for each in customs)

    rng = np.random.default_rng(2)
    start, worst = 0, 0.0
    for phase, tokens in (("prefill", 32), ("prefill", 32), *[("decode", 1)] * 3):
        ids = rng.integers(0, fused.model.vocab_size, (2, tokens)).astype(np.int32)
        logits = {}
        for ops, runner in runners.items():
            (program,) = runner.manifest.program(phase)  # type: ignore[arg-type]
            pages = np.arange(1, 13, dtype=np.int32).reshape(2, 6)[:, ::-1].copy()
            where, length = np.full(2, start, np.int32), np.full(2, tokens, np.int32)
            out = runner.step(program, [StepBatch(ids, where, length, pages)])[0]["logits"]
            logits[ops] = np.asarray(out, np.float64)
        start += tokens
        worst = max(worst, float(np.abs(logits["all"] - logits["none"]).max()))
    assert start > (fused.model.index_topk or 0)
    assert worst < verify.TOLERANCE

    (place,) = {key[0] for key in runners["all"].caches}
    first = {ops: runner.caches[place, _first(runner)] for ops, runner in runners.items()}
    joined = np.concatenate([first["all"]["cache.latent_nope"], first["all"]["cache.latent_rope"]], axis=-1)
    np.testing.assert_allclose(joined[1:], first["none"]["cache.latent"][1:], atol=verify.TOLERANCE)


def _first(runner: Runner) -> Any:
    """The key of the first layer's caches."""
    return sorted((key[1] for key in runner.caches), key=str)[0]


def test_fused_ops_are_in_the_manifest_by_name(fused: Path):
    steps = [s for p in Manifest.read(fused).programs for chain in p.units.values() for s in chain]
    uses = {(use.name, use.form, use.target) for step in steps for use in step.ops}
    assert ("glm.route", "custom", "cann::MoeGatingTopK") in uses
    assert ("glm.cache_write", "custom", "cann::ScatterNdUpdate") in uses
    assert any(name == "glm.linear" and form == "decomposed" for name, form, _ in uses)


def test_int8_weights_are_the_checkpoints_to_half_a_step(int8: Path):
    manifest = Manifest.read(int8)
    plain = package.export(request("bf16", layout=Layout(tp=2)), int8.parent / "plain")
    for device, other in zip(manifest.devices, plain.devices, strict=True):
        held = TensorReader(int8 / str(device.weights))
        want = TensorReader(int8.parent / "plain" / str(other.weights))
        scaled = [name for name in held.names if name.endswith(".values")]
        assert any(".experts_down" in name for name in scaled) and any(".o." in name for name in scaled)
        for name in scaled:
            stem = name.removesuffix(".values")
            values, scale = held.array(name), held.array(f"{stem}.scale")
            dim = 1 if ".experts_" in name else 0
            weight = want.array(stem).astype(np.float32)
            error = np.abs(values * np.expand_dims(scale, dim) - weight)
            assert values.dtype == np.int8 and (error <= np.expand_dims(scale, dim) * 0.501).all()
        assert not any(f"{name}.values" in held.names for name in ("outer.embed", "layers.1.router"))


def test_int8_packages_run(int8: Path):
    """Two ranks with int8 products: logits near the 16-bit package's."""
    outputs = []
    for folder in (
        int8,
        export(int8.parent / "wide", scheme="bf16", layout=Layout(tp=2), gears={"decode": [Gear(1, 1, 4)]}),
    ):
        manifest = Manifest.read(folder)
        weights = stored_weights(folder, manifest)
        assert weights is not None
        runner = Runner(folder, manifest, ReferenceExecutor(), weights)
        batch = _batch(manifest.programs[0].gear, token=17, start=0)
        outputs.append(np.asarray(runner.step(manifest.programs[0], [batch])[0]["logits"], np.float64).ravel())
    cosine = outputs[0] @ outputs[1] / np.linalg.norm(outputs[0]) / np.linalg.norm(outputs[1])
    assert cosine > 0.99


def _batch(gear: Gear, token: int, start: int) -> StepBatch:
    one = np.ones(gear.sequences, np.int32)
    pages = np.arange(1, 1 + gear.sequences * gear.context_pages, dtype=np.int32)
    return StepBatch(
        np.full((gear.sequences, gear.tokens), token, np.int32), one * start, one, pages.reshape(gear.sequences, -1)
    )


def test_the_runner_on_a_chip_keeps_buffers_by_name_and_in_place(fused: Path, tmp_path: Path, monkeypatch: Any):
    """Through a fake `acl` and `atc`: the same logits as without them, caches in the memory that they came in."""
    folder = copy_of(fused, tmp_path / "package")
    fake_atc(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manifest = Manifest.read(folder)
    weights = stored_weights(folder, manifest)
    assert weights is not None
    (program,) = manifest.program("decode")
    chip = Runner(folder, manifest, AscendExecutor(om.Session(acl=FakeAcl())), weights)
    want = Runner(folder, manifest, ReferenceExecutor(), weights)
    before = {key: {name: t.pointer for name, t in held.items()} for key, held in chip.caches.items()}
    for position, token in enumerate((5, 9, 13)):
        batch = _batch(program.gear, token, position)
        got, same = chip.step(program, [batch])[0]["logits"], want.step(program, [batch])[0]["logits"]
        np.testing.assert_allclose(chip.executor.get(got), same, atol=1e-6)
    after = {key: {name: t.pointer for name, t in held.items()} for key, held in chip.caches.items()}
    assert before == after
    assert (folder / "om").is_dir(), "compiled here, as build.sh would have"


def test_a_buffer_of_another_gear_is_refused(fused: Path, tmp_path: Path):
    session = om.Session(acl=FakeAcl())
    model = session.load(fused / graph_file(fused, "view"))
    given = {name: session.put(np.zeros(1, np.int32)) for name, _ in model.inputs}
    with pytest.raises(ArtifactError, match=r"takes \d+ bytes, 4 are given; a shape outside the gear"):
        model.run(given, {}, {})


def test_what_atc_says_is_passed_on(tmp_path: Path, monkeypatch: Any):
    from backends.ascend.compiler import compile_graph

    fake_atc(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "refused.onnx").touch()
    with pytest.raises(ArtifactError, match=r"atc refuses it: E16002: optype \[x\] is not registered"):
        compile_graph(tmp_path / "refused.onnx", tmp_path / "out", "Ascend910B3")


def test_without_cann_it_says_so_and_offers_the_emulation():
    with pytest.raises(BackendUnavailable, match="install CANN and source its set_env.sh, or emulate .* --backend sim"):
        executor("ascend", "ascend")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scheme": "fp8", "weights": False}, "--formats fp8: ONNX opset 18 has no 8-bit floats"),
        ({"scheme": "w4a8", "weights": False}, "--formats w4a8: ONNX opset 18 has no 4-bit integers"),
        ({"profile": "h200-sxm"}, "--profile h200-sxm: .* is no Ascend chip"),
        ({"cann_ops": "some"}, "--cann-ops some: all, shipped, none"),
        ({"soc_version": "910B3"}, "'Ascend' and the Name that `npu-smi info` prints"),
        ({"gears": {"decode": [Gear(i, 1, 1) for i in range(1, 102)]}}, "101 gears of decode: ATC takes at most 100"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments: dict[str, Any], says: str):
    with pytest.raises((UsageError, Unsupported), match=says) as caught:
        AscendWriter(request(**arguments))
    assert len(str(caught.value).splitlines()) == 1


def test_the_rank_table_is_hccls():
    one = rank_table(8, 8)
    assert one["status"] == "completed" and one["version"] == "1.0" and one["server_count"] == "1"
    two = rank_table(16, 8)
    devices = [device for server in two["server_list"] for device in server["device"]]
    assert [device["rank_id"] for device in devices] == [str(rank) for rank in range(16)]
    assert [device["device_id"] for device in devices] == [str(i) for i in range(8)] * 2
    assert all("device_ip" in device for device in devices), "several servers need addresses"
    assert len({server["server_id"] for server in two["server_list"]}) == 2 == int(two["server_count"])
    json.dumps(two)


def test_one_devices_package_has_the_whole_layouts_rank_table(tmp_path: Path):
    folder = export(tmp_path / "one", layout=Layout(tp=2), device=1, gears={"decode": [Gear(1, 1, 2)]})
    assert [path.name for path in (folder / "weights").iterdir()] == ["device-1.safetensors"]
    table = json.loads((folder / "rank_table.json").read_text())
    assert len(table["server_list"][0]["device"]) == 2 and "## 2 devices" in (folder / "README.md").read_text()


def test_the_pool_is_the_same_in_every_graph(fused: Path):
    """Caches pass between gears: their names and shapes must not depend on the gear."""
    manifest = Manifest.read(fused)
    for unit, caches in manifest.caches.items():
        named = {value.name: value for value in caches}
        for program in manifest.programs:
            given = {v.name: v for step in program.units[unit] for v in step.inputs if v.name.startswith("cache.")}
            assert given and all(named[name] == value for name, value in given.items()), (unit, program.phase)
