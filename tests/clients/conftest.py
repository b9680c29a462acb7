"""A server of this checkout, in a process of its own: these tests run without our packages."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

SAID = re.compile(r"glm5: serving (\S+) on (\S+), ready")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.clients)


BACKENDS = {"cpu": "", "sim": "--backend sim --profile h200-sxm"}


@pytest.fixture(scope="session", params=BACKENDS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that answers with the embedded model, on this host or on emulated chips. GLM5 is the
    command."""
    if "GLM5" not in os.environ:
        pytest.skip("GLM5 does not name the command: `make test-clients`")
    command = [*shlex.split(os.environ["GLM5"]), "serve", "--port", "0", "--warm-up", "1", "--api-key", "secret"]
    command += BACKENDS[request.param].split()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    try:
        assert process.stdout is not None
        found = SAID.search(process.stdout.readline())
        assert found, "the server did not start"
        yield found[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
