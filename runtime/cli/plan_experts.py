"""`glm5 plan experts`: which expert on which device, how even that is, and how far from the best possible."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from foundation.errors import UsageError
from foundation.writing import require_writable
from runtime.cli.given import given
from runtime.cli.terminal import Terminal
from runtime.deployment.errors import PreviousError
from runtime.planning.experts import (
    ExpertPlacement,
    moves,
    place_experts,
    read_load,
    read_placement,
    rebalance,
    sglang_init_expert_location,
    split_unevenly,
    write_json,
)


def plan_experts(
    context: typer.Context,
    load: Annotated[Path, typer.Option(help="Expert loads: .npy of layers × experts, any unit.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the experts.")],
    slots: Annotated[
        int | None, typer.Option(min=1, help="Expert slots a layer, all devices; by default one an expert.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes the devices are in.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Expert groups; more than one keeps each group on a node.")] = 1,
    previous: Annotated[Path | None, typer.Option(help="Placement in use: this command's --json output.")] = None,
    max_moves: Annotated[
        int | None, typer.Option(min=0, help="With --previous: experts to move at most, per layer.")
    ] = None,
    sglang: Annotated[Path | None, typer.Option(help="Write SGLang's --init-expert-location file here.")] = None,
    dense_layers: Annotated[int, typer.Option(help="With --sglang: first layers that have no experts.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the placement and its figures as JSON.")] = False,
) -> None:
    """Place the experts of every layer on devices, replicating the busy ones.

    max_over_mean is the most loaded device's load over the mean device's, per layer: 1 is even. bound is what
    no placement in these slots can beat, gap the distance to it. An expert's load is split evenly over its
    replicas, no two of which are on one device; uneven_split is what remains if the engine may split it as it
    likes.
    """
    if sglang is None and "dense_layers" in given(context):
        raise UsageError("--dense-layers is of SGLang's file: add --sglang")
    if sglang is not None:
        require_writable(sglang)
    report, placement = _answer(load, devices, slots, nodes, groups, previous, max_moves)
    if sglang is not None:
        write_json(sglang_init_expert_location(placement, dense_layers), sglang)
    if as_json:
        typer.echo(json.dumps({"placement": placement.as_lists(), **report}))
    else:
        _show(placement, report)


def _answer(
    load: Path,
    devices: int,
    slots: int | None,
    nodes: int,
    groups: int,
    previous: Path | None,
    max_moves: int | None,
) -> tuple[dict[str, Any], ExpertPlacement]:
    """The figures and the placement. Raises PlanError."""
    matrix = read_load(load)
    if (previous is None) != (max_moves is None):
        raise PreviousError("--previous and --max-moves go together")
    extra: dict[str, Any] = {}
    if previous is not None and max_moves is not None:
        old = read_placement(previous, matrix, nodes, groups)
        held = int(old.device_slots.sum())
        if (len(old.device_slots), held) != (devices, held if slots is None else slots):
            had = f"devices {len(old.device_slots)}, slots {held}"
            raise PreviousError(f"{previous}: {had} != devices {devices}, slots {slots} asked for")
        start = time.perf_counter()
        placement = rebalance(old, matrix, max_moves)
        extra["moves"] = _mean_worst(moves(old, placement))
        extra["previous_max_over_mean"] = _mean_worst(old.max_over_mean)
    else:
        start = time.perf_counter()
        placement = place_experts(matrix, devices, nodes, slots, groups=groups)
    seconds = time.perf_counter() - start
    report = {
        "max_over_mean": _mean_worst(placement.max_over_mean),
        "bound": _mean_worst(placement.bound),
        "gap": _mean_worst(placement.gap),
        "uneven_split": _mean_worst(split_unevenly(placement, matrix).max_over_mean),
        "node_max_over_mean": _mean_worst(placement.node_max_over_mean),
        **extra,
        "seconds": seconds,
    }
    return report, placement


def _mean_worst(per_layer: Any) -> dict[str, float]:
    return {"mean": float(per_layer.mean()), "worst": float(per_layer.max())}


def _show(placement: ExpertPlacement, report: dict[str, Any]) -> None:
    layers, slots = placement.slot_expert.shape
    console = Terminal()
    console.print(
        f"{layers} layers × {placement.replicas.shape[1]} experts in {slots} slots "
        f"on {len(placement.device_slots)} devices, {placement.nodes} nodes"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("over layers")
    table.add_column("mean", justify="right")
    table.add_column("worst", justify="right")
    names = {
        "previous_max_over_mean": "before: max / mean device load",
        "max_over_mean": "max / mean device load",
        "bound": "no placement can beat",
        "gap": "gap to that",
        "uneven_split": "with uneven token splitting",
        "node_max_over_mean": "max / mean node load",
        "moves": "experts moved",
    }
    for key, name in names.items():
        if key in report:
            form = {"gap": "{:.2%}", "moves": "{:.0f}"}.get(key, "{:.4f}")
            table.add_row(name, form.format(report[key]["mean"]), form.format(report[key]["worst"]))
    console.print(table)
    console.print(f"{report['seconds']:.3f} s")
