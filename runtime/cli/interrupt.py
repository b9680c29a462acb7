"""Ctrl-C, answered at once and whatever runs: "interrupted", exit code 130, nothing half-written.

Python's own answer is an exception wherever the interpreter happens to be: a traceback in an import, nothing at all in
a callback that drops it or in C code that runs on, a crash where XLA's threads outlive what they use. So a thread waits
for the signal instead, removes what is unfinished, and ends the process without taking it apart. Imports next to
nothing: until it is imported, nobody answers.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys

CODE, MESSAGE = 130, "glm5: interrupted"


def answer_interrupts() -> None:
    """From here on Ctrl-C ends this process. For a process of one's own, on its main thread; where SIGINT is ignored,
    as a shell has it for what runs behind `&`, or is somebody else's, it stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    _thread.start_new_thread(_end, (heard,))
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)  # what tells the thread, while C code runs too
    signal.signal(signal.SIGINT, lambda number, frame: None)


def _end(heard: int) -> None:
    while os.read(heard, 1)[0] != signal.SIGINT:
        pass  # another signal that somebody handles
    if abandon := getattr(sys.modules.get("foundation.writing"), "abandon", None):
        abandon()
    for child in getattr(sys.modules.get("multiprocessing"), "active_children", list)():
        child.kill()
    restored = "\x1b[?25h\n" if os.isatty(2) else ""  # the cursor, which a progress bar hides
    try:
        os.write(2, f"{restored}{MESSAGE}\n".encode())
    finally:
        os._exit(CODE)
