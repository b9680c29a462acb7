"""Imports an engine's argument module from a folder and answers one question about it on stdin. A script by itself: it
runs where only the engine and this machine's packages can be imported (tools/engine_flags.py starts it).

    python engine_parser.py FOLDER KIND < {"record": true} | {"parse": [[word, ...], ...]}
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import io
import json
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

Parser = argparse.ArgumentParser
ABSENT = {"libtpu", "tpu_inference", "tpu_commons", "torch_xla", "pynvml", "amdsmi", "mlx", "triton_ascend"}
"""Never stood in for: engines find out by importing them which chip they are on."""
STOOD_IN = {
    "sglang": ("sglang.srt.layers", "sglang.srt.lora", "sglang.srt.configs", "sglang.srt.utils.hf_transformers_utils"),
}
"""Modules of an engine that arguments need for a name or two, and that need the chip's own libraries."""


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class _StandIn(metaclass=_Meta):
    """A class of a package that is not here: it can be subclassed, subscripted and made."""

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def __init_subclass__(cls, **options: Any) -> None: ...
    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    __path__: list[str] = []
    __version__ = "99.0"
    __file__ = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        options = {"__module__": self.__name__}
        found = type(name, (_StandIn,), options) if name[0].isupper() else MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the modules that `wanted` names."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if self.wanted(fullname) else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def stand_in(folder: Path, kind: str) -> None:
    """Missing modules that the engine's own files ask for, and those of `STOOD_IN`, are made up; others are not: this
    machine's packages find out what is missing by asking, too."""

    def asked_by_engine(fullname: str) -> bool:
        frame: Any = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = frame is not None and frame.f_code.co_filename.startswith(str(folder))
        return ours and fullname.partition(".")[0] not in ABSENT

    inside = STOOD_IN.get(kind, ())
    first = _Finder(lambda name: any(name == each or name.startswith(each + ".") for each in inside))
    sys.meta_path.insert(0, first)
    sys.meta_path.append(_Finder(asked_by_engine))


def sglang() -> tuple[Parser, Callable[[argparse.Namespace], Any]]:
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(prog="sglang.launch_server", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return parser, lambda found: None


def vllm() -> tuple[Parser, Callable[[argparse.Namespace], Any]]:
    try:
        from vllm.entrypoints.openai.cli_args import make_arg_parser  # pyright: ignore[reportMissingImports]
    except ImportError:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # pyright: ignore[reportMissingImports]
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve")), AsyncEngineArgs.from_cli_args


def taken(convert: Any) -> str:
    """What a flag's converter takes, by trying: "text" (anything), "json", "float", "int" or "other"."""

    def takes(text: str) -> bool:
        try:
            convert(text)
        except Exception:
            return False
        return True

    if convert is None or takes("x"):
        return "text"
    return next((name for name, text in (("json", "{}"), ("float", "0.5"), ("int", "7")) if takes(text)), "other")


def flags(parser: Parser) -> dict[str, dict[str, Any]]:
    """Each flag with the values it takes."""
    found: dict[str, dict[str, Any]] = {}
    for flag, action in parser._option_string_actions.items():
        if not flag.startswith("--"):
            continue
        values = {None: 1, argparse.REMAINDER: "*"}.get(action.nargs, action.nargs)  # pyright: ignore
        each: dict[str, Any] = {"values": values}
        if values != 0:
            each["type"] = taken(action.type)
        if action.choices:
            each["choices"] = sorted(str(choice) for choice in action.choices)
        if "eprecated" in (action.help or "")[:40] or type(action).__name__.startswith("Deprecated"):
            each["deprecated"] = True
        if flag not in action.option_strings:  # still taken, no longer shown
            each["deprecated"] = True
        found[flag] = each
    return found


PARSERS = {"sglang": sglang, "vllm": vllm, "vllm-ascend": vllm}
"""By the name of the launch table: its argument parser, and what makes an engine's arguments of what that gives."""


def keys(kind: str, folder: Path) -> dict[str, list[str]]:
    """The keys that JSON flags take, dotted where they are inside others."""
    if PARSERS[kind] is not vllm:
        return {}
    import vllm.config as config  # pyright: ignore[reportMissingImports]

    of = {
        "--speculative-config": config.SpeculativeConfig,
        "--kv-transfer-config": config.KVTransferConfig,
        "--compilation-config": config.CompilationConfig,
        "--eplb-config": config.EPLBConfig,
    }
    found = {flag: sorted(each.name for each in dataclasses.fields(kind)) for flag, kind in of.items()}
    plugin = folder / "vllm_ascend"
    if plugin.is_dir():
        found["--additional-config"] = _additional((plugin / "ascend_config.py").read_text())
        found["--kv-transfer-config"] += _extra(plugin, folder / "vllm" / "distributed" / "kv_transfer")
    return found


def _additional(code: str) -> list[str]:
    """What vllm-ascend's `AscendConfig` reads."""
    top = re.findall(r'additional_config\.get\(\s*"(\w+)"', code)
    top += re.findall(r'_get_config_value\(\s*additional_config,\s*"(\w+)"', code)
    inner = []
    for section, name in re.findall(r"self\.(\w+) = (\w+Config)\(", code):
        body = code.partition(f"\nclass {name}")[2].partition("\nclass ")[0]
        head = body.partition("def __init__(")[2].partition("):")[0]
        read = re.findall(r"^\s+(\w+): \w+ = ", head, re.MULTILINE) + re.findall(r'\.get\(\s*"(\w+)"', body)
        read += re.findall(r'^        "(\w+)": ', body.partition("_defaults = {")[2].partition("}")[0], re.MULTILINE)
        inner += [f"{section}.{key}" for key in read]
    return sorted({*top, *inner})


def _extra(*folders: Path) -> list[str]:
    """What connectors read of kv_connector_extra_config, and of its entries for the two sides."""
    code = "".join(path.read_text() for each in folders for path in each.rglob("*.py"))
    top = re.findall(r'(?:get_from_extra_config|extra_config\.get)\(\s*"(\w+)"', code)
    side = re.findall(r'(?:prefill|decode)_parallel_config(?:\.get\(|\[)"(\w+)"', code)
    read = {*top, *(f"{name}.{key}" for name in ("prefill", "decode") for key in side)}
    return sorted(f"kv_connector_extra_config.{key}" for key in read)


def variables(folder: Path) -> list[str]:
    """Environment variables of the engine's own that its code names."""
    named = re.compile(r"\b(?:SGLANG|VLLM)_[A-Z0-9_]+\b")
    return sorted({name for path in folder.rglob("*.py") for name in named.findall(path.read_text(errors="ignore"))})


def parsed(parser: Parser, made: Callable[[argparse.Namespace], Any], words: list[str]) -> dict[str, str | None]:
    """Why a line is not taken (None: it is), and what the engine warns of."""
    heard, said = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    for name in ("vllm", "sglang"):
        logging.getLogger(name).addHandler(handler)
    error = None
    with contextlib.redirect_stderr(said), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made(parser.parse_args(words))
        except SystemExit:
            error = said.getvalue().strip().splitlines()[-1]
        except Exception as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
    told = heard.getvalue() + said.getvalue() + "".join(f"{each.message}\n" for each in caught)
    warned = [line for line in told.splitlines() if "deprecated" in line.lower()]
    return {"error": error, "warned": "; ".join(dict.fromkeys(warned)) or None}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what an engine prints as it is imported off stdout, which carries the answer."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)


def main() -> None:
    folder, kind = Path(sys.argv[1]).resolve(), sys.argv[2]
    question = json.load(sys.stdin)
    with quiet():
        os.environ["VLLM_PLUGINS"] = ""  # vllm-ascend adds no flags, and its platform needs an NPU's libraries
        import torch  # noqa: F401 # pyright: ignore[reportUnusedImport]

        sys.path.insert(0, str(folder))
        stand_in(folder, kind)
        for path in folder.glob("vllm-*.dist-info/METADATA"):  # vLLM goes by its version's name to know of no GPU
            path.write_text(re.sub(r"(?m)^(Version: [\d.]+)$", r"\1+cpu", path.read_text()))
        parser, made = PARSERS[kind]()
        if "record" in question:
            answer: Any = {"flags": flags(parser), "keys": keys(kind, folder), "variables": variables(folder)}
        else:
            answer = {"lines": [parsed(parser, made, words) for words in question["parse"]]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
