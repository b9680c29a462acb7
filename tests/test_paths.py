"""What a file names stays inside its folder: paths, links, and checkpoints in the layout of Hugging Face's cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from foundation.paths import Outside, inside
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.errors import ModelError
from model.hf_config import from_hf
from model.tokenizer import Tokenizer
from tests.cli.cli import glm5, make_checkpoint
from tests.model.oracle import CASES, random_weights

INDEX = "model.safetensors.index.json"
RAW = {"model_type": "glm_moe_dsa", **CASES["glm_moe_dsa"].fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "file").write_text("x")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", ["sub/file", "./sub/file", "sub//file", "link", "through/file"])
def test_inside(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("sub/file")
    (folder / "through").symlink_to(folder / "sub")
    assert inside(folder, name).read_text() == "x"


@pytest.mark.parametrize(
    "name",
    ["../secret", "sub/../../secret", "sub/../sub/file", "/etc/passwd", "", "C:/secret", "..\\secret", "a\0b", "a\nb",
     "x" * 5000, 3, None, ["sub/file"], "out", "out/secret", "up/secret", "~/secret", "nowhere", "sub", ".",
     "sub/file/x", "pipe", "circle", "hard/../../secret"],
)  # fmt: skip
def test_not_inside(folder: Path, name: object) -> None:
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    with pytest.raises(Outside) as caught:
        inside(folder, name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A checkpoint in shards as the cache holds it: every file a link to a blob."""
    save(tmp_path / "ck", RAW, random_weights(from_hf(RAW)), shard_bytes=100_000)
    repository = tmp_path / "hub" / "models--zai-org--GLM"
    place = repository / "snapshots" / "abc"
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "ck").iterdir())):
        shutil.move(file, repository / "blobs" / f"hash{number}")
        (place / file.name).symlink_to(f"../../blobs/hash{number}")
    return place


def test_the_cache_of_hugging_face(snapshot: Path, tmp_path: Path) -> None:
    assert Checkpoint(snapshot).tensor_names
    (tmp_path / "mine").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "mine").tensor_names


def refused(path: Path, *mentions: str) -> None:
    with pytest.raises(ModelError) as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value) and all(each in str(caught.value) for each in mentions), str(caught.value)


def test_links_to_another_repository(snapshot: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--other" / "blobs"
    other.mkdir(parents=True)
    name = "config.json"
    shutil.copyfile(snapshot / name, other / "hash")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(other / "hash")
    refused(snapshot, name, "a link that leads out of the folder")


@pytest.mark.parametrize("spelt", ["../shard", "sub/../../shard", "ABSOLUTE", "link"])
def test_a_shard_outside(tmp_path: Path, spelt: str) -> None:
    save(tmp_path / "ck", RAW, random_weights(from_hf(RAW)), shard_bytes=100_000)
    index = json.loads((tmp_path / "ck" / INDEX).read_text())
    name = min(index["weight_map"].values())
    shutil.move(tmp_path / "ck" / name, tmp_path / "shard")
    (tmp_path / "ck" / "link").symlink_to("../shard")
    new = str(tmp_path / "shard") if spelt == "ABSOLUTE" else spelt
    index["weight_map"] = {key: new if value == name else value for key, value in index["weight_map"].items()}
    (tmp_path / "ck" / INDEX).write_text(json.dumps(index))
    refused(tmp_path / "ck", INDEX, "weight_map", repr(new))


def test_a_single_file_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    save(tmp_path / "ck", RAW, random_weights(from_hf(RAW)))
    shard = tmp_path / "ck" / "model.safetensors"
    shutil.move(shard, tmp_path / "shard")
    shard.symlink_to("../shard")
    refused(tmp_path / "ck", str(shard), "a link that leads out of the folder")
    shard.unlink()
    os.mkfifo(shard)
    refused(tmp_path / "ck", str(shard), "no regular file")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_words_and_settings_outside(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "ck")
    file = tmp_path / "ck" / name
    if file.exists():
        shutil.move(file, tmp_path / "moved")
    else:
        (tmp_path / "moved").write_text("{}")
    file.symlink_to("../moved")
    with pytest.raises(ModelError, match="a link that leads out of the folder"):
        Checkpoint(tmp_path / "ck")
        Tokenizer.load(tmp_path / "ck")


def test_nothing_outside_is_copied(tmp_path: Path) -> None:
    """What quantize takes over from a checkpoint may be a link, too."""
    make_checkpoint(tmp_path / "ck")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "ck" / "notes.txt").symlink_to("../secret")
    code, out, err = glm5("quantize", "--checkpoint", tmp_path / "ck", "--formats", "fp8", "--out", tmp_path / "out")
    assert code == 2 and "notes.txt: a link that leads out of the folder" in err, (out, err)
    assert not (tmp_path / "out").exists()
