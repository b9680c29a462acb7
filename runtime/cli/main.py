"""The `glm5` command.

Expected failures print one line on stderr and exit with 2; a bug prints a traceback. What takes a moment to import
waits until Ctrl-C is answered.
"""

from __future__ import annotations

import errno
import os
import sys

from foundation.errors import Failure, printable, shortened
from runtime.cli.interrupt import CODE, MESSAGE, answer_interrupts

TYPE_CHECKING = False  # without `typing`, which takes its time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_WAY = (errno.ENAMETOOLONG, errno.EACCES)  # to a path that was given, whoever asked first whether it is there


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `glm5` command; `arguments` are the process's own by default. Raises SystemExit."""
    try:
        if arguments is None:
            answer_interrupts()
        _run(arguments)
    except KeyboardInterrupt:
        _interrupted()


def _run(arguments: Sequence[str] | None) -> NoReturn:
    import typer

    from runtime.cli.app import command
    from runtime.cli.pipe import for_its_reader

    try:
        with for_its_reader():
            code = command()(arguments, prog_name="glm5", standalone_mode=False)
        sys.exit(code)
    except Failure as error:
        _fail(str(error), error.keeps_lines)
    except typer.Abort:
        _interrupted()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:  # of stdout, or of a file that nobody else names
            _leave_unprinted()
            _fail(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        if isinstance(error, OSError) and error.errno in _NO_WAY and error.filename is not None:
            _fail(f"{shortened(printable(str(error.filename)))}: {error.strerror}")
        # A wrong command line. Its exception is public only as an interface: click's, or typer's own copy.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # whose message is the help
            print(message(), file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _fail(f"{' '.join(message().split()).rstrip('.')} (see `{context.command_path if context else 'glm5'} --help`)")


def _fail(message: str, keeps_lines: bool = False) -> NoReturn:
    """What a file or a name put into a message does not command the terminal."""
    lines = message.split("\n") if keeps_lines else [message]
    print("\n".join(map(printable, [f"glm5: {lines[0]}", *lines[1:]])), file=sys.stderr)
    sys.exit(2)


def _interrupted() -> NoReturn:
    print(MESSAGE, file=sys.stderr)
    sys.exit(CODE)


def _leave_unprinted() -> None:
    """What stdout did not take is not tried again when the process ends."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
