"""What a client is told when it gets no answer: status, kind and one line. Each dialect has a shape for it."""

from __future__ import annotations

from typing import Any

from runtime.serving.service import JobFault

_OPENAI = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    503: "service_unavailable_error",
}  # fmt: skip
_ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error", 429: "overloaded_error",
    503: "overloaded_error",
}  # fmt: skip


class ApiRefusal(Exception):
    """No answer: an HTTP status, one line, the parameter that is at fault, a code that programs compare."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def openai(self) -> dict[str, Any]:
        kind = _OPENAI.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC.get(self.status, "api_error")
        named = self.param is None or self.param in self.message
        message = self.message if named else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message}}

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiRefusal:
    """A request that no server could serve."""
    return ApiRefusal(400, message, param, code)


def full() -> ApiRefusal:
    return ApiRefusal(429, "as many requests wait as may: try again later", code="queue_full")


def failed(message: str, fault: JobFault) -> ApiRefusal:
    """An answer that could not be ended; clients ask again behind a 500 or 503, and not behind a 400."""
    match fault:
        case "constraint":
            return ApiRefusal(400, message, code="constraint_failed")
        case "memory":
            return ApiRefusal(503, message, code="out_of_memory")
        case "server":
            return ApiRefusal(500, message, code="failed")


def closing() -> ApiRefusal:
    return ApiRefusal(503, "the server is shutting down", code="shutting_down")
