"""`glm5 run`: its options, and which of its modes they ask for; `runners/` has the modes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import completion, device_options
from runtime.cli.given import refuse_decided, refuse_unread
from runtime.cli.runners.asked import RunMode
from runtime.cli.runners.emulated import EmulatedRun
from runtime.cli.runners.local import LocalRun
from runtime.cli.runners.package import PackageRun
from runtime.cli.runners.processes import ProcessesRun
from runtime.execution.cluster.options import DECIDED_BY_PLAN


def run(
    context: typer.Context,
    backend: device_options.BackendName = "cpu",
    checkpoint: device_options.CheckpointFolder = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, or to answer with --chat.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids to continue: 1,2,3.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt a line: served together, printed as JSON lines.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")] = False,
    no_thinking: Annotated[bool, typer.Option("--no-thinking", help="With --chat: no thinking block.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many best tokens; 0 keeps all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    mtp: device_options.Mtp = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end-of-turn tokens.")] = False,
    dtype: device_options.Dtype = None,
    keep_fp8: device_options.KeepFp8 = False,
    pool_tokens: device_options.PoolTokens = None,
    compile_cache: device_options.CompileCache = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens a prefill step feeds [default: as the engine does].")
    ] = None,
    dump_logits: Annotated[
        Path | None, typer.Option(help="Store float32 logits [prompt + generated, vocab] in this .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    artifact: Annotated[
        Path | None, typer.Option(help="Run this exported package alone, with --backend ort, torch or xla.")
    ] = None,
    trust_package: device_options.TrustPackage = False,
    plan: Annotated[Path | None, typer.Option(help="With sim: the plan to execute (`glm5 plan --out`).")] = None,
    profile: device_options.SimProfile = None,
    devices: device_options.SimDevices = None,
    tp: device_options.SimTp = None,
    dp: device_options.SimDp = None,
    ep: device_options.SimEp = None,
    pp: device_options.SimPp = None,
    formats: device_options.SimFormats = None,
    kv: device_options.Kv = None,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.engines,
            help="Whose scheduler serves, with sim its overheads too, as of simulate [default: glm5; sim: sglang].",
        ),
    ] = None,
    scale_memory: device_options.ScaleMemory = 1.0,
    trace: Annotated[Path | None, typer.Option(help="With sim: write a Chrome/Perfetto trace, a row a device.")] = None,
    coordinator: device_options.Coordinator = None,
    process: device_options.Process = None,
) -> None:
    """Generate text with a model on a backend."""
    values = dict(locals())
    mode = _mode(backend, artifact, coordinator, process)
    refuse_unread(context, mode.reads(), lambda name: mode.why_not(name, backend))
    if plan is not None:
        refuse_decided(context, DECIDED_BY_PLAN)
    mode(**{name: values[name] for name in mode.reads()}).run()


def _mode(backend: str, artifact: Path | None, coordinator: str | None, process: str | None) -> type[RunMode]:
    if coordinator is not None or process is not None:
        return ProcessesRun
    if artifact is not None:
        return PackageRun
    from backends import registry

    return EmulatedRun if registry.get(backend).emulates else LocalRun
