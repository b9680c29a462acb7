"""Checks with torch_npu, which is looked for when the first test marked `npu` is run (`make test-npu`)."""

import os

import pytest

from tests.npu import vendor

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else `import torch` imports torch_npu too early


@pytest.fixture(autouse=True)
def npu(request: pytest.FixtureRequest) -> None:
    """torch_npu is imported before anything declares its operators, by whichever test is first."""
    reason = vendor.reason_absent()
    if reason and request.node.get_closest_marker("npu"):
        pytest.skip(reason)
