"""A file or a folder is written whole or not at all: the disk fills up, fails, or the process must end."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from foundation.errors import UsageError
from foundation.writing import new_folder, replacing
from runtime.deployment.tensors import TensorReader, TensorWriter
from tests.cli.cli import make_checkpoint, refused

ROOT = Path(__file__).parents[1]
FAILURES = [errno.ENOSPC, errno.EFBIG, errno.EIO]


@contextmanager
def failing(path: Path, code: int) -> Iterator[None]:
    """What is written in the block fails, and that is one line which names `path`."""
    with pytest.raises(UsageError) as raised:
        yield
    assert str(raised.value) == f"{path} cannot be written: {os.strerror(code)}"


@pytest.mark.parametrize("code", FAILURES)
def test_a_file_is_whole_or_as_it_was(tmp_path: Path, code: int) -> None:
    path = tmp_path / "file"
    for before in ((), ("file",)):
        with failing(path, code), replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(code, os.strerror(code))
        assert tuple(p.name for p in tmp_path.iterdir()) == before
        path.write_text("mine")
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", FAILURES)
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_is_whole_or_as_it_was(tmp_path: Path, code: int, replace: bool) -> None:
    path = tmp_path / "a" / "b" / "folder"
    with failing(path, code), new_folder(path, replace) as temporary:
        (temporary / "part").write_text("half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []  # nor the folders above it
    path.mkdir(parents=True)
    with new_folder(path, replace) as temporary:
        (temporary / "part").write_text("whole")
    with failing(path, errno.ENOTEMPTY if not replace else code), new_folder(path, replace) as temporary:
        (temporary / "part").write_text("other")
        if replace:
            raise OSError(code, os.strerror(code))
    assert [p.name for p in path.parent.iterdir()] == ["folder"] and (path / "part").read_text() == "whole"
    if replace:
        with new_folder(path, replace=True) as temporary:
            (temporary / "other").write_text("new")
        assert [p.name for p in path.parent.rglob("*")] == ["folder", "other"]


def test_an_earlier_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "part").write_text("mine")

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with failing(path, errno.EIO), new_folder(path, replace=True):
        monkeypatch.setattr(os, "replace", fails)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "part"]


ENDS = """
import os, sys, threading
from pathlib import Path
from foundation.writing import abandon, new_folder, replacing
folder = Path(sys.argv[1])
with replacing(folder / "done") as temporary:
    temporary.write_text("whole")
with replacing(folder / "file") as file, new_folder(folder / "new" / "folder") as new:
    file.write_text("half")
    (new / "part").write_text("half")
    ending = threading.Thread(target=lambda: (abandon(), os._exit(7)))
    ending.start()
    while True:  # writes on
        (new / "part").write_text("more") if new.exists() else None
"""


def test_what_is_unfinished_is_removed_by_whoever_ends_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == 7
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["done"]


# --- weights of packages -------------------------------------------------------------------------


def write_weights(path: Path) -> np.ndarray:
    array = np.arange(6000, dtype=np.float32).reshape(20, 300)
    with TensorWriter(path, {"a": (array.shape, "float32"), "b": ((3,), "int32")}) as writer:
        writer.put("b", np.arange(3, dtype=np.int32))
        writer.put("a", array)
    return array


def test_room_for_weights_is_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a full disk is an error there; a memory map of a file with holes ends the process by SIGBUS."""
    asked = []

    def full(_: int, offset: int, size: int) -> None:
        asked.append((offset, size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path / "w")
    assert asked[0][0] == 0 and asked[0][1] > 4 * 6000 + 12


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_disk_that_sets_no_room_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(code, "not supported")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    array = write_weights(tmp_path / "w")
    reader = TensorReader(tmp_path / "w")
    np.testing.assert_array_equal(reader.array("a"), array)
    assert reader.array("b").tolist() == [0, 1, 2]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_weights(tmp_path / "v")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# --- every command that writes -------------------------------------------------------------------

LIMITED = """
import json, resource, sys
from tests.cli.cli import glm5
for limit, words in json.loads(sys.argv[1]):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a file grows to so many bytes and no further
    print(json.dumps(glm5(*words)), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""
LOAD = ("--requests", 10, "--isl", 64, "--osl", 8)
WRITERS = {
    "quantize, its config": (100, "quantize", "--formats", "fp8", "--out", "OUT/folder/q"),
    "quantize, a shard": (100_000, "quantize", "--formats", "w8a8", "--out", "OUT/q"),
    "export, a graph": (1_000, "export", "--format", "stablehlo", "--context", 64, "--out", "OUT/p"),
    "export, weights": (100_000, "export", "--format", "onnx", "--context", 64, "--out", "OUT/folder/p"),
    "run, logits": (3_000, "run", "--prompt-ids", "1,2", "--max-tokens", 1, "--dump-logits", "OUT/l.npz"),
    "simulate, a trace": (3_000, "simulate", *LOAD, "--trace", "OUT/t.json"),
    "simulate, a page": (3_000, "simulate", *LOAD, "--html", "OUT/t.html"),
}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "small")
    (tmp_path / "out").mkdir()
    asked = []
    for limit, verb, *words in WRITERS.values():
        model = () if verb == "simulate" else ("--checkpoint", str(tmp_path / "small"))
        asked.append((limit, [verb, *model, *(str(w).replace("OUT", str(tmp_path / "out")) for w in words)]))
    uncached = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", LIMITED, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=uncached, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for (_, words), line in zip(asked, done.stdout.splitlines(), strict=True):
        code, out, err = json.loads(line)
        assert (code, err) == (2, f"glm5: {words[-1]} cannot be written: File too large\n"), words
        assert not out or words[0] == "run", words  # which prints tokens as they come
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "runtime.cli.main", "profiles", "list"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "glm5: the output cannot be written: No space left on device\n")


def test_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    name = tmp_path / ("n" * 300)
    for words in (("quantize", "--formats", "fp8"), ("export", "--format", "onnx")):
        assert refused(*words, "--out", name) == f"{name} cannot be written: File name too long"
    assert list(tmp_path.iterdir()) == []
