"""Serving engines as data: one TOML per engine, every number with its source.

    from runtime.deployment.engines import engine_for, load
    engine = load("sglang", {"chunked_prefill_tokens": 32768})          as it starts up anywhere
    engine = engine_for("sglang", cfg, profile, layout)                 on a chip, for a model and layout

    KIND.toml        settings of a release, each with its source     loader.py: Engine
    defaults.py      the defaults that are formulas, by kind         engine_for, formats_for
    launch/KIND.toml flags of its command line                       flags.py: LaunchTable
    inferencex.py    what a public benchmark passes to it

To describe another engine, add a TOML file (and, where a default is a formula, a function in defaults.py). Must not
import the simulator or JAX.
"""

from runtime.deployment.engines.defaults import (
    check_dealt,
    deals_cache,
    default_kv,
    engine_for,
    formats_for,
    sized_cache,
    with_pool,
)
from runtime.deployment.engines.engine import Circumstances, Engine, FittedTo, Source
from runtime.deployment.engines.loader import ENGINES_HELP, described, load, names, nearest_release, split_release

__all__ = [
    "ENGINES_HELP",
    "Circumstances",
    "Engine",
    "FittedTo",
    "Source",
    "check_dealt",
    "deals_cache",
    "default_kv",
    "described",
    "engine_for",
    "formats_for",
    "load",
    "names",
    "nearest_release",
    "split_release",
    "sized_cache",
    "with_pool",
]
