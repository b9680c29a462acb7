"""`glm5 backends`: which adapters there are, and which can be used here."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also say, for each op, whether a kernel of the backend's own runs it.")
    ] = False,
) -> None:
    """List the backends with PASS, or the reason they cannot be used here."""
    from backends import registry

    rows = []
    for name in registry.names():
        backend = registry.get(name)
        reason = backend.unavailable()
        offered = backend.capabilities()
        rows.append(
            {
                "name": name,
                "summary": backend.summary,
                "usable": reason is None,
                "reason": reason,
                "platform": offered.platform,
                "devices": [{"kind": d.kind, "memory_bytes": d.memory_bytes} for d in offered.devices],
                "dtypes": sorted(offered.dtypes),
                "preferred_dtype": offered.preferred_dtype,
                "fp8_weights": offered.fp8_weights,
                **({"ops": dict(backend.op_notes())} if verbose else {}),
            }
        )
    if as_json:
        print(json.dumps({"backends": rows}, indent=2))
        return
    width = max(len(row["summary"]) for row in rows)
    for row in rows:
        devices = ", ".join(device["kind"] for device in row["devices"])
        status = f"PASS  {row['preferred_dtype']} on {devices}" if row["usable"] else f"no    {row['reason']}"
        print(f"{row['name']:6}  {row['summary']:{width}}  {status}")
        for op, note in row.get("ops", {}).items():
            print(f"        {op:22}  {note}")
