"""The adapter between dataclasses and documents: what is written is read; what is not is refused, in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from backends.errors import ArtifactError
from foundation.errors import Failure, UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.document import Fault, place, schema, to_json, validated
from runtime.deployment.errors import PlanFileError
from runtime.deployment.ledger import Ledger
from runtime.deployment.manifest import Manifest
from runtime.deployment.plan import Alternative, Plan, Predicted, Rejected, Route, Transfer
from runtime.training.config import OptimizerConfig, TrainingStage
from tests.export.test_manifest import MANIFEST
from tests.plans import formats, plan_for

Keys = tuple[str | int, ...]


class Refused(Failure):
    """The error of these tests."""


# --- every class is read as it was written -------------------------------------------------------


def classes(kind: Any) -> Iterator[type]:
    """The dataclasses of a type, itself included."""
    if dataclasses.is_dataclass(kind):
        yield typing.cast(type, kind)
        for hint in hints(kind).values():
            yield from classes(hint)
    for argument in get_args(kind):
        yield from classes(argument)


def hints(kind: Any) -> dict[str, Any]:
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


PLAIN: Mapping[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats(-1e15, 1e15) | st.integers(-1000, 1000),
    str: st.text(max_size=5),
    bool: st.booleans(),
    Layout: st.sampled_from([Layout(), Layout(tp=2, dp=4, ep=8, pp=2)]),
    type(None): st.none(),
}
ANY = st.recursive(st.one_of(*(PLAIN[kind] for kind in (int, float, str, bool))), st.lists, max_leaves=3)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type that a document may hold."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return ANY
    if kind in PLAIN:
        return PLAIN[kind]
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{name: values(hint) for name, hint in hints(kind).items()})
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    return st.dictionaries(st.text(max_size=5), values(arguments[1]), max_size=2)


CLASSES = sorted({*classes(Plan), *classes(Manifest), OptimizerConfig, TrainingStage}, key=lambda kind: kind.__name__)


def test_the_classes_are_those_of_the_documents() -> None:
    assert {Plan, Ledger, Layout, Predicted, Transfer, Alternative, Rejected, Manifest} <= set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=10)
@given(data=st.data())
def test_what_is_read_is_what_was_written(kind: type, data: st.DataObject) -> None:
    value = data.draw(values(kind))
    written = json.loads(json.dumps(to_json(value)))
    assert validated(kind, written, Refused, "file", complete=True) == value
    assert validated(kind, written, Refused, "file") == value


# --- a change anywhere is refused with its place, or is what is read -----------------------------


@cache
def plan_text() -> str:
    """A plan with all that a plan can hold."""
    cfg, profile = load_config("glm-4.7-flash"), hw_profiles.load("h100-sxm")
    made = plan_for(cfg, Layout(tp=2, dp=2, ep=4), profile, formats("bf16"))
    times: Mapping[str, float | None] = {"mean": 3.0, "p50": 2.5, "p90": None}
    priced = Predicted(8, None, 1.0, 10.0, 2.5, None, times, times, times, {"tpot_ms": (1.0, 2.0)}, "assumed",
                       0.0, 0.5, 80, "memory", "attention", True)  # fmt: skip
    other = Alternative("a", 4, 8, True, False, True, 2.0, 3.0, 4.0, 5.0, False, "fitted")
    transfer = Transfer(1.0, 2e9, 1e-5, 0.0, 8192.0, 0.1, (Route(0, 1, 1.0),))
    full = dataclasses.replace(
        made, predicted=priced, alternatives=(other,), rejected=(Rejected("b", "c"),), transfer=transfer
    )
    return json.dumps(to_json(full))


def places(document: Any, path: Keys = ()) -> Iterator[Keys]:
    """Every place below the top."""
    if not isinstance(document, dict | list):
        return
    for key, item in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        yield from places(item, (*path, key))


def at(document: Any, path: Keys) -> Any:
    for key in path:
        document = document[key]
    return document


OTHER = (None, True, 3, -1, 2.5, "x", [], {}, [1, 2, 3], {"a": 1}, [{}], 1e300, "serve")


def changed(draw: Any, document: Any, found: list[Keys]) -> Keys:
    """Changes a document at one place, which is returned."""
    path = draw(st.sampled_from(found))
    holder, key = at(document, path[:-1]), path[-1]
    match draw(st.sampled_from(("delete", "add", "replace"))):
        case "delete":
            del holder[key]
            return path if isinstance(holder, dict) else path[:-1]
        case "add" if isinstance(holder, dict):
            holder["surprise"] = draw(st.sampled_from(OTHER))
            return (*path[:-1], "surprise")
        case "add":
            holder.append(draw(st.sampled_from(OTHER)))
            return path[:-1]
    holder[key] = draw(st.sampled_from(OTHER).filter(lambda other: repr(other) != repr(holder[key])))
    return path


def without_derived(document: Any) -> Any:
    """A document without what is written beside the fields."""
    if isinstance(document, dict):
        return {key: without_derived(item) for key, item in document.items() if key not in Ledger.DERIVED}
    return [without_derived(item) for item in document] if isinstance(document, list) else document


PLACES: dict[str, list[Keys]] = {}


@given(data=st.data())
def test_a_plan_changed_anywhere(data: st.DataObject) -> None:
    document = json.loads(plan_text())
    found = PLACES.setdefault("plan", list(places(document)))
    path = changed(data.draw, document, found)
    try:
        read = validated(Plan, document, PlanFileError, "plan.json", complete=True)
    except PlanFileError as error:
        message = str(error)
        assert message.startswith("plan.json: ") and "\n" not in message and len(message) < 300
        assert "pydantic" not in message and "Input" not in message
        # what a layout refuses itself names the degree alone
        assert place(path) in message or ("layout" in path and f"{path[-1]} must be" in message or "ep must" in message)
    else:
        assert without_derived(to_json(read)) == without_derived(document)


@given(data=st.data())
def test_a_manifest_changed_anywhere(data: st.DataObject) -> None:
    document = json.loads(MANIFEST.to_json())
    path = changed(data.draw, document, PLACES.setdefault("manifest", list(places(document))))
    try:
        read = Manifest.from_json(json.dumps(document), "DIR/manifest.json")
    except ArtifactError as error:
        message = str(error)
        assert message.startswith("DIR/manifest.json: ") and "\n" not in message and len(message) < 300
        if path != ("schema_version",):
            parent, name = place(("manifest", *path[:-1])), path[-1] if path else ""
            assert place(("manifest", *path)) in message or (parent in message and f"`{name}`" in message)
    else:
        again, holder = json.loads(read.to_json()), at(document, path[:-1])
        if isinstance(holder, dict) and path[-1] not in holder:  # deleted: a default may stand in
            at(again, path[:-1]).pop(path[-1], None)
        assert again == document


# --- the words -----------------------------------------------------------------------------------

DEVICE, LEDGER = ("pools", 0, "devices", 3), ("pools", 0, "devices", 3, "ledger")
ABSENT = object()


@pytest.mark.parametrize(
    ("path", "new", "said"),
    [
        ((*LEDGER, "kv_bytes"), "x", "pools[0].devices[3].ledger.kv_bytes: must be a number, not 'x'"),
        ((*LEDGER, "kv_bytes"), True, "pools[0].devices[3].ledger.kv_bytes: must be a number, not True"),
        ((*LEDGER, "kv_bytes"), float("nan"), "pools[0].devices[3].ledger.kv_bytes: must be a finite number, not nan"),
        ((*LEDGER, "kv_bytes"), 10**400, "pools[0].devices[3].ledger.kv_bytes: must be a finite number, not 100"),
        ((*LEDGER, "kv_bytes"), ABSENT, "pools[0].devices[3].ledger.kv_bytes: missing field"),
        ((*LEDGER, "free_bytes"), ABSENT, "pools[0].devices[3].ledger.free_bytes: missing field"),
        ((*LEDGER, "fee_bytes"), 1.0, "pools[0].devices[3].ledger.fee_bytes: unknown field"),
        ((*LEDGER, "weights_bytes", "a\nb"), "x", "ledger.weights_bytes.'a\\nb': must be a number, not 'x'"),
        ((*DEVICE, "ledger"), [], "pools[0].devices[3].ledger: must be an object, not []"),
        ((*DEVICE, "layers"), [1, 2, 3], "pools[0].devices[3].layers: must hold 2 values, not [1, 2, 3]"),
        ((*DEVICE, "layers"), [1], "pools[0].devices[3].layers: must hold 2 values, not [1]"),
        ((*DEVICE, "layers"), [1, 2.0], "pools[0].devices[3].layers[1]: must be int, not 2.0"),
        ((*DEVICE, "index"), True, "pools[0].devices[3].index: must be int, not True"),
        (("pools", 0, "role"), "idle", "pools[0].role: must be one of serve, prefill, decode, not 'idle'"),
        (("pools", 0, "role"), "x" * 99, f"serve, prefill, decode, not '{'x' * 56}..."),
        (("pools", 0, "scheme"), 3, "pools[0].scheme: must be text, not 3"),
        (("pools", 0, "layout", "tp"), 0, "plan.json: tp must be at least 1, not 0"),
        (("pools", 0, "drafts"), ABSENT, "pools[0].drafts: missing field"),
        (("predicted", "meets_targets"), 1, "predicted.meets_targets: must be true or false, not 1"),
        (("predicted", "band"), [], "predicted.band: must be an object, not []"),
        (("pools",), {}, "plan.json: pools: must be a list, not {}"),
        (("kv",), ABSENT, "plan.json: kv: missing field"),
        (("kvs",), [], "plan.json: kvs: unknown field"),
        (("pools", 0, "settings", "a"), json.loads("[" * 300 + "]" * 300), "plan.json: nested too deep"),
        (("pools", 0, "settings", "a"), "\ud800", "plan.json: nested too deep, or not all of it Unicode"),
    ],
)  # fmt: skip
def test_a_fault_is_named(path: Keys, new: Any, said: str) -> None:
    document = json.loads(plan_text())
    if new is ABSENT:
        del at(document, path[:-1])[path[-1]]
    else:
        at(document, path[:-1])[path[-1]] = new
    with pytest.raises(PlanFileError) as caught:
        validated(Plan, document, PlanFileError, "plan.json", complete=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_object_at_all() -> None:
    for document in (None, 3, [], "x"):
        with pytest.raises(Refused, match=r"^file: must be an object, not "):
            validated(Plan, document, Refused, "file")


def test_a_derived_value_is_not_read() -> None:
    document = json.loads(plan_text())
    expected = validated(Plan, copy.deepcopy(document), Refused, "file")
    at(document, LEDGER)["free_bytes"] = -1.0
    assert validated(Plan, document, Refused, "file", complete=True) == expected


def test_a_default_stands_in_unless_all_is_asked_for() -> None:
    assert validated(OptimizerConfig, {}, Refused, "file") == OptimizerConfig()
    with pytest.raises(Refused, match=r"^file: name: missing field$"):
        validated(OptimizerConfig, {}, Refused, "file", complete=True)


def test_a_reader_has_its_own_words() -> None:
    def say(where: str, fault: Fault) -> str:
        return f"{where} {fault.missing} {fault.unknown} {fault.known[:2]} {fault.choices}"

    for document, said in (
        ({"attention": "dense"}, "f ('steps', 'rows', 'length') () () ()"),
        ({"step": 1, "rows": 2}, "f () ('step',) ('attention', 'steps') ()"),
        (
            {"attention": "a", "steps": 1, "rows": 1, "length": 1},
            "f () () () ('dense', 'warmup', 'sparse')",
        ),
    ):
        with pytest.raises(Refused) as caught:
            validated(TrainingStage, document, Refused, "f", say=say)
        assert str(caught.value) == said


def test_what_a_class_refuses_keeps_its_own_error() -> None:
    with pytest.raises(UsageError, match=r"^tp must be at least 1, not 0$"):
        validated(Layout, {"tp": 0}, UsageError, "file")


# --- beside them ---------------------------------------------------------------------------------


def test_the_schema_describes_every_class() -> None:
    found = schema(Plan)
    assert {kind.__name__ for kind in classes(Plan)} == set(found["$defs"]) and found["$ref"] == "#/$defs/Plan"
    for name, described in found["$defs"].items():
        assert described["description"] and described["additionalProperties"] is False, name
        assert described["required"] == list(described["properties"]), name
    assert found["$defs"]["Ledger"]["properties"]["free_bytes"] == {"type": "number"}


def test_pydantic_is_imported_with_the_first_document_only() -> None:
    """The command line's own library imports it for some commands; that is not ours to choose."""
    script = """
import sys
import runtime.cli.main, runtime.deployment.manifest, runtime.training.config
from runtime.deployment.engines import load
print("pydantic" in sys.modules)
load("sglang")
print("pydantic" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
