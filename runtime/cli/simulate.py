"""`glm5 simulate`: how fast a deployment will be under a load, and how sure the answer is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import UsageError
from foundation.limits import within
from foundation.writing import require_writable
from model.formats import SCHEMES_HELP
from runtime.cli import completion
from runtime.cli.given import given
from runtime.cli.kv_memory import KvDiskGb, KvDiskGbS, KvHostGb, offload_asked
from runtime.cli.loads import (
    HABITS,
    LENGTHS,
    Acceptance,
    Drafts,
    Isl,
    LengthCv,
    LengthFile,
    Osl,
    SharedPrefix,
    ThinkS,
    Turns,
    acceptance_asked,
    habits_asked,
    lengths_asked,
)
from runtime.cli.prefill_pool import (
    PrefillDevices,
    PrefillDp,
    PrefillEp,
    PrefillFormats,
    PrefillPp,
    PrefillProfile,
    PrefillTp,
    disaggregated,
    prefill_pool,
    refuse_without_pool,
)
from runtime.cli.simulated import explained, load_of, pool_words, pools_of, progress_bar, result_of, show
from runtime.deployment.engines import ENGINES_HELP

if TYPE_CHECKING:
    from model.config import ModelConfig
    from runtime.deployment.demand import Demand
    from runtime.serving import Report, Workload


def simulate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(autocompletion=completion.models, help="A preset, a checkpoint directory or a config.json.")
    ] = "glm-5-fp8",
    profile: Annotated[
        str,
        typer.Option(autocompletion=completion.chips, help="An accelerator of `glm5 profiles list`, or a TOML file."),
    ] = "h200-sxm",
    devices: Annotated[int, typer.Option(min=1, help="Devices in all.")] = 8,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism [default: what dp and pp leave].")] = None,
    dp: Annotated[int, typer.Option(min=1, help="Attention data parallelism.")] = 1,
    ep: Annotated[
        int,
        typer.Option(
            min=1,
            help="Expert groups: 1 (all cut by width), tp x dp (whole), or between.",
        ),
    ] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    dcp: Annotated[int, typer.Option(min=1, help="Ranks of a tp group that deal out a cache's tokens.")] = 1,
    pcp: Annotated[int, typer.Option(min=1, help="tp groups that compute a prompt's tokens together.")] = 1,
    engine: Annotated[str, typer.Option(autocompletion=completion.engines, help=ENGINES_HELP)] = "sglang",
    formats: Annotated[
        str | None,
        typer.Option(autocompletion=completion.schemes, help=f"{SCHEMES_HELP} [default: the checkpoint's own]."),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.caches, help="KV cache: bf16, fp8 or int8 [default: the engine's choice]."
        ),
    ] = None,
    isl: Isl = 8192,
    osl: Osl = 1024,
    length_ratio: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Lengths are uniform in [ratio x L, L], as benchmark clients draw them."),
    ] = 0.8,
    length_cv: LengthCv = None,
    length_file: LengthFile = None,
    shared_prefix: SharedPrefix = None,
    turns: Turns = None,
    think_s: ThinkS = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests in flight.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second.")] = None,
    burstiness: Annotated[float, typer.Option(help="Open loop: coefficient of variation of the gaps.")] = 1.0,
    trace_file: Annotated[Path | None, typer.Option(help="Requests of a Mooncake JSONL trace.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests to measure [default: 10 x concurrency].")] = None,
    mtp: Drafts = 0,
    accept: Annotated[float | None, typer.Option(help="Mean tokens a step with --mtp.")] = None,
    acceptance: Acceptance = None,
    prefill_devices: PrefillDevices = 0,
    prefill_tp: PrefillTp = None,
    prefill_dp: PrefillDp = None,
    prefill_ep: PrefillEp = None,
    prefill_pp: PrefillPp = None,
    prefill_profile: PrefillProfile = None,
    prefill_formats: PrefillFormats = None,
    kv_host_gb: KvHostGb = None,
    kv_disk_gb: KvDiskGb = None,
    kv_disk_gb_s: KvDiskGbS = None,
    expert_load: Annotated[
        str | None, typer.Option(help="uniform, balanced, power_law:A or a JSON file of counts.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override chip.*, link.*, overhead.*, model.index_topk or engine.*: field=value."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Simulate this plan of `glm5 plan --out`, under the load it is made for or another."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of lengths, arrivals and acceptance.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace here.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what TPOT and TTFT are made of, and where each price comes from.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate serving a load: latency, throughput, queueing, and how far to trust them.

    With --rate the load goes on until it is plain whether it is kept up with. The exit code is 1 where it is not, or
    where a plan misses its targets.
    """
    from model.hf_config import load_config
    from model.split import MOST_DEVICES, Layout
    from runtime.serving import StepLog, Trace
    from runtime.serving import simulate as run_load
    from runtime.simulation.build import (
        PriceTables,
        build,
        chip_with,
        model_override,
        require_positions,
        spec_for,
        split_settings,
    )

    for path in (trace, html):
        if path:
            require_writable(path)
    if requests is not None and requests < 1:
        raise UsageError(f"--requests must be at least 1, not {requests}")
    if plan is not None:
        from runtime.cli.simulate_plan import load_beside_plan, simulated_plan

        changed = load_beside_plan(context)
        recorder = StepLog() if explain else Trace() if trace else None
        with progress_bar(not as_json) as progress:
            named = model if "model" in given(context) else None
            result, report = simulated_plan(plan, changed, requests, seed, recorder, progress, named)
        return _give(result, report, recorder, trace, html, as_json)
    _refuse_unread(given(context), rate, trace_file)
    refuse_without_pool(context.params, given(context))
    chip, of_model, of_engine = split_settings(settings or [])
    cfg = load_config(model)
    for path, value in of_model:
        cfg = model_override(cfg, path, value)
    found = chip_with(profile, chip)
    within("--devices", devices, MOST_DEVICES)
    layout = Layout(tp or max(1, devices // (dp * pcp * pp)), dp, ep, pp, dcp, pcp)
    if devices % layout.devices:
        groups = f"dp {dp}" if pcp == 1 else f"pcp {pcp}"
        raise UsageError(
            f"{devices} devices / (tp {layout.tp} x {groups} x pp {pp} = {layout.devices}) = "
            f"{devices / layout.devices:.3f}: not a whole number of replicas"
        )
    if accept is not None and acceptance is not None:
        raise UsageError("--accept and --acceptance: give one of them")
    mtp, accepted = acceptance_asked(acceptance, mtp)
    asked: dict[str, Any] = {
        "settings": of_engine, "expert_load": expert_load,
        "drafts": mtp, "accept_length": accept, "offload": offload_asked(context.params), **accepted,
    }  # fmt: skip
    scheme = formats or cfg.stored_scheme
    spec = spec_for(cfg, found, layout, scheme, kv, engine, replicas=devices // layout.devices, **asked)
    prefill = prefill_pool(context.params, spec, chip, engine, asked) if prefill_devices else None
    demand = _demand(context, cfg, concurrency, rate, trace_file)
    pages = [each.engine.page_tokens for each in (prefill, spec) if each]
    load = _workload(demand, trace_file, requests, burstiness, pages, seed)
    if trace_file is None and demand.turns == 1:
        require_positions(cfg, *demand.longest)
    else:
        longest = max(load.requests, key=lambda each: each.prompt_tokens + each.output_tokens)
        require_positions(cfg, longest.prompt_tokens, longest.output_tokens)
    tables = PriceTables()
    built = build(spec, tables)
    deployment: Any = dataclasses.replace(built.deployment, replicas=devices // layout.devices, devices=devices)
    first = moved = None
    if prefill:
        deployment, first, moved = disaggregated(prefill, built, deployment, tables)
    recorder = StepLog() if explain else Trace() if trace else None
    with progress_bar(not as_json) as progress:
        report = run_load(load, deployment, seed=seed, trace=recorder, progress=progress)
    result = result_of(spec, built, report, devices + prefill_devices, devices // layout.devices)
    result |= load_of(demand, report, load.description if trace_file else "", built.spec.engine.prefix_cache)
    result |= explained(recorder, report, deployment)
    if first and moved:
        held = (("prefill", prefill_devices, first), ("decode", devices, built))
        result |= pools_of({f"{role}: {pool_words(each.spec)}": (n, each.ledger) for role, n, each in held}, moved)
    _give(result, report, recorder, trace, html, as_json)


def _give(
    result: dict[str, Any], report: Report, recorder: Any, trace: Path | None, html: Path | None, as_json: bool
) -> None:
    """Writes what was asked for, and prints the answer."""
    if trace and recorder:
        recorder.write(trace)
    if html:
        from runtime.reports.serving import write_page

        write_page(html, result, report)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result, report)
    if result["meets_targets"] is False:
        raise typer.Exit(1)


def _refuse_unread(said: Mapping[str, str], rate: float | None, trace_file: Path | None) -> None:
    """Raises `UsageError` for an option that the load asked for does not read."""
    if trace_file is not None:
        for name in (*LENGTHS, *HABITS, "burstiness"):
            if name in said:
                raise UsageError(f"{said[name]} does not go with --trace-file, whose requests decide it: leave it out")
    elif rate is None and "burstiness" in said:
        raise UsageError("--burstiness is of an open loop: add --rate")


def _demand(
    context: typer.Context, cfg: ModelConfig, concurrency: int | None, rate: float | None, trace_file: Path | None
) -> Demand:
    from runtime.deployment.demand import Demand

    if sum(option is not None for option in (concurrency, rate, trace_file)) > 1:
        raise UsageError("give one of --concurrency, --rate and --trace-file")
    asked = lengths_asked(cfg, context.params, given(context)) | habits_asked(context.params)
    inflight = 16 if concurrency is None and rate is None and trace_file is None else concurrency
    return Demand(concurrency=inflight, rate=rate, **asked)


def _workload(
    demand: Demand, trace_file: Path | None, requests: int | None, burstiness: float, page_tokens: list[int], seed: int
) -> Workload:
    from runtime.planning.predict import workload
    from runtime.serving import mooncake_trace

    if trace_file is not None:
        return mooncake_trace(trace_file, limit=requests)
    if demand.concurrency is not None and demand.turns == 1:
        requests = requests or 10 * max(demand.concurrency, 1)
    return workload(demand, 1, seed, requests, page_tokens=page_tokens, burstiness=burstiness)[0]
