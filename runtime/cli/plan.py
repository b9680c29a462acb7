"""`glm5 plan`: which layout, which expert on which device, how much KV cache, and what that promises."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foundation.errors import UsageError
from foundation.writing import require_writable
from model.formats import SCHEMES_HELP
from runtime.cli import completion
from runtime.cli.given import given, refuse_before
from runtime.cli.kv_memory import KvDiskGb, KvDiskGbS, KvHostGb, offload_asked
from runtime.cli.loads import (
    Acceptance,
    Bounded,
    Drafts,
    Isl,
    LengthCv,
    LengthFile,
    LengthRatio,
    Osl,
    Rate,
    SharedPrefix,
    ThinkS,
    TpotMs,
    TtftMs,
    Turns,
    acceptance_asked,
    habits_asked,
    lengths_asked,
)
from runtime.cli.plan_check import plan_check
from runtime.cli.plan_experts import plan_experts
from runtime.cli.plan_launch import plan_launch
from runtime.cli.plan_rl import plan_rl
from runtime.cli.prefill_pool import HeldPrefillDp, HeldPrefillEp, HeldPrefillPp, HeldPrefillTp, prefill_held
from runtime.cli.searches import progress, split_profile
from runtime.deployment.engines import ENGINES_HELP

if TYPE_CHECKING:
    from hw_profiles.loader import Override
    from runtime.deployment.demand import Percentile
    from runtime.deployment.plan import Plan
    from runtime.planning.options import Question
    from runtime.planning.search import Chips

app = typer.Typer(help="Plan a deployment: layout, experts and KV cache, assigned to devices.")
app.command("experts")(plan_experts)
app.command("check")(plan_check)
app.command("launch")(plan_launch)
app.command("rl")(plan_rl)

PERCENTILES: Mapping[str, Percentile | None] = {"mean": None, "50": 50, "90": 90, "99": 99}


@app.callback(invoke_without_command=True)
def plan(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(autocompletion=completion.models, help="A preset, a checkpoint directory or a config.json.")
    ] = "glm-5-fp8",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=completion.chips,
            help="A chip of `glm5 profiles list` or a TOML file; a second one, as NAME:DEVICES, "
            "splits prefill and decode between the two [default: h200-sxm].",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices [default: 8; with min-devices, 384 at most].")
    ] = None,
    isl: Isl = 8192,
    osl: Osl = 1024,
    length_ratio: LengthRatio = 0.8,
    length_cv: LengthCv = None,
    length_file: LengthFile = None,
    shared_prefix: SharedPrefix = None,
    turns: Turns = None,
    think_s: ThinkS = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight [default: the most the targets allow].")
    ] = None,
    rate: Rate = None,
    ttft_ms: TtftMs = None,
    tpot_ms: TpotMs = None,
    percentile: Bounded = "mean",
    objective: Annotated[
        Literal["throughput", "latency", "min-devices"], typer.Option(help="What to make best within the targets.")
    ] = "throughput",
    formats: Annotated[
        str,
        typer.Option(
            autocompletion=completion.schemes, help=f"auto (none narrower than the checkpoint's), {SCHEMES_HELP}."
        ),
    ] = "auto",
    kv: Annotated[
        str, typer.Option(autocompletion=completion.caches, help="KV cache: auto, bf16, fp8 or int8.")
    ] = "auto",
    mtp: Drafts = 0,
    acceptance: Acceptance = None,
    kv_host_gb: KvHostGb = None,
    kv_disk_gb: KvDiskGb = None,
    kv_disk_gb_s: KvDiskGbS = None,
    expert_load: Annotated[
        Path | None, typer.Option(help="Tokens of each expert: .npy of MoE layers x experts. Decides redundant slots.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Hold tensor parallelism to this.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Hold attention data parallelism to this.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Hold the expert groups to this.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Hold pipeline stages to this.")] = None,
    dcp: Annotated[int | None, typer.Option(min=1, help="Hold decode context parallelism to this.")] = None,
    pcp: Annotated[int | None, typer.Option(min=1, help="Hold prefill context parallelism to this.")] = None,
    prefill_tp: HeldPrefillTp = None,
    prefill_dp: HeldPrefillDp = None,
    prefill_ep: HeldPrefillEp = None,
    prefill_pp: HeldPrefillPp = None,
    max_pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages at most.")] = None,
    engine: Annotated[str, typer.Option(autocompletion=completion.engines, help=ENGINES_HELP)] = "sglang",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override chip.*, link.*, overhead.* or engine.*: field=value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, as --out writes it.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
) -> None:
    """Plan a deployment: layout, experts and KV cache, assigned to devices.

    The search covers what the memory allows of tp x dp x ep x pp, number formats, prefill chunk and running limit,
    serving together or with prefill and decode apart; the best by a steady-state estimate are simulated. Where none
    meets the targets the nearest is given, and the exit code is 1.
    """
    if context.invoked_subcommand is not None:
        return refuse_before(context)
    for path in (out, html):
        if path:
            require_writable(path)
    if rate is not None and concurrency is not None:
        raise UsageError("give one of --concurrency and --rate")
    for name, value in (("--rate", rate), ("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"{name} {value:g}: give a number above zero")
    from model.hf_config import load_config
    from runtime.deployment.demand import Demand
    from runtime.planning.options import Question
    from runtime.simulation.build import split_settings

    of_chip, of_model, of_engine = split_settings(settings or [])
    if of_model:
        raise UsageError(f"--set {of_model[0][0]}: a plan is for a model as it is; give a config.json with the change")
    cfg = load_config(model)
    mtp, accepted = acceptance_asked(acceptance, mtp)
    if mtp and not cfg.mtp_layers:
        raise UsageError(f"{cfg.name} has no MTP layer to draft with: leave out --mtp")
    asked = lengths_asked(cfg, context.params, given(context)) | habits_asked(context.params)
    if asked.get("turns", 1) > 1 and concurrency is None and rate is None:
        raise UsageError(
            "--turns is of conversations that clients hold or that come at a rate: give --concurrency or --rate"
        )
    question = Question(
        cfg,
        Demand(
            concurrency=concurrency,
            rate=rate,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            objective=objective,
            percentile=PERCENTILES[percentile],
            **asked,
        ),
        engine,
        None if formats == "auto" else formats,
        None if kv == "auto" else kv,
        mtp,
        of_engine,
        {
            axis: degree
            for axis, degree in (("tp", tp), ("dp", dp), ("ep", ep), ("pp", pp), ("dcp", dcp), ("pcp", pcp))
            if degree is not None
        },
        max_pp,
        prefill_held=prefill_held(context.params),
        offload=offload_asked(context.params),
        **accepted,
    )
    chips = _chips(profile or ["h200-sxm"], devices, 384 if objective == "min-devices" else 8, of_chip)
    found = _answer(question, chips, expert_load)
    if out:
        found.write(out)
        for name in found.files_elsewhere(out):
            print(f"note: {out} names {name}: it is read where a copy of that file stands beside it", file=sys.stderr)
    if html:
        from runtime.reports.plan import write_page

        write_page(html, found, cfg)
    if as_json:
        print(found.text, end="")
    else:
        from runtime.cli.plan_show import show

        show(found)
    if found.predicted and not found.predicted.meets_targets:
        raise typer.Exit(1)


def _chips(names: list[str], devices: int | None, default: int, settings: Mapping[str, Override]) -> list[Chips]:
    """The chips of --profile, with their numbers. Raises `UsageError` or `ProfileError`."""
    from runtime.planning.search import Chips
    from runtime.simulation.build import chip_with

    if len(names) > 2:
        raise UsageError(f"{len(names)} profiles: give one, or two to prefill on one and decode on the other")
    named = [split_profile(text) for text in names]
    if devices is not None and all(count is not None for _, count in named):
        raise UsageError(f"--devices {devices}: --profile {names[0]} has a number already; leave out one of the two")
    return [Chips(chip_with(name, settings), count or devices or default) for name, count in named]


def _answer(question: Question, chips: list[Chips], expert_load: Path | None) -> Plan:
    from runtime.planning.experts import read_load
    from runtime.planning.search import search
    from runtime.planning.smallest import smallest

    load = read_load(expert_load) if expert_load else None
    load_name = expert_load.name if expert_load else ""
    if question.demand.objective != "min-devices":
        return search(question, chips, load, load_name, progress())
    if len(chips) > 1:
        raise UsageError("min-devices counts one kind of chip: give one --profile")
    return smallest(question, chips[0].profile, chips[0].count, load, load_name, progress())
