"""Damaged prompts and command lines, and who reads them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from random import Random
from unittest import mock

from foundation.errors import Failure
from model.tokenizer import Tokenizer
from runtime.cli.main import main
from runtime.execution.prompts import read_prompts
from tests.fuzz.documents import load_file
from tests.fuzz.kind import CHECKPOINT, Kind
from tests.fuzz.mutations import (
    WORDS,
    encoded,
    mutated_bytes,
    mutated_words,
)  # fmt: skip


def _prompts(rng: Random) -> bytes:
    text = "\n".join(rng.choice(WORDS) for _ in range(rng.randint(0, 9)))
    return mutated_bytes(rng, encoded(text) or b"a") if rng.random() < 0.6 else encoded(text * rng.choice((1, 1, 1000)))


def _prompts_read(folder: Path) -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    for text in read_prompts(folder / "prompts.txt")[:20]:
        tokenizer.encode(text[:1000])


class Served(BaseException):
    """Where the work of a command would begin."""


_OPTIONS: dict[str, list[str]] = {
    "run": ["--backend", "--checkpoint", "--prompt", "--prompt-ids", "--prompts", "--chat", "--no-thinking",
            "--max-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--mtp", "--ignore-eos", "--dtype",
            "--keep-fp8", "--pool-tokens", "--prefill-chunk", "--dump-logits", "--json", "--artifact",
            "--trust-package", "--plan", "--profile", "--devices", "--tp", "--dp", "--ep", "--pp", "--formats", "--kv",
            "--engine", "--scale-memory", "--trace", "--coordinator", "--process"],
    "simulate": ["--devices", "--tp", "--dp", "--ep", "--pp", "--isl", "--osl", "--concurrency", "--rate", "--requests",
                 "--mtp", "--accept", "--expert-load", "--set", "--seed", "--kv", "--formats", "--engine", "--profile",
                 "--model", "--length-ratio", "--burstiness", "--prefill-devices", "--trace-file", "--plan", "--html",
                 "--shared-prefix", "--turns", "--think-s", "--length-cv", "--length-file"],
    "plan": ["--devices", "--isl", "--osl", "--concurrency", "--rate", "--ttft-ms", "--tpot-ms", "--objective",
             "--formats",
             "--kv", "--mtp", "--expert-load", "--engine", "--set", "--out", "--profile", "--model", "--length-ratio",
             "--shared-prefix", "--turns", "--think-s", "--length-cv", "--length-file"],
    "plan experts": ["--load", "--devices", "--slots", "--nodes", "--groups", "--previous", "--max-moves", "--sglang",
                     "--dense-layers", "--json"],
    "model": ["--json", "--formats", "--help"],
    "profiles show": ["--set", "--json"],
    "profiles diff": ["--json"],
    "profiles new": ["--bf16", "--memory", "--bandwidth", "--set", "--formats", "--kv", "--name", "--grade"],
    "validate": ["--json"],
    "export": ["--format", "--phase", "--batch", "--chunk", "--context", "--page-size", "--tp", "--dp", "--ep", "--pp",
               "--formats", "--dtype", "--device", "--plan", "--out", "--model", "--weights"],
    "quantize": ["--formats", "--profile", "--layout", "--out"],
    "compare": ["--profile", "--formats", "--window", "--max-tokens", "--tasks", "--html", "--text", "--prompts"],
}  # fmt: skip
# What decides the mode of a run, and that which follows is what another one reads.
_RUNS: list[list[str]] = [
    [], [], ["--backend", "sim", "--profile", "h200-sxm"], ["--artifact", "none"],
    ["--backend", "sim", "--plan", "none"],
    ["--coordinator", "localhost:1", "--process", "0/2"],
]  # fmt: skip
_BASES: dict[str, list[str]] = {
    "run": ["--prompt", "hello", "--max-tokens", "4"],
    "simulate": ["--devices", "8", "--concurrency", "4", "--isl", "64", "--osl", "8"],
    "plan": ["--devices", "8", "--concurrency", "4", "--isl", "64", "--osl", "8"],
    "plan experts": ["--load", "../load.npy", "--devices", "4", "--slots", "24"],
    "model": ["glm-5"],
    "profiles show": ["h200-sxm"],
    "profiles diff": ["h200-sxm", "h100-sxm"],
    "profiles new": ["my.toml", "--bf16", "1e14", "--memory", "8e10", "--bandwidth", "2e12"],
    "validate": ["rows.csv"],
    "export": ["--format", "onnx", "--out", "p", "--model", "glm-5"],
    "quantize": ["--formats", "fp8", "--out", "q"],
    "compare": ["--profile", "h200-sxm"],
}


def _words(rng: Random) -> bytes:
    verb = rng.choice(list(_BASES))
    words = [*verb.split(), *mutated_words(rng, _BASES[verb], _OPTIONS[verb])]
    if verb == "run":
        words[1:1] = rng.choice(_RUNS)
    return json.dumps([word.replace("\0", "") for word in words]).encode()


def _command(folder: Path) -> None:
    """Runs the words in the folder, up to where the work would begin."""
    load_file()
    words, said = json.loads((folder / "words.json").read_bytes()), io.StringIO()
    work = (
        "runtime.simulation.build.build", "runtime.planning.search.search", "runtime.planning.smallest.smallest",
        "runtime.cli.opening.opened_checkpoint", "runtime.porting.export.options.check",
        "runtime.simulation.validation.score",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(said))
        for name in work:
            with contextlib.suppress(AttributeError, ImportError):
                stack.enter_context(mock.patch(name, side_effect=Served))
        try:
            main(words)
        except Served:
            return
        except SystemExit as end:
            if end.code == 2:
                raise Failure(said.getvalue().removesuffix("\n")) from None
            if end.code not in (None, 0, 1):
                raise AssertionError(f"exit code {end.code}") from None


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    return {
        "prompts": Kind("prompts.txt", _prompts, _prompts_read, named=False),
        "command": Kind("words.json", _words, _command, named=False),
    }  # fmt: skip
