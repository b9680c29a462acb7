"""A server in a process of its own, and clients that measure it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
GLM5 = [sys.executable, "-m", "runtime.cli.main"]
_READY = re.compile(r"glm5: serving (\S+) on (\S+), ready")
_LATE = re.compile(r"behind the chips' clock by ([\d,.]+) ms")


def glm5(*words: object) -> str:
    """What a command prints."""
    command = [*GLM5, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True).stdout


@dataclasses.dataclass
class Server:
    """model: its name. late_ms: how far it was behind its clock at worst, known when it has ended."""

    url: str
    model: str
    process: subprocess.Popen[str]
    late_ms: float = 0.0

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mb(self) -> float:
        held = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", held)[0]) / 1e3

    @property
    def files(self) -> int:
        """File descriptors that are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def gauge(self, name: str) -> float:
        """A figure of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return float(re.findall(rf"^{re.escape(name)}{{.*}} (\S+)$", text, re.M)[0])

    def timed(self, name: str) -> tuple[float, float]:
        """Sum and count of a histogram."""
        return self.gauge(f"vllm:{name}_seconds_sum"), self.gauge(f"vllm:{name}_seconds_count")


@contextlib.contextmanager
def served(*words: object) -> Iterator[Server]:
    """`glm5 serve` with these options, on a free port, until SIGTERM."""
    command = [*GLM5, "serve", "--port", "0", *map(str, words)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = _READY.search(line)
        if found is None:
            process.kill()
            raise SystemExit(f"the server did not start: {process.communicate()[1][-2000:]}")
        made = Server(found[2], found[1], process)
        yield made
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        if late := _LATE.search(said):
            made.late_ms = float(late[1].replace(",", ""))
    finally:
        process.kill()
        process.wait()


@dataclasses.dataclass(frozen=True)
class Ask:
    """Tokens of a prompt, and of its answer."""

    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Seen:
    """An answer as its client saw it; seconds of the wall clock."""

    sent_s: float
    first_s: float
    last_s: float
    tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)


def in_closed_loop(
    server: Server, asks: Sequence[Ask], concurrency: int, seed: int, ids: tuple[int, int]
) -> list[Seen]:
    """A closed loop: so many clients, each sending the next of `asks` when its last answer has ended. ids: prompts are
    drawn from these, so that none begins like another."""
    return asyncio.run(_loop(server, asks, concurrency, seed, ids))


async def _loop(server: Server, asks: Sequence[Ask], concurrency: int, seed: int, ids: tuple[int, int]) -> list[Seen]:
    rng = np.random.default_rng([seed, os.getpid(), time.time_ns()])
    bodies = iter([(body(server, ask, rng, ids), ask) for ask in asks])  # nothing but sending is left to do
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    seen: list[Seen] = []
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=600) as http:

        async def client() -> None:
            for content, ask in bodies:
                seen.append(await _ask(http, content, ask))

        await asyncio.gather(*(http.get("/health") for _ in range(concurrency)))  # connects
        await asyncio.gather(*(client() for _ in range(concurrency)))
    return seen


def body(server: Server, ask: Ask, rng: np.random.Generator, ids: tuple[int, int]) -> bytes:
    """Of a request for a streamed completion of just that many tokens."""
    return json.dumps(
        {
            "model": server.model, "prompt": rng.integers(*ids, ask.prompt_tokens).tolist(), "stream": True,
            "max_tokens": ask.output_tokens, "ignore_eos": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


async def _ask(http: httpx.AsyncClient, content: bytes, ask: Ask) -> Seen:
    sent = first = last = 0.0

    async def trace(event: str, _: object) -> None:
        """What a client does before it sends is not the server's."""
        nonlocal sent
        if event == "http11.send_request_headers.started":
            sent = time.perf_counter()

    kept: list[bytes] = []
    given: dict[str, Any] = {"headers": {"content-type": "application/json"}, "extensions": {"trace": trace}}
    async with http.stream("POST", "/v1/completions", content=content, **given) as response:
        async for part in response.aiter_raw():
            now = time.perf_counter()
            if b'"text":"' in part:
                if b'"text":""' not in part:
                    first = first or now
                last = now
            kept.append(part)
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {b''.join(kept)[:500]!r}")
    lines = b"".join(kept).split(b"\n")
    usage: Any = next(json.loads(line[6:]) for line in reversed(lines) if b'"usage":{' in line)
    tokens = usage["usage"]["completion_tokens"]
    if tokens != ask.output_tokens:
        raise SystemExit(f"an answer has {tokens} tokens, not {ask.output_tokens}")
    return Seen(sent, first, last, tokens)


def shown(values: Sequence[float], form: str = ".1f") -> str:
    """Median, and lowest to highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def repeated(ask: Ask, count: int) -> list[Ask]:
    return list(itertools.repeat(ask, count))
