"""Causes that a prediction is made of, each with what is said of a deployment to be without it.

Switching one off is saying something else of the deployment, as `--set` and `--engine NAME@RELEASE` do: nothing is
predicted in a second way. So a cause that is a shape of the code (the serial front end) or of the price tables (how a
curve is fitted) is not here. `python -m tools.docs_validation ablation` scores measurements without each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foundation.errors import UsageError


@dataclass(frozen=True)
class Mechanism:
    """A cause. name: one word. words: what it is, and what holds without it.

    settings: of the engine, where a row does not say them itself. chip: figures of the profile, where it has them.
    newest: the engine is its newest release. newest_tables: only its kernels are. expert_load: as of `Spec`.
    """

    name: str
    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    chip: Mapping[str, float] = field(default_factory=dict)
    newest: bool = False
    newest_tables: bool = False
    expert_load: str | None = None


MECHANISMS = (
    Mechanism("releases", "engines by release; without: all are their newest, in rules and tables", newest=True),
    Mechanism(
        "kernels",
        "tables and choices of kernels by release; without: the newest tables, nothing fused or absorbed",
        newest_tables=True,
    ),
    Mechanism(
        "overlap",
        "steps are planned between steps up to vLLM 0.13; without: beside them",
        {"overlap_scheduling": True},
    ),
    Mechanism(
        "launches",
        "the host launches eager steps and pieces layer by layer; without: in no time",
        {"eager_launch_seconds": 0.0, "piecewise_launch_seconds": 0.0},
    ),
    Mechanism(
        "steps",
        "the host schedules each step; without: in no time, launches included",
        {
            "graph_step_host_seconds": 0.0,
            "eager_step_host_seconds": 0.0,
            "row_host_seconds": 0.0,
            "request_host_seconds": 0.0,
            "idle_host_seconds": 0.0,
            "warming_host_seconds": 0.0,
            "ahead_step_seconds": 0.0,
        },
    ),
    Mechanism("pieces", "steps with few prompt tokens replay pieces; without: eager", {"piecewise_step_tokens": 0}),
    Mechanism("padding", "TensorRT-LLM does not pad to a captured size; without: it does", {"graph_padding": True}),
    Mechanism("graphs", "vllm-ascend replays pieces unless told; without: whole graphs", {"graph_mode": "full"}),
    Mechanism(
        "front-end",
        "requests pass one front end after another; without: in no time",
        {"request_seconds": 0.0, "tokenize_seconds_per_token": 0.0, "request_delay_seconds": 0.0},
    ),
    Mechanism(
        "gathering",
        "requests that wait for vLLM's event loop are handed on together; without: one by one",
        {"front_end_gathers": False},
    ),
    Mechanism(
        "sparse-kernels",
        "small kernels around sparse attention; without: none beside the block's",
        {"sparse_layer_seconds": 0.0},
    ),
    Mechanism(
        "between-servers",
        "the smallest all-reduce between servers takes 44 us; without: a hop's latency",
        chip={"link.scale_out.collective_latency_s": 5e-6},
    ),
    Mechanism(
        "rings",
        "SGLang has NCCL reduce round a server's devices; without: in NVLink's switches",
        {"reduces_in_switches": True},
    ),
    Mechanism("clocks", "long matrix products lose clock; without: none", chip={"chip.sustained_clock_fraction": 1.0}),
    Mechanism(
        "cold-weights",
        "weights that tables were measured over in the chip's cache come from memory; without: from the cache",
        chip={"chip.memory.cache_bytes": 1.0},
    ),
    Mechanism(
        "expert-load",
        "DeepSeek-V3's and Kimi-K2's experts are loaded by a power law; without: evenly",
        expert_load="uniform",
    ),  # fmt: skip
)


def mechanism(name: str) -> Mechanism:
    """The cause of that name. Raises `UsageError` listing those there are."""
    found = next((each for each in MECHANISMS if each.name == name), None)
    if found is None:
        raise UsageError(f"--without {name}: no such cause; there are {', '.join(each.name for each in MECHANISMS)}")
    return found
