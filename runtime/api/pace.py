"""What serving takes on this machine, beside what the programs take alone: CPU seconds a request, a step and a row.

The whole server is measured, with the embedded checkpoint: sockets, forms, scheduler, sampling, streams, and that
programs between them find colder caches. Python runs one thread at a time, so what its threads take adds up, and adds
to a step. CPU is counted, not time, so that other programs on the machine do not count. The client is a thread of its
own, which is left out.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends.interface import Backend
from model.checkpoint import Checkpoint
from runtime.api.endpoint import Endpoint
from runtime.api.server import HttpServer, bound
from runtime.api.vocabulary import Vocabulary
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.services import engine_service
from runtime.porting.calibrate import ServingCost
from runtime.serving.executor import FedRow

_PROMPT, _ANSWER, _STREAMS = 16, 48, 8  # tokens, and requests at once
_STEPS = 50  # of a program alone


def serving_cost(backend: Backend, rounds: int = 5) -> ServingCost:
    """Medians over rounds of a second. Raises `ModuleNotFoundError` without the packages of the server."""
    engine = load_engine(Checkpoint(embedded_checkpoint()), backend, EngineConfig(least_batch=_STREAMS))
    loads = [(1, 1), (1, _ANSWER), (_STREAMS, 1), (_STREAMS, _ANSWER)]
    found = []
    with _served(engine) as port:
        _cpu_s(port, _STREAMS, _ANSWER)  # compiles, and the first of everything takes longer
        for _ in range(rounds):
            found.append([*(_cpu_s(port, *load) for load in loads), *_programs_cpu_s(engine)])
    one, alone, burst, together, prompt, token = (statistics.median(column) for column in zip(*found, strict=True))
    of_one = (alone - one) / (_ANSWER - 1) - token  # beside the program, which is the same: its rows are padded
    of_all = (together - burst) / (_ANSWER - 1) - token
    row_s = max(0.0, (of_all - of_one) / (_STREAMS - 1))
    step_s = max(0.0, of_one - row_s)
    return ServingCost(max(0.0, one - prompt - step_s - row_s), step_s, row_s)


def _programs_cpu_s(engine: LocalEngine) -> tuple[float, float]:
    """Of a step with a prompt, and of one with an answer's next token, one behind the other alike."""
    pages = range(1, 1 + -(-(_PROMPT + _ANSWER) // engine.config.described.page_tokens))
    prompt = [[FedRow(range(300, 300 + _PROMPT), 0, pages)]]
    token = [[FedRow([300], _PROMPT + _ANSWER // 2, pages)]]
    found = []
    for rows in ((prompt, [[]]), ([[]], token)):
        engine.executor.step(*rows, False)
        before = time.process_time()
        for _ in range(_STEPS):
            engine.executor.step(*rows, False)
        found.append((time.process_time() - before) / _STEPS)
    return found[0], found[1]


@contextmanager
def _served(engine: LocalEngine) -> Iterator[int]:
    """The port of a server of an engine."""
    config = engine.cfg
    vocabulary = Vocabulary.load(embedded_checkpoint(), config.vocab_size, config.eos_token_ids)
    endpoint = Endpoint(("calibrated",), vocabulary, config.max_positions)
    ready, listening = threading.Event(), bound("127.0.0.1", 0)
    server = HttpServer(endpoint, lambda: engine_service(engine), ready.set)
    thread = threading.Thread(target=server.serve_on, args=(listening,), name="glm5-pace")
    thread.start()
    try:
        ready.wait()
        yield listening.getsockname()[1]
    finally:
        server.leave(at_once=True)
        thread.join()


def _cpu_s(port: int, streams: int, tokens: int) -> float:
    """CPU seconds of this process, its client left out, for so many streams at once."""
    rng = np.random.default_rng(time.time_ns())
    requests = [_request(rng, tokens) for _ in range(streams)]
    own: list[float] = []

    def client() -> None:
        began = time.thread_time()
        with selectors.DefaultSelector() as selector:
            for content in requests:
                made = socket.create_connection(("127.0.0.1", port))
                made.sendall(content)
                selector.register(made, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    sock: Any = key.fileobj
                    if not sock.recv(1 << 16):
                        selector.unregister(sock)
                        sock.close()
        own.append(time.thread_time() - began)

    before = time.process_time()
    thread = threading.Thread(target=client)
    thread.start()
    thread.join()
    return time.process_time() - before - own[0]


def _request(rng: np.random.Generator, tokens: int) -> bytes:
    """Of a prompt that none before began like."""
    prompt = rng.integers(300, 900, _PROMPT).tolist()  # of the embedded tokenizer, none of them apart
    body = json.dumps({"prompt": prompt, "stream": True, "max_tokens": tokens, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
