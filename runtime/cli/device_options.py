"""Options that `glm5 run` and `glm5 serve` share: those of a local device, and those of emulated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.formats import SCHEMES_HELP
from runtime.cli import completion

BackendName = Annotated[
    str, typer.Option(autocompletion=completion.backends, help="Where to run; `glm5 backends` lists them.")
]
CheckpointFolder = Annotated[
    Path | None, typer.Option(help="A Hugging Face checkpoint directory [default: an embedded tiny model].")
]
Mtp = Annotated[int, typer.Option(min=0, max=16, help="Draft this many tokens a step with the MTP layer.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16 [default: the backend's preference].")]
KeepFp8 = Annotated[bool, typer.Option("--keep-fp8", help="Keep FP8 weights in FP8.")]
PoolTokens = Annotated[int | None, typer.Option(min=1, help="Size of the KV page pool in tokens.")]
CompileCache = Annotated[
    str | None,
    typer.Option(
        help="A folder of your own where compiled programs are kept for the next start, or `off` "
        "[default: glm5/compiled in the user's cache]."
    ),
]
SimProfile = Annotated[
    str | None,
    typer.Option(autocompletion=completion.chips, help="With sim: the accelerator, of `glm5 profiles list`."),
]
SimDevices = Annotated[int | None, typer.Option(min=1, help="With sim: devices in all [default: 1].")]
SimTp = Annotated[int | None, typer.Option(min=1, help="With sim: tensor parallelism.")]
SimDp = Annotated[int | None, typer.Option(min=1, help="With sim: attention data parallelism.")]
SimEp = Annotated[int | None, typer.Option(min=1, help="With sim: expert parallelism, 1 or tp x dp.")]
SimPp = Annotated[int | None, typer.Option(min=1, help="With sim: pipeline stages.")]
SimFormats = Annotated[
    str | None,
    typer.Option(autocompletion=completion.schemes, help=f"With sim: {SCHEMES_HELP} [default: the chip's own]."),
]
Kv = Annotated[
    str | None,
    typer.Option(autocompletion=completion.caches, help="KV cache in bf16 or fp8; with sim in int8, too."),
]
ScaleMemory = Annotated[float, typer.Option(help="With sim: share of the chip's memory that is there.")]
TrustPackage = Annotated[
    bool, typer.Option("--trust-package", help="With --artifact: open graphs that may run code, too.")
]
Coordinator = Annotated[
    str | None, typer.Option(help="Run --plan over several processes: HOST:PORT where process 0 meets the others.")
]
Process = Annotated[str | None, typer.Option(help="With --coordinator: I/N, this is process I of N, from 0 on.")]
