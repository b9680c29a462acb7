"""`glm5 plan`, `plan check` and `simulate --plan`: one file through all three, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli.main import main
from runtime.cli.plan_show import _limit
from runtime.deployment.plan import Plan
from tests.cli.cli import glm5, refused

pytestmark = pytest.mark.usefixtures("coarse")
LOAD = ("--isl", 2048, "--osl", 128, "--concurrency", 8)


@pytest.fixture(scope="module")
def plan(coarse: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    printed = glm5("plan", *LOAD, "--out", path, "--json").out
    assert printed == path.read_text()
    return path


def test_a_plan_is_checked_and_simulated_as_it_is(plan: Path) -> None:
    document = json.loads(plan.read_text())
    assert glm5("plan", "check", plan, "--json").json["wrong"] == []
    result = glm5("simulate", "--plan", plan, "--json").json
    for name in ("output_tokens_per_s", "ttft_ms", "tpot_ms", "evidence"):
        assert result[name] == document["predicted"][name]
    assert result["plan"] == document["hash"] and result["devices"] == 8


def test_what_a_person_sees(plan: Path) -> None:
    shown = glm5("plan", "--model", "glm-4.5-air", "--devices", 2, *LOAD).out
    assert "glm-4.5-air on 2 devices" in shown and "KV pages" in shown and "█" in shown
    assert "TPOT" in shown and "chosen" in shown and "rejected" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp", 4), "--tp does not go with --plan"),
        (("--engine", "vllm"), "--engine does not go with --plan"),
        (("--concurrency", 0), "at least 1"),
        (("--concurrency", 4, "--rate", 1), "give one of them"),
        (("--tp", 1), "--tp does not go with --plan"),
        (("--set", "chip.memory.capacity_bytes=1e12"), "--set does not go with --plan"),
        (("--requests", 0), "--requests must be at least 1"),
    ],
)
def test_what_a_plan_decides_cannot_be_said_again(plan: Path, words: tuple[object, ...], said: str) -> None:
    assert said in refused("simulate", "--plan", plan, *words)


def test_a_plan_under_a_lighter_load_answers_sooner(plan: Path) -> None:
    made = json.loads(glm5("simulate", "--plan", plan, "--json").out)
    lighter = json.loads(glm5("simulate", "--plan", plan, "--json", "--concurrency", 2).out)
    assert lighter["tpot_ms"]["mean"] < made["tpot_ms"]["mean"]
    assert lighter["plan"] == made["plan"]


def test_an_edited_plan_is_refused(plan: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited.json"
    edited.write_text(plan.read_text().replace('"replicas": 1', '"replicas": 2'))
    for command in (("simulate", "--plan", edited), ("plan", "check", edited)):
        assert "edited or damaged" in refused(*command)
    assert "not for glm-5.2-fp8" in refused("plan", "check", plan, "--model", "glm-5.2-fp8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--concurrency", 4, "--rate", 1), "give one of --concurrency and --rate"),
        (("--rate", 0), "--rate 0: give a number above zero"),
        (("--isl", 300000), "300,000 tokens in and 1,024 out are 301,024, and glm-5-fp8 has 202,752 positions"),
        (("--isl", 202752, "--osl", 1), "are 202,753, and glm-5-fp8 has 202,752 positions"),
        (("--model", "glm-4.5-air", "--osl", 131072, "--objective", "min-devices"), "has 131,072 positions"),
        (("--osl", 1, "--tpot-ms", 20), "answers of one token have no time per output token: leave out --tpot-ms"),
        (
            ("--model", "glm-4.7-flash", "--osl", 1, "--profile", "h200-sxm:1", "--profile", "h20-141gb:1"),
            "give one --profile",
        ),
        (("--formats", "fp7"), "unknown formats 'fp7'"),
        (("--kv", "int8"), "h200-sxm keeps no int8 cache"),
        (("--profile", "h200-sxm:0"), "at least one device"),
        (("--profile", "a", "--profile", "b", "--profile", "c"), "3 profiles: give one, or two"),
        (("--set", "model.index_topk=0"), "--set model.index_topk"),
        (("--out", "/no/such/folder/plan.json"), "cannot be written"),
        (("--model", "glm-4.5", "--mtp", 1, "--expert-load", "none.npy"), "none.npy: cannot be read"),
        (("--objective", "min-devices", "--profile", "h200-sxm", "--profile", "h20-96gb"), "one kind of chip"),
        (("--profile", "h200-sxm:8", "--devices", 8), "--devices 8: --profile h200-sxm:8 has a number already"),
        (("--profile", "h200-sxm:8", "--profile", "h20-96gb:8", "--devices", 16), "has a number already"),
        (("--model", "glm-5-fp8", "check", "plan.json"), "--model stands before `check`, which does not read it"),
        (("--engine", "sglang", "launch", "plan.json"), "--engine stands before `launch`, which does not read it"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[object, ...], said: str) -> None:
    assert said in refused("plan", *words)


def test_what_does_not_fit_prints_its_ledger() -> None:
    code, _, said = glm5("plan", "--profile", "h100-sxm")
    assert code == 2 and "no plan on 8 x h100-sxm" in said.splitlines()[0]
    assert "weights: experts" in said and "= free" in said


def test_a_longer_search_says_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("runtime.cli.searches.QUIET_SECONDS", -1.0)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--profile", "h100-sxm"])
    *progress, first, _ = capsys.readouterr().err.partition("glm5: ")
    assert end.value.code == 2 and first == "glm5: "
    assert all(re.fullmatch(r" *\d+ s  h100-sxm: .+", line) for line in progress[0].splitlines()) and progress[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see resident memory")
@pytest.mark.parametrize("devices", [8, 384])
def test_planning_is_small(devices: int) -> None:
    """The whole command in a process of its own. (`getrusage` would count what the process that started it held.)"""
    code = (
        "import sys\n"
        "from runtime.cli.main import main\n"
        f"sys.argv = ['glm5', 'plan', '--devices', '{devices}', '--json']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "most = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(most.split()[1]) * 1024, file=sys.stderr)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stderr.splitlines()[-1]) <= 2e9


def test_a_limit_of_the_plans_own_is_called_so(plan: Path) -> None:
    """Not as if the chips had no more places."""
    found = Plan.read(plan)
    assert found.predicted

    def shown(saturated_by: str, settings: dict[str, int], tpot_ms: float | None) -> str:
        assert found.predicted
        figures = dataclasses.replace(found.predicted, saturated_by=saturated_by, bottleneck="memory")
        pool = dataclasses.replace(found.serving, settings=settings)
        demand = dataclasses.replace(found.demand, tpot_ms=tpot_ms)
        return _limit(dataclasses.replace(found, predicted=figures, pools=(pool,), demand=demand))

    own = {"max_running_requests": 8}
    assert shown("max-running", own, 20.0) == (
        "max-running, 8 requests a rank that the plan admits (beyond it a token takes longer)"
    )
    assert shown("max-running", own, None).endswith("admits (as engine.max_running_requests)")
    assert shown("max-running", {}, 20.0) == "max-running"
    assert shown("kv-pool", own, 20.0) == "kv-pool" and shown("arrivals", own, 20.0) == "memory"
