"""Layouts of the random checkpoint, run on XLA host devices beside the CPU backend: a JSON line each.

    python -m tests.sim.matrix 2,2,4,2 1,8,8,1      these: tp,dp,ep,pp
    python -m tests.sim.matrix all                  every one with tp, dp, ep, pp in 1, 2, 4, 8 that the model admits
    python -m tests.sim.matrix some                 every twelfth of those

A process of its own, because JAX takes the number of host devices once, before it starts.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

from backends.emulation.backend import MOST_HOSTS
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.split import Layout
from tests.sim.servers import RANDOM, emulated, logit_error, plan_of, prompts_of, reference

LENGTHS, MOST = (70, 9, 1), (5, 3, 6)
"""Ragged prompts, the first of them longer than the selection of 64; answers that end one after another."""


def admitted(cfg: ModelConfig) -> list[Layout]:
    """Every layout of degrees in 1, 2, 4, 8 that the model divides by and that is emulated."""
    found = []
    for tp, dp, ep, pp in itertools.product((1, 2, 4, 8), repeat=4):
        try:
            layout = Layout(tp, dp, ep, pp)
            layout.check(cfg)
            layout.require_mesh(cfg)
        except UsageError:
            continue
        found.append(layout)
    return found


def main(words: list[str]) -> None:
    import jax

    checkpoint = Checkpoint(RANDOM)
    if words in (["all"], ["some"]):
        layouts = admitted(checkpoint.config)
        layouts = layouts if words == ["all"] else layouts[1::12]
    else:
        layouts = [Layout(*map(int, word.split(","))) for word in words]
    jax.config.update("jax_num_cpu_devices", MOST_HOSTS)
    requests = prompts_of(checkpoint.config, LENGTHS, MOST)
    expected = reference(checkpoint, requests)
    for layout in layouts:
        began = time.process_time()
        plan = plan_of(checkpoint.config, layout, int(layout.by_expert), layout.devices, engine="glm5")
        found = emulated(checkpoint, plan, requests, mapped=None).outcome.completions
        pairs = list(zip(found, expected, strict=True))
        line = {
            "layout": layout.name,
            "devices": layout.devices,
            "same_tokens": all(ours.token_ids == theirs.token_ids for ours, theirs in pairs),
            "logit_error": max(logit_error(ours, theirs) for ours, theirs in pairs),
            "cpu_s": round(time.process_time() - began, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
