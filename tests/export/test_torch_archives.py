"""`.pt2` archives from a stranger: what torch would run of them is refused before torch sees it."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from backends.errors import ArtifactError
from backends.toolchains import torch as torch_target
from runtime.deployment.manifest import Step, Value
from runtime.execution.package.torch import TorchExecutor
from tests.export.damage import damaged
from tests.export.test_targets import graph_of

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
CONSTANTS, CONSTANT = "data/constants/model_constants_config.json", "data/constants/tensor_0"
STEP = Step("graph", (Value("x", (2, 3), "float32"),), (Value("y", (2, 3), "float32"),))
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
HELD = np.asarray([[1, 2, 4]], np.float32)

Entries = dict[str, bytes]


@pytest.fixture(scope="module")
def honest() -> Entries:
    """The entries of an archive of our own: sin(x) * [1, 2, 4] + 1."""
    written = torch_target.write(graph_of(lambda x: jnp.sin(x) * HELD + 1, X))
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def save(path: Path, entries: Entries, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def run(path: Path, trusted: bool = False) -> np.ndarray:
    call = TorchExecutor(trusted=trusted).load(path, STEP).bind({})
    return call({"x": torch.from_numpy(X.copy())})["y"].numpy()


def test_an_archive_of_ours_opens_and_computes(honest: Entries, tmp_path: Path) -> None:
    path = save(tmp_path / "own.pt2", honest)
    for trusted in (False, True):
        np.testing.assert_allclose(run(path, trusted), np.sin(X) * HELD + 1, rtol=1e-6)


class Opens:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "ran")


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Opens(marker), buffer)
    return buffer.getvalue()


def edited(entries: Entries, name: str, edit: Callable[[Any], None]) -> Entries:
    document = json.loads(entries[name])
    edit(document)
    return {**entries, name: json.dumps(document).encode()}


def code(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).write_text('ran')"


# --- what runs in torch, and so must not be handed to it -----------------------------------------


def sample_inputs(entries: Entries, marker: Path) -> Entries:
    return {**entries, SAMPLES: pickled(marker)}


def pickled_constant(entries: Entries, marker: Path) -> Entries:
    made = edited(entries, CONSTANTS, lambda d: d["config"]["lifted_tensor_0"].update(use_pickle=True))
    return {**made, CONSTANT: pickled(marker)}


def opaque_constant(entries: Entries, marker: Path) -> Entries:
    import pickle

    def edit(document: Any) -> None:
        document["config"]["lifted_tensor_0"] |= {"path_name": "opaque_obj_0", "use_pickle": True, "tensor_meta": None}

    made = edited(entries, CONSTANTS, edit)
    return {**made, "data/constants/opaque_obj_0": pickle.dumps(Opens(marker))}


def old_weights(entries: Entries, marker: Path) -> Entries:
    return {**entries, "data/weights/model.pt": pickled(marker)}


def pickled_weight(entries: Entries, marker: Path) -> Entries:
    config = {"config": {"w": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}}
    config_file = "data/weights/model_weights_config.json"
    return {**entries, config_file: json.dumps(config).encode(), "data/weights/weight_0": pickled(marker)}


def symbolic_size(entries: Entries, marker: Path) -> Entries:
    def edit(document: Any) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        values["inputs_0"]["sizes"][0] = {"as_expr": {"expr_str": code(marker), "hint": {"as_int": 2}}}

    return edited(entries, PROGRAM, edit)


def symbol(entries: Entries, marker: Path) -> Entries:
    def edit(document: Any) -> None:
        expression = {"as_expr": {"expr_str": code(marker), "hint": {"as_int": 2}}}
        document["graph_module"]["graph"]["sym_int_values"]["s0"] = expression

    return edited(entries, PROGRAM, edit)


def operator_of_torch(entries: Entries, marker: Path) -> Entries:
    """`torch.load` as a node of the graph, of a file beside the package."""
    return edited(entries, PROGRAM, lambda d: d["graph_module"]["graph"]["nodes"][2].update(target="torch.load"))


def operator_that_writes(entries: Entries, marker: Path) -> Entries:
    """ATen's own operator of file access: it makes the file."""

    def edit(document: Any) -> None:
        def string(name: str, **arg: Any) -> Any:
            return {"name": name, "arg": arg, "kind": 1}

        node = document["graph_module"]["graph"]["nodes"][2]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [
            string("filename", as_string=str(marker)),
            string("shared", as_bool=True),
            string("size", as_int=6),
        ]

    return edited(entries, PROGRAM, edit)


def name_of_an_argument(entries: Entries, marker: Path) -> Entries:
    """Pasted into the source of the module's `forward`."""

    def edit(document: Any) -> None:
        call = document["graph_module"]["module_call_graph"][0]["signature"]
        call["forward_arg_names"] = [f"x={code(marker)}"]

    return edited(entries, PROGRAM, edit)


def name_of_a_constant(entries: Entries, marker: Path) -> Entries:
    """Pasted into the source as `getattr(self, "NAME")`."""
    name = f'a"), {code(marker)}, ("'

    def rename(document: Any) -> None:
        for spec in document["graph_module"]["signature"]["input_specs"]:
            if "tensor_constant" in spec:
                spec["tensor_constant"]["tensor_constant_name"] = name

    made = edited(entries, PROGRAM, rename)
    return edited(made, CONSTANTS, lambda d: d["config"].update({name: d["config"].pop("lifted_tensor_0")}))


def keyword_of_an_operator(entries: Entries, marker: Path) -> Entries:
    """Pasted into the source as `operator(x, NAME = value)`."""

    def edit(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][2]["inputs"].append(
            {"name": f"out={code(marker)}, x", "arg": {"as_int": 1}, "kind": 2}
        )

    return edited(entries, PROGRAM, edit)


def guard(entries: Entries, marker: Path) -> Entries:
    return edited(entries, PROGRAM, lambda d: d.update(guards_code=[code(marker)]))


def tree_of_arguments(entries: Entries, marker: Path) -> Entries:
    """torch imports the module that a defaultdict's factory is in."""
    factory = {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []}
    tree = [1, {"type": "collections.defaultdict", "context": json.dumps(factory), "children_spec": []}]

    def edit(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(tree)

    return edited(entries, PROGRAM, edit)


def compiled(entries: Entries, marker: Path) -> Entries:
    return {**entries, "data/aotinductor/model/model.so": b"\x7fELF"}


def another_program(entries: Entries, marker: Path) -> Entries:
    return {**entries, "models/other.json": entries[PROGRAM]}


ATTACKS = {
    sample_inputs: "data/sample_inputs/model.pt",
    pickled_constant: "use_pickle",
    opaque_constant: "opaque_obj_0",
    old_weights: "data/weights/model.pt",
    pickled_weight: "weight_0",
    symbolic_size: "sizes[0]: is no number",
    symbol: "sym_int_values.s0",
    operator_of_torch: "'torch.load' is no operator",
    operator_that_writes: "'torch.ops.aten.from_file.default' is no operator",
    name_of_an_argument: "forward_arg_names[0]",
    name_of_a_constant: "is no name of a constant",
    keyword_of_an_operator: "is no plain name",
    guard: "guards_code",
    tree_of_arguments: "in_spec: is not a flat list",
    compiled: "model.so",
    another_program: "models/other.json",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_may_run_is_refused(honest: Entries, tmp_path: Path, attack: Any) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "evil.pt2", attack(copy.deepcopy(honest), marker))
    with pytest.raises(ArtifactError) as caught:
        run(path)
    message = str(caught.value)
    assert str(path) in message and ATTACKS[attack] in message and "--trust-package" in message, message
    assert "\n" not in message and not marker.exists()


@pytest.mark.parametrize(
    "attack", [sample_inputs, pickled_constant, opaque_constant, symbolic_size], ids=lambda attack: attack.__name__
)
def test_the_attacks_are_real(honest: Entries, tmp_path: Path, attack: Any) -> None:
    """What is refused does run where the package is trusted: the tests above prove something."""
    marker = tmp_path / "marker"
    try:
        run(save(tmp_path / "evil.pt2", attack(copy.deepcopy(honest), marker)), trusted=True)
    except ArtifactError as error:
        assert "\n" not in str(error)
    assert marker.exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path, entries: path.write_bytes(b""), "no .pt2 archive"),
        (lambda path, entries: path.write_bytes(save(path, entries).read_bytes()[:-40]), "no .pt2 archive"),
        (lambda path, entries: save(path, entries, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path, entries: save(path, {**entries, PROGRAM: b"[" * 10**6}), "nested too deep"),
        (lambda path, entries: save(path, {**entries, PROGRAM: b"{}"}), "missing field"),
        (lambda path, entries: save(path, {**entries, PROGRAM: b"\xff"}), "no JSON"),
        (lambda path, entries: save(path, {**entries, CONSTANT: b"abc"}), "3 bytes, not those of its type and shape"),
        (lambda path, entries: save(path, {**entries, "../../x": b""}), "'../../x'"),
        (lambda path, entries: save(path, {k: v for k, v in entries.items() if k != PROGRAM}), f"lacks {PROGRAM}"),
    ],
)
def test_damage_is_one_line(honest: Entries, tmp_path: Path, damage: Any, complaint: str) -> None:
    path = tmp_path / "damaged.pt2"
    damage(path, honest)
    with pytest.raises(ArtifactError) as caught:
        run(path)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_an_entry_that_is_there_twice(honest: Entries, tmp_path: Path) -> None:
    """One reader would take the first, another the last."""
    path = save(tmp_path / "twice.pt2", honest)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"archive/{PROGRAM}", b"{}")
    with pytest.raises(ArtifactError, match="an entry twice"):
        run(path)


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """A megabyte that is two hundred when it is read: each entry holds all that come after it."""
    data, central = bytes(1 << 20), b""
    names = [b"archive/%03d" % number for number in range(200)]
    heads = len(names) * (30 + len(names[0]))
    for number, name in enumerate(reversed(names)):
        at = heads - (number + 1) * (30 + len(name))
        sizes = struct.pack("<3I2H", zlib.crc32(data), len(data), len(data), len(name), 0)
        data = b"PK\3\4" + struct.pack("<5H", 10, 0, 0, 0, 33) + sizes + name + data
        head = struct.pack("<6H", 10, 10, 0, 0, 0, 33) + sizes + struct.pack("<3H2I", 0, 0, 0, 0, at)
        central = b"PK\1\2" + head + name + central
    end = struct.pack("<4H2IH", 0, 0, len(names), len(names), len(central), len(data), 0)
    path = tmp_path / "bomb.pt2"
    path.write_bytes(data + central + b"PK\5\6" + end)
    with zipfile.ZipFile(path) as archive:
        assert sum(each.file_size for each in archive.infolist()) > 200 << 20 and archive.read("archive/199")
    with pytest.raises(ArtifactError, match="larger than the file"):
        run(path)


def test_mutations_are_refused_or_run(honest: Entries, tmp_path: Path) -> None:
    """Values of the program changed at random, by seed: a result, or one line."""
    rng = np.random.default_rng(0)
    values = [-1, 0, 2**31, 2**63, 10**30, 1.5, "x", "", None, True, [], {}, {"as_int": 3}, "a b", "import"]
    outcomes = set()
    for number in range(40):
        document = damaged(honest[PROGRAM], values, rng, 0.02)
        path = save(tmp_path / f"{number}.pt2", {**honest, PROGRAM: document.encode()})
        try:
            run(path)
            outcomes.add("ran")
        except ArtifactError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes.add("refused")
    assert outcomes == {"ran", "refused"}
