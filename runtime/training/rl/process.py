"""The process that generates, the other side of `generators.Apart`: its main program, and no module to import.

    python -m runtime.training.rl.process RUN CHECKPOINT BACKEND

Lines of JSON come on standard input, in the order that they take effect: `{"policy": version}`, load what the policy's
file holds; `{"stage": i, "begin": [numbers]}`, begin these groups. Groups and what they took go out. It ends where its
input does.
"""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path

from backends.registry import usable
from foundation.reading import parse_json
from model.checkpoint import Checkpoint
from runtime.training.rl import config as configs
from runtime.training.rl.episodes import Questions
from runtime.training.rl.generators import POLICY, asked, nested, told
from runtime.training.rl.rollouts import RolloutEngine
from runtime.training.state import read_arrays

_POLL_S = 0.02


def main(run: str, checkpoint_path: str, backend: str) -> None:
    folder = Path(run)
    config = configs.read(folder / configs.FILE)
    checkpoint = Checkpoint(checkpoint_path)
    questions = Questions.load(checkpoint.path, config.seed)
    policy, metadata = read_arrays(folder / POLICY)
    engine = RolloutEngine(
        checkpoint.config, nested(policy), usable(backend), config.generation, questions.generator.tokenizer,
        config.length, config.running,
    )  # fmt: skip
    engine.version = int(metadata["version"])
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pump, args=(lines,), daemon=True).start()
    drains = config.schedule.mode == "ahead"
    held: list[dict] = []
    while True:
        try:
            while True:
                line = lines.get(timeout=_POLL_S) if engine.idle and not held else lines.get_nowait()
                if line is None:
                    return
                held.append(parse_json(line))
        except queue.Empty:
            pass
        while held and not ("policy" in held[0] and drains and not engine.idle):
            said = held.pop(0)
            if "policy" in said:
                policy, metadata = read_arrays(folder / POLICY)
                engine.load(nested(policy), int(metadata["version"]))
            else:
                for number in said["begin"]:
                    engine.begin(asked(config, questions, said["stage"], number))
        if not engine.idle:
            for group in engine.advance(_POLL_S):
                print(told(group, engine), flush=True)


def _pump(into: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        into.put(line)
    into.put(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
