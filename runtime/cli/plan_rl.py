"""`glm5 plan rl`: how many devices generate rollouts, how many train, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foundation.errors import UsageError
from foundation.writing import require_writable
from model.formats import SCHEMES_HELP
from runtime.cli import completion
from runtime.cli.given import given
from runtime.cli.searches import progress, split_profile
from runtime.deployment.engines import ENGINES_HELP

if TYPE_CHECKING:
    from runtime.planning.rl.answer import RlPlan
    from runtime.planning.rl.load import RolloutLoad

_SHOWN = 8


def plan_rl(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(autocompletion=completion.models, help="A preset, a checkpoint directory or a config.json.")
    ] = "glm-5-fp8",
    profile: Annotated[
        str, typer.Option(autocompletion=completion.chips, help="A chip of `glm5 profiles list` or a TOML file.")
    ] = "h200-sxm",
    devices: Annotated[int, typer.Option(min=1, help="Devices to split; with --rollout-profile, to train on.")] = 256,
    rollout_profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:DEVICES", autocompletion=completion.chips, help="Rollouts have so many chips of their own."
        ),
    ] = None,
    train_devices: Annotated[int | None, typer.Option(min=1, help="Hold the training side to so many.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="Questions of a training step.")] = 64,
    group_size: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 16,
    isl: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 1024,
    osl: Annotated[int, typer.Option(min=1, help="Mean tokens drawn in a turn, lognormal.")] = 8192,
    length_cv: Annotated[float, typer.Option(help="Their coefficient of variation.")] = 1.0,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Tokens drawn in a turn at most [default: 4 x --osl].")
    ] = None,
    length_file: Annotated[
        Path | None,
        typer.Option(help="Questions and turns are of this CSV instead: input_tokens,output_tokens[,weight]."),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, max=1000, help="Turns of an answer.")] = 1,
    tool_tokens: Annotated[int, typer.Option(min=0, help="Tokens that a tool says between two turns.")] = 0,
    delay_s: Annotated[float, typer.Option(help="Mean seconds of an environment after each turn, Pareto.")] = 0.0,
    delay_tail: Annotated[float, typer.Option(help="Their tail, above 1: the lower, the heavier.")] = 1.5,
    mode: Annotated[
        Literal["sync", "ahead", "async"], typer.Option(help="Who waits for whom: see docs/rl.md.")
    ] = "async",
    staleness: Annotated[int, typer.Option(min=0, help="async: versions that a group may be behind.")] = 1,
    admission: Annotated[
        Literal["paced", "discard"],
        typer.Option(help="async: groups begin in time, or are thrown away when too stale."),
    ] = "paced",
    publish: Annotated[
        Literal["in-flight", "pause"], typer.Option(help="Replicas go on while weights are sent, or stand still.")
    ] = "in-flight",
    sync_schedule: Annotated[
        Literal["broadcast", "sharded"],
        typer.Option(help="How weights are sent: as frameworks do, or a bound; see docs/training_steps.md."),
    ] = "broadcast",
    formats: Annotated[
        str,
        typer.Option(autocompletion=completion.schemes, help=f"Of rollouts: auto (the checkpoint's), {SCHEMES_HELP}."),
    ] = "auto",
    kv: Annotated[
        str, typer.Option(autocompletion=completion.caches, help="KV cache of rollouts: auto, bf16, fp8 or int8.")
    ] = "auto",
    train_formats: Annotated[str, typer.Option(help="Of a training step's products: bf16, fp8 or mxfp8.")] = "bf16",
    scored: Annotated[
        int, typer.Option(min=0, max=4, help="Forward passes before a training step, for log-probabilities.")
    ] = 0,
    engine: Annotated[str, typer.Option(autocompletion=completion.engines, help=ENGINES_HELP)] = "sglang",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override chip.*, link.*, overhead.* or engine.*: field=value.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps that are played and reported.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths and delays.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the answer here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, as --out writes it.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
) -> None:
    """Split devices between rollouts and training, for reinforcement learning with a limit on staleness.

    Both sides are priced from the model's graph, and played beside one another on a virtual clock, paced as `glm5 rl`
    is; the split with the most answers trained on a second wins.
    """
    for path in (out, html):
        if path:
            require_writable(path)
    said = given(context)
    if mode != "async" and (name := next((said[key] for key in ("staleness", "admission") if key in said), None)):
        raise UsageError(f"{name} is for --mode async: in step, or one ahead, it is not a choice")
    if rollout_profile is not None and train_devices is not None:
        raise UsageError("--train-devices: with --rollout-profile all of --devices train; leave it out")
    from model.hf_config import load_config
    from runtime.planning.rl.answer import answer
    from runtime.planning.rl.question import RlQuestion
    from runtime.planning.rl.search import search
    from runtime.simulation.build import chip_with, split_settings

    of_chip, of_model, of_engine = split_settings(settings or [])
    if of_model:
        raise UsageError(f"--set {of_model[0][0]}: a plan is for a model as it is; give a config.json with the change")
    other, count = (None, 0)
    if rollout_profile is not None:
        name, of_other = split_profile(rollout_profile)
        if of_other is None:
            raise UsageError(f"--rollout-profile {rollout_profile}: say how many, as {rollout_profile}:64")
        other, count = chip_with(name, of_chip), of_other
    question = RlQuestion(
        load_config(model),
        chip_with(profile, of_chip),
        devices,
        _load(context.params, said),
        mode,
        staleness,
        admission,
        other,
        count,
        train_devices,
        engine,
        of_engine,
        None if formats == "auto" else formats,
        None if kv == "auto" else kv,
        train_formats,
        scored,
        publish == "in-flight",
        sync_schedule,
        steps,
        seed,
    )
    found = answer(search(question, progress()))
    if out:
        found.write(out)
    if html:
        from runtime.reports.plan_rl import write_page

        write_page(html, found)
    if as_json:
        print(found.text, end="")
    else:
        _show(found)


def _load(params: dict[str, Any], said: dict[str, str]) -> RolloutLoad:
    """The rollouts of the options. Raises `UsageError` or `WorkloadError`."""
    from runtime.planning.rl.load import RolloutLoad
    from runtime.serving import Fixed, Lognormal, read_histogram
    from runtime.serving.delays import Delay

    delay = Delay(params["delay_s"], params["delay_tail"])
    if fault := delay.problem():
        raise UsageError(fault.replace("`mean_s`", "--delay-s").replace("`tail`", "--delay-tail"))
    if params["tool_tokens"] and params["turns"] == 1:
        raise UsageError("--tool-tokens are between turns: add --turns of two or more")
    if params["length_file"] is not None:
        if name := next((said[key] for key in ("isl", "osl", "length_cv", "longest") if key in said), None):
            raise UsageError(f"{name} does not go with --length-file, which has the lengths: leave out one of the two")
        lengths = read_histogram(params["length_file"]), None
    else:
        most = params["longest"] or 4 * params["osl"]
        if most < params["osl"]:
            raise UsageError(f"--longest {most} is less than the mean, --osl {params['osl']}: raise it")
        lengths = Fixed(params["isl"]), Lognormal(params["osl"], params["length_cv"], most)
    return RolloutLoad(params["groups"], params["group_size"], *lengths, params["turns"], params["tool_tokens"], delay)


def _show(plan: RlPlan) -> None:
    from rich.table import Table

    from runtime.cli.simulated import show_assumed
    from runtime.cli.terminal import Terminal

    console = Terminal(highlight=False)
    train, there, got, asked = plan.trainer, plan.rollouts, plan.figures, plan.asked
    spare = f", {plan.spare_devices} spare" if plan.spare_devices else ""
    console.print(
        f"[bold]{plan.model}[/]: {train.devices} x {train.profile} train, {there.devices} x {there.profile} generate"
        f"{spare}; {asked['groups']} groups of {asked['group_size']} a step, {asked['mode']}, at most "
        f"{asked['staleness']} behind"
    )
    low, high = got.samples_per_s_band
    console.print(
        f"[bold]{got.samples_per_s:.3g} samples/s[/], {got.step_seconds:,.1f} s a step (nine times in ten: "
        f"{low:.3g} to {high:.3g} samples/s)"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("side", "layout", "busy", "weights", "idle", "memory"):
        table.add_column(heading, justify="left" if heading in ("side", "layout") else "right")
    table.add_row(
        "training",
        f"{_degrees(train.layout)}, {train.formats}, recompute {train.recompute}; {train.step_seconds:.3g} s a usual "
        "step",
        f"{got.trainer['training']:.1%}",
        f"{got.trainer['sending']:.1%}",
        f"{got.trainer['waiting']:.1%}",
        _memory(train.memory_bytes, train.usable_bytes),
    )
    table.add_row(
        "rollouts",
        f"{there.replicas} x ({_degrees(there.layout)}), {there.formats}, KV {there.kv}; "
        f"{there.token_seconds * 1e3:.3g} ms a token when full",
        f"{got.rollouts['busy']:.1%}",
        f"{got.rollouts['loading']:.1%}",
        f"{got.rollouts['idle']:.1%}",
        _memory(there.memory_bytes, there.usable_bytes),
    )
    console.print(table)
    behind = ", ".join(f"{versions}: {share:.1%}" for versions, share in got.behind.items())
    console.print(f"versions behind, of trained tokens: mean {got.mean_behind:.2f} ({behind})")
    console.print(
        f"weights: {plan.sync.bytes / 1e9:,.0f} GB a replica, sent in {plan.sync.seconds:.3g} s, loaded in "
        f"{plan.sync.load_seconds:.3g} s"
    )
    console.print(
        f"a group takes {got.group_seconds['median']:,.1f} s (median; longest {got.group_seconds['longest']:,.1f} s), "
        f"{got.groups_in_flight:.1f} are under way; {got.answers_drawn:,.0f} answers are drawn at once, and there "
        f"is room for {got.answers_held:,}"
    )
    if got.thrown_away_groups or got.preemptions:
        console.print(
            f"thrown away: {got.thrown_away_groups} groups, {got.thrown_away_share:.1%} of drawn tokens; answers that "
            f"began again: {got.preemptions}"
        )
    _others(console, plan)
    console.print(
        f"evidence: training {train.evidence}, rollouts {there.evidence}, weights {plan.sync.evidence} (the last "
        "without a band)"
    )
    for side, (fast, slow), seconds, basis in (
        ("training", train.step_band_seconds, train.step_seconds, train.band_basis),
        ("rollout", there.token_band_seconds, there.token_seconds, there.band_basis),
    ):
        console.print(f"band of a {side} step: {fast / seconds:.2f} to {slow / seconds:.2f} times; {basis}")
    show_assumed(console, plan.assumed)


def _others(console: Any, plan: RlPlan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("played", "training", "rollouts", "samples/s", "training idle", "rollouts idle", "behind"):
        table.add_column(heading, justify="left" if heading in ("training", "rollouts") else "right")
    for row in plan.played[:_SHOWN]:
        table.add_row(
            f"{row.train_devices}+{row.rollout_devices}",
            row.train_layout,
            f"{row.replicas} x {row.rollout_layout}",
            f"{row.samples_per_s:.3g}",
            f"{row.trainer_idle:.1%}",
            f"{row.rollouts_idle:.1%}",
            f"{row.mean_behind:.2f}",
        )
    console.print(table)
    if fewer := [count for count in map(int, plan.untrainable) if count < plan.trainer.devices]:
        console.print(f"fewer to train: {max(fewer)} devices: {plan.untrainable[str(max(fewer))]}")


def _degrees(layout: Any) -> str:
    return " ".join(f"{axis}{degree}" for axis, degree in layout.items() if degree > 1) or "one device"


def _memory(parts: Any, usable: float) -> str:
    return f"{sum(parts.values()) / 1e9:.0f} of {usable / 1e9:.0f} GB"
