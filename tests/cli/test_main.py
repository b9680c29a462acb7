"""The `glm5` command line as a whole: help without JAX, wrong command lines in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tests.cli.cli import glm5, refused


def test_help_starts_without_jax() -> None:
    code = "import sys; from runtime.cli.main import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and done.stderr == ""
    assert all(f"  {verb} " in done.stdout for verb in ("run", "model", "backends", "profiles"))


@pytest.mark.parametrize("words", [[], ["run"], ["plan"], ["plan", "experts"], ["profiles", "show"]])
def test_help_has_a_short_name(words: list[str]) -> None:
    code, out, err = glm5(*words, "-h")
    assert (code, err) == (0, "") and out == glm5(*words, "--help")[1]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("glm5 pl", ["plan"]),
        ("glm5 plan --model glm-5.2", ["glm-5.2", "glm-5.2-fp8"]),
        pytest.param("glm5 simulate --profile h200-", ["h200-sxm"], marks=pytest.mark.slow),
        pytest.param("glm5 run --backend cp", ["cpu"], marks=pytest.mark.slow),
        pytest.param("glm5 plan --engine vllm", ["vllm", "vllm-ascend"], marks=pytest.mark.slow),
        pytest.param("glm5 quantize --formats w4af", ["w4afp8"], marks=pytest.mark.slow),
        pytest.param("glm5 simulate --kv i", ["int8"], marks=pytest.mark.slow),
        ("glm5 simulate --profile ./my", []),  # a shell then offers files
    ],
)
def test_a_shell_completes(line: str, offered: list[str]) -> None:
    asked = {"_GLM5_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [sys.executable, "-m", "runtime.cli.main"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nonsense"], "No such command 'nonsense' (see `glm5 --help`)"),
        (["profiles", "nonsense"], "No such command 'nonsense' (see `glm5 profiles --help`)"),
        (["model", "--nonsense"], "No such option: --nonsense (see `glm5 model --help`)"),
        (["run", "--mtp"], "Option '--mtp' requires an argument"),
        (["run", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["run", "stray"], "stray"),
    ],
)
def test_a_wrong_command_line(words: list[str], text: str) -> None:
    assert text in refused(*words)


def test_no_command_prints_the_help() -> None:
    code, out, err = glm5()
    assert (code, out) == (2, "") and err.startswith("Usage: glm5 ")


def test_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the installed package; of the source tree without one; and a word where there is neither."""
    from runtime.cli import version

    code, out, err = glm5("--version")
    assert (code, err) == (0, "") and re.fullmatch(r"glm5 \d+\.\d+\.\d+\n", out)

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert glm5("--version") == (0, f"glm5 {project['version']}\n", "")
    monkeypatch.setattr(version, "_PROJECT", tmp_path / "none.toml")
    assert glm5("--version") == (0, "glm5 unknown\n", "")


def test_a_bug_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("runtime.cli.model.load_config", lambda name: fail())
    with pytest.raises(ValueError, match="a bug"):
        glm5("model", "glm-5")


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.cli.model.load_config", interrupt)
    assert glm5("model", "glm-5") == (130, "", "")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\rb", "a\u2028b", "a\x9b31mb"])
def test_what_was_given_commands_no_terminal(name: str) -> None:
    line = refused("simulate", "--model", "glm-4.7-flash", "--length-file", name)
    assert line.isprintable() and repr(name)[1:-1] in line


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--model", "a" * 5000),
        ("model", "a" * 300 + "/b"),
        ("profiles", "show", "a" * 5000 + ".toml"),
        ("simulate", "--profile", "a/" + "b" * 300),
        ("run", "--checkpoint", "c" * 5000),
        ("run", "--artifact", "c" * 5000, "--backend", "ort"),
        ("run", "--backend", "sim", "--plan", "p" * 5000),
        ("simulate", "--engine", "e" * 5000 + ".toml"),
        ("export", "--out", "o" * 5000),
        ("quantize", "--formats", "fp8", "--out", "o" * 300),
        ("plan", "--out", "o" * 5000),
    ],
)
def test_a_path_that_no_file_can_have_is_one_line(words: tuple[str, ...]) -> None:
    from tests.cli.cli import glm5

    found = glm5(*words)
    assert found.code == 2 and len(found.err.splitlines()) == 1, found.err[-400:]
