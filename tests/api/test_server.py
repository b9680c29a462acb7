"""What a server bears, and how it ends: hostile bodies and connections, no key, no room, no more time."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from foundation.errors import CapacityError, Failure, UsageError
from runtime.api.backing import Backing, warmed
from runtime.api.endpoint import Endpoint
from runtime.api.server import HttpServer, bound, is_loopback
from runtime.api.settings import Emulated, Settings
from runtime.serving.live import ModelLimits
from runtime.serving.service import JobFault, ServiceClosed
from tests.api.client import MODEL, Api, events, serving, wait_for
from tests.api.double import Scripted
from tests.api.words import VOCABULARY

CHAT = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
SHAPES = {"/v1/chat/completions": CHAT, "/v1/messages": {**CHAT, "max_tokens": 5}, "/v1/responses": {"input": "x"}}


def raw(api: Api, data: bytes, wait_s: float = 5.0) -> bytes:
    """What a connection that sends some bytes gets until it is closed."""
    with socket.create_connection(("127.0.0.1", api.port), wait_s) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def head(path: str = "/v1/chat/completions", **headers: Any) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


# --- bodies ---


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b'{"messages": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200, b'{"seed": ' + b"9" * 5000 + b"}", b'{"temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xef\xbb\xbf{}",
        b"{" + b'"a":1,' * 2_000_001 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize", "/v1/messages/count_tokens"])
def test_a_body_that_is_no_request_is_a_400_in_the_apis_shape(api: Api, body: bytes, path: str) -> None:
    response = api.http.post(path, content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"]
    assert ("param" in error) is not path.startswith("/v1/messages")


def test_a_body_that_is_too_large_is_a_413_unread() -> None:
    with serving(max_body_bytes=1000) as api:
        for path in ("/v1/chat/completions", "/v1/messages"):
            told = raw(api, head(path, content_length=100_000_000) + b"x")  # the rest of it is not waited for
            assert told.startswith(b"HTTP/1.1 413 ")
            assert (b"request_too_large" in told) and (b'"type":"error"' in told) is (path == "/v1/messages")
        told = raw(api, head(content_length=40_000_000) + b"x" * 40_000_000, 60)
        assert told.startswith(b"HTTP/1.1 413 ")  # whoever sends all of it before reading is told, too
        chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
        told = raw(api, head(transfer_encoding="chunked") + chunk * 3)
        assert told.startswith(b"HTTP/1.1 413 ")
        api.says("intact")
        assert api.chat(**CHAT).content == "intact"


def test_slow_heads_and_bodies_are_not_waited_for() -> None:
    with serving(header_s=0.2, body_s=0.3) as api:
        assert raw(api, b"") == b""
        assert raw(api, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow: ") == b""
        told = raw(api, head(content_length=50) + b'{"messages"')
        assert (
            told.startswith(b"HTTP/1.1 408 ")
            and json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        )
        with socket.create_connection(("127.0.0.1", api.port), 5) as kept:  # a second request on one connection, too
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            told = b""
            while not told.endswith(b"}"):
                told += kept.recv(1 << 16)
            assert told.startswith(b"HTTP/1.1 200")
            kept.sendall(b"GET /hea")
            assert kept.recv(1 << 16) == b""
        wait_for(lambda: not api.server.server_state.connections or len(api.server.server_state.connections) == 0)


def test_ten_thousand_tools_are_refused_while_others_are_served(api: Api) -> None:
    tools = [{"type": "function", "function": {"name": f"t{at}", "parameters": {}}} for at in range(10_000)]
    status, error = api.refused(tools=tools)
    assert (status, error["param"]) == (400, "tools") and "10,000 tools" in error["message"]
    many = [{"type": "function", "function": {"name": f"t{at}"}} for at in range(1000)]
    status, error = api.refused(tools=many)
    assert status == 400 and error["code"] == "context_length_exceeded"


def test_many_prompts_at_once_leave_the_loop_free(api: Api) -> None:
    """Thirty, each near the model's limit, are rendered and encoded beside the loop, which answers meanwhile."""
    api.says("x")
    body = json.dumps({"messages": [{"role": "user", "content": "a b c d " * 240}]}).encode()
    told: list[bytes] = []
    request = head(content_length=len(body), connection="close") + body
    threads = [threading.Thread(target=lambda: told.append(raw(api, request, 60))) for _ in range(30)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert api.http.get("/health").status_code == 200
    assert [each[:12] for each in told] == [b"HTTP/1.1 200"] * 30


# --- readers ---


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go() -> None:
    with serving(positions=100_000, send_s=0.3) as api:
        api.says("word " * 30_000, end="", burst=50)
        body = json.dumps({**CHAT, "stream": True, "n": 8}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", api.port))
            slow.sendall(head(content_length=len(body)) + body)
            wait_for(lambda: len(api.service.aborted) + len(api.service.ended) == 8)
            wait_for(lambda: not api.server.server_state.tasks)
        assert api.service.counts().running == 0


def test_nothing_is_left_of_clients_that_died() -> None:
    with serving() as api:
        api.says("on and on " * 150, end="")
        api.service.pace_s = 0.001
        api.http.get("/health")
        before = len(os.listdir("/proc/self/fd")), len(threading.enumerate())
        body = json.dumps({**CHAT, "stream": True}).encode()
        for at in range(40):
            with socket.create_connection(("127.0.0.1", api.port), 5) as client:
                client.sendall(head(content_length=len(body) + (at % 3 == 0)) + body)  # some never finish their body
                if at % 3 == 1:
                    client.recv(100)
        wait_for(lambda: api.service.counts().running == 0 and not api.server.server_state.tasks)
        wait_for(lambda: len(api.server.server_state.connections) <= 1)
        after = len(os.listdir("/proc/self/fd")), len(threading.enumerate())
        assert after[0] <= before[0] + 1 and after[1] <= before[1] + 8  # threads that make prompts stay


# --- readiness, and ends ---


def test_nothing_is_served_until_the_service_is_there() -> None:
    made = threading.Event()
    double = Scripted()

    def make() -> Scripted:
        made.wait(60)
        return double

    endpoint = Endpoint((MODEL,), VOCABULARY, 2048, Settings())
    server, listening = HttpServer(endpoint, make), bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.serve_on, args=(listening,))
    thread.start()
    try:
        endpoint.progress = "compiled 1 of 3 shapes"
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["progress"]) == (503, "compiled 1 of 3 shapes")
        refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert httpx.get(f"{url}/metrics").status_code == 200 and httpx.get(f"{url}/v1/models").status_code == 200
        made.set()
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
    finally:
        made.set()
        server.leave(at_once=True)
        thread.join(20)
    assert double.closed


def test_a_service_that_cannot_be_made_ends_the_server_with_its_reason() -> None:
    def make() -> Scripted:
        raise CapacityError("no room for the weights")

    endpoint = Endpoint((MODEL,), VOCABULARY, 2048, Settings())
    with pytest.raises(CapacityError, match="no room"):
        HttpServer(endpoint, make).serve_on(bound("127.0.0.1", 0))


def test_what_is_compiled_ahead_is_said() -> None:
    service, said = Scripted(lambda job: [5] * 9, slots=3), list[str]()
    found: Any = SimpleNamespace(limits=ModelLimits(1024, 2048))
    warmed(service, found, Backing("cpu", warm=5), said.append)
    assert [(len(job.prompt_ids), job.max_tokens) for job in service.jobs.values()] == [
        (32, 4), (128, 4), (256, 4), *[(64, 4)] * 6
    ]  # fmt: skip
    assert len(said) == 5 and said[-1].startswith("compiling 5 of 5 (4 x 64 tokens)")
    warmed(service, found, Backing("cpu", warm=0), said.append)
    assert len(said) == 5 and service.warmed == 2
    service.close()


@pytest.mark.parametrize("path", list(SHAPES))
@pytest.mark.parametrize("left_s", [20.0, 0.1], ids=["drained", "ended"])
def test_a_signal_ends_every_stream_properly(path: str, left_s: float) -> None:
    """Where there is time, whole; else with an error in the API's shape, and the stream's own end."""
    with serving(drain_s=left_s) as api:
        api.says("a few words more " * 20)
        api.service.gate.clear()
        found: dict[str, Any] = {}

        def ask(stream: bool) -> None:
            with httpx.Client(base_url=api.http.base_url, timeout=60) as client:
                if not stream:
                    found["whole"] = client.post(path, json=SHAPES[path])
                    return
                with client.stream("POST", path, json={**SHAPES[path], "stream": True}) as response:
                    found["events"] = list(events(response.iter_lines()))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(api.service.jobs) == 2)
        api.server.leave()
        wait_for(lambda: api.endpoint.state == "closing")
        if left_s > 1:
            api.service.gate.set()
        for thread in threads:
            thread.join(30)
        last = found["events"][-1]
        if left_s > 1:
            assert found["whole"].status_code == 200
            ends = {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}
            assert last == "[DONE]" if path not in ends else last["type"] == ends[path]
        else:
            assert found["whole"].status_code == 503
            if path == "/v1/chat/completions":
                assert last == "[DONE]"
                last = found["events"][-2]
            said = last["response"] if path == "/v1/responses" else last
            assert "shutting down" in said["error"]["message"]


FAULTS = {  # status, OpenAI's type, Anthropic's, the code of a response
    "server": (500, "server_error", "api_error", "server_error"),
    "memory": (503, "service_unavailable_error", "overloaded_error", "server_error"),
    "constraint": (400, "invalid_request_error", "invalid_request_error", "invalid_prompt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_fails_fails_alone_and_says_whether_to_ask_again(api: Api, fault: JobFault) -> None:
    status, openai, anthropic, code = FAULTS[fault]
    api.service.fails, api.service.fault = "it went no further", fault
    api.says("x")
    for path, shape in SHAPES.items():
        found = api.post(path, shape)
        assert found.status_code == status and "no further" in found.json()["error"]["message"]
        assert found.headers.get("retry-after") == ("1" if status == 503 else None)
        assert found.json()["error"]["type"] == (anthropic if path == "/v1/messages" else openai)
    chunks = api.chunks("/v1/chat/completions", CHAT)
    assert (chunks[-2]["error"]["type"], chunks[-1]) == (openai, "[DONE]")
    chunks = api.chunks("/v1/messages", SHAPES["/v1/messages"])
    assert (chunks[-1]["type"], chunks[-1]["error"]["type"]) == ("error", anthropic)
    chunks = api.chunks("/v1/responses", {"input": "x"})
    assert (chunks[-1]["type"], chunks[-1]["response"]["error"]["code"]) == ("response.failed", code)
    api.service.fails = ""
    assert api.chat(**CHAT).content == "x"


def test_a_service_that_has_ended_is_seen_by_whoever_looks_after_it(api: Api) -> None:
    assert api.http.get("/health").status_code == 200
    api.service.failed = True
    found = api.http.get("/health")
    assert (found.status_code, found.json()) == (503, {"status": "failed"})
    assert api.refused(**CHAT)[0] == 503
    api.service.failed = False


def test_a_service_that_closes_just_then_is_no_full_queue(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> Any:
        raise ServiceClosed("over")

    monkeypatch.setattr(api.service, "submit", closed)
    assert api.refused(**CHAT)[:1] == (503,) and api.refused(**CHAT)[1]["code"] == "shutting_down"


def test_a_model_whose_first_steps_fail_is_not_served(api: Api) -> None:
    api.service.fails = "it cannot be compiled"
    found = SimpleNamespace(limits=ModelLimits(90, 64), name="small")
    with pytest.raises(Failure, match="^small cannot be served: it cannot be compiled$"):
        warmed(api.service, found, Backing("cpu"), lambda words: None)  # type: ignore[arg-type]
    assert api.service.warmed == 0


def test_a_bug_of_ours_is_a_500_and_the_next_request_is_served(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def broken(job: Any) -> list[int]:
        raise ZeroDivisionError

    api.service.script = broken
    status, error = api.refused(**CHAT)
    assert (status, error["message"]) == (500, "the server failed: see its log")
    api.says("x")
    assert api.chat(**CHAT).content == "x"


# --- addresses, ids, what an emulated endpoint says ---


def test_a_port_in_use_and_a_bad_host_are_one_line() -> None:
    with bound("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="in use; give another --port"):
        bound("127.0.0.1", taken.getsockname()[1])
    for host, port in (("nowhere.invalid", 1), ("127.0.0.1", 70_000), ("256.1.1.1", 1)):
        with pytest.raises(UsageError, match="cannot listen on"):
            bound(host, port)
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "::", "example.com")))


def test_requests_have_ids(api: Api) -> None:
    own = api.http.get("/health").headers["x-request-id"]
    assert own.startswith("req_") and own != api.http.get("/health").headers["x-request-id"]
    assert api.http.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert api.http.get("/nowhere", headers={"x-request-id": "a b" * 100}).headers["x-request-id"].startswith("req_")


def test_an_emulated_endpoint_says_so() -> None:
    emulated = Emulated("h200-sxm", 8, "glm-5 · 8 h200", "fitted", "±12 %", "synthetic", 4.0)
    with serving(emulated=emulated) as api:
        api.says("x")
        for response in (api.post("/v1/chat/completions", CHAT), api.http.get("/health"), api.post("/v1/messages", {})):
            said = response.headers["x-glm5-emulated"]
            assert said.startswith("profile=h200-sxm; devices=8; ") and "evidence=fitted" in said
        text = api.http.get("/metrics").text
        assert 'glm5_emulated_info{band="±12 %",devices="8",evidence="fitted"' in text
        assert "glm5_time_scale 4.0" in text and "glm5_late_seconds{" in text and "glm5_most_late_seconds{" in text


def test_metrics_have_vllms_names(api: Api) -> None:
    api.says("x")
    api.chat(**CHAT)
    text = api.http.get("/metrics").text
    names = [
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_decode_time_seconds_bucket", "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket",
    ]  # fmt: skip
    missing = [name for name in names if f"\nvllm:{name}{{" not in text]
    assert missing == [] and "glm5_late" not in text
    sums = {name: float(value) for name, value in re.findall(r"^vllm:(\w+)_seconds_sum{.*} (\S+)$", text, re.M)}
    parts = sums["request_queue_time"] + sums["request_prefill_time"]
    assert parts == pytest.approx(sums["time_to_first_token"]) and sums["request_prefill_time"] > 0
    assert 'vllm:kv_cache_usage_perc{model_name="tiny-glm5"} 0.25' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny-glm5"}' in text
