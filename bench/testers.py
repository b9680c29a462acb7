"""Load testers of others against `glm5 serve`: whether they run to the end, and whether they see what the server says.

    python -m bench.testers [--testers build/testers/bin] [--backends cpu,sim] [--time-scale 4] [--keep DIR]

aiperf (chat, responses, messages) and guidellm (chat), offline, with the embedded tokenizer, from an environment of
their own (`make build/testers/ready`). TTFT and the time between tokens, means over requests, beside /metrics of the
same requests. A tester that finds no counts in a stream counts the answer's text again, which other tokens may spell as
well: the time between tokens is that of all of them over those that the server made, and both counts are printed. Their
JSON stays in --keep, for `glm5 fit` and `glm5 validate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.outside import ROOT, Server, served
from runtime.execution.local.load import embedded_checkpoint


@dataclasses.dataclass(frozen=True)
class Times:
    """Means over requests: milliseconds to the first token and between tokens, and how many there were."""

    first_ms: float
    between_ms: float
    tokens: float

    def by_tokens_of(self, other: Times) -> Times:
        """With the same time from the first token to the last, as many tokens as another counted."""
        return Times(self.first_ms, self.between_ms * (self.tokens - 1) / (other.tokens - 1), self.tokens)


def aiperf(bin_folder: Path, form: str, server: Server, options: argparse.Namespace, folder: Path) -> Times:
    _run(
        bin_folder / "aiperf", "profile", "-m", server.model, "--url", server.url, "--endpoint-type", form,
        "--streaming", "--tokenizer", embedded_checkpoint().relative_to(ROOT),
        *(["--use-server-token-count"] if form == "chat" else []),  # it finds no counts in other forms' streams
        "--extra-inputs", "ignore_eos:true", "--concurrency", options.concurrency,
        "--request-count", options.requests, "--isl", options.isl, "--osl", options.osl,
        "--output-artifact-dir", folder, "--ui", "none", "--no-server-metrics", "--no-gpu-telemetry",
    )  # fmt: skip
    run = json.loads(next(folder.glob("profile_export_aiperf.json")).read_text())
    errors = (run.get("error_request_count") or {}).get("avg", 0)
    if errors or run["request_count"]["avg"] != options.requests:
        raise SystemExit(f"aiperf {form}: {run['request_count']['avg']:g} requests, {errors:g} errors")
    return Times(
        *(run[name]["avg"] for name in ("time_to_first_token", "inter_token_latency", "output_sequence_length"))
    )


def guidellm(bin_folder: Path, server: Server, options: argparse.Namespace, folder: Path) -> Times:
    _run(
        bin_folder / "guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model={server.model}",
        "--tokenizer", f"kind=hf_auto,model={embedded_checkpoint()}",
        "--profile", f"kind=concurrent,streams={options.concurrency}",
        "--constraint", f"kind=max_requests,count={options.requests}",
        "--data", f"kind=synthetic_text,prompt_tokens={options.isl},output_tokens={options.osl}",
        "--output", f"kind=json,path={folder / 'guidellm.json'}", "--disable-console",
    )  # fmt: skip
    run = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    counts = run["request_totals"]
    if counts["errored"] or counts["successful"] < options.requests:
        raise SystemExit(f"guidellm: {counts}")
    names = ("time_to_first_token_ms", "inter_token_latency_ms", "output_token_count")
    return Times(*(run[name]["successful"]["mean"] for name in names))


def _run(*words: object) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}  # there is no hub
    found = subprocess.run(
        [*map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if found.returncode:
        raise SystemExit(f"{Path(str(words[0])).name} ended with {found.returncode}: {found.stdout[-3000:]}")


def compared(server: Server, scale: float, run: Callable[[], Times]) -> tuple[Times, Times]:
    """What a tester saw, by the tokens that the server counted, and what the server says of the same requests."""
    names = ("time_to_first_token", "inter_token_latency")
    before, made = [server.timed(name) for name in names], server.gauge(_MADE)
    seen = run()
    after = [server.timed(name) for name in names]
    first_ms, between_ms = (
        1e3 * (total - total_before) / (count - count_before) / scale
        for (total, count), (total_before, count_before) in zip(after, before, strict=True)
    )
    own = Times(first_ms, between_ms, (server.gauge(_MADE) - made) / (after[0][1] - before[0][1]))
    return Times(seen.first_ms / scale, seen.between_ms / scale, seen.tokens).by_tokens_of(own), own


_MADE = "vllm:generation_tokens_total"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testers", type=Path, default=ROOT / "build" / "testers" / "bin")
    parser.add_argument("--backends", default="cpu,sim")
    parser.add_argument("--time-scale", type=float, default=4.0, help="of sim")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--isl", type=int, default=256)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--only", default="", help="testers whose name contains this")
    parser.add_argument("--keep", type=Path, help="a folder for what the testers write")
    options = parser.parse_args()
    of: dict[str, list[Any]] = {
        "cpu": ["--backend", "cpu", "--warm-up", 2 * options.concurrency],
        "sim": ["--backend", "sim", "--profile", "h200-sxm", "--devices", 8, "--model", "glm-5-fp8", "--tokens",
                "synthetic", "--time-scale", options.time_scale],
    }  # fmt: skip
    testers: list[tuple[str, Callable[[Server, Path], Times]]] = [
        (f"aiperf {form}", lambda server, folder, form=form: aiperf(options.testers, form, server, options, folder))
        for form in ("chat", "responses", "messages")
    ]
    testers.append(("guidellm", lambda server, folder: guidellm(options.testers, server, options, folder)))
    testers = [(name, run) for name, run in testers if options.only in name]
    print("| | TTFT ms, tester / server | between tokens ms | tokens |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for backend in options.backends.split(","):
            with served(*of[backend]) as server:
                scale = options.time_scale if backend == "sim" else 1.0
                for name, run in testers:
                    if backend == "cpu":  # where what is left is compiled
                        run(server, _made(Path(temporary), backend, f"{name} first"))
                    folder = _made(options.keep or Path(temporary), backend, name)
                    seen, own = compared(server, scale, lambda run=run, folder=folder: run(server, folder))
                    pairs = zip(dataclasses.astuple(seen), dataclasses.astuple(own), strict=True)
                    cells = [f"{a:.1f} / {b:.1f} = {a / b:.2f}" for a, b in pairs]
                    print(f"| {backend}, {name} | {' | '.join(cells)} |", flush=True)


def _made(*parts: Any) -> Path:
    folder = Path(*parts).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
