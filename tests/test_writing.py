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
from foundation.writing import new_folder, replacing, replacing_together, require_writable
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


# --- a process that is killed ------------------------------------------------------------------------

WRITES = """
import sys
from pathlib import Path
from foundation.writing import new_folder, replacing
kind, path = sys.argv[1], Path(sys.argv[2])
with {"file": replacing, "folder": new_folder, "replaced": lambda p: new_folder(p, replace=True)}[kind](path) as made:
    (made if kind == "file" else made / "part").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(kind: str, path: Path, script: str = WRITES) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to write `path`, and waits for its standard input to end."""
    command = [sys.executable, "-c", script, kind, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def write_as(kind: str, path: Path) -> None:
    if kind == "file":
        with replacing(path) as temporary:
            temporary.write_text("whole")
        return
    with new_folder(path, replace=kind == "replaced") as temporary:
        (temporary / "part").write_text("whole")


@pytest.mark.parametrize("kind", ["file", "folder", "replaced"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    """And nothing else is: what a process that lives is writing, another file's, or a name that only looks alike."""
    path = tmp_path / "out"
    with another(kind, path) as killed, another(kind, tmp_path / "out.other") as others:
        killed.kill()
        killed.wait()
        others.kill()
        others.wait()
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 2 and all(name.endswith("glm5-tmp") for name in left)
    users = {".out.123.glm5-tmp", ".out.tmp", f".out.{os.getpid()}-mine.glm5-tmp"}
    for name in users:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.7-01234567.glm5-tmp").symlink_to(tmp_path / "elsewhere")
    with another(kind, path) as live:
        theirs = {p.name for p in tmp_path.iterdir() if f".out.{live.pid}-" in p.name}
        assert len(theirs) == 1
        write_as(kind, path)
        kept = {name for name in left if ".out.other." in name} | users | {"out", ".out.7-01234567.glm5-tmp"}
        assert {p.name for p in tmp_path.iterdir()} == kept | theirs
        if kind != "folder":  # which may not take a name that is there
            live.communicate()
            assert live.returncode == 0 and {p.name for p in tmp_path.iterdir()} == kept
    assert (path if kind == "file" else path / "part").read_text() == ("whole" if kind == "folder" else "half")


def test_a_number_that_another_process_has_now_saves_nothing(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getpid()}-0123abcd.glm5-tmp").mkdir()  # a dead process had the number that this one has
    write_as("folder", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


ASIDE = """
import os, sys
from pathlib import Path
from foundation.writing import new_folder
rename = os.rename
def put_aside(*paths):
    rename(*paths)
    print("writing", flush=True)
    sys.stdin.read()
os.rename = put_aside
with new_folder(Path(sys.argv[2]), replace=True):
    pass
"""


def test_a_folder_that_a_killed_process_had_put_aside_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_as("folder", path)
    with another("replaced", path, ASIDE) as killed:
        assert not path.exists()
        killed.kill()
        killed.wait()
    with pytest.raises(KeyError), new_folder(path, replace=True):
        assert (path / "part").read_text() == "whole"
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (path / "part").read_text() == "whole"


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is written to; what was left there stays, since nobody can tell whose it is."""
    left = tmp_path / ".out.7-01234567.glm5-tmp"
    left.mkdir()

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    write_as("folder", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", left.name}


@pytest.mark.parametrize("there", [True, False])
def test_several_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path in paths if there else ():
        path.write_text("mine")
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if target == paths[2]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        replace(source, target)

    with failing(paths[2], errno.EIO), replacing_together(*paths) as temporaries:
        for each in temporaries:
            each.write_text("new")
        monkeypatch.setattr(os, "replace", fails)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({p.name: "mine" for p in paths} if there else {})
    monkeypatch.undo()
    with replacing_together(*paths) as temporaries:
        for each in temporaries:
            each.write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {p.name: "new" for p in paths}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, why in (
        ("pipe", "it is no regular file"),
        ("folder", "Is a directory"),
        ("none/file", f"there is no directory {tmp_path / 'none'}"),
    ):
        path = tmp_path / name
        for ask in (require_writable, lambda path: replacing(path).__enter__()):
            with pytest.raises(UsageError) as raised:
                ask(path)
            assert str(raised.value) == f"{path} cannot be written: {why}"
    require_writable(tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "folder"}


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


@pytest.mark.parametrize(
    "writers",
    [
        ("quantize, its config", "quantize, a shard", "export, weights", "simulate, a page"),
        pytest.param(tuple(WRITERS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, writers: tuple[str, ...]) -> None:
    make_checkpoint(tmp_path / "small")
    (tmp_path / "out").mkdir()
    asked = []
    for limit, verb, *words in map(WRITERS.__getitem__, writers):
        model = () if verb == "simulate" else ("--checkpoint", str(tmp_path / "small"))
        asked.append((limit, [verb, *model, *(str(w).replace("OUT", str(tmp_path / "out")) for w in words)]))
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = str(tmp_path)  # of the product's own cache, which is full as well
    command = [sys.executable, "-c", LIMITED, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for (_, words), line in zip(asked, done.stdout.splitlines(), strict=True):
        code, out, err = json.loads(line)
        assert (code, err) == (2, f"glm5: {words[-1]} cannot be written: File too large\n"), words
        assert not out or words[0] == "run", words  # which prints tokens as they come
    assert list((tmp_path / "out").iterdir()) == []


UNWRITABLE = {
    "compare": ("compare", "--profile", "ascend-910c", "--checkpoint", "/none", "--html"),
    "simulate, a page": ("simulate", "--model", "/none", *LOAD, "--html"),
    "simulate, a trace": ("simulate", "--model", "/none", *LOAD, "--trace"),
    "plan": ("plan", "--model", "/none", "--devices", 1, "--out"),
    "plan, a page": ("plan", "--model", "/none", "--devices", 1, "--html"),
    "plan experts": ("plan", "experts", "--load", "none.npy", "--devices", 1, "--sglang"),
    "calibrate": ("calibrate", "--out"),
    "run, logits": ("run", "--checkpoint", "/none", "--prompt", "a", "--dump-logits"),
    "run, a trace": ("run", "--backend", "sim", "--checkpoint", "/none", "--prompts", "/none", "--trace"),
}
SUFFIX = {"calibrate": ".toml", "run, logits": ".npz"}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Before anything is read, since what they read is not there either."""

    def read_only(path: str, *rest: object, **named: object) -> int:
        if "glm5-tmp" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return plain(path, *rest, **named)  # type: ignore[arg-type]

    def measures(*_: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr("runtime.porting.calibrate.measure", measures)
    plain = os.open
    name = "out" + SUFFIX.get(what, "")
    said = refused(*UNWRITABLE[what], tmp_path / "none" / name)
    assert f"cannot be written: there is no directory {tmp_path / 'none'}" in said
    monkeypatch.setattr(os, "open", read_only)
    said = refused(*UNWRITABLE[what], tmp_path / name)
    assert said.endswith("cannot be written: Read-only file system") and said.startswith(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


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
