"""Who joins a run over several processes: all that know its secret, nobody else, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from backends.errors import BackendUnavailable
from backends.spmd import processes as spmd
from foundation.errors import CapacityError, UsageError
from runtime.execution.cluster import joining, processes
from runtime.execution.cluster.joining import gather, given_secret, knock

SECRET, OTHER = b"correct horse battery staple", b"incorrect horse battery staple"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """HOST:PORT on the loopback, in a temporary folder of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (joining.VARIABLE, joining.FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


class Clock:
    """The clock of those that join, which a test may put forward: whoever waits then has waited long enough."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))

    def forward(self) -> None:
        self._ahead_s += 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(joining, "time", made)
    return made


def await_listening(place: str) -> None:
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(_address(place), 20):
            return
        time.sleep(0.005)


def _address(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host, int(port)


class Meeting:
    """Each in a thread of its own: what it returned or raised, by its number."""

    def __init__(self) -> None:
        self.came: dict[int, bytes | str] = {}
        self._threads: list[threading.Thread] = []

    def add(self, index: int, work: Callable[[], bytes]) -> None:
        def run() -> None:
            try:
                self.came[index] = work()
            except UsageError as error:
                self.came[index] = str(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def ended(self) -> dict[int, bytes | str]:
        for each in self._threads:
            each.join(30)
            assert not each.is_alive()
        return self.came


def meet(place: str, count: int, secrets: list[bytes | None], seconds: float = 20) -> dict[int, bytes | str]:
    found = Meeting()
    for index in reversed(range(1, count)):
        found.add(index, lambda index=index: knock(place, index, count, secrets[index], seconds))
    found.add(0, lambda: gather(place, count, secrets[0], seconds))
    return found.ended()


@pytest.mark.parametrize("secret", [SECRET, None])
def test_all_that_know_the_secret_get_the_key_of_this_run(place: str, secret: bytes | None) -> None:
    came, again = meet(place, 4, [secret] * 4), meet(place, 4, [secret] * 4)
    assert len(set(came.values())) == len(set(again.values())) == 1 and came != again
    assert isinstance(came[0], bytes) and len(came[0]) == 32
    assert not list(Path(tempfile.gettempdir()).glob("glm5-*/*"))


def test_a_secret_that_was_made_up_is_its_users_alone(place: str) -> None:
    """Until all are there, and in a folder that is."""
    found = Meeting()
    found.add(0, lambda: gather(place, 2, None, 20))
    file = Path(tempfile.gettempdir()) / f"glm5-{os.getuid()}" / f"join-{place.rpartition(':')[2]}"
    while not file.exists() or not file.read_bytes():
        time.sleep(0.01)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    found.add(1, lambda: knock(place, 1, 2, file.read_bytes(), 20))
    assert len(set(found.ended().values())) == 1 and not file.exists()


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_a_folder_that_is_not_ones_own_is_not_used(place: str, tmp_path: Path, how: str) -> None:
    folder = tmp_path / f"glm5-{os.getuid()}"
    if how == "a link":
        (tmp_path / "mine").mkdir(0o700)
        folder.symlink_to(tmp_path / "mine")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with pytest.raises(UsageError, match="is not a folder that only you can read"):
        gather(place, 2, None, 1)


@pytest.mark.parametrize(("first", "second"), [(SECRET, OTHER), (SECRET, b""), (SECRET, SECRET + b"x")])
def test_another_secret_is_turned_away_and_process_0_waits_on_in_vain(
    place: str, first: bytes, second: bytes, clock: Clock
) -> None:
    found = Meeting()
    found.add(0, lambda: gather(place, 2, first, 20))
    with pytest.raises(UsageError) as turned_away:
        knock(place, 1, 2, second, 20)
    clock.forward()
    assert str(turned_away.value) == (
        f"process 1 of 2 is not let in at {place}: it has another secret than process 0; set GLM5_JOIN_SECRET, or "
        "GLM5_JOIN_SECRET_FILE to a file that holds it, to the same for all"
    )
    assert found.ended()[0] == (
        f"process 0 of 2: process 1 has not come to {place} within 20 s; 1 that knew no secret were turned away"
    )


def test_an_imposter_keeps_nobody_out(place: str) -> None:
    """Whether it says nothing, nonsense, or what it heard a real process say before; and one that is not let in is no
    process 1."""
    heard: list[bytes] = []
    real = joining._WHO.pack(1, 2)

    def imposter(said: bytes) -> socket.socket:
        while True:
            with contextlib.suppress(OSError):
                made = socket.create_connection(("127.0.0.1", int(place.rpartition(":")[2])), 5)
                heard.append(made.recv(44))
                made.sendall(said)
                return made

    found, strangers = Meeting(), []
    found.add(0, lambda: gather(place, 2, SECRET, 20))
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", real, real + bytes(64), bytes(72), b"\xff" * 500):
        strangers.append(imposter(said))
    found.add(1, lambda: knock(place, 1, 2, SECRET, 20))
    came = found.ended()
    for each in strangers:
        each.close()
    assert came[0] == came[1] and isinstance(came[0], bytes)
    assert len({each[12:] for each in heard if len(each) == 44}) == len(heard)  # a nonce for each


def test_what_was_heard_once_opens_nothing(place: str, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    said: list[bytes] = []
    pack = joining._mac
    monkeypatch.setattr(joining, "_mac", lambda secret, *parts: said.append(pack(secret, *parts)) or said[-1])
    meet(place, 2, [SECRET] * 2)
    old = said[:]
    found = Meeting()
    found.add(0, lambda: gather(place, 2, SECRET, 20))
    await_listening(place)
    for mac in old:
        with socket.create_connection(_address(place), 20) as caller:
            caller.recv(44)
            caller.sendall(joining._WHO.pack(1, 2) + bytes(32) + mac)
            assert caller.recv(1) == b"\1"
    clock.forward()
    assert "process 1 has not come" in str(found.ended()[0])


@pytest.fixture
def listening(place: str) -> Iterator[Callable[[bytes], None]]:
    """Something else that listens, and greets whoever comes."""
    server = socket.create_server(("127.0.0.1", int(place.rpartition(":")[2])))

    def serve(greeting: bytes) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as caller, contextlib.suppress(ConnectionError):
                        caller.sendall(greeting)
                        caller.recv(104)
                        caller.sendall(bytes(65))

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    threads: list[threading.Thread] = []
    yield serve
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for each in threads:
        each.join()


@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"220 mail.example ESMTP says hello to everyone who comes\r\n", "what listens there is not process 0"),
        (b"glm5 join 1\n" + bytes(32), "what listens there does not know the secret"),
        (b"glm5 join 1\n", "what listens there ends the connection, and may not be process 0"),
    ],
)
def test_a_false_process_0_is_noticed(
    place: str, listening: Callable[[bytes], None], greeting: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_ANSWER_SECONDS", 0.5)
    listening(greeting)
    with pytest.raises(UsageError) as raised:
        knock(place, 1, 2, SECRET, 1)
    assert str(raised.value) == f"--coordinator {place}: {said}" or "says nothing" in str(raised.value)


def test_a_false_process_0_of_another_user_is_noticed(place: str, listening: Callable[[bytes], None]) -> None:
    listening(b"glm5 join 1\n" + bytes(32))
    with pytest.raises(UsageError, match="has left no secret for processes of yours"):
        knock(place, 1, 2, None, 0.5)


@pytest.mark.parametrize(
    ("index", "count", "said"), [(1, 3, "another number of processes"), (1, 2, "there is a process 1 already")]
)
def test_who_has_no_place(
    place: str, index: int, count: int, said: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, is_in, let_in = Meeting(), threading.Event(), joining._Gate._let_in

    def told(gate: joining._Gate, caller: socket.socket) -> bool:
        kept = let_in(gate, caller)
        if kept:
            is_in.set()
        return kept

    monkeypatch.setattr(joining._Gate, "_let_in", told)
    found.add(0, lambda: gather(place, 3 if count == 2 else 2, SECRET, 20))
    if count == 2:
        found.add(1, lambda: knock(place, 1, 3, SECRET, 20))
        assert is_in.wait(60)
        count = 3
    with pytest.raises(UsageError, match=said):
        knock(place, index, count, SECRET, 20)
    clock.forward()
    found.ended()


def test_one_that_was_killed_may_come_again(place: str) -> None:
    found = Meeting()
    found.add(0, lambda: gather(place, 3, SECRET, 20))
    await_listening(place)
    with pytest.MonkeyPatch.context() as patched:  # it is let in, and is gone
        patched.setattr(joining, "_ANSWER_SECONDS", 0.0)
        with pytest.raises(UsageError):
            knock(place, 1, 3, SECRET, 0.0)
    for index in (1, 2):
        found.add(index, lambda index=index: knock(place, index, 3, SECRET, 20))
    assert len(set(found.ended().values())) == 1


def test_process_0_listens_where_it_is_told_and_nowhere_else(
    place: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    port = int(place.rpartition(":")[2])
    found = Meeting()
    found.add(0, lambda: gather(place, 2, SECRET, 20))
    await_listening(place)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 1)
    clock.forward()
    found.ended()
    with pytest.raises(UsageError, match="process 0 cannot listen there"):
        gather(f"192.0.2.1:{port}", 2, SECRET, 1)
    with pytest.raises(UsageError, match="process 0 cannot listen there"):
        gather(f"no-such-host.invalid:{port}", 2, SECRET, 1)
    asked: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: asked.update(given))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    spmd.join("cpu", "localhost:9", "127.0.0.1:9", 0, 1, 1, 1)
    assert asked["coordinator_bind_address"] == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("coordinator", "local"),
    [("127.0.0.1:1", True), ("127.3.2.1:1", True), ("[::1]:1", True), ("192.0.2.1:1", False), ("0.0.0.0:1", False),
     ("[::]:1", False), ("[2001:db8::1]:1", False)],
)  # fmt: skip
def test_where_others_can_come_a_secret_is_needed(
    coordinator: str, local: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(joining.VARIABLE, raising=False)
    monkeypatch.delenv(joining.FILE_VARIABLE, raising=False)
    if local:
        assert given_secret(coordinator) is None
    else:
        with pytest.raises(UsageError, match=r"joining takes a secret: set GLM5_JOIN_SECRET, or GLM5_JOIN_SECRET_FILE"):
            given_secret(coordinator)
    file = tmp_path / "secret"
    file.write_text("a secret that is long enough\n")
    monkeypatch.setenv(joining.FILE_VARIABLE, str(file))
    assert given_secret(coordinator) == b"a secret that is long enough"
    monkeypatch.setenv(joining.VARIABLE, "short")
    with pytest.raises(UsageError, match="are both set"):
        given_secret(coordinator)
    monkeypatch.delenv(joining.FILE_VARIABLE)
    with pytest.raises(UsageError, match="GLM5_JOIN_SECRET: at least 16 characters"):
        given_secret(coordinator)
    monkeypatch.delenv(joining.VARIABLE)
    for content in (None, "", "\n", "x" * 5000):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        monkeypatch.setenv(joining.FILE_VARIABLE, str(file))
        with pytest.raises(UsageError, match="GLM5_JOIN_SECRET_FILE"):
            given_secret(coordinator)


# --- when JAX has started ------------------------------------------------------------------------


def never_meets(ticket: processes.Ticket) -> None:
    time.sleep(60)


def test_whose_place_is_taken_inside_jax_waits_no_longer_than_that(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All were let in, and then JAX's runtime waits for one that never comes."""
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.5)
    with pytest.raises(
        UsageError, match=r"process 0 of 1 has not met all others at .* within 1 s, though all were let in"
    ):
        processes.supervise(processes.ProcessPlace(place, 0, 1), never_meets)
    assert not multiprocessing.active_children()


def test_who_has_taken_the_place_of_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of two would say, gathered."""
    key = b"k" * 32
    words: list[np.ndarray] = []

    def said(index: int, digest: bytes, key: bytes) -> np.ndarray:
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: words.append(mine) or [])
        spmd.agree(digest, key)
        return words[-1]

    def agreed(*each: np.ndarray) -> int | None:
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack(each))
        return spmd.agree(b"d" * 32, key)

    first, second = said(0, b"d" * 32, key), said(1, b"d" * 32, key)
    assert agreed(first, second) is None
    assert agreed(first, said(1, b"e" * 32, key)) == 1
    for imposter in (said(1, b"d" * 32, b"j" * 32), first, np.zeros(64, np.uint8)):
        with pytest.raises(BackendUnavailable, match="process 1 is not the one that was let in"):
            agreed(first, imposter)


@pytest.mark.parametrize("size", [-5, 0, 2**31 - 1])
def test_a_size_is_looked_at_before_there_is_room_for_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value, mine: np.int32(size))
    with pytest.raises(CapacityError, match="process 0 sends"):
        spmd.send([], 0)


def test_what_is_no_array_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    sent = iter([np.int32(9), np.full(16, 7, np.uint8)])
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value, mine: next(sent))
    with pytest.raises(BackendUnavailable, match="process 0 sends what is no array"):
        spmd.send([], 0)
