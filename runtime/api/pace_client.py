"""A client in a process of its own, which must not take long to start: the standard library alone.

Reads a line `{"port": PORT, "bodies": [...], "pause_s": 0.0}`, waits so long, sends all bodies at once to
/v1/completions, each over a connection of its own, and writes a line `{"began_s": B, "came": [[at, ...], ...]}`: the
machine's monotonic clock, and seconds from then until each write of a stream that holds tokens.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence


def asked(port: int, bodies: Sequence[str], pause_s: float) -> dict[str, object]:
    """Raises `RuntimeError` for an answer that is none."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    time.sleep(pause_s)
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in bodies]
    came: list[list[float]] = [[] for _ in opened]
    began = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for at, (made, body) in enumerate(zip(opened, bodies, strict=True)):
            made.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            selector.register(made, selectors.EVENT_READ, at)
        while selector.get_map():
            for key, _ in selector.select():
                made, at = opened[key.data], key.data
                if not (part := made.recv(1 << 16)):
                    selector.unregister(made)
                    made.close()
                elif b'"text":' in part:
                    came[at].append(time.perf_counter() - began)
    if not all(came):
        raise RuntimeError("an answer did not come")
    return {"began_s": began, "came": came}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asked(**json.loads(line))), flush=True)
