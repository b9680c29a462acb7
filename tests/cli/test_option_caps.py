"""Numbers on a command line: what makes us allocate or go round without end is refused in one line."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.cli.app import app
from runtime.execution import prompts
from runtime.execution.cluster.processes import ProcessPlace
from runtime.serving import Fixed, WorkloadError, open_loop
from tests.cli.cli import glm5

RUN = ("run", "--prompt-ids", "5,6,7")
SIM = (*RUN, "--backend", "sim", "--profile", "h200-sxm")
SIMULATE = ("simulate", "--concurrency", "2", "--isl", "64", "--osl", "8")
PLAN = ("plan", "--isl", "64", "--osl", "8")
EXPERTS = ("plan", "experts", "--load", "load.npy", "--devices", "4", "--slots", "24")
EXPORT = ("export", "--model", "glm-5", "--format", "stablehlo", "--out", "package")
BASES = {
    "run": RUN, "run sim": SIM, "simulate": SIMULATE, "plan": PLAN, "plan experts": EXPERTS, "export": EXPORT,
    "choose": ("choose", "--profiles", "h200-sxm", "--concurrency", "2", "--isl", "64", "--osl", "8"),
    "serve": ("serve", "--port", "0"),
    "serve sim": ("serve", "--port", "0", "--backend", "sim", "--profile", "h200-sxm"),
    "calibrate": ("calibrate", "--model", "glm-5", "--out", "host.toml"),
    "plan rl": ("plan", "rl"), "eval": ("eval",), "compare": ("compare", "--profile", "h200-sxm"),
}  # fmt: skip
LARGE, HUGE = 10**9, 10**18
AXES = ("--devices", "--tp", "--dp", "--ep", "--pp")

REFUSED: list[tuple[str, str, int, str]] = [
    ("run", "--max-tokens", LARGE, "exceeds the model's 2048 positions"),
    ("run", "--max-tokens", HUGE, "exceeds the model's 2048 positions"),
    ("run", "--max-tokens", 0, "at least 1"),
    ("run", "--pool-tokens", LARGE, "--pool-tokens 1,000,000,000 takes"),
    ("run", "--pool-tokens", HUGE, "of memory; ask for fewer"),
    ("run", "--top-k", -1, "0 (off) or more"),
    *[("run sim", axis, size, "1,000" if axis == "--devices" else "fits") for axis in AXES for size in (LARGE,)],
    *[("serve sim", axis, LARGE, "") for axis in AXES],
    ("serve", "--pool-tokens", HUGE, "of memory; ask for fewer"),
    *[("simulate", axis, LARGE, "") for axis in (*AXES, "--dcp", "--pcp")],
    *[("plan", axis, LARGE, "") for axis in (*AXES, "--dcp", "--pcp")],
    *[("export", axis, HUGE, "") for axis in AXES[1:]],
    *[("calibrate", axis, size, "") for axis in ("--tp", "--ep") for size in (LARGE, -1)],
    *[
        (verb, option, size, "")
        for verb, option in (
            ("simulate", "--isl"), ("simulate", "--osl"), ("simulate", "--concurrency"), ("simulate", "--requests"),
            ("simulate", "--mtp"), ("simulate", "--prefill-devices"), ("plan", "--isl"), ("plan", "--osl"),
            ("plan", "--concurrency"), ("plan", "--mtp"), ("plan experts", "--devices"), ("plan experts", "--slots"),
            ("plan experts", "--nodes"), ("plan experts", "--groups"), ("export", "--batch"), ("export", "--context"),
            ("export", "--page-size"), ("export", "--device"), ("eval", "--samples"),
            ("choose", "--isl"),
            ("choose", "--osl"), ("choose", "--concurrency"), ("choose", "--mtp"), ("choose", "--max-devices"),
            ("compare", "--tasks"), ("compare", "--max-tokens"),
            ("plan rl", "--devices"), ("plan rl", "--train-devices"), ("plan rl", "--groups"),
            ("plan rl", "--group-size"), ("plan rl", "--isl"), ("plan rl", "--osl"), ("plan rl", "--longest"),
            ("plan rl", "--tool-tokens"), ("plan rl", "--staleness"), ("plan rl", "--steps"),
        )
        for size in (HUGE, -1)
    ],
    ("plan experts", "--groups", 0, ">"),
    ("plan experts", "--sglang place.json --dense-layers", LARGE, "1,000,000,000 is more than the 1,000"),
    ("plan experts", "--previous none.json --max-moves", -1, ">"),
    ("export", "--phase prefill --chunk", LARGE, "is more than the 67,108,864"),
    ("export", "--batch", 10**6, "--batch 1,000,000 of --context 4,096"),
    ("export", "--phase both --page-size 1 --context", 202_753, "positions"),
]  # fmt: skip
FREE = {
    ("run", "--top-k"), ("run", "--seed"), ("run", "--prefill-chunk"), ("simulate", "--seed"), ("plan", "--max-pp"),
    ("plan rl", "--seed"), ("compare", "--window"), ("serve", "--prefill-chunk"), ("serve", "--max-queue"),
}  # fmt: skip
"""Where any number is taken, and more of it costs nothing."""


@pytest.mark.parametrize(("verb", "option", "size", "said"), REFUSED)
def test_a_number_beyond_what_is_taken_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, option: str, size: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if verb == "plan experts":
        np.save("load.npy", np.random.default_rng(0).random((4, 16)))
    found = glm5(*BASES[verb], *option.split(), size)
    lines = [line for line in found.err.splitlines() if line != "glm5: loading"]
    assert found.code == 2 and len(lines) == 1 and len(lines[0]) < 300, found.err[-500:]
    assert said.replace(">", "greater than or equal to") in lines[0] or ">" in said, lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"load.npy"}


def _options(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """Whole-number options of a group of verbs: verb, option, and what typer was told of it."""
    callbacks = [(before, group.registered_callback)] if group.registered_callback and before else []
    verbs = [((*before, each.name or each.callback.__name__), each) for each in group.registered_commands]
    for words, each in [*callbacks, *verbs]:
        for name, hint in typing.get_type_hints(each.callback, include_extras=True).items():
            told = next((what for what in getattr(hint, "__metadata__", ()) if hasattr(what, "min")), None)
            if told and int in (hint.__origin__, *typing.get_args(hint.__origin__)):
                typed = next((word for word in told.param_decls or () if word.startswith("--")), None)
                yield " ".join(words), typed or "--" + name.replace("_", "-"), told
    for inner in group.registered_groups:
        yield from _options(inner.typer_instance, (*before, inner.name))


def test_every_whole_number_of_the_command_line_is_bounded() -> None:
    """By typer (`max`), by a row above, or because more of it costs nothing."""
    rows = {(verb.removesuffix(" sim"), option.split()[-1]) for verb, option, size, _ in REFUSED if size >= LARGE}
    found = {(verb, option) for verb, option, told in _options(app) if told.max is None}
    assert len(found) > 30 and {("run", "--tp"), ("plan experts", "--slots")} <= found
    unbounded = found - rows - FREE - {("plan experts", "--max-moves")}
    assert not unbounded, f"a most of each, or a line in FREE: {sorted(unbounded)}"


def test_prompts_are_a_number_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\nb\nc\n")
    assert prompts.read_prompts(file) == ["a", "b", "c"]
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 2)
    for verb in (("run",), BASES["compare"]):
        found = glm5(*verb, "--prompts", file)
        assert found.code == 2 and found.err == (
            f"glm5: --prompts {file}: the number of prompts 3 is more than the 2 that are taken\n"
        )
    monkeypatch.setattr(prompts, "MOST_PROMPT_BYTES", 6)
    found = glm5("run", "--prompts", file)
    assert found.code == 2 and found.err.startswith(f"glm5: --prompts {file}: larger than 6 bytes")


@pytest.mark.parametrize("process", ["0/" + "9" * 5000, "1/1", "-1/2", "0/٣", "0/0", "1000000000/2"])
def test_a_process_that_is_none(process: str) -> None:
    from foundation.errors import UsageError

    with pytest.raises(UsageError, match="--process takes I/N"):
        ProcessPlace.parse("localhost:1234", process)
    with pytest.raises(UsageError, match="--coordinator takes HOST:PORT"):
        ProcessPlace.parse("localhost:" + "9" * 5000, "0/2")


@pytest.mark.parametrize(("rate", "cv"), [(1e10, 1.0), (1e-7, 1.0), (1.0, 101.0), (1.0, 1e18), (1.0, float("nan"))])
def test_a_load_that_no_clock_can_keep(rate: float, cv: float) -> None:
    with pytest.raises(WorkloadError, match="request rate|burstiness"):
        open_loop(rate, 4, Fixed(8), Fixed(8), cv=cv)


def test_bursts_at_the_most_are_a_load() -> None:
    times = [request.sent_at for request in open_loop(1e-6, 2000, Fixed(8), Fixed(8), cv=100.0).requests]
    assert times == sorted(times) and np.isfinite(times).all() and times[-1] == pytest.approx(2e9)
