"""Plans of one or two pools, launched, and their commands taken apart."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.engines.flags import releases
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.deployment.pool import Pool
from runtime.planning.launch import LAUNCHED_ENGINES, Command, Launch, launch
from tests.plans import formats, pool_of

RELEASES = [(kind, release) for kind in LAUNCHED_ENGINES for release in releases(kind)]
PRODUCT = {"sglang": ("h200-sxm", "fp8"), "vllm": ("h200-sxm", "fp8"), "vllm-ascend": ("ascend-910c-die", "w8a8")}


def pool(model: str, profile: str, layout: Layout, scheme: str, kv: str = "bf16", **options: Any) -> Pool:
    return pool_of(load_config(model), layout, hw_profiles.load(profile), formats(scheme, kv), **options)


def plan_of(model: str, *pools: Pool) -> Plan:
    cfg = load_config(model)
    return Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), pools)


def made(name: str, /, *pools: Pool, **options: Any) -> Launch:
    return launch(plan_of(name, *pools), load_config(name), **options)


def pairs(command: Command) -> dict[str, tuple[str, ...]]:
    """Flag -> its values. `--a=b` is `--a` with the value b."""
    found: dict[str, tuple[str, ...]] = {}
    flag = ""
    for word in command.argv:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            assert flag not in found, f"{flag} twice"
            found[flag] = (value,) if value else ()
        elif flag:
            found[flag] += (word,)
    return found


def says(command: Command, recipe: str, *, but: tuple[str, ...] = ()) -> None:
    """The command says all that a published one does, with the same values; JSON compares as JSON.

    but: what a recipe sets that is no part of a plan (its own name for the model, say).
    """
    words = shlex.split(recipe)
    wanted = pairs(Command("", 0, {}, ("x", *words)))
    got = pairs(command)
    for flag, values in wanted.items():
        if flag in but:
            continue
        assert flag in got, f"{flag} is missing from {command.argv}"
        if values and values[0].startswith("{"):
            assert json.loads(got[flag][0]) == json.loads(values[0]), flag
        else:
            assert got[flag] == values, flag


@cache
def recorded(kind: str, release: str) -> dict[str, Any]:
    """What an engine's own parser takes (tools/engine_flags.py)."""
    return json.loads((Path(__file__).parent / "flags" / f"{kind}-{release}.json").read_text())


def complaints(command: Command, record: Mapping[str, Any]) -> list[str]:
    """Why an engine's parser would not take a command, or would not read a part of it, by its record."""
    found = []
    for word, values in pairs(command).items():
        flag, _, key = word.partition(".")
        taken = record["flags"].get(flag)
        if taken is None:
            found.append(f"{flag} is unknown")
            continue
        if taken.get("deprecated"):
            found.append(f"{flag} is deprecated")
        if len(values) not in {0: (0,), 1: (1,)}.get(taken["values"], range(99)):
            found.append(f"{flag} takes {taken['values']} values, has {len(values)}")
        for value in values:
            if not (key or _is(taken["type"], value)) or value not in taken.get("choices", [value]):
                found.append(f"{flag} does not take {value}")
            if flag in record["keys"]:
                said = [key] if key else _keys(json.loads(value))
                found += [f"{flag}: {each} is read by nobody" for each in said if each not in record["keys"][flag]]
    own = [name for name in command.environment if name.startswith(("VLLM_", "SGLANG_"))]
    return found + [f"{name} is read by nobody" for name in own if name not in record["variables"]]


def _is(kind: str, value: str) -> bool:
    try:
        {"int": int, "float": float, "json": json.loads}.get(kind, str)(value)
    except ValueError:
        return False
    return True


def _keys(body: Any, before: str = "") -> Iterator[str]:
    for key, value in body.items() if isinstance(body, dict) else ():
        yield before + key
        yield from _keys(value, f"{before}{key}.")


def examples(kind: str, release: str) -> Iterator[tuple[str, Launch]]:
    """Plans of every kind that an engine launches: models, chips, formats, layouts, replicas, drafts, pools apart."""
    for name, pools, options in _PLANS[kind]:
        own = [pool(*words, **{"engine": kind, **more}) for words, more in pools]
        try:
            yield f"{name}: {'; '.join(each.name for each in own)}", made(name, *own, release=release, **options)
        except LaunchError as error:
            assert release in str(error), error  # refused for what this release lacks


def _one(
    name: str, profile: str, layout: Layout, scheme: str, kv: str = "bf16", *, tier: bool = False, **more: Any
) -> Any:
    return name, [((name, profile, layout, scheme, kv), more)], {"model": "m", "host_tier": tier}


def _two(name: str, profile: str, prefill: Layout, decode: Layout, scheme: str, kv: str = "bf16", **more: Any) -> Any:
    first = -(-prefill.devices // (16 if "ascend" in profile else 8))
    before = ((name, profile, prefill, scheme, kv), {"role": "prefill", **more})
    after = {"role": "decode", "first_device": prefill.devices, "first_node": first, **more}
    return name, [before, ((name, profile, decode, scheme, kv), after)], {"model": "m"}


_GRAPHS = {"graph_batch_sizes": [1, 2, 4, 8, 64], "chunked_prefill_tokens": 4096, "prefix_cache": False}
_CUDA = [
    _one("glm-5-fp8", "h200-sxm", Layout(8), "fp8", drafts=3),
    _one("glm-5-fp8", "b200-sxm", Layout(8), "fp8"),
    _one("glm-5.2-fp8", "b200-sxm", Layout(8), "fp8", "fp8", tier=True, drafts=5),
    _one("glm-5-fp8", "h200-sxm", Layout(1, 16, 16), "fp8", "fp8", settings=_GRAPHS),
    _one("glm-5-fp8", "h100-sxm", Layout(8, pp=2), "fp8"),
    _one("glm-5.1-fp8", "h200-sxm", Layout(4, 4, 16), "fp8", drafts=1, replicas=2),
    _one("glm-5.3-fp8", "b300-sxm", Layout(2, 4), "fp8"),
    _one("deepseek-v3.2", "h20-141gb", Layout(1, 16, 16), "fp8", settings=_GRAPHS),
    _one("deepseek-r1", "b200-sxm", Layout(8), "fp8"),
    _one("glm-4.6", "h200-sxm", Layout(8), "bf16", settings=_GRAPHS),
    _one("glm-4.7-flash", "h200-sxm", Layout(1), "bf16", replicas=8),
    _one("kimi-k2.5", "h200-sxm", Layout(8), "w4a16"),
    _two("glm-5-fp8", "h200-sxm", Layout(8), Layout(1, 16, 16), "fp8", "fp8", drafts=2),
    _two("deepseek-v3.2", "b200-sxm", Layout(8), Layout(4, 4, 16), "fp8"),
]
_PLANS = {
    "sglang": [
        *_CUDA,
        _one("glm-5-fp8", "h200-sxm", Layout(8, ep=4), "fp8"),
        _one("glm-5-fp8", "h200-sxm", Layout(8, 4, 4), "fp8"),
        _one("glm-5", "ascend-910c-die", Layout(16), "w4a8", drafts=3),
        _one("glm-5", "ascend-910c-die", Layout(8, 4, 32), "w8a8"),
        _two("glm-5", "ascend-910c-die", Layout(16, 2, 32), Layout(4, 8, 32), "w8a8"),
        _two("glm-5-fp8", "h100-sxm", Layout(8, pp=2), Layout(8, 2, 16), "fp8"),
    ],
    "vllm": [
        *_CUDA,
        _one("deepseek-r1", "h200-sxm", Layout(8, dcp=4), "fp8"),
        _one("glm-5-fp8", "h200-sxm", Layout(16, 2, 32), "fp8"),
    ],
    "vllm-ascend": [
        _one("glm-5", "ascend-910c-die", Layout(16, ep=16), "w4a8", drafts=3),
        _one("glm-5", "ascend-910c-die", Layout(16, 2, 32), "w8a8", tier=True, drafts=3, settings=_GRAPHS),
        _one("glm-5", "ascend-910c-die", Layout(16, pp=2), "w8a8"),
        _one("glm-5.2", "ascend-910c-die", Layout(8, 4, 32), "w8a8", "int8"),
        _one("glm-4.6", "ascend-910c-die", Layout(8, 2), "bf16"),
        _two("glm-5", "ascend-910c-die", Layout(8, 4, 32), Layout(4, 16, 64), "w8a8", drafts=3),
        _two("glm-5", "ascend-910c-die", Layout(16, pp=2), Layout(16, 2, 32), "w8a8", drafts=1),
        _two("deepseek-v3.2", "ascend-910c-die", Layout(16, 2, 32), Layout(8, 4, 32), "w8a8"),
    ],
}
