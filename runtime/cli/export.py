"""`glm5 export`: the graph for other toolchains, as a package that can be checked and run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import UsageError
from runtime.cli import completion, export_check
from runtime.cli.given import given, refuse_before
from runtime.deployment.manifest import PACKAGE_FORMATS

if TYPE_CHECKING:
    from runtime.deployment.manifest import Manifest

app = typer.Typer(help="Export the graph to other toolchains, or check a package.", invoke_without_command=True)
app.command("check")(export_check.check)


@app.callback()
def export(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(autocompletion=completion.models, help="A preset or config: the graphs without weights."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Hugging Face checkpoint directory [default: an embedded tiny model].")
    ] = None,
    format: Annotated[str, typer.Option(help="stablehlo, onnx, torch or ascend.")] = "",
    phase: Annotated[str, typer.Option(help="prefill, decode or both.")] = "decode",
    batch: Annotated[
        str | None,
        typer.Option(help="Sequences a step; several make several gears [default: 1]."),
    ] = None,
    chunk: Annotated[str, typer.Option(help="Tokens a sequence of a prefill step; several as for --batch.")] = "128",
    context_tokens: Annotated[
        str | None,
        typer.Option(
            "--context", help="Context tokens of a step, several as for --batch [default: 4096, or what the model has]."
        ),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a cache page.")] = 64,
    plan: Annotated[Path | None, typer.Option(help="Cut by this plan (`glm5 plan --out`).")] = None,
    device: Annotated[int | None, typer.Option(min=0, help="Weights of this device only.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Without a plan: tensor parallelism.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Without a plan: attention data parallelism.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Without a plan: expert parallelism, 1 or tp x dp.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Without a plan: pipeline stages.")] = 1,
    formats: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.schemes,
            help="Number formats: f32, bf16, fp8, w8a8, w4a16 .. [default: f32 with a checkpoint, else the preset's].",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="none, or external: a file for each device [default: external if there are any]."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(autocompletion=completion.chips, help="For ascend: the chip, a profile's name or TOML file."),
    ] = None,
    npu_ops: Annotated[
        str,
        typer.Option(
            help="For ascend, torch_npu's operators: all that take a call; local, without those that talk to other "
            "devices; or none (ATen alone)."
        ),
    ] = "all",
    kv: Annotated[
        str, typer.Option(help="For ascend: int8 keeps latents and index keys in it [default: as wide as activations].")
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(
            help="What activations, caches and all that is not quantised are in: float32 or bfloat16 [default: what "
            "--formats says; in quantised ONNX float32]."
        ),
    ] = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Run it beside the graph first, or the emulation; too far off, no export.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The package's folder: new, or empty.")] = None,
) -> None:
    """Export the graph of each layer type, with a manifest that says how they fit together."""
    if context.invoked_subcommand is not None:
        return refuse_before(context)
    said = given(context)
    if not format or out is None:
        raise UsageError(f"export needs --format ({', '.join(PACKAGE_FORMATS)}) and --out DIR")
    if format not in PACKAGE_FORMATS:
        raise UsageError(f"--format {format}: unknown; known: {', '.join(PACKAGE_FORMATS)}")
    if phase not in ("prefill", "decode", "both"):
        raise UsageError(f"--phase {phase}: prefill, decode or both")
    if weights not in (None, "none", "external"):
        raise UsageError(f"--weights {weights}: none or external")
    if dtype not in ("", "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype}: float32 or bfloat16")
    if model and checkpoint:
        raise UsageError("give one of --model (graphs only) and --checkpoint (with weights)")
    if format != "ascend" and not said.keys().isdisjoint(("profile", "npu_ops", "kv")):
        raise UsageError("--profile, --npu-ops and --kv are for --format ascend")
    if plan and not said.keys().isdisjoint(("tp", "dp", "ep", "pp")):
        raise UsageError("--plan decides the layout: leave out --tp, --dp, --ep and --pp")
    if phase == "decode" and "chunk" in said:
        raise UsageError("--chunk is of a prefill step, and --phase is decode: add --phase prefill or both")
    started = time.perf_counter()

    from hw_profiles import load
    from model.hf_config import load_config
    from model.split import Layout
    from runtime.cli.opening import opened_checkpoint
    from runtime.porting.export import options as cutting
    from runtime.porting.export import package
    from runtime.porting.export.job import ExportJob

    opened = None if model else opened_checkpoint(checkpoint)
    cfg = opened.config if opened else load_config(str(model))
    scheme = formats or ("f32" if opened else cutting.preset_scheme(cfg))
    gears = {
        name: cutting.gears(cfg, name, batch or "1", chunk, context_tokens, page_size)
        for name in (("prefill", "decode") if phase == "both" else (phase,))
    }
    placed = cutting.from_plan(cfg, plan) if plan else cutting.from_layout(cfg, Layout(tp, dp, ep, pp))
    request = ExportJob(
        cfg=cfg,
        checkpoint=opened,
        format=format,  # type: ignore[arg-type]
        gears=gears,  # type: ignore[arg-type]
        grid=placed.grid,
        layout=placed.name,
        scheme=scheme,
        page_size=page_size,
        weights=(weights or ("external" if opened else "none")) == "external",
        device=device,
        plan_hash=placed.plan_hash,
        wide_dtype=dtype,
        options={"profile": load(profile) if profile else None, "npu_ops": npu_ops, "kv": kv},
    )
    cutting.check(request)
    reports: list[Any] = []
    if verify:
        from runtime.porting.export import verify as verifier

        verifier.refuse(request)
        assert opened is not None
        source = opened
        manifest = package.export(
            request, out, lambda folder, m: reports.extend(verifier.verify(folder, m, source, placed.grid))
        )
    else:
        manifest = package.export(request, out)
    _summary(manifest, out, time.perf_counter() - started)
    for report in reports:
        print(
            f"verified: {report.phase} at {report.gear}: {report.steps} steps on {report.runtime} to context "
            f"{report.context}, off by {report.text}"
        )


def _summary(manifest: Manifest, out: Path, seconds: float) -> None:
    graphs = [step for program in manifest.programs for chain in program.units.values() for step in chain]
    count = sum(step.kind == "graph" for step in graphs)
    size = sum(file.bytes for name, file in manifest.files.items() if not name.startswith("weights/"))
    weights = sum(file.bytes for name, file in manifest.files.items() if name.startswith("weights/"))
    kept = f"{weights / 1e6:.1f} MB of weights" if weights else "no weights"
    print(
        f"{out}: {manifest.format} of {manifest.model.name}, {manifest.layout}, {manifest.dtype}: {count} graphs of "
        f"{len(manifest.programs[0].units)} units at {len(manifest.programs)} gears, {size / 1e6:.2f} MB, {kept}; "
        f"{seconds:.1f} s",
        file=sys.stdout,
    )


__all__ = ["app", "export"]
