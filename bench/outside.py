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


def in_open_loop(server: Server, asks: Sequence[Ask], rate: float, seed: int, ids: tuple[int, int]) -> list[Seen]:
    """So many requests a second, each when it comes (Poisson), whoever is still served."""

    async def one(content: bytes, ask: Ask, at: float) -> Seen:
        await asyncio.sleep(at)
        return await _ask(*await asyncio.open_connection(url.host, url.port), content, ask)

    async def loop() -> list[Seen]:
        times = np.cumsum(rng.exponential(1 / rate, len(asks)))
        bodies = [_request(body(server, ask, drawn, ids)) for ask in asks]
        return await asyncio.gather(*map(one, bodies, asks, times.tolist()))

    url, rng, drawn = httpx.URL(server.url), np.random.default_rng(seed), np.random.default_rng(time.time_ns())
    return asyncio.run(loop())


async def _loop(server: Server, asks: Sequence[Ask], concurrency: int, seed: int, ids: tuple[int, int]) -> list[Seen]:
    rng = np.random.default_rng([seed, os.getpid(), time.time_ns()])
    requests = iter([(_request(body(server, ask, rng, ids)), ask) for ask in asks])  # only to be sent from here on
    seen: list[Seen] = []
    url = httpx.URL(server.url)

    async def client() -> None:
        for content, ask in requests:
            reader, writer = await open_ones.pop()
            seen.append(await _ask(reader, writer, content, ask))
            open_ones.append(asyncio.open_connection(url.host, url.port))

    connected = [asyncio.ensure_future(asyncio.open_connection(url.host, url.port)) for _ in range(concurrency)]
    await asyncio.gather(*connected)
    open_ones: list[Any] = [*connected]
    await asyncio.gather(*(client() for _ in range(concurrency)))
    for each in open_ones:
        _, writer = await each
        writer.close()
    return seen


def _request(content: bytes) -> bytes:
    """Of a connection that ends with its answer. A client library would take longer over a token than the server, on
    the same cores."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def body(server: Server, ask: Ask, rng: np.random.Generator, ids: tuple[int, int]) -> bytes:
    """Of a request for a streamed completion of just that many tokens."""
    return json.dumps(
        {
            "model": server.model, "prompt": rng.integers(*ids, ask.prompt_tokens).tolist(), "stream": True,
            "max_tokens": ask.output_tokens, "ignore_eos": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes, ask: Ask) -> Seen:
    sent = time.perf_counter()
    writer.write(content)
    first = last = 0.0
    kept: list[bytes] = []
    while part := await reader.read(1 << 16):
        now = time.perf_counter()
        if b'"text":"' in part:
            if b'"text":""' not in part:
                first = first or now
            last = now
        kept.append(part)
    writer.close()
    if b" 200 " not in kept[0]:
        raise SystemExit(f"{b''.join(kept)[:500]!r}")
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
