"""What is deployed, as nouns: data that several questions share. Free of JAX, and the lowest floor of `runtime`.

    plan.py      Plan: layout, experts, pages and bytes of every device, what it promises; kv.py its part on caches
    ledger.py    Ledger: where a device's memory goes
    engines/     Engine: a serving engine's settings and defaults, a TOML file each
    choice.py    the number formats that a chip can be asked for
    manifest.py  Manifest: what an exported package says of itself; tensors.py its weight files
    document.py  dataclasses as JSON and back, checked; schema.py the plan's JSON Schema

Imports `model` (what of it is free of JAX), `hw_profiles` and `foundation`; nothing else of `runtime`.
"""
