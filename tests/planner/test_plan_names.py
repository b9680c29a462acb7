"""What a plan names and does not hold: read where it ships or stands beside the plan, and nowhere else."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
import runtime
from foundation.errors import Failure
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment import engines
from runtime.deployment.errors import PlanFileError
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.planning.check import check
from runtime.planning.launch import launch
from runtime.simulation.planned import spec_of
from tests.cli.cli import glm5, refused
from tests.plans import formats, plan_for

CHECKPOINT = Path(runtime.__file__).parent / "data" / "tiny-glm5"
_opened: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every file that Python opens meanwhile: the kernel's side of "nothing else is read"."""
    global _opened
    if _hook not in _installed:
        _installed.append(_hook)
        sys.addaudithook(_hook)
    _opened = []
    yield _opened
    _opened = None


_installed: list[Any] = []


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a chip, an engine, a load and a model, each as good as those that ship."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    three = {f"chip.{name}": value for name, value in (
        ("peak.bf16_flops_per_s", 256e12), ("memory.capacity_bytes", 96e9), ("memory.bandwidth_bytes_per_s", 1.2e12),
    )}  # fmt: skip
    (folder / "npu.toml").write_text(hw_profiles.new_profile("npu", "Startup", three, ["bf16"], ["bf16"], "spec", "A"))
    shutil.copy(Path(engines.__file__).parent / "vllm.toml", folder / "mine.toml")
    (folder / "counts.json").write_text(str([1] * 128))
    shutil.copytree(CHECKPOINT, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def _plan(chip: Path | str, engine: Path | str = "sglang", model: Path = CHECKPOINT) -> Plan:
    return plan_for(load_config(model), Layout(), hw_profiles.load(chip), formats("bf16"), engine=str(engine))


def _all_read(path: Path, model: Path | None = None) -> None:
    """As every verb does that takes a plan."""
    plan = Plan.read(path)
    cfg = plan.config(model, path)
    check(plan, cfg)
    spec_of(cfg, plan.serving, hw_profiles.load(plan.serving.profile))
    launch(plan, cfg, "vllm", release="0.33", model="/m").text()


@pytest.mark.parametrize("what", ["profile", "engine", "model", "expert_load"])
@pytest.mark.parametrize("how", ["absolute", "upwards", "link"])
def test_nothing_elsewhere_is_read(what: str, how: str, elsewhere: Path, tmp_path: Path, opened: list[str]) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    file = {"profile": "npu.toml", "engine": "mine.toml", "model": "model/config.json", "expert_load": "counts.json"}
    target = elsewhere / file[what]
    if how == "link":
        (folder / target.name).symlink_to(target)
    name = {"absolute": str(target), "upwards": f"../elsewhere/{file[what]}", "link": target.name}[how]
    plan = _plan("h200-sxm")
    if what == "model":
        plan = dataclasses.replace(plan, model=ModelRef(name, plan.model.config_hash))
    else:
        plan = dataclasses.replace(plan, pools=(dataclasses.replace(plan.serving, **{what: name}),))
    plan.write(folder / "plan.json")
    opened.clear()
    with pytest.raises(Failure) as failure:
        _all_read(folder / "plan.json", CHECKPOINT if what != "model" else None)
    assert "\n" not in str(failure.value)
    assert {"model": "--model", "expert_load": "slot_load"}.get(what, "beside") in str(failure.value)
    assert opened and not [path for path in opened if str(elsewhere) in path or "/sent/" in path and "plan" not in path]


def test_what_stands_beside_a_plan_is_read_wherever_one_is(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was spelt from the folder where the plan was made, and in a copy of all elsewhere."""
    monkeypatch.chdir(tmp_path)
    here = Path("elsewhere")
    made = _plan(here / "npu.toml", here / "mine.toml", here / "model")
    made.write(elsewhere / "plan.json")
    assert made.files_elsewhere(elsewhere / "plan.json") == []
    assert set(made.files_elsewhere(tmp_path / "none" / "plan.json")) == {"elsewhere/npu.toml", "elsewhere/mine.toml"}
    shutil.copytree(elsewhere, tmp_path / "copy" / "inner")
    for folder in (tmp_path, elsewhere, Path("/")):
        monkeypatch.chdir(folder)
        _all_read(elsewhere / "plan.json")
        found = Plan.read(tmp_path / "copy" / "inner" / "plan.json")
        assert found.hash == made.hash
        assert Path(found.serving.profile).resolve() == tmp_path / "copy" / "inner" / "npu.toml"


def test_a_model_elsewhere_is_named_by_a_person(elsewhere: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p" / "plan.json"
    plan.parent.mkdir()
    _plan("h200-sxm", model=elsewhere / "model").write(plan)
    line = f"{plan}: model.name: {elsewhere}/model/config.json"
    assert line[:60] in refused("plan", "check", plan)
    for words in (("plan", "check", plan), ("plan", "launch", plan, "--engine", "sglang", "--model-path", "/m")):
        glm5(*words, "--model", elsewhere / "model")
        assert "not for glm-5" in refused(*words, "--model", "glm-5")


def test_a_chip_that_calls_itself_as_one_that_ships_is_another(elsewhere: Path) -> None:
    mine = elsewhere / "npu.toml"
    mine.write_text(mine.read_text().replace('name = "npu"', 'name = "h200-sxm"'))
    assert _plan(mine).serving.profile == str(mine) and _plan("h200-sxm").serving.profile == "h200-sxm"


def test_a_plan_of_the_command_says_what_must_go_with_it(elsewhere: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "p.json"
    out.parent.mkdir()
    words = ("--model", CHECKPOINT, "--profile", elsewhere / "npu.toml", "--devices", 1, "--concurrency", 1)
    done = glm5("plan", *words, "--isl", 32, "--osl", 4, "--out", out)
    assert f"note: {out} names {elsewhere / 'npu.toml'}: " in done.err
    with pytest.raises(PlanFileError, match="copy it there"):
        Plan.read(out)
    shutil.copy(elsewhere / "npu.toml", out.parent)
    assert Plan.read(out).model == ModelRef(str(CHECKPOINT / "config.json"), config_hash(load_config(CHECKPOINT)))
