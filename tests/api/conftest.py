"""One server a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.client import Api, serving


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with serving() as made:
        yield made


@pytest.fixture(autouse=True)
def as_new(request: pytest.FixtureRequest) -> None:
    """The module's service, with nothing left of the last test."""
    if "api" in request.fixturenames:
        service = request.getfixturevalue("api").service
        service.burst, service.pace_s, service.cached, service.fails, service.max_queue = 1, 0.0, 0, "", 64
        service.most_prompt = 1 << 30
        service.gate.set()
