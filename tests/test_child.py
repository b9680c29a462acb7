"""A child that works on what strangers made: limits, ends, new beginnings, threads."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from foundation import child
from foundation.child import Child, ChildFailure, one_line
from foundation.foreign_text import WORKER, ForeignTemplate, ForeignTokenizer
from tests.cli.cli import glm5

ROOT = Path(__file__).parents[1]
CHIP = "--model glm-5-fp8 --profile h200-sxm --devices 8"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DAG = "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.x[0] }}"


@pytest.fixture
def small() -> Iterator[ForeignTemplate]:
    yield ForeignTemplate("{{ a }}")


def running(number: int) -> bool:
    """Whether a process runs that is not only waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(there: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.02)
    return there()


def process() -> int:
    assert WORKER._process is not None
    return WORKER._process.pid


def test_one_process_serves_all_until_it_is_ended(small: ForeignTemplate) -> None:
    assert small.render([{"a": 1}])[0] == "1"
    first = process()
    assert ForeignTemplate("{{ b }}").render([{"b": 2}])[0] == "2" and process() == first
    os.kill(first, signal.SIGKILL)
    assert small.render([{"a": 3}])[0] == "3" and process() != first


def test_more_are_held_than_the_process_holds(small: ForeignTemplate) -> None:
    others = [ForeignTemplate(f"{number}{{{{ a }}}}") for number in range(20)]
    assert [each.render([{"a": "x"}])[0] for each in [*others, *reversed(others)][::3]]
    assert small.render([{"a": 4}])[0] == "4"


def test_threads_wait_for_each_other(small: ForeignTemplate) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        mine = ForeignTemplate("{{ number }}:{{ a }}")
        for a in range(20):
            found[number] = mine.render([{"number": number, "a": a}])[0] + small.render([{"a": number}])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {number: f"{number}:19{number}" for number in range(6)}


def test_a_thread_that_waits_is_not_stopped_with_the_one_that_hangs(
    small: ForeignTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WORKER, "cpu_seconds", 0.2)
    said: list[str] = []

    def hang() -> None:
        try:
            ForeignTemplate(ENDLESS).render([{}])[0]
        except ChildFailure as error:
            said.append(error.why)

    thread = threading.Thread(target=hang)
    thread.start()
    assert small.render([{"a": 5}])[0] == "5"
    thread.join()
    assert said == ["time"] and small.render([{"a": 6}])[0] == "6"


def test_an_interrupt_leaves_no_answer_for_the_next(small: ForeignTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Child, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.render([{"a": "old"}])[0]
    assert small.render([{"a": "new"}])[0] == "new"


@pytest.mark.parametrize("work", ["{{ 1 }}", ENDLESS, DAG, "{{ 7 ** 77777777 > 0 }}"])
def test_it_ends_with_its_parent(work: str) -> None:
    """Idle, between two instructions of Python, or in C code that comes back to none."""
    program = f"""
    import threading, time
    from foundation.foreign_text import WORKER, ForeignTemplate
    ForeignTemplate("x").render([{{}}])[0]
    threading.Thread(target=lambda: ForeignTemplate({work!r}).render([{{}}])[0], daemon=True).start()
    time.sleep(0.3)
    print(WORKER._process.pid, flush=True)
    time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert running(child)
    parent.kill()
    parent.communicate()
    assert until(lambda: not running(child))


def test_it_ends_as_its_parent_does_in_peace() -> None:
    program = "from foundation.foreign_text import *; ForeignTemplate('x'); print(WORKER._process.pid)"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not ended.stderr and not running(int(ended.stdout))


def test_a_forked_process_has_a_child_of_its_own(small: ForeignTemplate) -> None:
    """So that no answer goes to another. (A process of one thread, which JAX's are not.)"""
    program = """
    import os
    from foundation.foreign_text import WORKER, ForeignTemplate
    made = ForeignTemplate("{{ a }}")
    first = WORKER._process.pid
    if not os.fork():
        os._exit(made.render([{"a": 1}])[0] != "1" or WORKER._process.pid == first)
    assert os.wait()[1] == 0 and made.render([{"a": 2}])[0] == "2" and WORKER._process.pid == first
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "words", ["--help", f"simulate {CHIP} --requests 2 --rate 1", pytest.param(f"plan {CHIP}", marks=pytest.mark.slow)]
)
def test_it_is_started_when_it_is_needed_and_no_earlier(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Child) -> None:
        raise AssertionError

    monkeypatch.setattr(Child, "_start", refuse)
    WORKER.end()
    assert glm5(*words.split()).out


def test_what_it_may_do(monkeypatch: pytest.MonkeyPatch, small: ForeignTemplate) -> None:
    """It has none of its parent's environment, files or folder, and writes nothing."""
    monkeypatch.setenv("A_SECRET", "hush")
    WORKER.end()
    small.render([{"a": 1}])[0]
    at = Path(f"/proc/{process()}")
    names = {entry.partition("=")[0] for entry in (at / "environ").read_text().split("\0")}
    assert "A_SECRET" not in names and os.readlink(at / "cwd") == "/"
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (at / "limits").read_text().splitlines()}
    assert limits["Max file size"] == ["0", "0"] and limits["Max core file size"] == ["0", "0"]
    assert int(limits["Max address space"][1]) < 2e9


def test_a_child_that_does_not_start_says_so() -> None:
    child = Child("foundation.no_such_module")
    with pytest.raises(ChildFailure, match="does not start"):
        child.ask({})
    gc.collect()


def test_a_long_request_is_not_given_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.child.MOST_CPU_SECONDS", 0.2)
    with pytest.raises(ChildFailure, match=r"more than the 0\.2 s"):
        ForeignTemplate(ENDLESS).render([{"a": 100_000 * "a"}])


def test_a_text_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.child.MESSAGE_BYTES", 1000)
    with pytest.raises(ChildFailure, match="text of more than"):
        ForeignTemplate("a" * 1000)


def test_the_ids_are_those_of_the_library_here() -> None:
    import tokenizers

    text = (ROOT / "runtime" / "data" / "tiny-glm5" / "tokenizer.json").read_text()
    here, there = tokenizers.Tokenizer.from_str(text), ForeignTokenizer(text)
    assert there.encode(["Hello, 天地"], False)[0] == here.encode("Hello, 天地", add_special_tokens=False).ids
    assert json.loads(there.to_json()) == json.loads(here.to_str())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\nb\tc", "a b c"),
        ("\x1b[2Ja\x00", "?[2Ja?"),
        ("", "ValueError"),
        ("é天", "é天"),
        ("x" * 999, "x" * 300 + "..."),
    ],
)
def test_a_line_is_what_a_terminal_can_show(said: str, shown: str) -> None:
    assert one_line(ValueError(said)) == shown


@pytest.mark.parametrize(
    ("passes", "late"),
    [
        ([1.0, 1.0, 0.5], False),  # there before its time is over
        ([1.0] * 10, True),
        ([300.0, 1.0, 0.5], False),  # stopped once for five minutes, and there soon after
        ([300.0] + [1.0] * 10, True),  # stopped, and late all the same
    ],
)
def test_time_does_not_pass_for_who_is_stopped(
    monkeypatch: pytest.MonkeyPatch, passes: list[float], late: bool
) -> None:
    """passes: seconds by the clock of one look after the other; at the end of the last there is an answer."""
    clock, left = [0.0], list(passes)

    class Poll:
        def poll(self, milliseconds: float) -> list[int]:
            if milliseconds:
                clock[0] += left.pop(0)
            return [] if left else [1]

    monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    waits = Child("none")
    waits._until = 5.0
    if late:
        with pytest.raises(child._Late):
            waits._await(Poll())  # type: ignore[arg-type]
    else:
        waits._await(Poll())  # type: ignore[arg-type]
