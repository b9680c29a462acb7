"""Who may join a run over several processes: those that know its secret, before JAX's runtime, which asks for none,
starts.

Process 0 listens at the coordinator's address and sends whoever comes a nonce; a process answers with its number, a
nonce of its own, and an HMAC of all that under the secret. When all are there, process 0 sends each of them the run's
number with an HMAC over both nonces, so that they know it too, and everyone makes a key of it for this run alone.
Nothing that has been heard before is of use, and the secret does not pass.

Where the address is not of this host alone, a person gives the secret; there, process 0 makes one up and leaves it
where only processes of the same user can read it.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import secrets
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from foundation.errors import UsageError
from foundation.reading import Unreadable, read_bytes, read_text

VARIABLE, FILE_VARIABLE = "GLM5_JOIN_SECRET", "GLM5_JOIN_SECRET_FILE"
LEAST_CHARACTERS = 16
_MAGIC = b"glm5 join 1\n"
_NONCE = _MAC = 32
_WHO = struct.Struct(">II")  # number, and of how many
_JOINED, _NO_SECRET, _OTHER_COUNT, _TAKEN = b"\0", b"\1", b"\2", b"\3"
_ANSWER_SECONDS = 5  # that one side has for a message
_MOST_STRANGERS = 64  # at a time
_EITHER = f"set {VARIABLE}, or {FILE_VARIABLE} to a file that holds it, to the same for all"


class Address(NamedTuple):
    """Where process 0 listens, resolved."""

    family: socket.AddressFamily
    host: str
    port: int

    @classmethod
    def of(cls, coordinator: str) -> Address:
        """Of HOST:PORT. Raises OSError where the host is not known."""
        host, _, port = coordinator.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        return cls(found[0], str(found[4][0]), int(port))

    @property
    def local(self) -> bool:
        """Whether only processes of this host get there."""
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def given_secret(coordinator: str) -> bytes | None:
    """The secret that a person gave; None where none is needed. Raises `UsageError`."""
    text, file = os.environ.get(VARIABLE), os.environ.get(FILE_VARIABLE)
    if text and file:
        raise UsageError(f"{VARIABLE} and {FILE_VARIABLE} are both set; keep one")
    if file:
        try:
            text = read_text(file, 4096)
        except Unreadable as error:
            raise UsageError(f"{FILE_VARIABLE} {file}: {error}") from None
    if text is not None and (file or text):
        secret = text.strip().encode(errors="surrogateescape")
        if len(secret) < LEAST_CHARACTERS:
            raise UsageError(f"{FILE_VARIABLE if file else VARIABLE}: at least {LEAST_CHARACTERS} characters, please")
        return secret
    with contextlib.suppress(OSError):  # a host that is not known yet may be later
        if not Address.of(coordinator).local:
            raise UsageError(
                f"--coordinator {coordinator} can be reached by others, so joining takes a secret: {_EITHER}"
            )
    return None


def gather(coordinator: str, count: int, secret: bytes | None, seconds: float) -> bytes:
    """Process 0: lets the others in, and returns the run's key. Raises `UsageError` where not all come in time."""
    try:
        address = Address.of(coordinator)
        server = socket.create_server((address.host, address.port), family=address.family)
    except OSError as error:
        raise UsageError(
            f"--coordinator {coordinator}: process 0 cannot listen there ({error.strerror or error}); "
            "give a free port at an address of this host"
        ) from None
    with server, _left_for_others(address.port, secret) as known:
        return _Gate(server, count, known).key(coordinator, seconds)


class _Gate:
    """Where the others come in."""

    def __init__(self, server: socket.socket, count: int, secret: bytes):
        self._server, self._count, self._secret = server, count, secret
        self._there: dict[int, tuple[socket.socket, bytes]] = {}
        self._lock, self._room = threading.Lock(), threading.BoundedSemaphore(_MOST_STRANGERS)
        self._turned_away = 0

    def key(self, coordinator: str, seconds: float) -> bytes:
        until, run = time.monotonic() + seconds, secrets.token_bytes(_NONCE)
        self._server.settimeout(0.1)
        try:
            while missing := self._missing():
                if time.monotonic() > until:
                    away = f"; {self._turned_away} that knew no secret were turned away" if self._turned_away else ""
                    raise UsageError(
                        f"process 0 of {self._count}: process {missing[0]} has not come to {coordinator} within "
                        f"{seconds:g} s{away}"
                    )
                with contextlib.suppress(TimeoutError):
                    caller = self._server.accept()[0]
                    if self._room.acquire(blocking=False):
                        threading.Thread(target=self._hear, args=(caller,), daemon=True).start()
                    else:
                        caller.close()
            for caller, nonces in self._there.values():
                with contextlib.suppress(OSError):  # one that is gone now is missed when JAX starts
                    caller.sendall(run + _mac(self._secret, b"0", nonces, run))
        finally:
            for caller, _ in self._there.values():
                caller.close()
        return _mac(self._secret, b"run", run)

    def _missing(self) -> list[int]:
        with self._lock:
            for index in [index for index, (caller, _) in self._there.items() if _gone(caller)]:
                self._there.pop(index)[0].close()
            return [index for index in range(1, self._count) if index not in self._there]

    def _hear(self, caller: socket.socket) -> None:
        kept = False
        try:
            kept = self._let_in(caller)
        except OSError:
            pass
        finally:
            self._room.release()
            if not kept:
                caller.close()

    def _let_in(self, caller: socket.socket) -> bool:
        caller.settimeout(_ANSWER_SECONDS)
        ours = secrets.token_bytes(_NONCE)
        caller.sendall(_MAGIC + ours)
        said = _receive(caller, _WHO.size + _NONCE + _MAC, time.monotonic() + _ANSWER_SECONDS)
        who, theirs, mac = said[: _WHO.size], said[_WHO.size : -_MAC], said[-_MAC:]
        if not hmac.compare_digest(mac, _mac(self._secret, b"1", ours, theirs, who)):
            self._turned_away += 1
            caller.sendall(_NO_SECRET)
            return False
        index, count = _WHO.unpack(who)
        with self._lock:
            if count != self._count or not 0 < index < count:
                answer = _OTHER_COUNT
            elif index in self._there and not _gone(self._there[index][0]):
                answer = _TAKEN
            else:
                answer = _JOINED
            caller.sendall(answer)
            if answer == _JOINED:
                caller.setblocking(False)  # so that `_gone` does not wait
                self._there[index] = (caller, ours + theirs + who)
        return answer == _JOINED


def knock(coordinator: str, index: int, count: int, secret: bytes | None, seconds: float) -> bytes:
    """Process `index`: comes in, waits until all are there, and returns the run's key. Raises `UsageError` where it is
    not let in in time."""
    until = time.monotonic() + seconds
    while True:
        try:
            return _come_in(coordinator, index, count, secret, until)
        except _Stranger as error:
            why = str(error)
        except OSError as error:
            reason = error.strerror or error
            why = f"nothing has listened there for {seconds:g} s ({reason}); start process 0 on that host"
        if time.monotonic() > until:
            raise UsageError(f"--coordinator {coordinator}: {why}")
        time.sleep(0.2)


class _Stranger(Exception):
    """What listens is not process 0, or not of this run: it may be, later."""


def _come_in(coordinator: str, index: int, count: int, secret: bytes | None, until: float) -> bytes:
    address = Address.of(coordinator)
    with socket.create_connection((address.host, address.port), timeout=_ANSWER_SECONDS) as there:
        try:
            known = _left(address.port) if secret is None else secret
            soon, who, ours = time.monotonic() + _ANSWER_SECONDS, _WHO.pack(index, count), secrets.token_bytes(_NONCE)
            hello = _receive(there, len(_MAGIC) + _NONCE, soon)
            if not hello.startswith(_MAGIC):
                raise _Stranger("what listens there is not process 0")
            theirs = hello[len(_MAGIC) :]
            there.sendall(who + ours + _mac(known, b"1", theirs, ours, who))
            answer = _receive(there, 1, soon)
            if answer == _JOINED:
                run_and_mac = _receive(there, _NONCE + _MAC, until + _ANSWER_SECONDS)
                run, mac = run_and_mac[:_NONCE], run_and_mac[_NONCE:]
                if not hmac.compare_digest(mac, _mac(known, b"0", theirs + ours + who, run)):
                    raise UsageError(f"--coordinator {coordinator}: what listens there does not know the secret")
                return _mac(known, b"run", run)
        except OSError as error:
            said = "says nothing" if isinstance(error, TimeoutError) else "ends the connection"
            raise _Stranger(f"what listens there {said}, and may not be process 0") from None
    place = f"process {index} of {count} is not let in at {coordinator}"
    if answer == _TAKEN:
        raise UsageError(f"{place}: there is a process {index} already")
    if answer == _OTHER_COUNT:
        raise UsageError(f"{place}: process 0 is one of another number of processes")
    raise UsageError(f"{place}: it has another secret than process 0; {_EITHER}")


def _mac(secret: bytes, *parts: bytes) -> bytes:
    """Over parts that are all of known lengths but the first, which says what it is for."""
    return hmac.digest(secret, b"glm5 " + b" ".join((parts[0], b"".join(parts[1:]))), "sha256")


def _receive(there: socket.socket, count: int, until: float) -> bytes:
    """Raises OSError where not all of it comes in time."""
    found = b""
    while len(found) < count:
        there.settimeout(max(0.001, until - time.monotonic()))
        more = there.recv(count - len(found))
        if not more:
            raise ConnectionResetError
        found += more
    return found


def _gone(caller: socket.socket) -> bool:
    """Whether the other end has been closed. A socket that does not block."""
    try:
        return caller.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


# --- a secret for processes of one user on one host ----------------------------------------------


@contextlib.contextmanager
def _left_for_others(port: int, secret: bytes | None) -> Iterator[bytes]:
    """The secret; one made up lies in a file for as long as others may come."""
    if secret is not None:
        yield secret
        return
    file, made = _own_folder() / f"join-{port}", secrets.token_hex(_NONCE).encode()
    try:
        file.unlink(missing_ok=True)  # of a process 0 that was killed
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(made)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); {_EITHER}") from None
    try:
        yield made
    finally:
        file.unlink(missing_ok=True)


def _left(port: int) -> bytes:
    """Raises `_Stranger` where process 0 has left none."""
    try:
        return read_bytes(_own_folder() / f"join-{port}", 4096)
    except Unreadable:
        raise _Stranger(
            f"what listens there has left no secret for processes of yours; if it is yours, {_EITHER}"
        ) from None


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"glm5-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder}: is not a folder that only you can read; remove it, or {_EITHER}")
    return folder
