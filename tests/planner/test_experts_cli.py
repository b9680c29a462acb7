"""`glm5 plan experts` and the files it reads and writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from runtime.planning.experts import write_json
from tests.cli.cli import Output, glm5
from tests.planner.eplb_reference import power_law_suite

LOAD = power_law_suite(1.01, 7, layers=3, experts=32)


@pytest.fixture
def load_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "load.npy", LOAD)
    return tmp_path / "load.npy"


def call(*words: object) -> Output:
    return glm5("plan", "experts", *words)


def test_json_and_sglang(load_file: Path, tmp_path: Path) -> None:
    words = ("--load", load_file, "--devices", 8, "--nodes", 2, "--slots", 40, "--sglang", tmp_path / "map.json")
    result = call(*words, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert np.array(report["placement"]).shape == (3, 8, 5)
    for key in ("max_over_mean", "bound", "gap", "uneven_split"):
        assert report[key]["mean"] <= report[key]["worst"]
    assert 1 <= report["bound"]["mean"] <= report["max_over_mean"]["mean"] < 1.1
    assert report["uneven_split"]["mean"] <= report["max_over_mean"]["mean"]
    assert report["seconds"] > 0
    document = json.loads((tmp_path / "map.json").read_text())
    assert document == {"physical_to_logical_map": np.array(report["placement"]).reshape(3, 40).tolist()}
    call(*words, "--dense-layers", 2)
    padded = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert padded[2:] == document["physical_to_logical_map"] and padded[0] == [*range(32), *range(8)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    again = json.loads(call(*words, "--json").out)
    assert again["placement"] == report["placement"]


def test_previous(load_file: Path, tmp_path: Path) -> None:
    words = ("--load", load_file, "--devices", 8, "--slots", 40)
    first = call(*words, "--json")
    previous = tmp_path / "previous.json"
    previous.write_text(first.out)
    np.save(load_file, LOAD[:, ::-1])
    for budget in (0, 4):
        report = json.loads(call(*words, "--previous", previous, "--max-moves", budget, "--json").out)
        assert report["moves"]["worst"] <= budget
        assert report["max_over_mean"]["mean"] <= report["previous_max_over_mean"]["mean"]
    assert call(*words, "--previous", previous).code == 2
    assert "--dense-layers is of SGLang's file: add --sglang" in call(*words, "--dense-layers", 0).err
    previous.write_text(first.out[:200])
    for bad in (previous, load_file, tmp_path / "none.json"):
        result = call(*words, "--previous", bad, "--max-moves", 1)
        assert result.code == 2 and result.err.count("\n") == 1


def test_table(load_file: Path) -> None:
    result = call("--load", load_file, "--devices", 8, "--nodes", 2, "--slots", 40)
    assert result.code == 0 and "no placement can beat" in result.out
    result = call("--load", load_file, "--devices", 8, "--sglang", load_file / "map.json")
    assert result.code == 2 and "cannot be written" in result.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--devices", 7, "--slots", 40), "slots 40 % devices 7 = 5, must be 0"),
        (("--devices", 8, "--slots", 24), "slots 24 < experts 32"),
        (("--devices", 2, "--nodes", 4), "devices 2 < nodes 4"),
        (("--devices", 8, "--nodes", 3), "devices 8 % nodes 3 = 2, must be 0"),
    ],
)
def test_refusals(load_file: Path, words: tuple, text: str) -> None:
    result = call("--load", load_file, *words)
    assert result.code == 2 and text in result.err and result.err.count("\n") == 1


def test_bad_load_files(tmp_path: Path) -> None:
    bad = tmp_path / "load.npy"
    contents = [b"", b"text", b"\x93NUMPY\x01\x00"]
    for content in contents:
        bad.write_bytes(content)
        result = call("--load", bad, "--devices", 8)
        assert result.code == 2 and "not a .npy file" in result.err
    for array, text in ((np.full((2, 8), np.nan), "not finite"), (-np.ones((2, 8)), "negative"), (np.ones(8), "shape")):
        np.save(bad, array)
        result = call("--load", bad, "--devices", 8)
        assert result.code == 2 and text in result.err and result.err.count("\n") == 1
    assert "cannot be read" in call("--load", tmp_path / "none.npy", "--devices", 8).err


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json({"bad": object()}, tmp_path / "file.json")
    assert list(tmp_path.iterdir()) == []
