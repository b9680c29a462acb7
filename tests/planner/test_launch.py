"""What holds of every launched command: sources, devices, words a shell reads back, the command itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import CapacityError, UsageError
from model.split import Layout
from runtime.deployment.engines.flags import holds, table
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool
from runtime.planning.launch import Command, Launch, launch
from tests.cli.cli import glm5, refused
from tests.planner.launching import PRODUCT, RELEASES, complaints, made, pairs, plan_of, pool, recorded

LAYOUTS = st.sampled_from(
    [Layout(tp, dp, ep, pp) for tp in (1, 2, 4, 8, 16) for dp in (1, 2, 4, 8, 16) for pp in (1, 2)
     for ep in {1, tp * dp} if tp * dp * pp <= 64]
)  # fmt: skip


@given(LAYOUTS, st.sampled_from(RELEASES), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_every_flag_has_a_source_and_every_device_a_process(
    layout: Layout, of: tuple[str, str], drafts: int, replicas: int, apart: bool, host_tier: bool
) -> None:
    engine, release = of
    profile, scheme = PRODUCT[engine]
    options: Any = {"engine": engine, "drafts": drafts, "replicas": replicas}
    try:
        pools = [pool("glm-5-fp8", profile, layout, scheme, role="prefill" if apart else "serve", **options)]
        if apart:
            nodes = 1 + max(device.node for device in pools[0].devices)
            more: Any = {"first_device": len(pools[0].devices), "first_node": nodes}
            pools.append(pool("glm-5-fp8", profile, layout, scheme, role="decode", **options, **more))
        found = made("glm-5-fp8", *pools, release=release, host_tier=host_tier)
    except (CapacityError, UsageError, LaunchError):
        return
    documented = table(engine, release).documented
    for command in found.commands:
        flags = pairs(command)
        assert flags.keys() == command.sources.keys(), "a flag without a source, or the other way round"
        assert flags.keys() <= documented.keys()
        assert complaints(command, recorded(engine, release)) == []
    assert covered(found, engine) == {(device.node, local) for device, local in numbered(pools, profile)}
    ends = [(c.node, pairs(c)["--port"]) for c in found.commands if "--port" in pairs(c) and serves(c, engine)]
    assert len(ends) == len(set(ends)), "two processes on one port"
    assert found.nodes == sorted({command.node for command in found.commands})
    told = json.loads(json.dumps(found.to_json()))
    assert told["commands"][0]["argv"] == found.commands[0].argv and told["releases"] == {engine: release}


def serves(command: Command, engine: str) -> bool:
    """Whether the process answers requests: of SGLang's nodes only the first does."""
    return engine != "sglang" or pairs(command).get("--node-rank", ("0",)) == ("0",)


def numbered(pools: list[Pool], profile: str) -> list[tuple[Any, int]]:
    """Each device with its number on its node."""
    per_node = int(hw_profiles.load(profile).value("node.devices"))
    return [(device, i % per_node) for each in pools for i, device in enumerate(each.devices)]


def covered(found: Launch, engine: str) -> set[tuple[int, int]]:
    """(node, device) that the commands start processes on, each once, read off the words alone."""
    per_node = 16 if engine == "vllm-ascend" else 8
    held: list[tuple[int, int]] = []
    for command in found.commands:
        flags = {flag: values[0] if values else "" for flag, values in pairs(command).items()}
        nodes = int(flags.get("--nnodes", 1))
        if engine == "sglang":
            total = int(flags["--tp-size"]) * int(flags.get("--pp-size", 1))
            first = int(flags.get("--base-gpu-id", 0))
            held += [(command.node, first + i) for i in range(total // nodes)]
            continue
        total = int(flags["--tensor-parallel-size"]) * int(flags.get("--pipeline-parallel-size", 1))
        ranks = int(flags.get("--data-parallel-size-local", flags.get("--data-parallel-size", 1)))
        if "--data-parallel-rank" in flags:
            ranks = 1
        if flags.get("--data-parallel-backend") == "ray":
            span = range(-(-total * ranks // per_node))
            held += [(command.node + n, i) for n in span for i in range(per_node)]
            continue
        name = "ASCEND_RT_VISIBLE_DEVICES" if engine == "vllm-ascend" else "CUDA_VISIBLE_DEVICES"
        count = total * ranks // nodes
        seen = command.environment.get(name)
        chosen = [int(i) for i in str(seen).split(",")] if seen else list(range(per_node))
        assert len(chosen) == count, (command.argv, chosen)
        held += [(command.node, i) for i in chosen]
    assert len(held) == len(set(held)), "a device with two processes"
    return set(held)


def test_every_rule_of_a_table_can_be_reached_and_has_a_source() -> None:
    facts: Mapping[str, list[Any]] = {
        "vendor": ["NVIDIA", "Huawei"], "role": ["serve", "prefill", "decode"], "model": ["glm-5", "x"],
        "model_type": ["glm_moe_dsa", "deepseek_v32"], "scheme": ["bf16", "fp8", "w8a8", "w4a8", "w4a16"],
        "kv": ["bf16", "fp8", "int8", "f32"], "graph_mode": ["full", "piecewise", "eager"], **{k: [True, False] for k in
        ("sparse", "fp4", "by_expert", "groups", "cut", "drafts", "nodes", "pp", "placement", "same_cache", "tp_fits")},
    }  # fmt: skip
    for engine, release in RELEASES:
        read = table(engine, release)
        assert set(read.documented.values()) <= set(read.sources.values())
        for rule in (*read.extra, *read.environment, *read.additional, *read.remark, *read.refuse):
            assert rule["when"].keys() <= facts.keys()
            chosen = {k: v[0] if isinstance(v, list) else v for k, v in rule["when"].items()}
            assert holds(rule["when"], {k: vs[0] for k, vs in facts.items()} | chosen)
            assert "why" in rule or "text" in rule or rule["source"] in read.sources


def test_a_shell_reads_the_words_back(tmp_path: Path) -> None:
    """The scripts, run by sh with engines that only write down their arguments: what arrives is what was meant."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("vllm", "python3"):
        (tools / name).write_text(
            f'#!/bin/sh\n{{ printf "%s\\0" "{name}" "$@"; }} > "$OUT/$$.argv"\nenv -0 > "$OUT/$$.env"\n'
        )
        (tools / name).chmod(0o755)
    awkward = 'it\'s a "model" $HOME `x` \\ of *mine*'
    prefill = pool("glm-5", "ascend-910c-die", Layout(8, 4, 32), "w8a8", role="prefill", engine="vllm-ascend", drafts=2)
    decode = pool(
        "glm-5", "ascend-910c-die", Layout(4, 8, 32), "w8a8", role="decode", engine="vllm-ascend", first_device=32,
        first_node=2,
    )  # fmt: skip
    found = made("glm-5", prefill, decode, model=awkward)
    folder = tmp_path / "scripts"
    folder.mkdir()
    written = found.write(folder, sources=True)
    assert {path.name for path in written} == {*(f"node{n}.sh" for n in range(4)), "router.sh"}
    hosts = {f"NODE{n}": f"10.0.0.{n}" for n in range(4)} | {"NIC": "eth0", "LOCAL_IP": "10.0.0.9"}
    for node in (*range(4), -1):
        out = tmp_path / f"out{node}"
        out.mkdir()
        script = folder / (f"node{node}.sh" if node >= 0 else "router.sh")
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), **hosts}
        ended = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0 and not ended.stderr, ended.stderr
        wanted = [c for c in (*found.commands, found.router) if c is not None and c.node == node]
        arrived = sorted(path.read_text().split("\0")[:-1] for path in out.glob("*.argv"))
        assert arrived == sorted([filled(word, hosts) for word in c.argv] for c in wanted)
        told = [dict(line.split("=", 1) for line in p.read_text().split("\0") if line) for p in out.glob("*.env")]
        for command in wanted:
            values = {k: filled(str(getattr(v, "text", v)), hosts) for k, v in command.environment.items()}
            assert any(values.items() <= heard.items() for heard in told)


def filled(word: str, values: Mapping[str, str]) -> str:
    """The word with `$NAME` and `${NAME:?message}` filled in."""
    for name, value in values.items():
        if word.startswith("${" + name + ":?"):
            return value + word.partition("}")[2]
        if word == f"${name}" or word.startswith(f"${name}:"):
            return value + word.removeprefix(f"${name}")
    return word


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\u2028"])
def test_what_a_plan_says_stays_a_comment(tmp_path: Path, end: str) -> None:
    """Titles, remarks and sources come from files of others: no line of them is run."""
    text = f"0.5.14{end}touch {tmp_path}/run #"
    command = Command(text, 0, {}, ("true",), (text, text), {text: text})
    made = Launch(text, {}, (command,), command, {}, (text,))
    (tmp_path / "scripts").mkdir()
    for path in made.write(tmp_path / "scripts", sources=True):
        subprocess.run(["sh", path], check=True, cwd=tmp_path)
    code = [line for line in made.text(sources=True).splitlines() if line and not line.startswith("#")]
    assert code == ["true", "true"]
    assert {path.name for path in tmp_path.iterdir()} == {"scripts"}


def test_a_missing_address_stops_the_script(tmp_path: Path) -> None:
    found = made("glm-5-fp8", pool("glm-5-fp8", "h200-sxm", Layout(8, 2), "fp8", engine="sglang"))
    found.write(tmp_path)
    command = ["sh", str(tmp_path / "node0.sh")]
    environment = {"PATH": os.environ["PATH"]}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode and "address of node 0" in ended.stderr


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan_of("glm-5-fp8", pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", drafts=3)).write(path)
    return path


def test_the_command_prints_what_launch_makes(plan_file: Path, tmp_path: Path) -> None:
    plan = Plan.read(plan_file)
    made_here = launch(plan, plan.config(), hosts=["h"])
    assert glm5("plan", "launch", plan_file, "--hosts", "h").out == made_here.text()
    assert glm5("plan", "launch", plan_file, "--hosts", "h", "--json").json == json.loads(
        json.dumps(made_here.to_json())
    )
    shown = glm5("plan", "launch", plan_file, "--sources").out
    assert "# --tp-size: SGLang docs, advanced_features/server_arguments.md" in shown
    listed = glm5("plan", "launch", plan_file, "--engine", "vllm", "--out", tmp_path).out.split()
    assert listed == [str(tmp_path / "node0.sh")]
    assert "--tensor-parallel-size 8" in (tmp_path / "node0.sh").read_text()


def test_the_command_refuses_in_one_line(plan_file: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused("plan", "launch", tmp_path / "absent.json")
    assert "no such directory" in refused("plan", "launch", plan_file, "--out", tmp_path / "absent")
    assert "2 addresses, the plan has 1 node" in refused("plan", "launch", plan_file, "--hosts", "a,b")
    assert "an address is empty" in refused("plan", "launch", plan_file, "--hosts", ",")
    assert "does not run on h200-sxm" in refused("plan", "launch", plan_file, "--engine", "vllm-ascend")
    edited = tmp_path / "edited.json"
    edited.write_text(plan_file.read_text().replace('"kv_pages": ', '"kv_pages": 1', 1))
    assert "edited" in refused("plan", "launch", edited)
