"""The recorded operators are those of torch_npu."""

from importlib.metadata import version

import pytest

from backends.ascend.operators import NpuOperator, npu_release
from model.ops import OPS
from tests.npu import vendor
from tools import docs_ascend

torch = pytest.importorskip("torch")
OPERATORS = list(npu_release().operators.values())


@pytest.mark.npu
def test_the_record_is_of_the_release_that_is_checked_with():
    assert npu_release().version == version("torch_npu").partition("+")[0]


@pytest.mark.npu
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: each.name)
def test_a_recorded_schema_is_the_registered_one_and_has_a_meta_kernel(operator: NpuOperator):
    assert str(getattr(vendor.operators(), operator.name).default._schema) == operator.schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{operator.name}", "Meta")


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: each.name)
def test_a_recorded_schema_can_be_declared(operator: NpuOperator):
    parsed = torch._C.parse_schema(operator.schema)
    assert parsed.name == f"npu::{operator.name}" and str(parsed) == operator.schema
    assert set(operator.ops) <= OPS.keys()


def test_the_documents_table_is_the_record():
    page = docs_ascend.PAGE.read_text(encoding="utf-8")
    assert page == docs_ascend.render(page), "run `python -m tools.docs_ascend`"
