"""What is damaged, and who reads it: a kind for each sort of file that people are sent, and for command lines.

A kind makes the content of one file from a seed, and reads it as the product does. Free of JAX.
"""

from __future__ import annotations

import signal
from pathlib import Path

from foundation.errors import Failure
from tests.fuzz import checkpoints, commands, documents, requests
from tests.fuzz.kind import Kind


def _judged(folder: Path) -> None:
    """What a reader may do wrong, one thing after the other."""
    match int(folder.name.rpartition("-")[2]):
        case 1:
            raise ZeroDivisionError
        case 2:
            bytearray(8 << 30)
        case 3:
            while True:
                pass
        case 4:
            signal.raise_signal(signal.SIGSEGV)
        case 5:
            raise Failure("judge.txt: is\nno line")
        case 6:
            raise Failure("is wrong")
        case 7:
            (folder / "more").touch()
            raise Failure("judge.txt: is wrong")


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    judge = Kind("judge.txt", lambda rng: b"", _judged)
    return {**checkpoints.kinds(), **documents.kinds(), **commands.kinds(), **requests.kinds(), "the judge": judge}
