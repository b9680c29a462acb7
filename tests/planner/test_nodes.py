"""Replicas that stand unevenly on nodes are out before anything is ranked: no engine's command line can start them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.errors import LaunchError
from runtime.planning.assign import plan_for, uneven_nodes
from runtime.planning.launch import launch
from runtime.planning.options import Question, nodes_refused, options
from runtime.simulation.build import spec_for

GLM, H200 = load_config("glm-4.5-air"), hw_profiles.load("h200-sxm")


@given(devices=st.integers(1, 40), replicas=st.integers(1, 12), node=st.integers(1, 20))
def test_uneven_is_what_counting_says(devices: int, replicas: int, node: int) -> None:
    each = [Counter((r * devices + d) // node for d in range(devices)) for r in range(replicas)]
    wrong = [list(counts.values()) for counts in each if len(set(counts.values())) > 1]
    assert uneven_nodes(devices, replicas, node) == (wrong[0] if wrong else None)
    if devices % node == 0 or node % devices == 0:
        assert not wrong


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("devices", [6, 12])
def test_what_is_ranked_can_be_launched(engine: str, devices: int) -> None:
    question = Question(GLM, Demand(isl=2048, osl=256), engine)
    found, _, rejected = options(question, H200, devices)
    named = {each.name: each.reason for each in rejected}
    assert found and all(nodes_refused(option, devices // option.devices) is None for option in found)
    for option in found[:: max(1, len(found) // 12)]:
        made = plan_for(option.spec, devices // option.devices)
        try:
            launch(made, GLM)
        except LaunchError as error:  # of another kind
            assert "on each node" not in str(error), option.name
    uneven = [name for name, reason in named.items() if "as many on each node" in reason]
    assert bool(uneven) == (devices > 8), named


def test_the_ranking_and_the_printer_say_the_same() -> None:
    spec = spec_for(GLM, H200, Layout(tp=4, ep=4, pp=3), "bf16")
    with pytest.raises(LaunchError, match=r"8 \+ 4 devices over nodes of 8: sglang wants as many on each node"):
        launch(plan_for(spec), GLM)
    _, _, rejected = options(Question(GLM, Demand(isl=2048, osl=256), held={"tp": 4}), H200, 12)
    assert any("8 + 4 devices over nodes of 8: sglang wants as many" in each.reason for each in rejected)


def test_an_engine_without_launch_lines_may_stand_anywhere() -> None:
    found, _, rejected = options(Question(GLM, Demand(isl=2048, osl=256), "glm5"), H200, 12)
    assert not any("on each node" in each.reason for each in rejected)
    assert any(option.devices == 12 for option in found)
