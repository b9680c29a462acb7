"""`run.py` of a package, as an engineer starts it: with torch alone, on CPU processes, references for kernels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest

pytest.importorskip("torch")
from backends import registry
from backends.ascend.target import NpuOptions
from backends.ascend.writer import write
from backends.errors import BackendUnavailable
from backends.toolchains import narrow
from model.checkpoint import Checkpoint
from model.formats import scheme
from model.split import Layout
from runtime.deployment.manifest import Gear
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.local.request import Prompt
from runtime.execution.package.torch import TorchExecutor
from tests.cli.cli import glm5, refused
from tests.export.wide_checkpoint import glm_like
from tests.npu import graphs as g
from tests.npu.packages import export, operators, request
from tests.npu.references import register

PROMPTS = ((32, 537, 72, 87, 83, 875, 542), (85, 258, 300, 4, 9, 11, 13, 400, 77, 31, 5, 600))
COUNT = 30
GEARS = {"prefill": [Gear(2, 32, 3)], "decode": [Gear(2, 1, 6)]}
_ROOT = Path(__file__).parents[2]


@cache
def expected() -> list[list[int]]:
    """Greedy tokens of the JAX step."""
    engine = load_engine(Checkpoint(embedded_checkpoint()), registry.get("cpu"), EngineConfig(), "float32", False, None)
    return [list(each.token_ids) for each in engine.generate([Prompt(ids, COUNT) for ids in PROMPTS])]


def package(folder: Path, layout: Layout = Layout(), gears: Any = None, **options: Any) -> Path:
    job = request(embedded_checkpoint(), "f32", gears or GEARS, layout)
    if options:
        job = dataclasses.replace(job, options=options)
        from runtime.porting.export.package import export as plain

        plain(job, folder)
    else:
        assert "npu_grouped_matmul" in operators(export(job, folder))
    return folder


def start(folder: Path, *words: str, processes: int = 1, python: str = sys.executable) -> subprocess.CompletedProcess:
    """With torch alone: nothing of ours is on the path, but where references are asked for."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT) if "--kernels" in words else ""}
    command = [python, *torchrun, str(folder / "run.py"), "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900)


def prompts(count: int = len(PROMPTS)) -> list[str]:
    given = [word for ids in PROMPTS[:count] for word in ("--prompt-ids", ",".join(map(str, ids)))]
    return [*given, "--max-tokens", str(COUNT)]


def tokens(done: subprocess.CompletedProcess) -> list[list[int]]:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokens ")]
    return [[int(word) for word in line.partition(":")[2].split()] for line in lines]


KERNELS = ("--kernels", "tests.npu.kernels")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(pp=2)], ids=lambda each: each.name)
def test_tokens_are_those_of_the_jax_step_on_one_process_a_device(layout: Layout, tmp_path: Path):
    folder = package(tmp_path / "package", layout)
    done = start(folder, *KERNELS, *prompts(), processes=layout.tp * layout.dp * layout.pp)
    assert tokens(done) == expected()


@pytest.mark.slow
def test_tokens_with_experts_that_operators_reach(tmp_path: Path):
    """Four processes, each with its own share of a group's tokens and of the experts; rows wide enough to be sent."""
    checkpoint = Checkpoint(glm_like(tmp_path / "checkpoint", hidden_size=1024, n_routed_experts=8))
    gears = {"prefill": [Gear(2, 32, 3)], "decode": [Gear(2, 1, 6)]}
    folder = tmp_path / "package"
    manifest = export(request(checkpoint.path, "f32", gears, Layout(tp=2, dp=2, ep=4)), folder)  # type: ignore[arg-type]
    assert "npu_moe_distribute_dispatch_v2" in operators(manifest) and manifest.extra["ascend"]["exchange"]
    engine = load_engine(checkpoint, registry.get("cpu"), EngineConfig(), "float32", False, None)
    want = [list(each.token_ids) for each in engine.generate([Prompt(ids, COUNT) for ids in PROMPTS])]
    assert tokens(start(folder, *KERNELS, *prompts(), processes=4)) == want
    with pytest.raises(BackendUnavailable, match="talk to other devices themselves.*its run.py"):
        TorchExecutor(trusted=True).admit(folder, manifest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gears", [{"decode": [Gear(2, 1, 6)]}, {"prefill": [Gear(2, 16, 7)]}], ids=["decode", "chunks"]
)
def test_either_phase_alone_generates(gears: Any, tmp_path: Path):
    folder = package(tmp_path / "package", gears=gears)
    assert tokens(start(folder, *KERNELS, *prompts())) == expected()


@pytest.mark.slow
def test_without_operators_torch_is_all_it_takes_and_the_product_runs_it_too(tmp_path: Path):
    """Compiled, with the collectives in the graph; and all ranks in one process, by `glm5 run --artifact`."""
    folder = package(tmp_path / "package", Layout(tp=2), {"decode": [Gear(2, 1, 6)]}, npu_ops="none")
    assert tokens(start(folder, *prompts(), "--graph-mode", "aot_eager", processes=2)) == expected()
    ids = ",".join(map(str, PROMPTS[0]))
    said = glm5("run", "--artifact", folder, "--backend", "torch", "--prompt-ids", ids, "--max-tokens", COUNT, "--json",
                "--ignore-eos")  # fmt: skip
    assert said.json["token_ids"] == expected()[0]


@pytest.mark.slow
def test_operators_without_kernels_are_refused_where_they_are_asked_for(tmp_path: Path):
    folder = package(tmp_path / "package", gears={"decode": [Gear(1, 1, 4)]})
    done = start(folder)
    assert done.returncode == 2 and "no kernels for cpu of npu_grouped_matmul" in done.stderr
    said = refused("run", "--artifact", folder, "--backend", "ascend", "--prompt-ids", "1,2")
    assert "--backend ascend cannot be used here: torch_npu" in said
    report = glm5("export", "check", folder, "--json").json
    assert report["calls"] > 20 and report["refusals"] == []


@pytest.mark.npu
def test_compiled_with_torch_npus_own_registrations(tmp_path: Path):
    """What torch_npu makes of writing in place, and units of a step beyond what torch.compile keeps of one function."""
    folder = package(tmp_path / "package", Layout(tp=2))
    done = start(folder, *KERNELS, *prompts(), "--graph-mode", "aot_eager", processes=2)
    assert tokens(done) == expected()


@pytest.mark.npu
@pytest.mark.parametrize("kv", [None, 64])
def test_projections_that_write_caches_in_place_are_compiled_as_they_run(kv: int | None):
    import torch

    register()
    linear = narrow.lowerings(scheme("w8a8"), "ascend")["glm.linear"]
    inputs = g.projection_inputs(ml_dtypes.bfloat16, int8=True)
    made = write(g.graph(g.projections(linear), inputs, g.PROJECTED), NpuOptions(int8_rope=kv))
    given = {**inputs, "cache.latent": g.int8_caches(g.attention_inputs())["cache.latent"][..., :656]} if kv else inputs
    assert "npu_mla_prolog_v3" in g.operators(made)
    run = g.program(made).module()
    results = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        tensors = [g.tensor(g.given(given, each.name)).reshape(each.shape) for each in made.inputs]
        results.append([*call(*tensors), *tensors])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    at = {each.name: place for place, each in enumerate(made.inputs)}
    for out, name in made.aliases.items():
        place = [each.name for each in made.outputs].index(out)
        assert torch.equal(results[1][place], results[1][len(made.outputs) + at[name]])


@pytest.mark.slow
def test_measurements_have_every_unit_and_operator(tmp_path: Path):
    folder = package(tmp_path / "package")
    done = start(folder, *KERNELS, *prompts(1), "--measure", "2", "--operators", "--json", "m.json")
    assert tokens(done) == expected()[:1]
    found = json.loads((folder / "m.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    for program, said in zip(found["programs"], manifest["programs"], strict=True):
        assert program["units"].keys() == said["units"].keys() - {manifest["mtp"]}
        calls = {unit: each["calls_a_step"] for unit, each in program["units"].items()}
        layers = [layer["unit"] for layer in manifest["layers"]]
        assert calls == {unit: max(1, layers.count(unit)) for unit in calls}
    called = {each["operator"].removeprefix("npu.") for each in found["operators"]}
    grouped = [each for each in found["operators"] if each["operator"] == "npu.npu_grouped_matmul"]
    for each in grouped:  # on one device every row that is given is some expert's
        assert each["rows"] == each["inputs"][0]["shape"][0] and 1 <= each["groups"] <= each["inputs"][1]["shape"][0]
    assert set(manifest["extra"]["ascend"]["operators"]) <= called


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("run") / "package", Layout(), {"decode": [Gear(1, 1, 4)]}, npu_ops="none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt-ids", "1,x"), "whole numbers separated by commas"),
        (("--prompt-ids", "99999"), "a prompt has tokens from 0 to 1023"),
        (("--max-tokens", "999"), "sequences of 1000 tokens are more than a gear holds"),
        (("--max-tokens", "0"), "--max-tokens: 1 or more"),
        (("--operators",), "--operators goes with --measure N"),
        (("--measure", "-1"), "--measure: 0 or more"),
        (("--json", "there/is/none.json"), "its folder is not there"),
        (("--graph-mode", "nosuch"), "--graph-mode nosuch: eager, npugraph_ex"),
        (("--graph-mode", "torchair"), "compiles for an NPU"),
        (("--kernels", "nosuch"), "--kernels nosuch: No module named"),
        (("--kernels", "json"), "--kernels json: module 'json' has no attribute 'register'"),
        (("--device", "npu"), "--device npu: torch_npu"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: tuple[str, ...], says: str, plain: Path):
    done = start(plain, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_another_package_or_a_damaged_one_is_refused(plain: Path, tmp_path: Path):
    import shutil

    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    text = (folder / "manifest.json").read_text()
    for old, new, says in (
        ('"schema_version": 2', '"schema_version": 1', "manifest version 1; this run.py reads ascend, version 2"),
        ('"format": "ascend"', '"format": "torch"', "a package of format 'torch'"),
        ('"index": 0,\n   "stage"', '"index": 5,\n   "stage"', "has no weights of device 0"),
        ('"layers": [\n    0,', '"layers": [', "does not hold all devices"),
    ):
        (folder / "manifest.json").write_text(text.replace(old, new, 1))
        done = start(folder)
        assert done.returncode == 2 and says in done.stderr, done.stderr
    (folder / "manifest.json").write_text(text)
    graph = next(folder.glob("*/head.pt2"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    done = start(folder)
    assert done.returncode == 2 and "altered" in done.stderr
