"""Serving engines as data: one TOML per engine, every number with its source.

    from runtime.deployment.engines import load
    engine = load("sglang", overrides={"chunked_prefill_tokens": 32768}, device_memory_bytes=150e9)

Must not import the simulator (but for its errors), JAX or a chip.
"""

from runtime.deployment.engines.loader import Engine, Source, load, names

__all__ = ["Engine", "Source", "load", "names"]
