"""Op lists of a family of layouts, substituted, equal fresh traces of each layout, at sizes nobody fitted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foundation.errors import UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.pricing.oplist import Sizes, TracedOp
from runtime.pricing.trace import PAGE_SIZE, _fit, _flatten, _Point, _Tracer, trace

MODELS = ("glm-5.2", "deepseek-v3", "glm-4.5")
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def shapes(op: TracedOp) -> list[Any]:
    return [(x.element_bytes, x.weight) for x in (*op.inputs, *op.outputs)]


@settings(max_examples=3)
@given(
    model=st.sampled_from(MODELS),
    tp=POWERS,
    dp=POWERS,
    by_expert=st.booleans(),
    phase=st.sampled_from(("prefill", "decode")),
    sparse=st.booleans(),
    b=st.integers(2, 200),
    t=st.integers(2, 3000),
    p=st.integers(1, 400),
)
def test_a_substituted_list_is_a_fresh_trace(
    model: str, tp: int, dp: int, by_expert: bool, phase: Any, sparse: bool, b: int, t: int, p: int
) -> None:
    cfg, layout = load_config(model), Layout(tp=tp, dp=dp, ep=tp * dp if by_expert else 1)
    try:
        layout.check(cfg)
    except UsageError:
        assume(False)
    sparse = sparse and cfg.indexer is not None
    if cfg.indexer:
        limit = cfg.indexer.topk // PAGE_SIZE
        p = p + limit + 1 if sparse else 1 + p % limit
    sizes = Sizes(b, 1 if phase == "decode" else t, p)
    found = trace(cfg, layout, phase, sparse)
    tracer = _Tracer(cfg, layout, phase, sparse)
    programs: list[Any] = [*found.layers.items(), ("embed", found.embed), ("head", found.head)]
    for what, program in [*programs, *([("mtp", found.mtp)] if found.mtp else [])]:
        fresh = list(_flatten(tracer.program(what)(sizes)))
        assert len(fresh) == len(program.ops)
        for op, new in zip(program.ops, fresh, strict=True):
            assert (op.name, op.stage, op.axes, dict(op.attributes)) == (
                new.name,
                new.stage,
                new.axes,
                dict(new.attributes),
            )
            assert shapes(op) == shapes(new)
            for held, other in zip((*op.inputs, *op.outputs), (*new.inputs, *new.outputs), strict=True):
                assert list(held.at(sizes)) == list(other.shape), (program.name, op.name)


@given(
    coefficient=st.integers(1, 200_000),
    b=st.integers(0, 2),
    t=st.integers(0, 2),
    p=st.integers(0, 2),
    i=st.integers(-1, 1),
    j=st.integers(-1, 1),
)
def test_a_monomial_is_found_again(coefficient: int, b: int, t: int, p: int, i: int, j: int) -> None:
    """At the points that a sparse model's decode is traced at, the fit is the only one."""
    points = (
        _Point(Sizes(3, 1, 3), (2, 2, 1)),
        _Point(Sizes(11, 5, 5), (4, 2, 1)),
        _Point(Sizes(13, 1, 3), (2, 4, 1)),
    )
    whole = coefficient * 16  # divides by every degree
    values = tuple(
        int(whole * x.sizes.b**b * x.sizes.t**t * x.sizes.p**p * x.degrees[0] ** float(i) * x.degrees[1] ** float(j))
        for x in points
    )
    found = _fit(values, points)
    assert (found.dim.b, found.dim.t, found.dim.p, found.tp, found.dp) == (b, t, p, i, j)
    assert found.dim.coefficient == whole


def test_what_is_no_monomial_is_an_error() -> None:
    points = (_Point(Sizes(3, 1, 3), (1, 1, 1)), _Point(Sizes(11, 5, 5), (1, 1, 1)))
    with pytest.raises(AssertionError, match="no monomial"):
        _fit((4, 12), points)  # 1 + sequences


def test_drafts_are_traced_only_where_they_are_asked_for() -> None:
    cfg = load_config("glm-5")
    assert trace(cfg, Layout(), "decode", mtp=False).mtp is None
    assert trace(cfg, Layout(), "decode").mtp is not None
