"""`glm5 run --backend sim`: the same tokens from the command line, and a line for everything that cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.hf_config import from_hf
from model.split import Layout
from runtime.execution.cluster.deploy import lay_out
from tests.cli.cli import CONFIG, glm5, make_checkpoint, refused
from tests.plans import formats, plan_for
from tests.sim.servers import CHIP, plan_of

SIM = ("run", "--backend", "sim")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers."""
    folder = tmp_path_factory.mktemp("sim-cli") / "small"
    make_checkpoint(folder)
    return folder


def in_a_process(*words: object) -> Any:
    """The JSON of `glm5 words..` in a process of its own, where JAX can still be given host devices."""
    command = [sys.executable, "-m", "runtime.cli.main", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cpus_tokens_on_four_devices(small: Path, tmp_path: Path) -> None:
    """From a plan file, with a timeline of the four devices."""
    config = from_hf(CONFIG)
    plan_for(config, Layout(tp=2, dp=2, ep=4), hw_profiles.load(CHIP), formats("f32")).write(tmp_path / "plan.json")
    ask = ("--checkpoint", small, "--prompt-ids", "5,6,7,8,9", "--max-tokens", 4, "--ignore-eos")
    found = in_a_process(*SIM, "--plan", tmp_path / "plan.json", "--trace", tmp_path / "trace.json", *ask)
    assert found["token_ids"] == glm5("run", *ask, "--json").json["token_ids"]
    assert found["devices"] == 4 and found["timings_s"]["ttft"] > 0 and found["clock"].startswith("virtual")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}


def test_what_cannot_be_is_said_in_a_line(small: Path, tmp_path: Path) -> None:
    ask = (*SIM, "--checkpoint", small)
    assert "--profile" in refused(*ask)
    assert refused("run", "--devices", 4).startswith("--devices needs a backend that emulates")
    assert "no fp8-block" in refused(*ask, "--profile", "a100-sxm-80gb", "--formats", "fp8")
    assert "unknown formats 'w3a3'" in refused(*ask, "--profile", CHIP, "--formats", "w3a3")
    assert "attention heads / tp = 4 / 3" in refused(*ask, "--profile", CHIP, "--devices", 3, "--tp", 3)
    assert "no directory" in refused(*ask, "--profile", CHIP, "--trace", tmp_path / "none" / "trace.json")
    assert "--scale-memory must be above 0" in refused(*ask, "--profile", CHIP, "--scale-memory", 0)


def test_a_plan_for_something_else_is_refused(small: Path, tmp_path: Path) -> None:
    chip, path = hw_profiles.load(CHIP), tmp_path / "plan.json"
    plan_for(from_hf(CONFIG), Layout(tp=2), chip, formats("bf16")).write(path)
    assert "not for" in refused(*SIM, "--plan", path)  # the embedded checkpoint is another model
    ask = (*SIM, "--checkpoint", small, "--plan", path)
    assert f"{path} is a plan for 2 devices" in refused(*ask, "--devices", 8)
    for given in (("--tp", 2), ("--mtp", 0), ("--kv", "bf16")):  # whatever the plan says
        assert refused(*ask, *given).startswith(f"{given[0]} does not go with --plan, which decides it")
        assert refused("serve", *ask[1:], *given).startswith(f"{given[0]} does not go with --plan")
    path.write_text(path.read_text()[:200])
    assert "cut short" in refused(*ask)
    assert refused(*ask, "--mtp", 2).startswith("--mtp does not go with --plan")


@pytest.mark.parametrize("planned", [False, True])
def test_out_of_memory_names_the_tensor(small: Path, tmp_path: Path, planned: bool) -> None:
    """Memory that does not hold all weights; nothing is loaded, and nothing is written."""
    trace, path = tmp_path / "trace.json", tmp_path / "plan.json"
    plan = plan_for(from_hf(CONFIG), Layout(), hw_profiles.load(CHIP), formats("f32"))
    held = plan.devices[0].ledger
    needed = held.activation_bytes + held.weights_total_bytes * 0.8
    share = needed / (held.usable_bytes - held.runtime_bytes - held.communication_bytes)
    how: tuple[object, ...] = ("--profile", CHIP, "--formats", "f32")
    if planned:
        plan.write(path)
        how = ("--plan", path)
    line = refused(*SIM, "--checkpoint", small, *how, "--trace", trace, "--scale-memory", share)
    assert line.startswith(f"out of memory on {CHIP}, device 0: layers.") and "weights" in line
    assert "activations" in line and not trace.exists()


def test_memory_runs_out_tensor_by_tensor(tiny: Checkpoint) -> None:
    """As memory shrinks, the tensor that does not fit comes earlier in the order of loading, and less fits before."""
    from backends.emulation.memory import Limits, OutOfMemory, account
    from runtime.execution.cluster.deploy import grid_of

    cfg = tiny.config
    (pool,) = plan_of(cfg, Layout(tp=2, ep=2)).pools
    whole = Limits("chip", 1e9, {"activations": 1e5}, formats("bf16"), 9, 16)
    (memory,) = account(cfg, grid_of(cfg, pool), whole)
    used = 1e9 - memory.free_bytes
    assert account(cfg, grid_of(cfg, pool), dataclasses.replace(whole, usable_bytes=used))
    named = []
    for share in (0.999999, 0.9, 0.5, 0.2, 0.01):
        with pytest.raises(OutOfMemory) as error:
            account(cfg, grid_of(cfg, pool), dataclasses.replace(whole, usable_bytes=used * share))
        assert "\n" not in str(error.value)
        named.append(str(error.value).split(": ", 1)[1].split(" takes ")[0])
    assert named[0] == "layers.5.latent (9 pages)" and named[-1] == "activations"
    layers = [int(name.split(".")[1]) for name in named[1:-1]]
    assert layers == sorted(layers, reverse=True) and len(set(layers)) > 1


def test_a_layout_for_any_number_of_devices(tiny: Checkpoint) -> None:
    cfg = tiny.config
    assert lay_out(cfg, 1) == (Layout(), 1)
    assert lay_out(cfg, 4) == (Layout(tp=4, ep=4), 1)
    assert lay_out(cfg, 16) == (Layout(tp=8, dp=2, ep=16), 1)
    assert lay_out(cfg, 64) == (Layout(tp=8, dp=2, ep=16, pp=4), 1)
    assert lay_out(cfg, 8, dp=4, ep=1) == (Layout(tp=2, dp=4), 1)
    layout, servers = lay_out(cfg, 384)
    assert layout.devices * servers == 384
    with pytest.raises(UsageError, match="no layout of 6 devices with tp 2, pp 6 fits .*must divide 6"):
        lay_out(cfg, 6, tp=2, pp=6)


@pytest.mark.slow
def test_many_devices_from_the_command_line() -> None:
    """The embedded checkpoint."""
    devices = 384
    ask = ("--prompt", "A mixture of experts", "--max-tokens", 8)
    words = (*SIM, "--profile", "ascend-910c", "--formats", "f32", "--devices", devices, *ask, "--json")
    # A small process starts it and says how much it took: what a large one starts is as large before it begins.
    measured = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    )
    command = [sys.executable, "-c", measured, sys.executable, "-m", "runtime.cli.main", *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(process.stdout)
    code, most_kib = map(int, process.stderr.split()[-2:])
    assert found["token_ids"] == glm5("run", *ask, "--json").json["token_ids"] and found["devices"] == devices
    assert code == 0 and most_kib * 1024 < 4e9


@pytest.mark.slow
def test_layouts_on_host_devices() -> None:
    """A twelfth of the 72 with degrees in 1, 2, 4, 8, as the checkpoint admits; `tests.sim.matrix all` runs all."""
    command = [sys.executable, "-m", "tests.sim.matrix", "some"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 6
    assert all(each["same_tokens"] and each["logit_error"] < 1e-4 for each in found)


@pytest.mark.slow
def test_several_emulated_devices_are_served() -> None:
    """In a process of its own: JAX is told of its devices before anything starts it."""
    command = [sys.executable, "-m", "runtime.cli.main", "serve", "--port", "0", "--warm-up", "0"]
    devices = ["--backend", "sim", "--profile", CHIP, "--devices", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with subprocess.Popen([*command, *devices], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
    assert "ready" in line and process.returncode == 0
