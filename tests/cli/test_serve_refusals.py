"""`glm5 serve` with what it cannot serve: one line that says what to change, before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.cli import refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "nowhere"], "backend"),
        (["--profile", "h200-sxm"], "--profile needs a backend that emulates: --backend sim"),
        (["--tokens", "synthetic"], "--tokens needs a backend that emulates"),
        (["--time-scale", "2"], "--time-scale needs a backend that emulates"),
        (["--backend", "sim", "--dtype", "float32"], "--dtype does not go with --backend sim"),
        (["--trust-package"], "--trust-package needs --artifact"),
        (["--backend", "sim"], "name it with --profile"),
        (["--backend", "sim", "--profile", "h200-sxm", "--time-scale", "0"], "--time-scale must be above 0"),
        (["--backend", "sim", "--profile", "h200-sxm", "--tokens", "some"], "--tokens is model or synthetic"),
        (["--backend", "sim", "--profile", "h200-sxm", "--tokens", "synthetic"], "name it with --model"),
        (["--backend", "sim", "--tokens", "synthetic", "--model", "gpt-4", "--profile", "h200-sxm"], "gpt-4"),
        (["--backend", "sim", "--tokens", "synthetic", "--model", "glm-5-fp8", "--profile", "h200-sxm"], "GB"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--api-key", ""], "a key has printable"),
        (["--api-key", "a b"], "a key has printable"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
        (["--allowed-origin", "http://a/"], "--allowed-origin 'http://a/': give"),
        (["--allowed-origin", "https://*.a.example"], "--allowed-origin 'https://*.a.example': give"),
        (["--allowed-origin", "https://a.example:443"], "the port that the scheme has anyway"),
        (["--allowed-origin", "a.example"], "--allowed-origin 'a.example': give"),
        (["--allowed-origin", "http://a\r\nX: y"], "--allowed-origin 'http://a\\r\\nX: y': give"),
        (["--port", "70000"], "port"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["--max-queue", "-1"], "max-queue"),
        (["--drain-seconds", "0"], "--drain-seconds must be above 0"),
        (["--max-body-mb", "nan"], "--max-body-mb must be above 0"),
    ],
)
def test_one_line(words: list[str], said: str) -> None:
    assert said in refused("serve", *(["--port", "0"] if "--port" not in words else []), *words)


def test_a_port_in_use_and_a_file_without_keys(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is in use; give another --port" in refused("serve", "--port", taken.getsockname()[1])
    (tmp_path / "keys").write_text("\n\n")
    assert "no key in it" in refused("serve", "--port", "0", "--api-key-file", tmp_path / "keys")


def test_without_its_packages_it_says_what_to_install(monkeypatch: Any) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("runtime.api", "uvicorn", "llguidance"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install 'glm5-runtime[serve]'" in refused("serve", "--port", "0")
