"""A server in this process, and a client that reads whole and streamed answers into one form."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from runtime.api.endpoint import Endpoint
from runtime.api.server import HttpServer, bound
from runtime.api.settings import Emulated, Settings
from runtime.serving.service import Service
from tests.api.double import Scripted
from tests.api.words import VOCABULARY, ids

MODEL = "tiny-glm5"


@dataclasses.dataclass
class Answer:
    """What came of a choice, whole or streamed. calls: (name, arguments as JSON text). raw: the body, or its chunks."""

    content: str | None = None
    reasoning: str | None = None
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] | None = None
    raw: Any = dataclasses.field(default=None, compare=False)


class Api:
    """One server. `says` decides what its service answers."""

    def __init__(self, server: HttpServer, service: Service, endpoint: Endpoint, port: int):
        self.server, self.endpoint, self.port = server, endpoint, port
        self.service: Any = service
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def says(self, *texts: str, burst: int = 1, end: str = "<|user|>") -> None:
        """The answers to the next requests: to the n-th of a request's jobs the n-th, or the last."""
        tokens = [ids(text + end) for text in texts]
        count = iter(range(1 << 30))
        self.service.script = lambda job: tokens[min(next(count), len(tokens) - 1)]
        self.service.burst = burst

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def chunks(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream; `[DONE]` as it is."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(events(response.iter_lines()))

    def chat(self, stream: bool = False, **body: Any) -> Answer:
        (answer,) = self.choices(stream, **body)
        return answer

    def choices(self, stream: bool = False, **body: Any) -> list[Answer]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}
        if stream:
            return of_chunks(self.chunks("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}))
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return of_body(response.json())

    def refused(self, path: str = "/v1/chat/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        if "messages" not in body and path != "/v1/completions":
            body["messages"] = [{"role": "user", "content": "hi"}]
        response = self.post(path, body)
        return response.status_code, response.json()["error"]


def events(lines: Iterator[str]) -> Iterator[Any]:
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        if line.startswith("data: "):
            data = line[6:]
            value = data if data == "[DONE]" else json.loads(data)
            assert name is None or name == value["type"]
            yield value
            name = None


def of_body(body: dict[str, Any]) -> list[Answer]:
    found = []
    for at, choice in enumerate(body["choices"]):
        assert choice["index"] == at and choice["message"]["role"] == "assistant"
        message = choice["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
        assert all(c["id"].startswith("call_") and c["type"] == "function" for c in message.get("tool_calls", []))
        reasoning, finish = message.get("reasoning_content"), choice["finish_reason"]
        found.append(Answer(message["content"], reasoning, calls, finish, body["usage"], body))
    return found


def of_chunks(chunks: list[Any]) -> list[Answer]:
    """As the SDKs assemble them, with what they rely on checked."""
    assert chunks[-1] == "[DONE]"
    found: dict[int, Answer] = {}
    usage = None
    for chunk in chunks[:-1]:
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"]
        if chunk.get("usage"):
            usage = chunk["usage"]
            assert chunk["choices"] == []
        for choice in chunk["choices"]:
            first = choice["index"] not in found
            answer, delta = found.setdefault(choice["index"], Answer(raw=chunks)), choice["delta"]
            assert (delta.get("role") == "assistant") is first and answer.finish is None
            if "content" in delta:
                answer.content = (answer.content or "") + delta["content"]
            if "reasoning_content" in delta:
                answer.reasoning = (answer.reasoning or "") + delta["reasoning_content"]
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(answer.calls) and call["type"] == "function"
                    answer.calls.append((call["function"]["name"], ""))
                assert call["index"] == len(answer.calls) - 1
                name, arguments = answer.calls[-1]
                answer.calls[-1] = (name, arguments + call["function"]["arguments"])
            answer.finish = choice["finish_reason"]
    for answer in found.values():
        answer.usage = usage
        if not answer.content:
            answer.content = None if answer.reasoning or answer.calls else ""
    return [found[at] for at in sorted(found)]


@contextmanager
def serving(
    service: Service | None = None, emulated: Emulated | None = None, positions: int = 2048, **settings: Any
) -> Iterator[Api]:
    """A server, which is ready."""
    double = service or Scripted()
    endpoint = Endpoint((MODEL, "alias"), VOCABULARY, positions, Settings(**settings), {}, emulated)
    server = HttpServer(endpoint, lambda: double)
    listening = bound("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.serve_on, args=(listening,), daemon=True)
    thread.start()
    api = Api(server, double, endpoint, port)
    try:
        wait_for(lambda: endpoint.state == "ready" and server.started)
        yield api
    finally:
        api.http.close()
        server.leave(at_once=True)
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)
