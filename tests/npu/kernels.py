"""What `run.py --kernels` imports in tests: the references, beside torch_npu's own registrations where it is there."""

from tests.npu import references, vendor


def register() -> None:
    vendor.reason_absent()
    references.register()
