"""One plan over several processes on the loopback: the tokens of one device, and an end for all where one is lost."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import hw_profiles
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.hf_config import from_hf
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import ModelRef, Plan, Transfer, config_hash
from runtime.execution.cluster import processes
from runtime.execution.local.load import embedded_checkpoint
from tests.cli.cli import CONFIG, glm5, make_checkpoint, refused
from tests.plans import formats, plan_for, pool_of
from tests.sim.servers import CHIP

CFG = from_hf(CONFIG)
PROMPTS = ("A mixture of experts", "Hello", "The capital of France is", "1, 2, 3,")
ASK = ("--max-tokens", 5, "--ignore-eos")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers."""
    folder = tmp_path_factory.mktemp("processes") / "small"
    make_checkpoint(folder)
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test, none of which outlives it."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for each in found:
        each.kill()
        each.communicate()


def plan_at(path: Path, layout: Layout, replicas: int = 1, cfg: ModelConfig = CFG) -> Path:
    plan_for(cfg, layout, hw_profiles.load(CHIP), formats("f32"), replicas=replicas).write(path)
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    started: list[subprocess.Popen[str]],
    count: int,
    plan: Path,
    *words: object,
    own: tuple[str, ...] = (),
    pipe_bytes: int = -1,
    verb: str = "run",
) -> None:
    """Process 0 of `count` first. own: more words, one for each process. pipe_bytes: what a pipe of theirs holds."""
    port = free_port()
    for index in range(count):
        place = ("--coordinator", f"127.0.0.1:{port}", "--process", f"{index}/{count}", *own[index : index + 1])
        command = (sys.executable, "-m", "runtime.cli.main", verb, "--backend", "cpu", "--plan", plan, *place, *words)
        line, pipe = list(map(str, command)), subprocess.PIPE
        started.append(subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, pipesize=pipe_bytes))


def answers(started: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What process 0 prints, where all end well and the others print nothing."""
    first, *others = [(*each.communicate(timeout=600), each.returncode) for each in started]
    assert first[1:] == ("", 0)
    assert others == [("", "", 0)] * len(others)
    return [json.loads(line) for line in first[0].splitlines()]


def check(
    started: list[subprocess.Popen[str]],
    count: int,
    plan: Path,
    small: Path,
    prompts: Path,
    most: int = len(PROMPTS),
    how: tuple[object, ...] = (),
) -> None:
    """The tokens of one device; times on the wall clock."""
    prompts.write_text("\n".join(PROMPTS[:most]))
    ask = ("--checkpoint", small, "--prompts", prompts, *ASK, *how)
    start(started, count, plan, *ask)
    expected = [json.loads(line) for line in glm5("run", *ask).out.splitlines()]
    found = answers(started)
    assert [each["token_ids"] for each in found] == [each["token_ids"] for each in expected]
    assert all(len(each["token_ids"]) == 5 and each["processes"] == count for each in found)
    assert all(each["timings_s"]["ttft"] > 0 < each["timings_s"]["decode"] for each in found)


@pytest.mark.slow
def test_two_processes(started: list[subprocess.Popen[str]], small: Path, tmp_path: Path) -> None:
    """Tensor and expert parallelism across them; tokens are drawn."""
    plan = plan_at(tmp_path / "plan.json", Layout(tp=2, ep=2))
    how = ("--temperature", 0.9, "--top-p", 0.95, "--seed", 3)
    check(started, 2, plan, small, tmp_path / "prompts", most=1, how=how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "layout", "replicas"),
    [
        (2, Layout(tp=2, ep=2, pp=2), 1),  # two devices each, a stage
        (4, Layout(dp=2, ep=2), 2),  # a server on two of them
    ],
)
def test_layouts(
    started: list[subprocess.Popen[str]], small: Path, tmp_path: Path, count: int, layout: Layout, replicas: int
) -> None:
    plan = plan_at(tmp_path / "plan.json", layout, replicas)
    check(started, count, plan, small, tmp_path / "prompts")


@pytest.mark.slow
def test_what_a_plan_has_in_fp8_is_kept_so(started: list[subprocess.Popen[str]], small: Path, tmp_path: Path) -> None:
    """Matrices and records of the cache, which moves from one process to the other; the tokens of one device."""
    opened = Checkpoint(small)
    save(tmp_path / "fp8", opened.raw_config, opened.load(), fp8=True)
    cfg = Checkpoint(tmp_path / "fp8").config
    pools = [
        pool_of(
            cfg, Layout(), hw_profiles.load(CHIP), formats("fp8", "fp8"), role=role, first_device=number, engine="glm5"
        )
        for number, role in enumerate(("prefill", "decode"))
    ]
    made = Transfer(1e3, 1e9, 1e-5, 0.0, 1e6, 1e-3, ())
    plan = Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), tuple(pools), transfer=made)
    plan.write(tmp_path / "plan.json")
    ask = ("--checkpoint", tmp_path / "fp8", "--prompt-ids", "5,6,7,8", *ASK, "--json")
    start(started, 2, tmp_path / "plan.json", *ask)
    expected = json.loads(glm5("run", "--keep-fp8", "--kv", "fp8", *ask).out)
    (out, err), other = (each.communicate(timeout=600) for each in started)
    assert err == "" and other == ("", "")
    assert json.loads(out)["token_ids"] == expected["token_ids"]


@pytest.mark.slow
def test_the_cache_moves_between_processes(started: list[subprocess.Popen[str]], small: Path, tmp_path: Path) -> None:
    """Prefill on one, decode on the other."""
    pools = [
        pool_of(CFG, Layout(tp=2, ep=2), hw_profiles.load(CHIP), formats("f32"), role=role, first_device=2 * number)
        for number, role in enumerate(("prefill", "decode"))
    ]
    ref = ModelRef(CFG.name, config_hash(CFG))
    Plan(ref, Demand(), tuple(pools), transfer=Transfer(1e3, 1e9, 1e-5, 0.0, 1e6, 1e-3, ())).write(
        tmp_path / "plan.json"
    )
    check(started, 2, tmp_path / "plan.json", small, tmp_path / "prompts")


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_lost_process_ends_the_others(
    started: list[subprocess.Popen[str]], tmp_path: Path, lost: int, how: signal.Signals
) -> None:
    """In the middle of an answer, which is larger than the pipe: it cannot end before it is read."""
    long = {"max_position_embeddings": 16384}
    make_checkpoint(tmp_path / "long", **long)
    plan = plan_at(tmp_path / "plan.json", Layout(tp=2, ep=2), cfg=from_hf({**CONFIG, **long}))
    ask = ("--checkpoint", tmp_path / "long", "--max-tokens", 16000, "--ignore-eos", "--prompt-ids", "5,6,7")
    start(started, 2, plan, *ask, pipe_bytes=4096)
    stdout = started[0].stdout
    assert stdout and stdout.read(1)
    started[lost].send_signal(how)
    _, err = started[1 - lost].communicate(timeout=600)
    assert started[1 - lost].returncode == 2, err
    assert (
        err.startswith(f"glm5: process {1 - lost} of 2 ends, because another process was lost") and err.count("\n") == 1
    )


@pytest.mark.slow
def test_another_prompt_is_noticed(started: list[subprocess.Popen[str]], small: Path, tmp_path: Path) -> None:
    plan = plan_at(tmp_path / "plan.json", Layout(tp=2, ep=2))
    start(started, 2, plan, "--checkpoint", small, own=("--prompt-ids=5", "--prompt-ids=6"))
    for each in started:
        _, err = each.communicate(timeout=600)
        assert each.returncode == 2 and err.startswith("glm5: process 1 was started with another plan"), err


def test_what_cannot_be_is_said_in_a_line(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_at(tmp_path / "plan.json", Layout(tp=4, ep=4))
    ask = ("run", "--checkpoint", small, "--coordinator", "127.0.0.1:1")
    assert "--coordinator needs --plan" in refused(*ask, "--process", "0/2")
    ask = (*ask, "--plan", plan)
    assert "go together" in refused(*ask)
    assert "go together" in refused("run", "--plan", plan, "--process", "0/2")
    assert "HOST:PORT, not 'here'" in refused("run", "--plan", plan, "--process", "0/2", "--coordinator", "here")
    for wrong in ("2/2", "-1/2", "1", "a/b", "0/0"):
        assert f"not '{wrong}'" in refused(*ask, f"--process={wrong}")
    assert "4 devices are not divisible by 3 processes" in refused(*ask, "--process", "0/3")
    assert "--trace does not go with --coordinator" in refused(*ask, "--process", "0/2", "--trace", "t.json")
    assert "--mtp does not go with" in refused(*ask, "--process", "0/2", "--mtp", 1)
    assert "backend sim does not run over" in refused(*ask, "--process", "0/2", "--backend", "sim")
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.5)
    line = refused(*ask, "--process", "1/2")
    assert line.startswith("--coordinator 127.0.0.1:1: nothing has listened there for 0.5 s") and "process 0" in line


@pytest.mark.slow
def test_a_plan_is_served(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    """By two processes: the tokens of one device, streams ended properly on SIGTERM, both ending well."""
    checkpoint = embedded_checkpoint()
    plan = plan_at(tmp_path / "plan.json", Layout(tp=2, ep=2), cfg=Checkpoint(checkpoint).config)
    serving = ("--warm-up", 1, "--port", 0)
    start(started, 2, plan, *serving, verb="serve")
    first, second = started
    assert first.stdout and second.stderr
    said = first.stdout.readline()
    url = re.search(r"http://\S+:\d+", said)
    assert url, (said, *first.communicate(timeout=60))
    ask = {"prompt": "1, 2, 3,", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    expected = json.loads(glm5("run", "--prompt", ask["prompt"], "--max-tokens", 24, "--ignore-eos", "--json").out)
    with httpx.Client(base_url=url[0], timeout=300) as client:
        found = client.post("/v1/completions", json=ask).raise_for_status().json()
        assert found["choices"][0]["text"] == re.sub(r"<\|\w+\|>", "", expected["text"])
        named = client.post("/v1/completions", json={**ask, "logprobs": 2}).raise_for_status().json()["choices"][0]
        assert named["text"] == found["choices"][0]["text"]
        for own, top in zip(named["logprobs"]["token_logprobs"], named["logprobs"]["top_logprobs"], strict=True):
            assert max(top.values()) == pytest.approx(own, abs=1e-6) and len(top) == 2  # greedy
        with client.stream("POST", "/v1/completions", json={**ask, "max_tokens": 300, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            for each in started:
                each.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    _, err = first.communicate(timeout=600)
    assert first.returncode == 0 and err.endswith("glm5: ended\n"), err
    assert second.communicate(timeout=600)[1].count("\n") == 1 and second.returncode == 0


def test_what_cannot_be_served_over_processes_is_said_in_a_line(small: Path, tmp_path: Path) -> None:
    plan = plan_at(tmp_path / "plan.json", Layout(tp=4, ep=4))
    ask = ("serve", "--coordinator", "127.0.0.1:1", "--process", "0/2")
    assert "--coordinator needs --plan" in refused(*ask)
    assert "go together" in refused(*ask[:3], "--plan", plan)
    assert "--mtp does not go with --coordinator" in refused(*ask, "--plan", plan, "--mtp", 1)
    assert "--profile does not go with --coordinator" in refused(*ask, "--plan", plan, "--profile", CHIP)
    assert "--process does not go with --artifact" in refused("serve", "--artifact", tmp_path, "--process", "0/2")
    assert "backend sim does not run over" in refused(*ask, "--plan", plan, "--backend", "sim")
    assert "; make a plan for" in refused(*ask, "--plan", plan)
