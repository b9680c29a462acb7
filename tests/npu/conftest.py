"""Checks with torch_npu, which is looked for before the first test (`make test-npu`)."""

import os

import pytest

from tests.npu import vendor

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else `import torch` imports torch_npu too early


@pytest.fixture(scope="session", autouse=True)
def absent() -> str | None:
    """torch_npu is imported before anything declares its operators, fixtures of modules included."""
    return vendor.reason_absent()


@pytest.fixture(autouse=True)
def npu(request: pytest.FixtureRequest, absent: str | None) -> None:
    if absent and request.node.get_closest_marker("npu"):
        pytest.skip(absent)
