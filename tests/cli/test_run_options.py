"""`glm5 run`, every option in every mode: the mode reads it, or one line names it and exits with 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.cli.app import command
from runtime.cli.runners.asked import RunMode
from runtime.cli.runners.emulated import EmulatedRun
from runtime.cli.runners.local import LocalRun
from runtime.cli.runners.package import PackageRun
from runtime.cli.runners.processes import ProcessesRun
from tests.cli.cli import glm5, refused

MODES: dict[type[RunMode], tuple[str, ...]] = {
    LocalRun: (),
    EmulatedRun: ("--backend", "sim"),
    ProcessesRun: ("--coordinator", "127.0.0.1:1", "--process", "0/2"),
    PackageRun: ("--artifact", "package"),
}
"""What asks for each."""
ASKS_FOR_ANOTHER = ("artifact", "coordinator", "process")
COMMAND: Any = command()
OPTIONS = {p.name: p for p in COMMAND.commands["run"].params if p.name != "help"}
TYPED = {
    "checkpoint": "folder", "prompt": "Hi", "prompt_ids": "1,2", "prompts": "file", "dtype": "float32",
    "pool_tokens": "64", "dump_logits": "logits.npz", "artifact": "package", "plan": "plan.json", "profile": "h200-sxm",
    "devices": "1", "tp": "1", "dp": "1", "ep": "1", "pp": "1", "formats": "bf16", "kv": "bf16", "engine": "sglang",
    "trace": "trace.json", "coordinator": "127.0.0.1:1", "process": "0/2",
    "prefill_chunk": "64", "compile_cache": "off",
}  # fmt: skip
"""A value for each option that has no default; others are given at theirs."""


def words(name: str, mode: type[RunMode]) -> list[str]:
    """An option as it is typed, with what it needs beside it and what asks for the mode."""
    option = OPTIONS[name]
    beside = [*MODES[mode], *(["--chat"] if name == "no_thinking" and "chat" in mode.reads() else [])]
    if option.is_flag:
        return [option.opts[0], *beside]
    return [option.opts[0], TYPED[name] if option.default is None else str(option.default), *beside]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RunMode]:
    """Runs that were ready to begin."""
    found: list[RunMode] = []
    for mode in MODES:
        monkeypatch.setattr(mode, "run", lambda self: found.append(self))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_option_is_read_or_refused(mode: type[RunMode], made: list[RunMode]) -> None:
    for name, option in OPTIONS.items():
        made.clear()
        typed = words(name, mode)
        code, out, err = glm5("run", *typed)
        where = f"{mode.__name__}: {option.opts[0]}"
        if made:
            (run,) = made
            assert (code, out, err) == (0, "", ""), where
            assert name in run.reads() and str(getattr(run, name)) in (*typed, "True"), where
            assert type(run) is mode or name in ASKS_FOR_ANOTHER, where
        else:
            assert name not in mode.reads(), where
            assert (code, out) == (2, "") and err.count("\n") == 1 and option.opts[0] in err, where


def test_every_option_has_a_mode() -> None:
    assert set().union(*(mode.reads() for mode in MODES)) == set(OPTIONS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--backend sim --prefill-chunk 256", "--prefill-chunk does not go with --backend sim"),
        ("--artifact p --backend ort --mtp 0", "--mtp does not go with --artifact"),
        ("--artifact p --backend ort --prefill-chunk 64", "--prefill-chunk does not go with --artifact"),
        ("--artifact p --backend ort --no-thinking", "--no-thinking does not go with --artifact"),
        ("--artifact p --backend ort --scale-memory 1", "--scale-memory does not go with --artifact"),
        (
            "--coordinator a:1 --process 0/2 --plan p --prefill-chunk 8",
            "--prefill-chunk does not go with --coordinator",
        ),
        ("--coordinator a:1 --process 0/2 --artifact p", "--artifact does not go with --coordinator"),
        ("--scale-memory 1", "--scale-memory needs a backend that emulates: --backend sim"),
        ("--plan p.json", "--plan needs a backend that emulates: --backend sim"),
    ],
)
def test_what_a_mode_does_not_read_is_refused_at_its_default_too(line: str, said: str) -> None:
    assert refused("run", *line.split()).startswith(said)


def test_a_mode_is_decided_by_what_a_backend_can(made: list[RunMode], tmp_path: Path) -> None:
    for backend, mode in (("cpu", LocalRun), ("cuda", LocalRun), ("sim", EmulatedRun)):
        assert glm5("run", "--backend", backend).code == 0 and type(made[-1]) is mode
    assert glm5("run", "--backend", "sim", "--artifact", tmp_path).code == 0 and type(made[-1]) is PackageRun
    assert "unknown backend 'tpu'" in refused("run", "--backend", "tpu")
