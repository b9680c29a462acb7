"""Options of memory below the devices' that keeps prompts cached, which `simulate` and `plan` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import UsageError

if TYPE_CHECKING:
    from runtime.deployment.kv import Offload

KvHostGb = Annotated[
    float | None,
    typer.Option(help="Keep prompts in so many GB of host memory a device, too [default: 0]."),
]
KvDiskGb = Annotated[float | None, typer.Option(help="Keep prompts in so many GB of disk a device, too [default: 0].")]
KvDiskGbS = Annotated[float | None, typer.Option(help="GB/s from disk to a device [default: 1].")]

OFFLOAD = ("kv_host_gb", "kv_disk_gb", "kv_disk_gb_s")
"""Their names."""
_MOST_GB = 1e9


def offload_asked(params: Mapping[str, Any]) -> Offload:
    """What is asked for. Raises `UsageError`."""
    from runtime.deployment.kv import Offload

    host, disk, rate = (params[name] for name in OFFLOAD)
    for name, value in (("--kv-host-gb", host), ("--kv-disk-gb", disk)):
        if value is not None and not 0 <= value <= _MOST_GB:
            raise UsageError(f"{name} {value:g}: give GB a device, from 0 to {_MOST_GB:g}")
    if rate is not None:
        if not 0 < rate <= _MOST_GB:
            raise UsageError(f"--kv-disk-gb-s {rate:g}: give GB/s above zero")
        if not disk:
            raise UsageError("--kv-disk-gb-s is of a cache on disk: add --kv-disk-gb")
    return Offload((host or 0.0) * 1e9, (disk or 0.0) * 1e9, None if rate is None else rate * 1e9)
