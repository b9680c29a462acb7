"""Runs cases of `kinds` where nothing that they do matters: in a fork, on a budget of time and memory.

`python -m tests.fuzz.server` answers lines "KIND\\tFROM\\tTO\\tSECONDS" with a JSON list of what went wrong.
`python -m tests.fuzz.server KIND FROM [TO]` prints it for a person, and leaves the damaged file of the last case.
JAX is never imported here: a fork of a process that holds it is none to rely on.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

from foundation.errors import Failure
from tests.fuzz.kinds import Kind, kinds

SECONDS = 20.0  # of the processor, a case; a minute and twelve times as long without a word of it ends it too
ROOM_BYTES = 2 << 30  # beside what the process has before
ROOT = Path(__file__).parents[2]
_ELSEWHERE = re.compile("/fuzz/|/.venv/")


def judged(kind: Kind, folder: Path) -> str | None:
    """What is wrong with how a file is read; None where it is taken, or refused as it should be."""
    before = {path.name for path in folder.rglob("*")}
    try:
        kind.read(folder)
        return None
    except Failure as error:
        said = str(error)
        left = {path.name for path in folder.rglob("*")} - before
        if left:
            return f"left {sorted(left)[0]}"
        if "\n" in said or not said.strip():
            return f"not one line: {said[:200]!r}"
        if kind.named and kind.file not in said and str(folder) not in said:
            return f"does not name {kind.file}: {said[:200]!r}"
        return None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if str(ROOT) in frame.filename and not _ELSEWHERE.search(frame.filename)]
        where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:160]}"


def prepared(kind: Kind, name: str, seed: int, folder: Path) -> None:
    folder.mkdir()
    for file, source in kind.beside().items():
        (folder / file).symlink_to(source)
    (folder / kind.file).write_bytes(kind.make(Random(f"{name} {seed}")))


def _work(kind: Kind, name: str, seeds: range, told: int, keep: bool, seconds: float) -> None:
    """In the fork: a line for each case that begins, and one for each that ends."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    for seed in seeds:
        folder = Path(f"case-{os.getpid()}-{seed}").absolute()
        os.write(told, f'["begin", {seed}]\n'.encode())
        prepared(kind, name, seed, folder)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # ends the process, whatever it is in
        wrong = judged(kind, folder)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        os.write(told, (json.dumps(["end", seed, wrong]) + "\n").encode("utf-8", "replace"))
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def run(
    kind: Kind, name: str, seeds: range, keep: bool = False, seconds: float = SECONDS, peaks: list[int] | None = None
) -> list[tuple[int, str]]:
    """What went wrong, by seed. A case that takes its process along is one of them; the next goes on in another.

    peaks: where the most memory goes that each process has held, or one that it started; bytes.
    """
    wrong: list[tuple[int, str]] = []
    while seeds:
        read, told = os.pipe()
        if (worker := os.fork()) == 0:
            os.close(read)
            try:
                _work(kind, name, seeds, told, keep, seconds)
            finally:
                os._exit(1)
        os.close(told)
        at, ended = _followed(read, seeds, wrong, 60 + 12 * seconds)
        os.close(read)
        if not ended:
            os.kill(worker, signal.SIGKILL)
        _, status, used = os.wait4(worker, 0)
        if peaks is not None:
            peaks.append(used.ru_maxrss << 10)
        if at is None:
            return wrong
        code = os.waitstatus_to_exitcode(status)
        ending = signal.Signals(-code).name if code < 0 else str(code)
        hangs = not ended or code == -signal.SIGVTALRM
        wrong.append((at, "hangs" if hangs else f"ends the process, {ending}"))
        seeds = range(at + 1, seeds.stop)
    return wrong


def _followed(read: int, seeds: range, wrong: list[tuple[int, str]], patience: float) -> tuple[int | None, bool]:
    """The case that a worker was in when it ended, None after the last; and whether it ended by itself."""
    held, at = b"", None
    while select.select([read], [], [], patience)[0]:
        more = os.read(read, 1 << 16)
        if not more:
            return at, True
        *lines, held = (held + more).split(b"\n")
        for line in lines:
            what: list[Any] = json.loads(line)
            at = what[1] if what[0] == "begin" else None
            if what[0] == "end" and what[2]:
                wrong.append((what[1], what[2]))
    return (at if at is not None else seeds.start), False


def main() -> None:
    here = os.environ.get("GLM5_FUZZ_FOLDER") or tempfile.mkdtemp(prefix="glm5-fuzz-")
    os.chdir(here)
    known = kinds()
    assert "jax" not in sys.modules
    try:
        if len(sys.argv) > 1:
            name, first, *last = sys.argv[1:]
            peaks: list[int] = []
            seeds = range(int(first), int(last[0]) if last else int(first) + 1)
            for seed, what in run(known[name], name, seeds, True, peaks=peaks):
                print(f"{name} {seed}: {what}")
            print(f"{name}: {max(peaks) / 1e6:,.0f} MB at most; the files are in {here}")
            return
        for line in sys.stdin:
            name, first, last, seconds = line.rstrip("\n").split("\t")
            wrong = run(known[name], name, range(int(first), int(last)), seconds=float(seconds))
            print(json.dumps(wrong), flush=True)
    finally:
        if len(sys.argv) == 1:
            shutil.rmtree(here, ignore_errors=True)


if __name__ == "__main__":
    main()
